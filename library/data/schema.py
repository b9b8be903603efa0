"""The language of dataset files: which keys there are, where each may stand and what it may hold.

Types are strict, as in sd-scripts: ``1`` is not a decimal number, ``true`` is not a whole one, ``0`` is not a boolean.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from library.options import option_types
from library.options.declaration import DATASETS, FOLDERS, SUBSETS, Option
from library.options.option_types import LARGEST_NUMBER
from library.options.options import dataset_keys, declared_options
from library.support.errors import UserError, closest

# What a subset takes its images from; each kind knows some keys of its own.
DREAMBOOTH, FINETUNING, MASK = "dreambooth", "finetuning", "mask"
KIND_NAMES = {
    DREAMBOOTH: "a folder of images with caption files",
    FINETUNING: "images listed in a metadata_file",
    MASK: "images with a conditioning_data_dir (masks)",
}
FILE, GENERAL, DATASET, SUBSET = "the file", "[general]", "[[datasets]]", "[[datasets.subsets]]"

# Of a size to train at: nobody can mean more, and a slip of the finger should not fill the memory.
_LONGEST_SIDE = 16384
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Key:
    """What one key may hold, in words and as a test."""

    description: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _whole(least: float, most: float) -> Key:
    return Key(f"a whole number from {least} to {most}", lambda value: _is_whole(value) and least <= value <= most)


def _number(least: float, most: float) -> Key:
    return Key(f"a number from {least} to {most}", lambda value: _is_number(value) and least <= value <= most)


def _is_decimal(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _is_pair(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(test, value))


def _is_size(value: Any) -> bool:
    sides = value if _is_pair(value, _is_whole) else [value]
    return all(_is_whole(side) and 8 <= side <= _LONGEST_SIDE for side in sides)


_FLAG = Key("true or false", lambda value: isinstance(value, bool))
_TEXT = Key("a string in quotes", lambda value: isinstance(value, str))
_FILLED_TEXT = Key("a string in quotes that is not empty", lambda value: isinstance(value, str) and value != "")
# Written with "\" in double quotes, a Windows path turns into something with control characters.
_PATH = Key(
    "a path in quotes (a Windows path in single quotes, or with /)",
    lambda value: isinstance(value, str) and value.strip() != "" and min(value) >= " ",
)
_SIZE = Key(f"a whole number from 8 to {_LONGEST_SIDE}, or two of them: [width, height]", _is_size)
_SPLIT = Key("a number with a decimal point from 0.0 to below 1.0", lambda value: _is_decimal(value) and 0 <= value < 1)
_MULTIPLIER = Key("a number with a decimal point", _is_decimal)
_RANGE = Key(
    "two numbers with a decimal point, [least, most], the first above 0.0 and not above the second",
    lambda value: _is_pair(value, _is_decimal) and 0 < value[0] <= value[1],
)
_TABLE = Key("a table", lambda value: isinstance(value, dict))


def _tables(header: str) -> Key:
    return Key(
        f"a list of tables, each begun with {header}",
        lambda value: isinstance(value, list) and all(isinstance(table, dict) for table in value),
    )


def _one_of(words: Sequence[str | int]) -> Key:
    return Key("one of " + ", ".join(map(str, words)), lambda value: value in words)


def _key_of(option: Option) -> Key:
    """What the key that falls back on an option may hold: what the option may, in the types of a file."""
    if option.choices:
        return _one_of(option.choices)
    if option.read in _KEYS:
        return _KEYS[option.read]
    if option.at_least is None:
        raise ValueError("the option has no least number")
    between = _whole if option.read is option_types.whole_number else _number
    return between(option.at_least, LARGEST_NUMBER if option.at_most is None else option.at_most)


_KEYS = {
    option_types.boolean: _FLAG,
    option_types.text: _TEXT,
    option_types.resolution: _SIZE,
    option_types.face_crop_range: _RANGE,
}


def _keys(*tables: str) -> dict[str, Key]:
    return {key: _key_of(option) for key, (_, option) in dataset_keys(*tables).items()}


def _repeats(option: Option) -> Key:
    """Less than the option's least number leaves the subset out, as in sd-scripts."""
    return Key(f"a whole number up to {option.at_most}", lambda value: _is_whole(value) and value <= option.at_most)


_OPTIONS = dict(declared_options())
FILE_KEYS = {"general": _TABLE, "datasets": _tables(DATASET)}
_INTERPOLATION = _one_of((*(_OPTIONS["resize_interpolation"].choices or ()), "box"))

