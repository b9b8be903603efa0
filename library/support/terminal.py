"""Text for whoever reads it: broken between words on a terminal, left as it is in a pipe or a file."""

import os
import shutil
import sys
import textwrap
from typing import TextIO

_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31"}
_CODE = "    "  # lines that begin so are to be copied, and may end where the screen does


def fitted(text: str, stream: TextIO) -> str:
    """The text as ``stream`` should get it: on a terminal its lines end between words, before the screen does.

    Words that are longer than a line (paths) and lines of code stay whole.
    """
    width = columns(stream)
    return text if width is None else "\n".join(_broken(line, width) for line in text.split("\n"))


def columns(stream: TextIO) -> int | None:
    """How wide the terminal is that ``stream`` writes on; None where it is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def _broken(line: str, width: int) -> str:
    if len(line) <= width or line.startswith(_CODE):
        return line
    margin = line[: len(line) - len(line.lstrip())] + "  "
    return textwrap.fill(
        line, width, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def coloured(text: str, level: str, stream: TextIO) -> str:
    """The text with the name of its log ``level`` in colour, where that is a warning and colours are shown."""
    shown = stream.isatty() and sys.platform != "win32" and "NO_COLOR" not in os.environ
    if not shown or os.environ.get("TERM") == "dumb" or level not in _COLOURS:
        return text
    return text.replace(level, f"\x1b[{_COLOURS[level]}m{level}\x1b[0m", 1)
