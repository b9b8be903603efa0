"""Where a file keeps its tensors, and how they are read from there: one at a time, when each is asked for.

Whatever a file claims is compared with its length before anything is read, so that a few bytes can never ask for
gigabytes.
"""

import io
import mmap as memory_map
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch

from library.support.errors import UserError

Tensors = dict[str, torch.Tensor]
OpenFile = io.BufferedReader | io.BytesIO
Index = int | slice | torch.Tensor | None | tuple[int | slice | torch.Tensor | None, ...]

_MOST_AXES = 16
_MOST_ELEMENTS = 2**40  # axes of length 0 left out: no product of them may overflow


@dataclass(frozen=True)
class Place:
    """A tensor in a file: ``start`` is the byte where its first element begins, ``stride`` counts elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @cached_property
    def span(self) -> int:
        """Bytes from ``start`` to the end of the last element."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Unread:
    """A tensor that is still in its file, where renaming a model's tensors takes no memory and no time.

    It bears what diffusers' conversions do to tensors: a part, a transpose or a copy of it is unread as well.
    ``outline`` has its shape, and need not have numbers. ``read`` may be called more than once and raises UserError.
    """

    outline: torch.Tensor
    read: Callable[[], torch.Tensor]

    @classmethod
    def held(cls, tensor: torch.Tensor) -> "Unread":
        """A tensor that is in memory already."""
        return cls(tensor, lambda: tensor)

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        return self.outline.shape

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return self.outline.ndim

    @property
    def T(self) -> "Unread":  # noqa: N802 - torch's name
        """Its transpose."""
        return self.then(lambda tensor: tensor.T)

    def __getitem__(self, part: Index) -> "Unread":
        return self.then(lambda tensor: tensor[part])

    def contiguous(self) -> "Unread":
        """The same, its elements following one another."""
        return self.then(torch.Tensor.contiguous)

    def clone(self) -> "Unread":
        """A copy in memory of its own, once it is read."""
        return self.then(torch.Tensor.clone)

    def detach(self) -> "Unread":
        """The same: it never takes part in a graph."""
        return self

    def then(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Unread":
        """What ``change`` makes of it, once it is read; it is tried on the outline at once."""
        return Unread(change(self.outline), lambda: change(self.read()))


UnreadTensors = dict[str, Unread]


def is_count(value: object) -> TypeGuard[int]:
    """Whether a number read from a file can be a size or an offset: an integer from 0 (JSON and pickle know others)."""
    return type(value) is int and value >= 0


def is_shape(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a list or tuple read from a file can be the shape of a tensor."""
    if not isinstance(value, list | tuple) or len(value) > _MOST_AXES or not all(map(is_count, value)):
        return False
    elements: int = prod(max(size, 1) for size in value)
    return elements <= _MOST_ELEMENTS


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements follow one another."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def unread_places(path: Path, mmap: bool, places: Mapping[str, Place]) -> UnreadTensors:
    """Tensors that are known to lie within the file; reading one raises UserError where that is no longer so.

    With ``mmap`` they become views of the mapped file, which is mapped once, when the first is read.
    """

    @cache
    def view() -> memory_map.mmap:
        with path.open("rb") as file:
            return memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_COPY)

    def read(place: Place) -> torch.Tensor:
        try:
            # Processors want elements at multiples of their size.
            if mmap and place.span and place.start % place.dtype.itemsize == 0:
                count = place.span // place.dtype.itemsize
                flat = torch.frombuffer(view(), dtype=place.dtype, count=count, offset=place.start)
                return flat.as_strided(place.shape, place.stride)
            with path.open("rb") as file:
                return read_place(file, place)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} could not be read, or changed while it was read ({error}). Try again.") from error

    return {
        name: Unread(torch.empty(place.shape, device="meta"), partial(read, place)) for name, place in places.items()
    }


def read_place(file: OpenFile, place: Place) -> torch.Tensor:
    """Read one tensor. Raises EOFError, OSError or ValueError."""
    if not place.span:
        return torch.empty(place.shape, dtype=place.dtype)
    # torch's own memory: sums may depend on where a tensor begins.
    flat = torch.empty(place.span // place.dtype.itemsize, dtype=place.dtype)
    file.seek(place.start)
    if file.readinto(flat.view(torch.uint8).numpy().data) != place.span:
        raise EOFError("its end is missing")
    return flat.as_strided(place.shape, place.stride)
