"""The header of a safetensors file, checked in every point before any of its tensors is read."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch

from library.support.errors import UserError
from library.support.stored_tensors import Place, contiguous, is_count, is_shape

# Real headers have up to some megabytes (metadata with a preview image); parsed, a header can take 25 times its length.
LONGEST_HEADER = 25_000_000
_LONGEST_NAME = 1000
_AGAIN = "Download or copy it again."
_HALF = re.compile("[\ud800-\udfff]")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_safetensors_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where each tensor is, and the metadata. Raises UserError, with the reason, for whatever breaks the format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        text = file.read(length) if start <= size and length <= LONGEST_HEADER else b""
    if start > size:
        raise UserError(f"{path} is cut off inside its header, or damaged. {_AGAIN}")
    if not text:
        raise UserError(f"{path} is damaged: it claims a header of {length:,} bytes. {_AGAIN}")
    header = _parsed(path, text)
    metadata = _metadata(path, header.pop("__metadata__", None))
    places = {name: _place(path, name, entry, start) for name, entry in header.items()}
    _check_coverage(path, places, start, size)
    return places, metadata


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header cannot be read. {_AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header cannot be read. {_AGAIN}")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that can be printed: JSON also knows halves of characters."""
    return isinstance(value, str) and not _HALF.search(value)


def _metadata(path: Path, content: object) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(_is_text(part) for pair in content.items() for part in pair):
        raise UserError(f"{path} is damaged: the metadata in its header is not made of strings. {_AGAIN}")
    return content


def _place(path: Path, name: str, entry: object, start: int) -> Place:
    """The place of one tensor in the file, whose data begins at byte ``start``."""
    if not _is_text(name) or len(name) > _LONGEST_NAME:
        raise UserError(f"{path} is damaged: its header holds a name that no tensor has. {_AGAIN}")
    damaged = f'{path} is damaged: its header says of the tensor "{name}"'
    if not isinstance(entry, dict):
        raise UserError(f"{damaged} neither type nor place. {_AGAIN}")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_text(kind):
        raise UserError(f"{damaged} no data type. {_AGAIN}")
    if kind not in _DTYPES:
        raise UserError(
            f'{path} holds the tensor "{name}" as {kind[:40]}, a data type that cannot be read here. Use a copy of the '
            "file in float16, bfloat16 or float32."
        )
    if not is_shape(shape):
        raise UserError(f"{damaged} no valid shape. {_AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise UserError(f"{damaged} no valid place. {_AGAIN}")
    place = Place(_DTYPES[kind], tuple(shape), contiguous(tuple(shape)), start + offsets[0])
    if place.span != offsets[1] - offsets[0]:
        raise UserError(f"{damaged} a shape and a length that disagree. {_AGAIN}")
    return place


def _check_coverage(path: Path, places: dict[str, Place], start: int, size: int) -> None:
    """Tensors must follow one another without gap or overlap, from the end of the header to the end of the file."""
    end = start
    for place in sorted(places.values(), key=lambda place: (place.start, place.span)):
        if place.start != end:
            raise UserError(f"{path} is damaged: its tensors overlap or leave gaps. {_AGAIN}")
        end += place.span
    if end > size:
        raise UserError(f"{path} is cut off: {size:,} of {end:,} bytes are there. {_AGAIN}")
    if end < size:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, but its header describes {end:,}. {_AGAIN}")
