"""Embedding files made of others: in another program's layout, as a mean, or the first vectors alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from library.embedding.embedding_file import EmbeddingFile
from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.support.atomic_files import write_atomically
from library.support.errors import UserError, counted

# What is true of the very file that says it; the rest goes along into files that are made of it.
_OF_ONE_FILE = re.compile(r"ti\.|sshs_|modelspec\.(hash_sha256|date|trigger_phrase|usage_hint)$")
_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")


def convert(file: Path, layout: str, output: Path) -> None:
    """Write ``file`` in another program's layout. Raises UserError."""
    embedding = EmbeddingFile.read(file)
    _require_suffix(output, ".pt" if layout == "a1111" else ".safetensors", layout)
    if layout in ("diffusers", "onetrainer") and not embedding.is_pair:
        name = embedding.token if layout == "diffusers" else "emp_params"
        (rows,) = embedding.rows.values()
        content = safetensors_bytes({name: rows.contiguous()}, dict(embedding.metadata))
        write_atomically(output, content, keep_old=True)
        print(f"Written: {output}")
    else:
        _write(output, embedding, embedding.rows)


def merge(files: Sequence[Path], weights: Sequence[float] | None, output: Path) -> None:
    """Write the mean of ``files``, each counting by its weight (default: all alike). Raises UserError."""
    embeddings = [EmbeddingFile.read(path) for path in files]
    first = embeddings[0]
    shares = weights or [1.0] * len(embeddings)
    if len(shares) != len(embeddings):
        raise UserError(f"--weights has {counted(len(shares), 'number')} for {counted(len(embeddings), 'file')}.")
    if sum(shares) == 0:
        raise UserError("--weights adds up to 0, so there is no mean.")
    for other in embeddings[1:]:
        if _shapes(other) != _shapes(first):
            raise UserError(
                f"{other.path} ({_described(other)}) cannot be averaged with {first.path} ({_described(first)})."
            )
    total = sum(shares)
    means = {
        key: torch.stack([share / total * one.rows[key] for share, one in zip(shares, embeddings, strict=True)]).sum(0)
        for key in first.rows
    }
    _write(output, embeddings[-1], means)


def first_vectors(file: Path, count: int, output: Path) -> None:
    """Write the first ``count`` vectors of ``file``. Raises UserError."""
    embedding = EmbeddingFile.read(file)
    if not 1 <= count <= embedding.count:
        raise UserError(f"--vectors={count}: {file} has {counted(embedding.count, 'vector')}.")
    _write(output, embedding, {key: rows[:count] for key, rows in embedding.rows.items()})


def _write(output: Path, source: EmbeddingFile, rows: Mapping[str, Tensor]) -> None:
    """Write vectors of ``source``, as a training would; its own record and description go along."""
    record = TrainingRecord(**{**vars(source.record), "num_vectors": len(next(iter(rows.values())))})
    described = {name: value for name, value in source.metadata.items() if not _OF_ONE_FILE.match(name)}
    if output.suffix not in _SUFFIXES:
        raise UserError(
            f"--output {output}: an embedding's name ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}."
        )
    write_embedding(output, rows, record, metadata=described or None, keep_old=output.exists())
    print(f"Written: {output}")


def _require_suffix(output: Path, suffix: str, layout: str) -> None:
    if output.suffix != suffix:
        raise UserError(f"--output {output}: the layout {layout} is a {suffix} file. Give a name that ends so.")


def _shapes(embedding: EmbeddingFile) -> dict[str, torch.Size]:
    return {key: rows.shape for key, rows in embedding.rows.items()}


def _described(embedding: EmbeddingFile) -> str:
    return f"{counted(embedding.count, 'vector')} for {embedding.base}"
