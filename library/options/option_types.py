"""What values an option can have: how they are read, shown and written.

The readers serve the command line (strings) and TOML files (strings, numbers, booleans, lists) alike. They raise
``argparse.ArgumentTypeError`` with a sentence; whoever calls them adds the option's name.
"""

import itertools
import math
import re
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.support.text_files import is_unicode

LearningRate = float | tuple[tuple[float, int | None], ...]

# No option means more: what is larger is a slip that would overflow, fill the memory or never end somewhere else.
LARGEST_NUMBER = 10**12
_LONGEST_SHOWN = 100


def shown(value: Any) -> str:
    """Return a value as a message shows it: text in quotes, other things as TOML writes them, long ones cut off."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = printable(str(value))
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    return f'"{text}"' if isinstance(value, str) else text


def printable(text: str) -> str:
    """Return the text with an escape in place of every lone surrogate, so that it can be written anywhere."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def whole_number(value: Any) -> int:
    """Read an integer from an int, a float without a fraction, or a string such as "3" or "1e3"."""
    try:
        result = _as_number(value)
    except ValueError:
        raise ArgumentTypeError(f"{shown(value)} is not a whole number.{_without_comma(value, '')}") from None
    if isinstance(value, bool) or result != result // 1:
        raise ArgumentTypeError(f"{shown(value)} is not a whole number.")
    return int(_bounded(result, value))


def _as_number(value: Any) -> int | float:
    """An integer as it is, since floats are exact to 2**53 only. Raises ValueError."""
    if isinstance(value, int | float):
        return value
    with suppress(ValueError):
        return int(value if isinstance(value, str) else "")
    return float(value if isinstance(value, str) else "")


def _without_comma(value: Any, point: str) -> str:
    """What to write for a number with a comma, which stands for ``point``; empty where there is none."""
    if not isinstance(value, str) or not re.fullmatch(r"\s*[+-]?\d+,\d+(e[+-]?\d+)?\s*", value, re.IGNORECASE):
        return ""
    meant = value.strip().replace(",", point)
    return f" Use a point: {meant}." if point else f" Write it without a comma: {meant}."


def _bounded(result: float, value: Any) -> float:
    if abs(result) > LARGEST_NUMBER:
        raise ArgumentTypeError(f"{shown(value)} is too large; no option takes more than {LARGEST_NUMBER}.")
    return result


def number(value: Any) -> float:
    """Read a finite float from a number or a string such as "1e-4"."""
    try:
        result = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentTypeError(f"{shown(value)} is not a number.{_without_comma(value, '.')}") from None
    if not math.isfinite(result):
        raise ArgumentTypeError(f"{shown(value)} is not a finite number.")
    return _bounded(result, value)


def text(value: Any) -> str | None:
    """Read a string; an empty one means "not given" (None). Numbers become their digits."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ArgumentTypeError(f"{shown(value)} is not a string.")
    found = str(value)
    # Lone surrogates are how Python holds a file name that is not UTF-8; whether one can be meant is checked later.
    if "\0" in found or not is_unicode(found, odd_names=True):
        raise ArgumentTypeError(f"{shown(found.replace(chr(0), '?'))} holds what no text may hold.")
    return found or None


def boolean(value: Any) -> bool:
    """Read true or false from a boolean, from 0 or 1, or from those words."""
    meaning = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = meaning.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise ArgumentTypeError(f"{shown(value)} is neither true nor false.")
    return found


def path(value: Any) -> Path | None:
    """Read a path; an empty text means "not given"."""
    found = text(value)
    return None if found is None else Path(found)


def text_or_boolean(value: Any) -> str | None:
    """Read a string; TOML's true and false become those words."""
    return shown(value) if isinstance(value, bool) else text(value)


def texts(value: Any) -> tuple[str, ...] | None:
    """Read a list of texts; one text is split at its spaces. An empty list means "not given"."""
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ArgumentTypeError(f"{shown(value)} is not a list of texts.")
    return tuple(value) or None


def int_or_float(value: Any) -> int | float:
    """Read a number of steps ("100"), or a share of all steps ("0.1", "10%").

    As in sd-scripts, a value of 1 or more must be written as a whole number; a share comes back as a float.
    """
    if isinstance(value, str) and value.endswith("%"):
        return number(value[:-1]) / 100
    result = number(value)
    if result < 1:
        return result
    try:
        return int(value if isinstance(value, str) else str(value))
    except ValueError:
        meant = f" Write {int(result)}." if result == result // 1 else ""
        raise ArgumentTypeError(
            f"{shown(value)} is neither a whole number of steps nor a share below 1 such as 0.1 or 10%.{meant}"
        ) from None


def resolution(value: Any) -> tuple[int, int] | None:
    """Read (width, height) from "512", "512,768", 512 or [512, 768]; an empty text means "not given"."""
    if value == "":
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if len(parts) not in (1, 2):
        raise ArgumentTypeError(f"{shown(value)} is not a size: give one number, or width,height.")
    try:
        sides = [whole_number(part) for part in parts]
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{shown(value)} is not a size such as 512 or 512,768.") from None
    if min(sides) < 1:
        raise ArgumentTypeError(f"{shown(value)} is not a size: both sides must be at least 1.")
    return sides[0], sides[-1]


def face_crop_range(value: Any) -> tuple[float, float] | None:
    """Read (a, b) with 0 < a ≤ b from "2.0,4.0" or [2.0, 4.0]; an empty text means "not given"."""
    if value == "":
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ArgumentTypeError(f"{shown(value)} is not a range: give two numbers, for example 2.0,4.0.")
    low, high = number(parts[0]), number(parts[1])
    if not 0 < low <= high:
        raise ArgumentTypeError(
            f"{shown(value)} is not a range: the first number must not exceed the second, both > 0."
        )
    return low, high


def learning_rate(value: Any) -> LearningRate | None:
    """Read a rate, or rates with the optimizer step each one lasts until: "5e-3:100,1e-3:1000,5e-4".

    The list form (known from AUTOMATIC1111) becomes ((0.005, 100), (0.001, 1000), (0.0005, None)): a rate holds
    until its step is reached; the last one holds to the end and needs no step.
    """
    if value == "":
        return None
    if not isinstance(value, str) or not re.search("[:,]", value) or _without_comma(value, "."):
        return _positive_rate(value)
    pieces = [piece.strip() for piece in value.split(",")]
    stages = []
    for place, piece in enumerate(pieces):
        rate, colon, until = piece.partition(":")
        if not colon and place < len(pieces) - 1:
            raise ArgumentTypeError(
                f'{shown(value)}: "{piece}" needs the step it lasts until, for example 5e-3:100; '
                "only the last rate may go without."
            )
        stages.append((_positive_rate(rate), whole_number(until) if colon else None))
    steps = [0, *(until for _, until in stages if until is not None)]
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ArgumentTypeError(f"{shown(value)}: the steps must be above 0 and grow from left to right.")
    return tuple(stages)


def _positive_rate(value: Any) -> float:
    rate = number(value)
    if rate <= 0:
        raise ArgumentTypeError(f"{shown(value)} is no learning rate: it must be above 0.")
    return rate


def written(value: Any) -> Any:
    """Return an option's value as a TOML file or a report holds it: the inverse of the readers."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, tuple):
        return value
    if all(isinstance(item, str) for item in value):
        return list(value)
    if isinstance(value[0], tuple):
        return ",".join(f"{rate}" if until is None else f"{rate}:{until}" for rate, until in value)
    return ",".join(str(item) for item in value)
