"""``--config_file``: options from a TOML file, and ``--output_config``, which writes one."""

import logging
import os
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toml

from library.errors import UserError, closest
from library.option_types import Option, checked, written

logger = logging.getLogger(__name__)

# The Textual Inversion tab of the kohya_ss GUI misspells this key in the files it writes.
MISSPELT = {"weigts": "weights"}


def config_path(given: str) -> Path:
    """Return the file that ``--config_file`` names: ".toml" is added where it is missing."""
    return Path(given if given.endswith(".toml") else f"{given}.toml")


def read_config_file(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """Read options from a TOML file; return the given ones by name, converted and checked.

    Tables are only headings: their keys count as if they stood at the top, and a later key wins over an earlier one.
    A key with an empty text or list counts as not given. Unknown keys are named in one warning. Raises UserError for
    a missing or broken file and for a value that does not fit its option.
    """
    values, unknown = {}, []
    for key, value in _flattened(_read_toml(path)).items():
        name = MISSPELT.get(key, key)
        if name not in known:
            unknown.append(key)
        elif value not in ("", []):
            values[name] = _converted(path, name, known[name], value)
    if unknown:
        logger.warning("%s: unknown keys, which change nothing: %s.", path, _with_guesses(unknown, known))
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return toml.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"The configuration file {path} of --config_file does not exist.") from None
    except OSError as error:
        raise UserError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The configuration file {path} is not UTF-8 text. Save it as UTF-8.") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:  # toml raises them for broken files
        hint = " Windows paths need single quotes or forward slashes." if "escape" in str(error).lower() else ""
        raise UserError(f"The configuration file {path} is not valid TOML: {str(error).rstrip('.')}.{hint}") from error


def _flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _converted(path: Path, name: str, option: Option, value: Any) -> Any:
    try:
        if isinstance(value, dict):
            raise ArgumentTypeError("a table stands where a value belongs.")
        return checked(option, value)
    except ArgumentTypeError as error:
        raise UserError(f"{name} in {path}: {error}") from None


def _with_guesses(unknown: list[str], known: Mapping[str, Option]) -> str:
    guesses = ((key, closest(key, known)) for key in unknown)
    return ", ".join(f'{key} (did you mean "{guess}"?)' if guess else key for key, guess in guesses)


def write_config_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write options as flat TOML, whole or not at all. Raises UserError where the file exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten. Choose another name for --config_file.")
    content = toml.dumps({name: written(value) for name, value in values.items()})
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        Path(file.name).chmod(0o666 & ~_umask())
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
