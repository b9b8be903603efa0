"""A command for embedding files: say what is in them, write them in another layout, average them, take a part."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from library.options.console import keep_talking, quieten
from library.options.option_types import number, whole_number
from library.options.sentence_parser import SentenceParser
from library.support.completion import PrintCompletion
from library.support.errors import UserError
from library.support.terminal import fitted

COMMAND = "textual_inversion_embedding"  # as it is installed
_LAYOUTS = ("safetensors", "a1111", "comfyui", "diffusers", "onetrainer")


def main(arguments: Sequence[str] | None = None, called: str = COMMAND) -> int:
    """Run the command; returns 0, or 1 for a user's mistake, which is told in a sentence.

    ``called`` is what the user wrote to start it. PyTorch is imported once the arguments are known to be good.
    """
    keep_talking()
    quieten()
    try:
        asked = _parser(called).parse_args(arguments)
        asked.run(asked)
    except UserError as error:
        print(fitted(f"error: {error}", sys.stderr), file=sys.stderr)
        return 1
    return 0


def _parser(called: str) -> argparse.ArgumentParser:
    parser = SentenceParser(prog=called, description=__doc__, allow_abbrev=False)
    parser.add_argument("--print_completion", action=PrintCompletion, command=COMMAND)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what is in the files")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument(
        "--model",
        metavar="MODEL",
        help="a base model as the training takes it: the vectors are compared with its vocabulary",
    )
    inspect.add_argument("--json", action="store_true", help="print a JSON list instead")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="write a file in another program's layout")
    convert.add_argument("file", type=Path, metavar="FILE")
    convert.add_argument("--to", required=True, choices=_LAYOUTS, help="safetensors is read by every program")
    convert.set_defaults(run=_convert)
    merge = commands.add_parser("merge", help="average files, for example the last checkpoints of one run")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--weights", nargs="+", type=number, metavar="W", help="one number a file; default: all alike")
    merge.set_defaults(run=_merge)
    part = commands.add_parser("slice", help="take the first vectors of a file")
    part.add_argument("file", type=Path, metavar="FILE")
    part.add_argument("--vectors", required=True, type=whole_number, metavar="K", help="how many")
    part.set_defaults(run=_slice)
    for command in (convert, merge, part):
        command.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file to write")
    return parser


def _inspect(asked: argparse.Namespace) -> None:
    from library.embedding.inspection import inspect

    inspect(asked.files, asked.model, as_json=asked.json)


def _convert(asked: argparse.Namespace) -> None:
    from library.embedding.copies import convert

    convert(asked.file, asked.to, asked.output)


def _merge(asked: argparse.Namespace) -> None:
    from library.embedding.copies import merge

    merge(asked.files, asked.weights, asked.output)


def _slice(asked: argparse.Namespace) -> None:
    from library.embedding.copies import first_vectors

    first_vectors(asked.file, asked.vectors, asked.output)
