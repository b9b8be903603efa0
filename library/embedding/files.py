"""Embedding files: writing the two layouts that clients read, and reading every layout that is in use.

Written: ``{"emb_params": [N, width]}`` for one text encoder, ``{"clip_l": [N, 768], "clip_g": [N, 1280]}`` for two.
Read besides: OneTrainer's ``emp_params``, AUTOMATIC1111's ``string_to_param``, diffusers' ``{"<token>": …}``, and
embeddings bundled in a LoRA file (``bundle_emb.<word>.<key>``); a single vector may be one-dimensional.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from library.embedding.metadata import TrainingRecord, file_metadata
from library.model.identity import Shapes, identify_file
from library.model.weight_files import open_weights
from library.support.atomic_files import write_atomically
from library.support.errors import UserError, counted, first_names
from library.support.file_hash import legacy_hash
from library.support.torch_files import torch_content

SINGLE, PAIR = ("emb_params",), ("clip_l", "clip_g")
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_BASE_OF_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}
_BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<key>string_to_param\.\*|clip_l|clip_g|emb_params|emp_params)")
# OneTrainer's output embeddings: vectors for what the text encoder gives, not for what it reads.
_OUTPUT_KEYS = frozenset({"emp_params_out", "clip_l_out", "clip_g_out"})
# Name and hash of the base model: ours, sd-scripts' and, in torch files, AUTOMATIC1111's.
_ORIGIN_KEYS = (
    ("ti.base_model", "ti.base_model_hash"),
    ("ss_sd_model_name", "ss_new_sd_model_hash"),
    ("sd_checkpoint_name", "sd_checkpoint"),
)
# AUTOMATIC1111 writes this id ("*" in CLIP's vocabulary) whatever the embedding is called.
_WEBUI_TOKEN_ID = 265


def write_embedding(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    record: TrainingRecord,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    keep_old: bool = False,
) -> Path | None:
    """Write the trained rows; the suffix decides the format (``.safetensors``, else torch's).

    ``tensors`` maps ``emb_params``, or ``clip_l`` and ``clip_g``, to rows [N, width] on any device; ``dtype`` None
    keeps theirs. ``metadata`` (from ``modelspec_metadata``) goes, completed, into a ``.safetensors`` file; torch files
    have no place for it. The old file stays until the new one is complete; for ``keep_old`` and what is returned see
    ``write_atomically``. Raises :class:`UserError` when the file cannot be written, or when a row is NaN or infinite.
    """
    path = Path(path)
    plain = {key: _plain(rows, dtype) for key, rows in tensors.items()}
    for key, rows in plain.items():
        if not torch.isfinite(rows).all():
            raise UserError(f"{path} was not written: the trained rows ({key}) hold NaN or infinite values.")
    if path.suffix == ".safetensors":
        content = _safetensors_content(plain, record, path.stem, metadata)
    else:
        content = _torch_content(plain, record)
    return write_atomically(path, content, keep_old=keep_old)


def run_of(path: Path) -> str | None:
    """The run that wrote an embedding file (``TrainingRecord.run``); None where it does not say so."""
    try:
        if path.suffix == ".safetensors":
            return open_weights(path).metadata.get("ti.run")
        content = torch_content(path)
    except (UserError, OSError):  # missing, damaged or foreign
        return None
    return content.get("run") if isinstance(content, Mapping) else None


@dataclass(frozen=True)
class Origin:
    """The base model that an embedding was trained on, as its file says: name, and SHA-256 or what web UIs keep."""

    base_model: str | None
    base_hash: str | None


def origin_of(path: Path | str) -> Origin | None:
    """What an embedding file says of its base model, or None if nothing. Raises UserError like ``read_embedding``."""
    metadata = open_weights(Path(path), mmap=False).metadata
    for keys in _ORIGIN_KEYS:
        name, digest = (metadata.get(key) or None for key in keys)
        if name or digest:
            return Origin(name, digest)
    return None


def read_embedding(path: Path | str) -> dict[str, Tensor]:
    """Read the rows of an embedding file of any known layout, as float32 [N, width] on the CPU.

    The keys are ``emb_params``, or those of ``clip_l`` and ``clip_g`` that the file has. Nothing in them is
    run. Raises :class:`UserError` for a file that is missing, damaged, unsafe or not an
    embedding.
    """
    return read_stored(path).rows


@dataclass(frozen=True)
class StoredEmbedding:
    """An embedding file: its rows as :func:`read_embedding` gives them, how they are stored, what it says of itself."""

    rows: dict[str, Tensor]
    dtypes: dict[str, str]
    metadata: Mapping[str, str]


def read_stored(path: Path | str) -> StoredEmbedding:
    """All that an embedding file holds, read once. Raises UserError like :func:`read_embedding`."""
    path = Path(path)
    weights = open_weights(path, mmap=False)
    # "string_to_token" holds the id of a token.
    shapes = {name: size for name, size in weights.shapes.items() if not name.startswith("string_to_token.")}
    chosen = _choose(shapes, path)
    tensors = weights.read(chosen.values())
    rows = {key: _as_rows(tensors[name], key, path) for key, name in chosen.items()}
    if len({len(each) for each in rows.values()}) > 1:
        counts = " and ".join(f"{counted(len(each), 'vector')} for {key}" for key, each in rows.items())
        raise UserError(f"{path} holds {counts}; an embedding has as many for both text encoders. Use another file.")
    return StoredEmbedding(
        rows,
        {key: str(tensors[name].dtype).removeprefix("torch.") for key, name in chosen.items()},
        weights.metadata,
    )


def rows_from_file(path: Path | str, keys: Sequence[str], widths: Sequence[int], count: int) -> list[Tensor | None]:
    """Read the rows to go on training from (``--weights``): float32 [count, width] for each of the model's ``keys``.

    A file for two encoders may lack one of them; its place is then None. Raises :class:`UserError` for a file of
    another base (named by its width) or with another number of vectors.
    """
    content = read_embedding(path)
    known = rows_by_key(content, dict(zip(keys, widths, strict=True)))
    if known is None:
        raise UserError(_other_base(path, content, keys, widths))
    rows = [known.get(key) for key in keys]
    for found in rows:
        if found is not None and found.shape[0] != count:
            raise UserError(
                f"--weights {path} holds {found.shape[0]} vector(s), but --num_vectors_per_token is {count}. "
                f"Use --num_vectors_per_token={found.shape[0]}, or another file."
            )
    return rows


def rows_by_key(content: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor] | None:
    """An embedding's rows [N, width] for those of a model's keys that it has; None if it is for another base.

    ``widths`` of the model's text encoders are by key. A lone tensor of whatever key serves a model with one encoder.
    """
    if len(widths) == 1 and len(content) == 1:
        content = dict(zip(widths, content.values(), strict=True))
    rows = {key: content[key] for key in widths if key in content}
    fits = all(found.shape[1] == widths[key] for key, found in rows.items())
    return rows if rows and fits else None


def _plain(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous CPU tensor of its own: clients test for exactly torch.Tensor, so no Parameter may be left."""
    return rows.detach().to(device="cpu", dtype=dtype).clone(memory_format=torch.contiguous_format)


def _safetensors_content(
    tensors: dict[str, Tensor], record: TrainingRecord, stem: str, metadata: Mapping[str, str] | None
) -> bytes:
    unlabelled = safetensors_bytes(tensors)
    if metadata is None:
        return unlabelled
    whole = file_metadata(metadata, record, stem)
    _, data = _header_and_data(unlabelled)
    digest = hashlib.sha256(data).hexdigest()
    # As sd-scripts makes it: of the file as it is with its ss_* keys alone, which nobody edits later.
    unedited = _labelled(unlabelled, {name: value for name, value in whole.items() if name.startswith("ss_")})
    hashes = {
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "sshs_legacy_hash": legacy_hash(io.BytesIO(unedited)),
    }
    return _labelled(unlabelled, whole | hashes)


def _header_and_data(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The parts of a safetensors file: an 8-byte length, a JSON header of that length, the tensors' bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def _labelled(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata, in the order of its names: the library would write another order every time."""
    header, data = _header_and_data(content)
    header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _torch_content(tensors: dict[str, Tensor], record: TrainingRecord) -> bytes:
    """One format for ``.pt`` and ``.ckpt``: AUTOMATIC1111's fields beside ``emb_params``, or the two tensors alone.

    The old serialisation is deliberate: AUTOMATIC1111 refuses zip members that newer torch versions add.
    """
    content: dict[str, object] = dict(tensors)
    if "emb_params" in tensors:
        content |= {
            "string_to_token": {"*": _WEBUI_TOKEN_ID},
            "string_to_param": {"*": tensors["emb_params"]},
            "name": record.token,
            "step": record.steps,
            "sd_checkpoint": record.base_model_hash,
            "sd_checkpoint_name": record.base_model,
        }
    if record.run:
        content["run"] = record.run
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _choose(shapes: Shapes, path: Path) -> dict[str, str]:
    """Find the rows among a file's tensors: our key → the name that stands for it there."""
    names = list(shapes)
    bundled = [match for name in names if (match := _BUNDLED.fullmatch(name))]
    if bundled:
        words = sorted({match["word"] for match in bundled})
        if len(words) > 1:
            raise UserError(f"{path} bundles several embeddings ({', '.join(words)}). Give a file that holds one.")
        inside = {match["key"]: match[0] for match in bundled}
        of_word = {key: shapes[name] for key, name in inside.items()}
        return {key: inside[name] for key, name in _choose(of_word, path).items()}

    params = [name for name in names if name.startswith("string_to_param.")]
    if len(params) > 1 and "string_to_param.*" not in params:
        raise UserError(f"{path} holds several embeddings ({', '.join(params)}). Give a file that holds one.")
    if params:
        return {"emb_params": "string_to_param.*" if "string_to_param.*" in params else params[0]}
    if pair := {key: key for key in PAIR if key in names}:
        return pair
    for name in ("emb_params", "emp_params"):
        if name in names:
            return {"emb_params": name}
    if names and set(names) <= _OUTPUT_KEYS:
        raise UserError(
            f"{path} holds only OneTrainer's output embedding ({', '.join(sorted(names))}): vectors that are added "
            "behind the text encoder. Training starts from vectors that go into it: switch off OneTrainer's output "
            "embedding, and use a file that was trained so."
        )
    if len(names) == 1:
        return {"emb_params": names[0]}
    if not names:
        raise UserError(f"{path} is not an embedding: it holds no tensors.")
    what = identify_file(shapes).what
    if what.startswith(("not a ", "an embedding")):
        what = f"a file of {counted(len(names), 'tensor')} ({first_names(names)})"
    raise UserError(f"{path} is not an embedding but {what}. Give the embedding's own file.")


def _as_rows(rows: Tensor, key: str, path: Path) -> Tensor:
    if rows.ndim not in (1, 2) or not rows.is_floating_point() or rows.numel() == 0:
        shape, kind = list(rows.shape), str(rows.dtype).removeprefix("torch.")
        raise UserError(
            f"{path} is not an embedding: {key} is {kind} {shape}; expected floating point [vectors, width]."
        )
    rows = torch.atleast_2d(rows.to(torch.float32)).contiguous()
    if not torch.isfinite(rows).all():
        raise UserError(f"{path} holds NaN or infinite values ({key}), so nothing can be made of it. Use another file.")
    return rows


def _other_base(path: Path | str, content: Mapping[str, Tensor], keys: Sequence[str], widths: Sequence[int]) -> str:
    found = base_of_widths({key: rows.shape[1] for key, rows in content.items()})
    wanted = base_of_widths(dict(zip(keys, widths, strict=True)))
    return (
        f"--weights {path} belongs to {found}; this model is {wanted}. "
        "Give an embedding of the same base, or train on the base that this file was made for."
    )


def base_of_widths(widths: Mapping[str, int]) -> str:
    """Name a base by its encoders' widths: ``Stable Diffusion XL (clip_l 768, clip_g 1280)``."""
    sizes = ", ".join(f"{key} {width}" if key in PAIR else f"vectors of width {width}" for key, width in widths.items())
    if set(widths) & set(PAIR):
        return f"Stable Diffusion XL ({sizes})"
    return f"{_BASE_OF_WIDTH.get(next(iter(widths.values())), 'an unknown base')} ({sizes})"
