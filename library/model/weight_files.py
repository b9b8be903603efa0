"""Files of weights: what they hold is known from the header, tensors are read when they are asked for.

Both kinds of file are recognised by their content, since links into a download cache have no suffix: safetensors, and
what ``torch.save`` wrote (``.ckpt``, ``.pt``, ``.bin``), of which nothing is ever run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.support.errors import UserError, looked_for
from library.support.safetensors_header import read_safetensors_header
from library.support.stored_tensors import Place, Tensors, UnreadTensors, unread_places
from library.support.text_files import not_downloaded
from library.support.torch_files import is_whole_zip, torch_content
from library.support.torch_pickle import StoredTensor

_DOWNLOAD_AGAIN = "Download or copy it again."
_MOST_WRAPPERS = 4  # a "state_dict" in a "state_dict": some programs save a checkpoint as a part of theirs


@dataclass(frozen=True)
class Weights:
    """Names and shapes of the tensors in one or several files, and the way to some of them, still ``unread``.

    ``metadata`` is that of a safetensors file, or the strings that a torch file holds beside its tensors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    unread: Callable[[Iterable[str]], UnreadTensors] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> Tensors:
        """Read some tensors, all at once."""
        return {name: tensor.read() for name, tensor in self.unread(names).items()}

    def unread_all(self) -> UnreadTensors:
        """All tensors, still unread."""
        return self.unread(self.shapes)

    def read_all(self) -> Tensors:
        """Read all tensors at once: for small files."""
        return self.read(self.shapes)


def open_weights(path: Path, *, mmap: bool = True) -> Weights:
    """Open a file without reading its tensors.

    With ``mmap`` the tensors are views of the mapped file: they take no memory of their own until they are cast or
    moved. Without it they are read plainly, which is faster on network drives. Raises UserError if the file is missing,
    cut off, or no file of weights.
    """
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else f"does not exist{looked_for(path)}"
            raise UserError(f"{path} {problem}. Check the path.")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    if head[8:9] == b"{":
        return _open_safetensors(path, mmap)
    if head[:2] == b"PK":
        if not is_whole_zip(path):
            raise UserError(f"{path} is cut off: the end of the file is missing. {_DOWNLOAD_AGAIN}")
        return _open_pickle(path, mmap)
    if head[:1] == b"\x80":
        return _open_pickle(path, mmap)
    reason = not_downloaded(head) or "it is neither a safetensors nor a torch file"
    raise UserError(f"{path} cannot be read as a file of weights: {reason}.")


def join_weights(paths: Sequence[Path], *, mmap: bool = True) -> Weights:
    """Open the shards of one model as if they were one file. Raises UserError if one is missing or unreadable."""
    shards = [open_weights(path, mmap=mmap) for path in paths]

    def unread(names: Iterable[str]) -> UnreadTensors:
        names = set(names)
        return {name: t for shard in shards for name, t in shard.unread(names & shard.shapes.keys()).items()}

    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    if len(shapes) < sum(len(shard.shapes) for shard in shards):
        raise UserError(f"{paths[0]} and the other parts of this model hold some tensors twice. {_DOWNLOAD_AGAIN}")
    return Weights(shapes, unread)


def _open_safetensors(path: Path, mmap: bool) -> Weights:
    places, metadata = read_safetensors_header(path)
    return _weights(path, mmap, places, metadata)


def _weights(path: Path, mmap: bool, places: dict[str, Place], metadata: Mapping[str, str]) -> Weights:
    def unread(names: Iterable[str]) -> UnreadTensors:
        return unread_places(path, mmap, {name: places[name] for name in names})

    return Weights({name: place.shape for name, place in places.items()}, unread, metadata)


def _open_pickle(path: Path, mmap: bool) -> Weights:
    """The tensors of a torch file, out of its "state_dict" if it has one."""
    content = torch_content(path)
    for _ in range(_MOST_WRAPPERS):
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no named tensors, so it is neither a model nor an embedding.")
    strings = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, str)}
    return _weights(path, mmap, {name: tensor.place for name, tensor in _named_tensors(content)}, strings)


def _named_tensors(content: dict[Any, Any]) -> Iterable[tuple[str, StoredTensor]]:
    """Tensors of a dict, and of dicts in it one level down (``string_to_param`` of old embeddings)."""
    for name, value in content.items():
        if isinstance(value, StoredTensor):
            yield str(name), value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items() if isinstance(inner, StoredTensor))
