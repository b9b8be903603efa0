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

# What torch's reader of pickles runs into, depending on where a file is damaged.
_DAMAGE = (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError)
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
    moved. Without it they are read plainly, which is faster on network drives. Raises UserError if the file is missing,
    cut off, or no file of weights.
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
    header = _safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    return Weights(shapes, partial(_read_safetensors, path, "mmap" if mmap else "pread"), metadata)


def _safetensors_header(path: Path) -> dict:
    """The parsed header: per tensor its dtype, shape and place. Read here so that a cut-off file is told as one."""
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
    return header


def _read_safetensors(path: Path, backend: str, names: Iterable[str]) -> Tensors:
    with safe_open(path, framework="pt", backend=backend) as file:
        return {name: file.get_tensor(name) for name in names}


def _open_pickle(path: Path, mmap: bool) -> Weights:
    tensors = _load_pickle(path, mmap)
    return Weights({name: tuple(t.shape) for name, t in tensors.items()}, lambda names: {n: tensors[n] for n in names})


def _load_pickle(path: Path, mmap: bool) -> Tensors:
    """The tensors of a torch file, out of its "state_dict" if it has one."""
    try:
        if mmap and path.suffix != ".safetensors":  # by that suffix torch.load expects safetensors
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            with path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects besides tensors and could run code when read, so it is refused. Convert it "
            "to .safetensors with a tool you trust, or use a .safetensors copy."
        ) from error
    except _DAMAGE as error:
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
