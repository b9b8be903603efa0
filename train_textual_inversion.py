"""Teach Stable Diffusion 1.x or 2.x a new word from a few captioned images. See README.md, or run with --help."""

import sys
from collections.abc import Sequence

from library.command_line import run
from library.options.parser import OptionParser, build_parser

FAMILY = "sd"


def setup_parser() -> OptionParser:
    """The command line's parser, without importing torch."""
    return build_parser(__doc__, FAMILY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments (default: the process's own) and return the exit code."""
    return run(setup_parser(), FAMILY, arguments)


if __name__ == "__main__":
    sys.exit(main())
