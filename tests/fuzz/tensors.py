"""Targets that hold tensors: embedding files, checkpoints, states and latent caches."""

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fuzz.mutations import edited, edits, poked, pokes, values
from fuzz.running import Target
from library.embedding.files import rows_from_file
from library.model.identity import identify_file
from library.model.weight_files import open_weights
from library.support.errors import UserError

BOMB = 3 * 2**29  # bytes


def safetensors_bytes(header: Any, size: int) -> bytes:
    """A file with this header, its length right, and ``size`` bytes of data."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\x3c" * size


def header_of(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], int]:
    """The header of float32 tensors, one after another, and how many bytes they are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "modelspec.prediction_type": "epsilon"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return header, end


_EMBEDDINGS = (
    {"emb_params": (2, 768)},
    {"clip_l": (2, 768), "clip_g": (2, 1280)},
    {"bundle_emb.mychar.string_to_param.*": (2, 768)},
    {"<mychar>": (768,)},
)
_CHECKPOINT = {
    "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 768),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (64, 32),
    "first_stage_model.encoder.conv_in.weight": (32, 3, 3, 3),
}
_HEADER_KEYS = ("dtype", "shape", "data_offsets", "emb_params", "clip_l", "clip_g", "emp_params", "string_to_param.*")
_DTYPES = ("F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", "")
_SHAPES = ([], [0], [-1], [2**63], [2**40, 2**40], [768], [1, 768], [2, 0], [0, 768], [1, 1, 768], [2.0, 768], ["2"])
_OFFSETS = ([], [0], [0, 0], [0, 2**63], [-1, 4], [4, 0], [8, 8 + 6144], [0, 1e3], ["0", "4"], [0, 3072], [0, 2**40])
_HEADER_VALUES = st.one_of(st.sampled_from((*_DTYPES, *_SHAPES, *_OFFSETS)), values)
_HEADER_EDITS = st.lists(
    st.tuples(st.sampled_from(("set", "set", "set", "drop", "copy")), *[st.integers(0, 9999)] * 2, _HEADER_VALUES),
    max_size=2,
)


def _header_recipes(bases: int) -> st.SearchStrategy:
    changes = st.one_of(_HEADER_EDITS, edits(_HEADER_KEYS, most=2))
    return st.tuples(st.integers(0, bases - 1), changes, st.one_of(st.just([]), pokes(1)))


def _from_header(bases: Sequence[dict], recipe) -> bytes:
    number, changes, last = recipe
    if isinstance(number, str):
        return safetensors_bytes(number, 6144)
    header, size = header_of(bases[number])
    return poked(safetensors_bytes(edited(header, changes), size), last)


_ENTRY = {"dtype": "F32", "shape": [2, 768], "data_offsets": [0, 6144]}
_ODD_HEADERS = tuple(
    (json.dumps(header) if not isinstance(header, str) else header, [], [])
    for header in (
        *({"emb_params": {key: value for key, value in _ENTRY.items() if key != missing}} for missing in _ENTRY),
        *({"emb_params": {**_ENTRY, "dtype": kind}} for kind in (*_DTYPES, None, 3, [])),
        *({"emb_params": {**_ENTRY, "shape": shape}} for shape in (*_SHAPES, None, {}, "ab", 3)),
        *({"emb_params": {**_ENTRY, "data_offsets": offsets}} for offsets in (*_OFFSETS, None, {}, "ab", 3)),
        *({"emb_params": value} for value in (None, [], 3, "a", {})),
        *({"__metadata__": value, "emb_params": _ENTRY} for value in (None, [], {"a": 1}, {"a": {}}, "x")),
        *({"a\ud800": _ENTRY}, {}, {"emb_params": _ENTRY, "clip_l": _ENTRY}),
        *(
            "[" * 10**6,
            "{" + '"a":{' * 10**5,
            '{"a":' + "9" * 5000 + "}",
            "{" + " " * 10**6,
            '{"emb_params":{}',
            "{}" * 9,
        ),
        *('{"emb_params":null,"emb_params":{}}', '{"\ud800":{}}', '{"a":NaN}', '{"emb_params":{"shape":[1e400]}}'),
    )
)


