"""Files of weights: what they hold is known from the header, tensors are read when they are asked for.

Both kinds of file are recognised by their content, since links into a download cache have no suffix: safetensors, and
what ``torch.save`` wrote (``.ckpt``, ``.pt``, ``.bin``), which is only ever read with ``weights_only``.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from library.errors import UserError

Tensors = dict[str, torch.Tensor]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DOWNLOAD_AGAIN = "Download or copy it again."


@dataclass(frozen=True)
class Weights:
    """Names and shapes of the tensors in one or several files, and the way to read some of them."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[str]], Tensors] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read_all(self) -> Tensors:
        return self.read(self.shapes)


def open_weights(path: Path, *, mmap: bool = True) -> Weights:
    """Open a file without reading its tensors.

    With ``mmap`` the tensors are views of the mapped file: they take no memory of their own until they are cast or
    moved. Raises UserError if the file is missing, cut off, or no file of weights.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        return _open_safetensors(path, mmap)
    if head[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is cut off: the end of the file is missing. {_DOWNLOAD_AGAIN}")
        return _open_pickle(path, mmap)
    if head[:1] == b"\x80":
        return _open_pickle(path, mmap=False)
    raise UserError(f"{path} is not a file of model weights: {_nature(head)}.")


def join_weights(paths: Iterable[Path], *, mmap: bool = True) -> Weights:
    """Open the shards of one model as if they were one file."""
    shards = [open_weights(path, mmap=mmap) for path in paths]

    def read(names: Iterable[str]) -> Tensors:
        names = set(names)
        return {name: t for shard in shards for name, t in shard.read(names & shard.shapes.keys()).items()}

    return Weights({name: shape for shard in shards for name, shape in shard.shapes.items()}, read)


def _nature(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, so the file itself was not fetched (run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, so the download did not work"
    return "it is neither a safetensors nor a torch file"


def _open_safetensors(path: Path, mmap: bool) -> Weights:
    header, start = _safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    read = partial(_read_mapped, path) if mmap else partial(_read_copies, path, header, start)
    return Weights(shapes, read, metadata)


def _safetensors_header(path: Path) -> tuple[dict, int]:
    """The parsed header and the position where the tensors' bytes begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8) if start <= size else b""
    if start > size:
        raise UserError(f"{path} is cut off inside its header. {_DOWNLOAD_AGAIN}")
    try:
        header = json.loads(text)
        end = start + max((entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"), default=0)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its header cannot be read. {_DOWNLOAD_AGAIN}") from error
    if end > size:
        raise UserError(f"{path} is cut off: {size:,} of {end:,} bytes are there. {_DOWNLOAD_AGAIN}")
    return header, start


def _read_mapped(path: Path, names: Iterable[str]) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _read_copies(path: Path, header: dict, start: int, names: Iterable[str]) -> Tensors:
    """Read plainly, in file order: faster than mapping on network drives and hard disks."""
    tensors = {}
    with path.open("rb") as file:
        for name in sorted(names, key=lambda name: header[name]["data_offsets"][0]):
            entry = header[name]
            first, end = entry["data_offsets"]
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            file.seek(start + first)
            if end > first:
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())
            tensors[name] = tensor
    return tensors


def _open_pickle(path: Path, mmap: bool) -> Weights:
    tensors = _load_pickle(path, mmap)
    return Weights({name: tuple(t.shape) for name, t in tensors.items()}, lambda names: {n: tensors[n] for n in names})


def _load_pickle(path: Path, mmap: bool) -> Tensors:
    """The tensors of a torch file, out of its "state_dict" if it has one."""
    try:
        content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects besides tensors and could run code when read, so it is refused. Convert it "
            "to .safetensors with a tool you trust, or use a .safetensors copy."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or cut off: torch cannot read it. {_DOWNLOAD_AGAIN}") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no named tensors, so it is not a file of model weights.")
    return dict(_named_tensors(content))


def _named_tensors(content: dict) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors of a dict, and of dicts in it one level down (``string_to_param`` of old embeddings)."""
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items() if isinstance(inner, torch.Tensor))
