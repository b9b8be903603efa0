"""From the command line and ``--config_file`` to checked, frozen ``Options``."""

import argparse
import logging
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from library.options.checks import check, settle
from library.options.config_file import FILE_OPTIONS, config_path, is_of_lora, read_config_file, write_config_file
from library.options.declaration import Option, option_of
from library.options.option_types import text
from library.options.options import Options, declared_options, option_groups
from library.options.sentence_parser import SentenceParser
from library.support.completion import PrintCompletion
from library.support.errors import UserError, did_you_mean
from library.support.shipped_files import shipped
from library.support.version import DISTRIBUTION, version

logger = logging.getLogger(__name__)

USAGE = """\
%(prog)s --pretrained_model_name_or_path MODEL --token_string WORD [--init_word WORD]
         --dataset_config FILE --output_dir DIR [options]
"""
EPILOG = """\
An option that a --config_file switches on is switched off again with =false: --cache_latents=false.
A text that it gives is taken back with an empty one: --vae="".
"""


class OptionParser(SentenceParser):
    """An argument parser which knows the model family it serves, and the slips that are made with options."""

    def __init__(self, family: str, **details: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **details)
        self.family = family

    def parse_args(  # type: ignore[override]  # its other forms serve namespaces of other classes
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse, and answer an unknown option with the closest known one; dashes in names count as underscores."""
        args = [self._with_underscores(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return parsed

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Take "--" for a value where it is one, as in ``--caption_separator=--``; argparse makes nothing of it."""
        if arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return [value] if action.nargs == "*" else value

    def _with_underscores(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        meant = f"--{name.removeprefix('--').replace('-', '_')}"
        return f"{meant}{equals}{value}" if name.startswith("--") and meant in self._option_string_actions else argument

    def _refuse(self, unknown: list[str]) -> NoReturn:
        for argument in unknown:
            if argument.startswith("-"):
                flag = argument.split("=")[0]
                if is_of_lora(flag.lstrip("-").replace("-", "_")):
                    self.error(
                        f"{flag} is an option of LoRA training, and this trains an embedding. Leave it out; the size "
                        "of an embedding is --num_vectors_per_token."
                    )
                known = [name for name in self._option_string_actions if "=" not in name]
                self.error(f"{flag} is not an option.{did_you_mean(flag, known) or ' See --help.'}")
        advice = "A value with spaces needs quotes."
        if unknown[0].lower() in ("true", "false"):
            advice = "A flag is given alone, or with =true or =false: --cache_latents, --cache_latents=false."
        self.error(f'"{unknown[0]}" belongs to no option. {advice}')


def build_parser(description: str, family: str) -> OptionParser:
    """Make the command line's parser; ``family`` is "sd" or "sdxl", and both take the same options."""
    parser = OptionParser(family, usage=USAGE, description=description, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {version()}")
    parser.add_argument("--print_completion", action=PrintCompletion)
    group = parser.add_argument_group("Configuration file")
    for name, declared in FILE_OPTIONS.items():
        _add(group, name, declared)
    for kind in option_groups().values():
        group = parser.add_argument_group(kind.__doc__)
        for option in fields(kind):
            _add(group, option.name, option_of(option))
    return parser


def _add(group: argparse._ArgumentGroup, name: str, option: Option) -> None:
    help_text = described(option).replace("%", "%%")
    if option.is_flag:
        group.add_argument(f"--{name}", action="store_true", default=option.default, help=help_text)
        # argparse looks a whole argument up before it splits it at "=", so these are options of their own.
        for action, words in (("store_false", ("false", "False", "0")), ("store_true", ("true", "True", "1"))):
            spelt = [f"--{name}={word}" for word in words]
            group.add_argument(*spelt, dest=name, action=action, default=SUPPRESS, help=SUPPRESS)
        return
    group.add_argument(
        f"--{name}",
        type=text if option.many else option.read,
        default=option.default,
        choices=option.choices,
        nargs="*" if option.many else None,
        metavar=option.placeholder,
        help=help_text,
    )


def described(option: Option) -> str:
    """The option's help with its range and its default, where they say something."""
    notes = [option.limits] if option.limits else []
    if option.default not in (None, False, ""):
        notes.append(f"default: {option.default}")
    return f"{option.whole_help} ({'; '.join(notes)})" if notes else option.whole_help


def parse(parser: OptionParser, arguments: Sequence[str] | None = None) -> Options:
    """Turn the command line (default: the process's own) and its ``--config_file`` into checked options.

    Raises UserError for a mistake, SystemExit after ``--help`` and after ``--output_config`` has written its file.
    """
    given = parser.parse_args(arguments)
    if given.output_config:
        _write_config(given)
        raise SystemExit(0)
    _warn_of_secrets(given)
    options = Options.from_values(settle(read_values(parser, arguments)))
    check(options, parser.family)
    return options


def _warn_of_secrets(given: argparse.Namespace) -> None:
    """Warn of keys on the command line, which every user of the machine and every history and crash report sees."""
    for name, declared in declared_options():
        if declared.secret and getattr(given, name):
            logger.warning(
                "--%s stands on the command line, where other users, shell histories and logs can see it. Set the "
                "environment variable %s instead.",
                *(name, declared.secret),
            )


def read_values(parser: OptionParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return every option's value by name: the command line's, else the file's, else the default."""
    given = parser.parse_args(arguments)
    known = dict(declared_options())
    if given.config_file:
        path = shipped(str(config_path(given.config_file)))
        from_file = read_config_file(Path(path), known)
        # argparse fills in defaults only where the namespace has no value yet.
        given = parser.parse_args(arguments, argparse.Namespace(**from_file))
    return {name: _value(getattr(given, name), declared) for name, declared in known.items()}


def _value(found: Any, option: Option) -> Any:
    if option.many and found is not None:
        found = tuple(item for item in found if item) or None
    return option.default if found is None else found


def _write_config(given: argparse.Namespace) -> None:
    if not given.config_file:
        raise UserError("--output_config needs --config_file, which names the file to write.")
    path = config_path(given.config_file)
    values = {
        name: _value(getattr(given, name), declared) for name, declared in declared_options() if not declared.secret
    }
    write_config_file(path, _non_default(values))
    print(f"The options of this command line were written to {path}.")


def _non_default(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: values[name] for name, option in declared_options() if name in values and values[name] != option.default
    }
