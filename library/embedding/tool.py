"""A command for embedding files: say what is in them, write them in another layout, average them, take a part."""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from library.embedding.clients import usages
from library.embedding.files import PAIR, base_of_widths, read_stored, write_embedding
from library.embedding.metadata import TrainingRecord
from library.support.atomic_files import write_atomically
from library.support.errors import UserError, counted

_LAYOUTS = ("safetensors", "a1111", "comfyui", "diffusers", "onetrainer")
# What is true of the very file that says it; the rest goes along into files that are made of it.
_OF_ONE_FILE = re.compile(r"ti\.|sshs_|modelspec\.(hash_sha256|date|trigger_phrase|usage_hint)$")
_LONGEST_VALUE = 200  # characters of a metadata value that are printed; a thumbnail has many thousands


@dataclass(frozen=True)
class Embedding:
    """A file's vectors, float32 [N, width] by key, how they were stored, and what the file says of itself."""

    path: Path
    rows: dict[str, Tensor]
    dtypes: dict[str, str]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Embedding":
        """Raises UserError for what is no embedding, see ``read_embedding``."""
        stored = read_stored(path)
        return cls(path, stored.rows, stored.dtypes, stored.metadata)

    @property
    def count(self) -> int:
        """Its number of vectors, the same for each encoder."""
        return len(next(iter(self.rows.values())))

    @property
    def base(self) -> str:
        """The base that vectors of these widths are for."""
        return base_of_widths({key: rows.shape[1] for key, rows in self.rows.items()})

    @property
    def token(self) -> str:
        """The placeholder token, or the file's name where it says none."""
        return self.metadata.get("ti.token") or self.metadata.get("name") or self.path.stem

    @property
    def record(self) -> TrainingRecord:
        """How it came about, as far as the file says it."""
        known = {
            field.name: value
            for field in fields(TrainingRecord)
            if (value := self.metadata.get(f"ti.{field.name}")) is not None
        }
        return TrainingRecord(**{**known, "token": self.token, "num_vectors": self.count})  # type: ignore[arg-type]  # strings, as they are written again

    def facts(self) -> dict[str, Any]:
        """All that can be said of it, for people and programs."""
        vectors = {
            key: {
                "dtype": self.dtypes[key],
                "norms": [round(norm, 6) for norm in rows.norm(dim=1).tolist()],
                "cosines": [[round(value, 4) for value in row] for row in _cosines(rows).tolist()],
            }
            for key, rows in self.rows.items()
        }
        pair = set(self.rows) <= set(PAIR)
        read_by = usages(self.path.stem, self.path.suffix, self.token, self.count, pair=pair)
        return {
            "file": str(self.path),
            "base": self.base,
            "token": self.token,
            "num_vectors": self.count,
            "vectors": vectors,
            "clients": {usage.client: {"prompt": usage.word, "how": usage.how} for usage in read_by},
            "metadata": dict(self.metadata),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 for a user's mistake, which is told in a sentence."""
    asked = _parser().parse_args(arguments)
    try:
        asked.run(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m library.embedding", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what is in the files")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print a JSON list instead")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="write a file in another program's layout")
    convert.add_argument("file", type=Path, metavar="FILE")
    convert.add_argument("--to", required=True, choices=_LAYOUTS, help="safetensors is read by every program")
    convert.set_defaults(run=_convert)
    merge = commands.add_parser("merge", help="average files, for example the last checkpoints of one run")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--weights", nargs="+", type=float, metavar="W", help="one number a file; default: all alike")
    merge.set_defaults(run=_merge)
    part = commands.add_parser("slice", help="take the first vectors of a file")
    part.add_argument("file", type=Path, metavar="FILE")
    part.add_argument("--vectors", required=True, type=int, metavar="K", help="how many")
    part.set_defaults(run=_slice)
    for command in (convert, merge, part):
        command.add_argument("--output", required=True, type=Path, metavar="FILE", help="the file to write")
    return parser


def _inspect(asked: argparse.Namespace) -> None:
    found = [Embedding.read(path).facts() for path in asked.files]
    if asked.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(map(_text, found)))


