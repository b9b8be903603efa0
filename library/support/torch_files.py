"""Files that ``torch.save`` wrote (``.pt``, ``.ckpt``, ``.bin``): a zip archive or, before torch 1.6, five pickles.

What they hold is known without reading a tensor, and what they claim is compared with the file's length before a byte
of memory is taken for it. Nothing in them is ever run, see ``torch_pickle``.
"""

import io
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from library.support.errors import UserError
from library.support.stored_tensors import OpenFile, read_place
from library.support.torch_pickle import DamagedError, RefusedError, Storage, StoredTensor, read_pickle

_LONGEST_PICKLE = 64 * 2**20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch's, of the older format
_DEEPEST = 50
_PLAIN = (str, bytes, bytearray, int, float, complex, type(None))
# Several names may be of one tensor, but a few bytes shall not become gigabytes by being named a thousand times.
_MOST_SHARED = 4

_ODD_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, KeyError, OSError, EOFError, zlib.error)


def torch_content(path: Path) -> Any:
    """What a file holds, each tensor as a StoredTensor. Raises UserError if it is damaged or holds more than that."""
    try:
        with path.open("rb") as file:
            return _content(file)
    except RefusedError as error:
        raise UserError(_refusal(path, str(error))) from error
    except DamagedError as error:
        raise UserError(f"{path} is damaged or cut off: {error}. Download or copy it again.") from error


def load_torch(file: OpenFile) -> Any:
    """What a file holds, its tensors read and a zip's check sums compared. Raises DamagedError or RefusedError."""
    file.seek(0)
    if file.read(2) == b"PK":
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, _length(file))
                if (broken := archive.testzip()) is not None:
                    raise DamagedError(f"{broken} is not what was written")
        except _ODD_ZIP as error:
            raise DamagedError("its list of parts cannot be read") from error
    return _Filler(file).filled(_content(file))


def is_whole_zip(path: Path) -> bool:
    """Whether a zip archive has its end, which a download that was cut off lacks."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it has one, but a damaged one
        return True


def _refusal(path: Path, what: str) -> str:
    if what.startswith("Python"):
        return (
            f"{path} holds {what} and could run code when read, so it is refused. Convert it to .safetensors with a "
            "tool you trust, or use a .safetensors copy."
        )
    return f"{path} holds {what}, which cannot be used here. Save it with ordinary tensors, or use another copy."


def _length(file: OpenFile) -> int:
    return file.seek(0, io.SEEK_END)


def _content(file: OpenFile) -> Any:
    file.seek(0)
    is_zip = file.read(2) == b"PK"
    length = _length(file)
    file.seek(0)
    return _zip_content(file, length) if is_zip else _old_content(file, length)


def _zip_content(file: OpenFile, length: int) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            members = _check_members(archive, length)
            (prefix,) = {name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")}
            if (order := members.get(f"{prefix}/byteorder")) and archive.read(order) != sys.byteorder.encode():
                raise RefusedError("numbers in the byte order of other processors")
            if members[f"{prefix}/data.pkl"].file_size > _LONGEST_PICKLE:
                raise DamagedError("its list of tensors is longer than any real one")
            pickled = io.BytesIO(archive.read(f"{prefix}/data.pkl"))
    except _ODD_ZIP as error:
        raise DamagedError("its list of parts cannot be read") from error
    storages: dict[str, Storage] = {}
    content = read_pickle(pickled, storages)
    for storage in storages.values():
        member = members.get(f"{prefix}/data/{storage.key}")
        if member is None or member.file_size < storage.size:
            raise DamagedError("some of its numbers are missing")
        storage.start = _data_start(file, member, length)
    return content


def _check_members(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    """The parts by name. Raises DamagedError where one is compressed (torch never does it) or longer than the file."""
    members = {member.filename: member for member in archive.infolist()}
    for member in members.values():
        is_stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not is_stored or member.flag_bits & 1 or member.file_size > length:
            raise DamagedError("its parts are not stored as torch stores them")
    return members


def _data_start(file: OpenFile, member: zipfile.ZipInfo, length: int) -> int:
    """The byte where a part's content begins, behind its own header."""
    file.seek(member.header_offset)
    header = file.read(30)
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
    if header[:4] != b"PK\3\4" or start + member.file_size > length:
        raise DamagedError("some of its numbers are missing")
    return start


def _old_content(file: OpenFile, length: int) -> Any:
    """Five pickles (magic number, version, system, content, the storages' order), then the storages' numbers."""
    pickles = io.BytesIO(file.read(_LONGEST_PICKLE))
    storages: dict[str, Storage] = {}
    if read_pickle(pickles, {}) != _MAGIC or read_pickle(pickles, {}) != _PROTOCOL:
        raise DamagedError("torch did not write it")
    read_pickle(pickles, {})
    content = read_pickle(pickles, storages)
    order = read_pickle(pickles, {})
    if not isinstance(order, list) or not all(isinstance(key, str | int) for key in order):
        raise DamagedError("its list of tensors cannot be read")
    if {str(key) for key in order} != storages.keys() or len(order) != len(storages):
        raise DamagedError("some of its numbers are missing")
    start = pickles.tell()
    for key in map(str, order):
        storage = storages[key]
        file.seek(start)
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise DamagedError("it contradicts itself about where its data is")
        storage.start, start = start + 8, start + 8 + storage.size
        if start > length:
            raise DamagedError("some of its numbers are missing")
    return content


class _Filler:
    """Puts the tensors of a file in their places within its content."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.left = _MOST_SHARED * _length(file)
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # what ids stand for must stay alive

    def filled(self, value: Any, depth: int = 0) -> Any:
        """The same value with tensors. Raises DamagedError where it holds itself, RefusedError for other objects."""
        if isinstance(value, _PLAIN) or (type(value).__module__ == "torch" and not isinstance(value, tuple)):
            return value  # dtypes and devices, besides numbers and strings
        if depth > _DEEPEST:
            raise DamagedError("it holds lists within lists without end")
        if id(value) not in self.done:
            self.kept.append(value)
            self.done[id(value)] = self._made(value, depth + 1)
        return self.done[id(value)]

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = self.filled(item, depth)
            return value
        if type(value) in (list, tuple):
            return type(value)([self.filled(item, depth) for item in value])
        if isinstance(value, tuple | set):  # torch.Size, and sets of plain values
            return value
        raise RefusedError("Python objects besides tensors")

    def _tensor(self, value: StoredTensor) -> Any:
        place = value.place
        self.left -= place.span
        if self.left < 0:
            raise DamagedError("it names the same numbers many times")
        try:
            tensor = read_place(self.file, place)
        except (OSError, EOFError, ValueError) as error:
            raise DamagedError("some of its numbers are missing") from error
        for name, attribute in value.attributes.items():
            setattr(tensor, name, attribute)
        return tensor
