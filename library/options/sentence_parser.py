"""An argument parser that tells mistakes in sentences, as everything else here does."""

import argparse
from typing import Any, NoReturn

from library.options.option_types import shown
from library.support.errors import UserError, did_you_mean

_LONGEST_MESSAGE = 400


class SentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage, a screenful for some commands, and exiting."""
        message = message.removeprefix("argument ")
        if ": ignored explicit argument" in message:  # argparse's words for a value at a flag
            message = f"{message.split(':')[0]} is a flag: give it alone, or with =true or =false"
        message = message.replace(": expected one argument", " needs a value")
        message = message.replace("the following arguments are required:", "see --help; there must also be")
        if len(message) > _LONGEST_MESSAGE:  # argparse repeats whole values
            message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
        raise UserError(message if message.endswith((".", "?")) else f"{message}.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an argument's choices, in the words of ``--config_file``."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            guess = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise argparse.ArgumentError(action, f"{shown(value)} is not one of: {', '.join(choices)}.{guess}")
