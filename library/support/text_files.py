"""How text, TOML and JSON files of the user are read: whatever is wrong with one becomes a sentence.

``what`` names the file at the start of a sentence, for example ``The file c.toml of --config_file``.
"""

import json
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.support.errors import UserError, looked_for

# Far more than anyone writes by hand, far less than a checkpoint that was named by mistake.
LARGEST_FILE = 16 * 2**20
LARGEST_METADATA = 256 * 2**20  # a million images
# Of a caption or a prompt: 75 to 225 tokens of it count, and looking at a million signs takes half a minute.
LONGEST_LINE = 2**16
_DEEPEST = 64
# What is longer than a float can say is a slip, and Python itself refuses to print it.
_LONGEST_NUMBER = 308
# What stands in quotes or is a comment; TOML may also end within it, which is for tomllib to say.
_QUOTED = re.compile(
    r'''"""(?:[^\\]|\\.)*?(?:"""|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:[^"\\\n]|\\[^\n])*+"?|'[^'\n]*+'?|(\#)[^\n]*+''',
    re.DOTALL,
)
# tomllib's time for a key grows with the square of the parts in it.
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{_DEEPEST}}}")
_LONGEST_ADVICE = 300
# "key = value" where the value is in no quotes or brackets; a comment behind it does not count.
_BARE_VALUE = re.compile(r"\s*(?P<key>[\w.-]+)\s*=\s*(?P<value>[^\s\"'\[{#][^#]*?)\s*(#.*)?$")


class _RepeatedKeyError(ValueError):
    """An object gives one key twice; the message is the key."""


def read_text(path: str | Path, what: str, *, largest: int = LARGEST_FILE) -> str:
    """The content of a UTF-8 file, a byte order mark taken off. Raises UserError unless there is one to read.

    A file of more than ``largest`` bytes is not read.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UserError(f"{what} is not a regular file. Give a file with the text in it.")
        if status.st_size > largest:
            raise UserError(f"{what} has {status.st_size:,} bytes; at most {largest:,} are read. Is it the right file?")
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"{what} does not exist{looked_for(path)}. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{what} is a folder, not a file. Check the path.") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 text (byte {error.start} cannot be decoded). Save it again as UTF-8."
        ) from error
    except ValueError as error:  # a NUL, or a lone surrogate
        raise UserError(f"{what} has a name that no file can have. Check the path.") from error


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises UserError where it is not valid TOML, or no configuration can be meant."""
    if _DEEP_KEY.search(_QUOTED.sub(lambda found: "" if found[1] else "quoted", text)):
        raise _too_deep(what)
    try:
        with _bounded(what):
            content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} is not valid TOML: {error}.{_toml_advice(text, str(error))}") from error
    _check_content(content, what, odd_names=False)
    return content


def _toml_advice(text: str, problem: str) -> str:
    """What to write instead, as far as the line at fault tells it."""
    place = re.search(r"at line (\d+)", problem)
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    if "Cannot overwrite" in problem or "twice" in problem:
        return " It is given twice. Keep one of them."
    if "Unclosed array" in problem:
        return " A list ends with ]."
    bare = _BARE_VALUE.match(line) if len(line) <= _LONGEST_ADVICE else None
    if bare and (instead := _toml_value(bare["value"])):
        return f" Write {bare['key']} = {instead}"
    if "Invalid value" in problem:
        return " Text needs quotes, and true and false are written in lowercase."
    if "\\" in text:
        return " In double quotes, write the backslashes of Windows paths as /, or use single quotes."
    return ""


def _toml_value(written: str) -> str | None:
    """How TOML writes a value that was given as ``written``, and why; None where that is not to be told."""
    if written.lower() in ("true", "false"):
        return f"{written.lower()}, in lowercase."
    if re.fullmatch(r"[+-]?\d+,\d+", written):
        return f"{written.replace(',', '.')}, with a point."
    if "'" in written or '"' in written:
        return None
    return f"'{written}': text needs quotes."


def parse_json(text: str, what: str, *, odd_names: bool = False) -> Any:
    """The content of a JSON text. Raises UserError where it is not valid JSON or gives a key twice.

    With ``odd_names`` texts may stand for file names that are not UTF-8, as Python writes those.
    """
    try:
        with _bounded(what):
            content = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not valid JSON: {error}.") from error
    except _RepeatedKeyError as error:
        raise UserError(f'{what} gives "{error}" twice in one object. Keep one of them.') from None
    _check_content(content, what, odd_names=odd_names)
    return content


@contextmanager
def _bounded(what: str) -> Iterator[None]:
    """Within a ``with``: the limits of Python itself, which its TOML and JSON readers meet alike, as UserErrors."""
    try:
        yield
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, _RepeatedKeyError):  # ValueErrors with their own words
        raise
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError:
        raise _too_long_a_number(what) from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(next(key for key, _ in pairs if counts[key] > 1))
    return content


def _check_content(content: Any, what: str, *, odd_names: bool) -> None:
    """Refuse nesting, numbers and texts that something would fail on later, far from the file."""
    level, depth = [content], 0
    while level:
        if depth > _DEEPEST:
            raise _too_deep(what)
        for value in level:
            if isinstance(value, str) and not is_unicode(value, odd_names=odd_names):
                raise UserError(f"{what} holds {value!r:.80}, which is not valid Unicode. Correct the text.")
            if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER * 3:
                raise _too_long_a_number(what)
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in ((*value, *value.values()) if isinstance(value, dict) else value)
        ]
        depth += 1


def check_lines(text: str, what: str) -> None:
    """Raise UserError where a line of a caption or a prompt is so long that it cannot be one."""
    if len(text) > LONGEST_LINE and (longest := max(map(len, text.split("\n")))) > LONGEST_LINE:
        raise UserError(
            f"{what} has {longest:,} characters in one line; at most {LONGEST_LINE:,} are read, and only 75 to 225 "
            "tokens count. Shorten it. Is it the right file?"
        )


def is_unicode(text: str, *, odd_names: bool = False) -> bool:
    """Whether a text has no lone surrogates; with ``odd_names`` those of a file name that is not UTF-8 are fine."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8", errors="surrogateescape" if odd_names else "strict")
    except UnicodeEncodeError:
        return False
    return True


def not_downloaded(start: bytes) -> str | None:
    """What a file is whose content did not come, by its first bytes: the end of a sentence; None for any other file."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, so the file itself was not fetched (run `git lfs pull`)"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, so the download did not work"
    return None


def _too_deep(what: str) -> UserError:
    return UserError(f"{what} is nested more than {_DEEPEST} levels deep, so it is not such a file. Check the path.")


def _too_long_a_number(what: str) -> UserError:
    return UserError(f"{what} holds a whole number of more than {_LONGEST_NUMBER} digits. Correct it.")