def _text(facts: Mapping[str, Any]) -> str:
    lines = [facts["file"], f"  {facts['base']}: {counted(facts['num_vectors'], 'vector')}, token {facts['token']}"]
    for key, vectors in facts["vectors"].items():
        lines.append(f"  {key}, {vectors['dtype']}: norm and cosines to each other")
        for number, (norm, cosines) in enumerate(zip(vectors["norms"], vectors["cosines"], strict=True)):
            shown = " ".join(f"{cosine:6.3f}" for cosine in cosines[:8]) + (" …" if len(cosines) > 8 else "")
            lines.append(f"    {number:>3}  {norm:9.4f}  {shown}")
    lines.append("  programs, and what to write in a prompt there")
    width = max(map(len, facts["clients"]))
    lines += [f"    {name:<{width}}  {use['prompt'] or '-'}  ({use['how']})" for name, use in facts["clients"].items()]
    lines += ["  metadata"] if facts["metadata"] else ["  no metadata"]
    for name, value in sorted(facts["metadata"].items()):
        lines.append(f"    {name}: {value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + ' …'}")
    return "\n".join(lines)


def _convert(asked: argparse.Namespace) -> None:
    embedding = Embedding.read(asked.file)
    _require_suffix(asked.output, ".pt" if asked.to == "a1111" else ".safetensors", asked.to)
    if asked.to in ("diffusers", "onetrainer") and not set(embedding.rows) <= set(PAIR):
        name = embedding.token if asked.to == "diffusers" else "emp_params"
        (rows,) = embedding.rows.values()
        content = safetensors_bytes({name: rows.contiguous()}, dict(embedding.metadata))
        _written(asked.output, write_atomically(asked.output, content, keep_old=True))
    else:
        _write(asked.output, embedding, embedding.rows)


def _merge(asked: argparse.Namespace) -> None:
    embeddings = [Embedding.read(path) for path in asked.files]
    first = embeddings[0]
    shares = asked.weights or [1.0] * len(embeddings)
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
    _write(asked.output, embeddings[-1], means)


def _slice(asked: argparse.Namespace) -> None:
    embedding = Embedding.read(asked.file)
    if not 1 <= asked.vectors <= embedding.count:
        raise UserError(f"--vectors={asked.vectors}: {asked.file} has {counted(embedding.count, 'vector')}.")
    _write(asked.output, embedding, {key: rows[: asked.vectors] for key, rows in embedding.rows.items()})


def _write(output: Path, source: Embedding, rows: Mapping[str, Tensor]) -> None:
    """Write vectors of ``source``, as a training would; its own record and description go along."""
    record = TrainingRecord(**{**vars(source.record), "num_vectors": len(next(iter(rows.values())))})
    described = {name: value for name, value in source.metadata.items() if not _OF_ONE_FILE.match(name)}
    _written(output, write_embedding(output, rows, record, metadata=described or None, keep_old=output.exists()))


def _written(output: Path, kept: Path | None) -> None:
    if kept:
        print(f"The file that was there is now {kept}.")
    print(f"Written: {output}")


def _require_suffix(output: Path, suffix: str, layout: str) -> None:
    if output.suffix != suffix:
        raise UserError(f"--output {output}: the layout {layout} is a {suffix} file. Give a name that ends so.")


def _cosines(rows: Tensor) -> Tensor:
    directions = torch.nn.functional.normalize(rows, dim=1)
    return directions @ directions.T


def _shapes(embedding: Embedding) -> dict[str, torch.Size]:
    return {key: rows.shape for key, rows in embedding.rows.items()}


def _described(embedding: Embedding) -> str:
    return f"{counted(embedding.count, 'vector')} for {embedding.base}"
