"""Tab completion of a command's options: a script for the user's shell, made by shtab where that is installed."""

import argparse
from pathlib import Path
from typing import Any

from library.support.errors import UserError

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# What the values are, by how they are called in the help; the other strings are the user's own.
_FILES, _FOLDERS = ("FILE", "MODEL", "VAE"), ("DIR",)


class PrintCompletion(argparse.Action):
    """An option that prints the script for a shell and ends the command, as ``--version`` does.

    The script is for ``command``, the installed command; default: the name that the parser goes by.
    """

    def __init__(self, option_strings: list[str], dest: str, command: str | None = None, **details: Any) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            choices=SHELLS,
            help="print a script that lets Tab complete the options of the installed command, and stop",
            **details,
        )
        self.command = command

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, shell: Any, *_: Any) -> None:
        """Print the script. Raises UserError without shtab, SystemExit otherwise."""
        print(completion_script(parser, self.command or Path(parser.prog).stem, shell))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, command: str, shell: str) -> str:
    """The script that makes ``shell`` complete the options of ``command``. Raises UserError without shtab."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("--print_completion needs the package shtab: pip install shtab.") from error
    parser.prog = command
    _complete_paths(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Mark the options whose values are paths, also those of subcommands, as shtab wants it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, file, folder)
        elif action.metavar in _FILES + _FOLDERS:
            action.complete = file if action.metavar in _FILES else folder  # type: ignore[attr-defined]