# What may stand where a tensor is expected; made when asked for, for pickles are made of them.
STRANGE: dict[str, Callable[[], Any]] = {
    "expanded": lambda: torch.zeros(1).expand(2**20, 768),
    "expanded more": lambda: torch.zeros(1).expand(2**31, 1280),
    "overlapping": lambda: torch.zeros(768).as_strided((2**22, 768), (0, 1)),
    "few rows": lambda: torch.ones(1).expand(2, 768),
    "meta": lambda: torch.zeros(2, 768, device="meta"),
    "huge meta": lambda: torch.zeros(2**40, 768, device="meta"),
    "sparse": lambda: torch.eye(768)[:2].to_sparse(),
    "huge sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**20, 2**20)),
    "csr": lambda: torch.eye(768)[:2].to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(768), torch.zeros(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2, 768), 0.1, 0, torch.qint8),
    "whole numbers": lambda: torch.zeros(2, 768, dtype=torch.int64),
    "booleans": lambda: torch.zeros(2, 768, dtype=torch.bool),
    "complex": lambda: torch.zeros(2, 768, dtype=torch.complex64),
    "float8": lambda: torch.zeros(2, 768).to(torch.float8_e4m3fn),
    "double": lambda: torch.full((2, 768), 1e300, dtype=torch.float64),
    "half": lambda: torch.zeros(2, 768, dtype=torch.float16),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(2, 768)),
    "parameters": lambda: torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(2, 768))}),
    "computed": lambda: torch.zeros(2, 768, requires_grad=True),
    "conjugate": lambda: torch.zeros(2, 768, dtype=torch.complex64).conj(),
    "nothing": lambda: torch.zeros(0, 768),
    "one number": lambda: torch.tensor(1.0),
    "a vector": lambda: torch.zeros(768),
    "a block": lambda: torch.zeros(1, 2, 768),
    "rows": lambda: torch.zeros(2, 768),
    "wide rows": lambda: torch.zeros(2, 1280),
    "nan": lambda: torch.full((2, 768), float("nan")),
    "infinite": lambda: torch.full((2, 768), float("inf")),
    "itself": lambda: _holding_itself(),
    "itself in a list": lambda: _list_holding_itself(),
    "deep": lambda: _deep(300),
    "storage": lambda: torch.zeros(4).untyped_storage(),
    "numpy": lambda: np.zeros((2, 768), np.float32),
    "bytes": lambda: bytes(100),
    "a set": lambda: {1, 2},
    "a tuple": lambda: (1, (2,)),
    "a slice": lambda: slice(1),
    "dtype": lambda: torch.float32,
    "size": lambda: torch.Size((2, 768)),
    "device": lambda: torch.device("cpu"),
}
STRANGE_NAMES = tuple({"!": name} for name in STRANGE)  # how a tree of a recipe names them
_OBJECTS = st.one_of(st.sampled_from(STRANGE_NAMES), st.sampled_from(STRANGE_NAMES), values)


def _holding_itself() -> dict:
    whole: dict[str, Any] = {}
    whole["state_dict"] = whole
    return whole


def _list_holding_itself() -> list:
    whole: list = []
    whole.append(whole)
    return whole


def _deep(levels: int) -> dict:
    return {"state_dict": _deep(levels - 1)} if levels else {}


def made(tree: Any) -> Any:
    """The objects that a tree names."""
    if isinstance(tree, dict):
        name = tree.get("!") if len(tree) == 1 else None
        return STRANGE[name]() if isinstance(name, str) and name in STRANGE else _made_items(tree)
    return [made(item) for item in tree] if isinstance(tree, list) else tree


def _made_items(tree: dict) -> dict:
    return {key: made(value) for key, value in tree.items()}


