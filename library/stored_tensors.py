"""Where a file keeps its tensors, and how they are read from there.

Whatever a file claims is compared with its length before anything is read, so that a few bytes can never ask for
gigabytes.
"""

import mmap as memory_map
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from library.errors import UserError

Tensors = dict[str, torch.Tensor]

_MOST_AXES = 16
_MOST_ELEMENTS = 2**40  # axes of length 0 left out: no product of them may overflow


@dataclass(frozen=True)
class Place:
    """A tensor in a file: ``start`` is the byte where its first element begins, ``stride`` counts elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def span(self) -> int:
        """Bytes from ``start`` to the end of the last element."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def is_count(value: object) -> bool:
    """Whether a number read from a file can be a size or an offset: an integer from 0 (JSON and pickle know others)."""
    return type(value) is int and value >= 0


def is_shape(value: object) -> bool:
    """Whether a list or tuple read from a file can be the shape of a tensor."""
    if not isinstance(value, list | tuple) or len(value) > _MOST_AXES or not all(map(is_count, value)):
        return False
    return prod(max(size, 1) for size in value) <= _MOST_ELEMENTS


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements follow one another."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_places(path: Path, mmap: bool, places: Mapping[str, Place]) -> Tensors:
    """Read tensors that are known to lie within the file. Raises UserError where it has become shorter or unreadable.

    With ``mmap`` they are views of the mapped file.
    """
    try:
        with path.open("rb") as file:
            view = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY) if mmap and places else None
            return {name: read_place(file, place, view) for name, place in places.items()}
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} could not be read, or changed while it was read ({error}). Try again.") from error


def read_place(file: BinaryIO, place: Place, view: memory_map.mmap | None = None) -> torch.Tensor:
    """Read one tensor, or make it a view of the mapped file. Raises EOFError, OSError or ValueError."""
    size = place.dtype.itemsize
    if not place.span:
        return torch.empty(place.shape, dtype=place.dtype)
    count = place.span // size
    if view is not None and place.start % size == 0:  # processors want elements at multiples of their size
        flat = torch.frombuffer(view, dtype=place.dtype, count=count, offset=place.start)
    else:
        flat = torch.empty(count, dtype=place.dtype)  # torch's own memory: sums may depend on where a tensor begins
        file.seek(place.start)
        if file.readinto(flat.view(torch.uint8).numpy()) != place.span:
            raise EOFError("its end is missing")
    return flat.as_strided(place.shape, place.stride)
