"""What can be said of an embedding file, for people and programs; with a model, also beside its vocabulary."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.embedding.clients import Usage, usages
from library.embedding.embedding_file import EmbeddingFile
from library.embedding.files import base_of_widths, rows_by_key
from library.embedding.vocabulary import Vocabulary, vocabularies_of
from library.model.family import family_of
from library.model.model_paths import hub_id, local_path
from library.options.options import ModelOptions
from library.support.errors import UserError, counted
from library.support.imports import lean_imports

_LONGEST_VALUE = 200  # characters of a metadata value that are printed; a thumbnail has many thousands
_WORDS = 5  # nearest ones that are named
_COSINES = 8  # of a vector to the others that are printed


def inspect(files: Sequence[Path], model: str | None, *, as_json: bool) -> None:
    """Print what is in the files, beside the vocabulary of ``model`` if one is given. Raises UserError."""
    embeddings = [EmbeddingFile.read(path) for path in files]
    known = KnownWords.of(model) if model else None
    found = [facts(embedding, known) for embedding in embeddings]
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n\n".join(map(_text, found)))


@dataclass(frozen=True)
class KnownWords:
    """The vocabulary of each of a model's text encoders, by the key of its vectors in embedding files."""

    model: str
    by_key: Mapping[str, Vocabulary]

    @classmethod
    def of(cls, model: str) -> "KnownWords":
        """Those of a model as ``--model`` names it; only its token tables are read. Raises UserError."""
        if local_path(model) is None:
            hub_id(model, "--model")
        with lean_imports():
            from library.model.base_model import BaseModel
        opened = BaseModel.open(ModelOptions(pretrained_model_name_or_path=model), None)
        keys = family_of(opened.architecture).embedding_keys
        return cls(model, dict(zip(keys, vocabularies_of(opened), strict=True)))

    def rows_of(self, embedding: EmbeddingFile) -> dict[str, Tensor]:
        """The file's vectors by this model's keys. Raises UserError if they are for another base."""
        widths = {key: words.table.shape[1] for key, words in self.by_key.items()}
        rows = rows_by_key(embedding.rows, widths)
        if rows is None:
            raise UserError(
                f"{embedding.path} belongs to {embedding.base}; --model {self.model} is {base_of_widths(widths)}. Give "
                "a model of the same base."
            )
        return rows


def facts(embedding: EmbeddingFile, known: KnownWords | None = None) -> dict[str, Any]:
    """All that can be said of a file. Raises UserError if ``known`` are the words of another base."""
    vectors = {
        key: {
            "dtype": embedding.dtypes[key],
            "norms": _rounded(rows.norm(dim=1), 6),
            "cosines": [_rounded(row, 4) for row in _cosines(rows)],
        }
        for key, rows in embedding.rows.items()
    }
    beside = known.rows_of(embedding) if known else {}
    read_by = usages(
        embedding.path.stem, embedding.path.suffix, embedding.token, embedding.count, pair=embedding.is_pair
    )
    return {
        "file": str(embedding.path),
        "base": embedding.base,
        "token": embedding.token,
        "num_vectors": embedding.count,
        "vectors": vectors,
        **({"model": known.model} if known else {}),
        **({"vocabulary": {key: _beside(known.by_key[key], rows) for key, rows in beside.items()}} if known else {}),
        "clients": {usage.client: {"prompt": usage.word, "how": _how(usage, embedding)} for usage in read_by},
        "metadata": dict(embedding.metadata),
    }


def _how(usage: Usage, embedding: EmbeddingFile) -> str:
    """How a program takes the file; diffusers by a call, of which more is said in docs/clients.md."""
    if usage.client != "diffusers" or usage.word is None:
        return usage.how
    encoders = "for each text encoder, " if embedding.is_pair else ""
    return f'{encoders}pipe.load_textual_inversion(…, token="{usage.word}")'


def _beside(words: Vocabulary, rows: Tensor) -> dict[str, Any]:
    """Vectors [N, D] beside a vocabulary: its usual norm, theirs in such norms, and the nearest words of each."""
    return {
        "usual_norm": round(words.typical_norm, 6),
        "times_usual": _rounded(rows.norm(dim=1) / words.typical_norm, 4),
        "nearest": [
            [{"word": one.word, "cosine": round(one.cosine, 4)} for one in neighbours]
            for neighbours in words.nearest(rows, _WORDS)
        ],
    }


def _text(found: Mapping[str, Any]) -> str:
    lines = [found["file"], f"  {found['base']}: {counted(found['num_vectors'], 'vector')}, token {found['token']}"]
    for key, vectors in found["vectors"].items():
        lines.append(f"  {key}, {vectors['dtype']}: norm and cosines to each other")
        for number, (norm, cosines) in enumerate(zip(vectors["norms"], vectors["cosines"], strict=True)):
            shown = " ".join(f"{cosine:6.3f}" for cosine in cosines[:_COSINES]) + " …" * (len(cosines) > _COSINES)
            lines.append(f"    {number:>3}  {norm:9.4f}  {shown}")
    for key, beside in found.get("vocabulary", {}).items():
        lines.append(f"  {key} beside {found['model']}: norm in norms of a usual word ({beside['usual_norm']:.4f})")
        lines[-1] += ", and the nearest words by their cosine"
        for number, (times, nearest) in enumerate(zip(beside["times_usual"], beside["nearest"], strict=True)):
            words = ", ".join(f"{one['word']} {one['cosine']:.3f}" for one in nearest)
            lines.append(f"    {number:>3}  {times:8.2f}×  {words}")
    return "\n".join(lines + _uses(found["clients"]) + _told(found["metadata"]))


def _uses(clients: Mapping[str, Mapping[str, str]]) -> list[str]:
    width = max(map(len, clients))
    lines = [f"    {name:<{width}}  {use['prompt'] or '-'}  ({use['how']})" for name, use in clients.items()]
    return ["  programs, and what to write in a prompt there", *lines]


def _told(metadata: Mapping[str, str]) -> list[str]:
    shown = {
        name: value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]} …"
        for name, value in sorted(metadata.items())
    }
    return ["  metadata" if shown else "  no metadata", *(f"    {name}: {value}" for name, value in shown.items())]


def _rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def _cosines(rows: Tensor) -> Tensor:
    directions = torch.nn.functional.normalize(rows, dim=1)
    return directions @ directions.T