def torch_bytes(content: Any, *, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes; as in a file of unknown origin where it refuses."""
    file = io.BytesIO()
    try:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    except Exception:  # what cannot be saved may still be in some file
        return pickle.dumps(repr(content)[:100])
    return file.getvalue()


@cache
def torch_bomb() -> bytes:
    """A torch file whose one tensor is gigabytes of zeros, a thousandth of that when packed.

    Made before a child is forked: it takes as long as the child has.
    """
    pickled = torch_bytes({"emb_params": torch.zeros(1).expand(BOMB // 4 // 768, 768)})
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pickled)) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, True, 1) as to,
    ):
        for name in source.namelist():
            if not name.endswith("/data/0"):
                to.writestr(name, source.read(name))
                continue
            with to.open(name, "w", force_zip64=True) as member:
                for _ in range(BOMB // 2**24):
                    member.write(bytes(2**24))
    return packed.getvalue()


def _disks(content: bytes) -> bytes:
    """A zip file that says it is the second of several."""
    place = content.rfind(b"PK\5\6")
    return content[: place + 4] + b"\1\0\1\0" + content[place + 8 :]


def pickled_bytes(base: Any, recipe) -> bytes:
    """The bytes of a torch file from a recipe (tree or a name, edits, legacy, pokes)."""
    what, changes, legacy, last = recipe
    if what == "bomb":
        return torch_bomb()
    if what == "disks":
        return _disks(torch_bytes(made(base)))
    tree = base if what is None else what
    return poked(torch_bytes(made(edited(tree, changes)), legacy=legacy), last)


def object_recipes(keys: Sequence[str]) -> st.SearchStrategy:
    places = st.integers(0, 9999)
    change = st.one_of(
        st.tuples(st.sampled_from(("set", "set", "set", "copy", "drop")), places, places, _OBJECTS),
        st.tuples(st.just("add"), places, st.just(0), st.tuples(st.sampled_from((*keys, "", 0)), _OBJECTS)),
        st.tuples(st.just("rename"), places, st.just(0), st.sampled_from((*keys, "a\ud800", 3, ""))),
    )
    return st.tuples(
        st.just(None), st.lists(change, max_size=3), st.booleans(), st.one_of(st.just([]), st.just([]), pokes(2))
    )


ROWS = {"!": "rows"}
_EMBEDDING_TREE = {"string_to_param": {"*": ROWS}, "string_to_token": {"*": 265}, "name": "mychar", "step": 100}
_STRANGE_EMBEDDINGS = tuple(
    (tree, [], legacy, [])
    for name in STRANGE_NAMES
    for legacy in (False, True)
    for tree in ({"emb_params": name}, {"string_to_param": name}, {"string_to_param": {"*": name}}, name)
)
_STRANGE_WEIGHTS = tuple(
    (tree, [], False, [])
    for name in STRANGE_NAMES
    for tree in ({"state_dict": name}, {"state_dict": {"a": name}}, name)
)


def _use_rows(file: Path) -> None:
    """Read an embedding for a base that it fits, if there is one."""
    with contextlib.suppress(UserError):
        return _rows_for(file, ("emb_params",), (768,))
    return _rows_for(file, ("clip_l", "clip_g"), (768, 1280))


def _rows_for(file: Path, keys: tuple[str, ...], widths: tuple[int, ...]) -> None:
    for row, width in zip(rows_from_file(file, keys, widths, 2), widths, strict=True):
        assert row is None or (row.dtype == torch.float32 and row.shape == (2, width) and torch.isfinite(row).all())


def _use_checkpoint(file: Path) -> None:
    weights = open_weights(file)
    identity = identify_file(weights.shapes)
    assert f"{identity.what} {identity.advice}".encode() is not None
    str(weights.metadata.get("modelspec.prediction_type", ""))
    for tensor in weights.read_all().values():
        tensor.to(dtype=torch.float32, copy=True)


def _file(suffix: str, content: Callable[[Any], bytes], use: Callable[[Path], None]):
    """Write what ``content`` makes of a recipe, and use it as a run does."""

    def prepare(folder: Path):
        file = folder / f"input{suffix}"
        torch_bomb()

        def act(recipe):
            file.write_bytes(content(recipe))
            use(file)

        return act

    return prepare


_EMBEDDING_KEYS = ("emb_params", "emp_params", "clip_l", "clip_g", "string_to_param", "*", "<mychar>")
_CHECKPOINT_TREE = {"state_dict": dict.fromkeys(_CHECKPOINT, ROWS), "epoch": 3, "string_to_param": {"*": ROWS}}
_SPECIAL = (("bomb", [], False, []), ("disks", [], False, []))

TARGETS = (
    Target("embedding.safetensors", _file(".safetensors", lambda recipe: _from_header(_EMBEDDINGS, recipe), _use_rows),
           _header_recipes(len(_EMBEDDINGS)), (0, [], []), _ODD_HEADERS, 600),
    Target("embedding.pt", _file(".pt", lambda recipe: pickled_bytes(_EMBEDDING_TREE, recipe), _use_rows),
           object_recipes(_EMBEDDING_KEYS), (None, [], False, []), (*_SPECIAL, *_STRANGE_EMBEDDINGS), 400),
    Target("checkpoint.safetensors",
           _file(".safetensors", lambda recipe: _from_header([_CHECKPOINT], recipe), _use_checkpoint),
           _header_recipes(1), (0, [], []), _ODD_HEADERS, 600),
    Target("checkpoint.ckpt", _file(".ckpt", lambda recipe: pickled_bytes(_CHECKPOINT_TREE, recipe), _use_checkpoint),
           object_recipes((*_CHECKPOINT, "state_dict")), (None, [], False, []), (*_SPECIAL, *_STRANGE_WEIGHTS), 500),
)  # fmt: skip
