"""``--config_file``: options from a TOML file, and ``--output_config``, which writes one."""

import json
import logging
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.options.declaration import Option, checked
from library.options.option_types import boolean, written
from library.support.atomic_files import replacement
from library.support.errors import UserError, closest
from library.support.text_files import parse_toml, read_text

logger = logging.getLogger(__name__)

FILE_OPTIONS = {
    "config_file": Option(
        "TOML file with options, written as option = value; table names in it are only headings. What the command "
        "line gives wins over the file. .toml may be left out.",
        metavar="FILE",
    ),
    "output_config": Option(
        "Write the options of this command line to the file of --config_file and stop. Secrets are not written.",
        default=False,
        read=boolean,
    ),
}
# The Textual Inversion tab of the kohya_ss GUI misspells this key in the files it writes.
MISSPELT = {"weigts": "weights"}


# Options of sd-scripts' LoRA training that do not begin with "network_".
_LORA: tuple[str, ...] = ("unet_lr", "text_encoder_lr", "dim_from_weights", "scale_weight_norms", "base_weights")
_LORA += ("base_weights_multiplier",)


def is_of_lora(name: str) -> bool:
    """Whether an unknown option is one of sd-scripts' LoRA training."""
    return name.startswith("network_") or name in _LORA


def config_path(given: str) -> Path:
    """Return the file that ``--config_file`` names: ".toml" is added where it is missing."""
    return Path(given if given.endswith(".toml") else f"{given}.toml")


def read_config_file(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """Read options from a TOML file; return the given ones by name, converted and checked.

    Tables are only headings: their keys count as if they stood at the top, and a later key wins over an earlier one.
    A key with an empty text or list counts as not given. Unknown keys are named in one warning. Raises UserError for
    a missing or broken file and for a value that does not fit its option.
    """
    what = f"The file {path} of --config_file"
    content, values, unknown = parse_toml(read_text(path, what), what), {}, []
    if isinstance(content.get("datasets"), list):
        raise UserError(f"{path} describes a dataset. Give it with --dataset_config instead of --config_file.")
    for key, value in _flattened(content).items():
        name = MISSPELT.get(key, key)
        if name not in known:
            unknown.append(key)
        elif value not in ("", []):
            values[name] = _converted(path, name, known[name], value)
    if unknown:
        logger.warning("%s: unknown keys, which change nothing: %s.", path, _with_guesses(unknown, known))
    return values


def _flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _converted(path: Path, name: str, option: Option, value: Any) -> Any:
    try:
        if isinstance(value, dict):
            raise ArgumentTypeError("it is a table where a value belongs.")
        if option.is_place and isinstance(value, str) and min(value) < " ":
            raise ArgumentTypeError(
                f"{value!r} holds a control character. In double quotes, \\t, \\n and the like are such: write the "
                "backslashes of Windows paths as /, or use single quotes."
            )
        return checked(option, value)
    except ArgumentTypeError as error:
        raise UserError(f"{name} in {path}: {'its value is not a string.' if option.secret else error}") from None


def _with_guesses(unknown: list[str], known: Mapping[str, Option]) -> str:
    return ", ".join(f"{key}{_guess(key, known)}" for key in unknown)


def _guess(key: str, known: Mapping[str, Option]) -> str:
    if is_of_lora(key):
        return " (of LoRA training; this trains an embedding)"
    guess = closest(key, known)
    return f' (did you mean "{guess}"?)' if guess else ""


def as_toml(values: Mapping[str, Any]) -> str:
    """Options by name as ``--config_file`` reads them: flat TOML, a line each."""
    # JSON's texts, numbers, booleans and lists are TOML's too; only DEL must not stand for itself.
    lines = (f"{name} = {json.dumps(written(value), ensure_ascii=False)}\n" for name, value in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")


def write_config_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write options as flat TOML, whole or not at all. Raises UserError where the file exists or cannot be written."""
    if os.path.lexists(path):  # Path.exists raises for a name that is too long
        raise UserError(f"{path} exists already and is not overwritten. Choose another name for --config_file.")
    content = as_toml(values)
    try:
        with replacement(path) as file:
            file.write(content.encode("utf-8"))
    except UnicodeEncodeError as error:
        odd = error.object[max(error.start - 20, 0) : error.end]
        raise UserError(
            f"{path} of --config_file cannot be written: TOML is UTF-8, and {odd!r} is not. Rename that file or folder."
        ) from error
    except OSError as error:
        raise UserError(f"{path} of --config_file cannot be written: {error.strerror}. Check its folder.") from error
