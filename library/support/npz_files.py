"""Archives of arrays (``.npz``), read with distrust: what an array takes is known before it is read."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# No cache of one image comes near: it would be dozens of masks of 1024 x 1024 pixels.
LARGEST_FILE = 2**27
# A header's longest text, as numpy has it, and what stands before it.
_LONGEST_HEADER = 10_000 + 12
_LONGEST_TEXT = 4096


class ArchiveError(Exception):
    """A file that is no archive of arrays, or a damaged one; the message says what was found."""


class Archive:
    """Arrays by key, and ``sum(key)``, the checksum of each."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def sum(self, key: str) -> int:
        """CRC-32 of what the archive holds under the key, from its directory; reading the array proves it."""
        return self._members[key].CRC

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array, from its header alone."""
        with self._file.open(self._members[key]) as member:
            return _header(member.read(_LONGEST_HEADER))[0]

    def numbers(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of numbers of that shape."""
        return self._read(key, shape, "fiu", 8)

    def text(self, key: str) -> str:
        """A short text."""
        return str(self._read(key, (), "U", 4 * _LONGEST_TEXT))

    def raw(self, key: str) -> bytes:
        """What the archive holds under the key, header and all."""
        if sum(info.file_size for info in self._members.values()) > LARGEST_FILE:
            raise ValueError("it unpacks to more than a cache can hold")
        return self._file.read(self._members[key])

    def _read(self, key: str, shape: tuple[int, ...], kinds: str, largest_item: int) -> np.ndarray:
        info = self._members[key]
        if info.file_size > math.prod(shape) * largest_item + _LONGEST_HEADER:
            raise ValueError(f"{key} is larger than it can be")
        content = self._file.read(info)
        held, in_columns, dtype, length = _header(content[:_LONGEST_HEADER])
        if held != shape or dtype.kind not in kinds or dtype.itemsize > largest_item:
            raise ValueError(f"{key} is {dtype} {held}")
        if len(content) != length + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key} has another length than its header says")
        values = np.frombuffer(content, dtype, offset=length)
        return values.reshape(shape, order="F" if in_columns else "C")


def _header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether it is stored column by column, dtype, and the header's own length."""
    file = io.BytesIO(start)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return *readers[version](file), file.tell()


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an ``.npz`` file. Raises FileNotFoundError; ArchiveError for all else that goes wrong within."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is larger than a cache can be")
        with zipfile.ZipFile(path) as file:
            yield Archive(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # the readers of damaged archives and headers raise nearly anything
        raise ArchiveError(str(error) or type(error).__name__) from error


def sum_of(array: np.ndarray) -> int:
    """The checksum that ``np.savez`` would give the array."""
    file = _Summing()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.sum


class _Summing:
    """A file that keeps nothing but the checksum."""

    sum = 0

    def write(self, data: bytes) -> None:
        self.sum = zlib.crc32(data, self.sum)