DATASET_KEYS = _keys(DATASETS) | {
    "validation_seed": Key("a whole number", _is_whole),
    "validation_split": _SPLIT,
    "network_multiplier": _MULTIPLIER,
    "resize_interpolation": _INTERPOLATION,
}
_DATASET_ONLY_KEYS = {"subsets": _tables(SUBSET)}
SUBSET_KEYS = _keys(SUBSETS) | {
    "num_repeats": _repeats(_OPTIONS["dataset_repeats"]),
    "caption_separator": _FILLED_TEXT,
    "resize_interpolation": _INTERPOLATION,
    "custom_attributes": _TABLE,
}
_FOLDER_KEYS = _keys(FOLDERS) | {"caption_extension": _FILLED_TEXT}
_CLASS_KEYS = {"class_tokens": _TEXT}
# Keys that the kinds add to SUBSET_KEYS: such as a dataset hands down, and such as only a subset itself has.
_HANDED_DOWN = {DREAMBOOTH: _FOLDER_KEYS | _CLASS_KEYS, FINETUNING: {}, MASK: _FOLDER_KEYS}
_OWN = {
    DREAMBOOTH: {"image_dir": _PATH, "is_reg": _FLAG, "alpha_mask": _FLAG},
    FINETUNING: {"image_dir": _PATH, "metadata_file": _PATH, "alpha_mask": _FLAG},
    MASK: {"image_dir": _PATH, "conditioning_data_dir": _PATH},
}
_REQUIRED = {DREAMBOOTH: ("image_dir",), FINETUNING: ("metadata_file",), MASK: ("image_dir", "conditioning_data_dir")}

# Keys that the command line knows by another name.
OPTION_NAMES = {key: name for key, (name, _) in dataset_keys(DATASETS, SUBSETS, FOLDERS).items() if key != name}


def known_keys(level: str, kind: str) -> dict[str, Key]:
    """The keys that may stand at a level (FILE, GENERAL, DATASET, SUBSET) above or in subsets of this kind."""
    if level == FILE:
        return FILE_KEYS
    if level == GENERAL:
        return DATASET_KEYS | SUBSET_KEYS | _FOLDER_KEYS | _CLASS_KEYS
    if level == DATASET:
        return DATASET_KEYS | _DATASET_ONLY_KEYS | SUBSET_KEYS | _HANDED_DOWN[kind]
    return SUBSET_KEYS | _HANDED_DOWN[kind] | _OWN[kind]


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, much as the file has it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "a list of tables"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def check_table(table: dict[str, Any], level: str, kind: str, place: str) -> None:
    """Refuse unknown keys and values of the wrong type or range in one table of a dataset file.

    Raises UserError naming the place, the key, the value, and the nearest key or what is permitted.
    """
    known = known_keys(level, kind)
    for name, value in table.items():
        if name not in known:
            raise UserError(f"{place}: {_unknown(name, value, level, kind)}")
        check_value(known[name], name, value, place)
    if level == SUBSET:
        missing = next((name for name in _REQUIRED[kind] if name not in table), None)
        if missing:
            raise UserError(f'{place}: "{missing}" is missing. Add {missing} = "path/to/…".')


def check_value(key: Key, name: str, value: Any, place: str) -> None:
    """Refuse a value that the key does not take; raises UserError with place, name, value and what is permitted."""
    if not key.accepts(value):
        raise UserError(
            f'{place}: "{name}" must be {key.description}, but it is {shown(value)}.{_unquoted(key, value)}'
        )


def _unquoted(key: Key, value: Any) -> str:
    """What to write where only the quotes are wrong: " Write it without quotes: [512, 768]."; else nothing."""
    for text in (value.lower(), f"[{value}]") if isinstance(value, str) else ():
        with suppress(ValueError, RecursionError):
            if key.accepts(meant := json.loads(text)):
                return f" Write it without quotes: {json.dumps(meant)}."
    return ""


def _unknown(name: str, value: Any, level: str, kind: str) -> str:
    """Why a key cannot stand where it does, and where or how it can."""
    it = f'"{name}" (here {shown(value)})'
    if name == "conditioning_data_dir":
        return (
            f"{it} names masks. It needs --masked_loss on the command line and belongs in {SUBSET}: there in all of a "
            "dataset or in none, unless --conditioning_data_dir serves those without."
        )
    kinds = [KIND_NAMES[other] for other in KIND_NAMES if name in known_keys(level, other)]
    if kinds:
        return f"{it} does not go with {KIND_NAMES[kind]}, only with {' or '.join(kinds)}."
    elsewhere = [where for where in (GENERAL, DATASET, SUBSET) if any(name in known_keys(where, k) for k in KIND_NAMES)]
    if elsewhere:
        return f"{it} cannot stand in {level}; it belongs in {' or '.join(elsewhere)}."
    guess = _meant_by_option(name)
    if guess is None and name in _OPTIONS:
        return f"{it} is not for dataset files: give --{name} on the command line."
    guess = guess or closest(name, known_keys(level, kind))
    advice = f'Did you mean "{guess}"?' if guess else f"Known here are {', '.join(sorted(known_keys(level, kind)))}."
    return f"{it} is not a known key. {advice}"


def _meant_by_option(name: str) -> str | None:
    """The key for what the command line calls ``name``; None where the name is no option, or no key serves it."""
    if name in _OPTIONS and _OPTIONS[name].spelling_of:
        return _OPTIONS[name].spelling_of
    return next((key for key, option in OPTION_NAMES.items() if option == name), None)
