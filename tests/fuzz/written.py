"""Targets that a run has written itself: states and latent caches."""

import ast
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import make_image
from hypothesis import strategies as st

from fuzz.mutations import poked, pokes
from fuzz.running import LeftAsideError, Target
from fuzz.tensors import BOMB, ROWS, STRANGE, STRANGE_NAMES, object_recipes, pickled_bytes, torch_bomb
from library.data.images import Framing
from library.data.latent_cache import LatentCache
from library.data.latent_entry import LatentEntry
from library.options.options import Options
from library.training.state import FILE, TrainingState, random_states, recorded, set_random_states


def _state_tree() -> dict[str, Any]:
    """A state as a small run writes it: plain values, tensors by name."""
    options = recorded(Options())
    adam = {"state": {0: {"step": {"!": "one number"}, "exp_avg": ROWS, "exp_avg_sq": ROWS}}}
    adam["param_groups"] = torch.optim.AdamW([torch.zeros(2, 768)]).state_dict()["param_groups"]
    learner = {"rows": [ROWS], "optimizer": adam, "schedule": {"last_epoch": 3, "base_lrs": [0.1]}, "scaler": {}}
    return {
        "format": 1,
        "step": 3,
        "total_steps": 10,
        "epoch_closed": False,
        "seed": 1,
        "data": "abc",
        "options": options,
        "starts": [ROWS],
        "learner": {**learner, "taught": True},
        "epoch_losses": [0.5],
        "random_states": [{"!": "random"}],
    }


def _resume(folder: Path) -> None:
    """What a run does with a state before its first step."""
    state, options = TrainingState.read(folder), Options()
    state.check(options)
    state.begun_alike(options)
    state.changes(options, 10, "abc", 1)
    table = torch.nn.Embedding(3, 768)
    state.starts_for([table])
    (state.step, state.total_steps, state.epoch_closed, list(state.epoch_losses))
    if state.random_states:
        set_random_states(state.random_states[0])


def _state(folder: Path):
    file, tree = folder / FILE, _state_tree()
    STRANGE["random"] = random_states
    torch_bomb()

    def act(recipe):
        content = pickled_bytes(tree, recipe)
        file.write_bytes(content)
        (folder / "input.pt").write_bytes(content)
        _resume(folder)

    return act


_STATE_KEYS = (*TrainingState.__dataclass_fields__, "format", "rows", "optimizer", "python", "numpy", "torch")
_STATE_SEEDS = (
    ("bomb", [], False, []),
    ("disks", [], False, []),
    *((None, [("set", place, 0, name)], False, []) for name in STRANGE_NAMES[:14] for place in range(0, 11)),
)


class _Encoder:
    """Stands in for a VAE: any latents will do."""

    device, dtype = torch.device("cpu"), torch.float32
    fingerprint = np.linspace(-1, 1, 30, dtype=np.float32)

    def encode(self, images, generators, names=()):
        return torch.zeros(len(images), 4, images.shape[2] // 8, images.shape[3] // 8)


def _npz(folder: Path):
    os.chdir(folder)
    image = make_image(folder / "a.png", (70, 66), mode="RGBA")
    framing = Framing((70, 66), (64, 64))
    entry = LatentEntry(image, (70, 66), framing, (0.0, 0.0, 70.0, 66.0), True, True)

    def cache_() -> LatentCache:
        return LatentCache(suffix="_sd.npz", to_disk=True, seed=1)

    first = cache_()
    first.fill([entry], _Encoder())
    file = first.file(entry)
    members = _members(file.read_bytes())
    bomb = _npz_bomb(members)

    def act(recipe):
        content = bomb if recipe[0] == "bomb" else _npz_bytes(members, recipe)
        for name in folder.glob("*.npz"):
            name.unlink()
        file.write_bytes(content)
        (folder / "input.npz").write_bytes(content)
        found = cache_()
        reasons = found.fill([entry], _Encoder()).reasons
        loaded = found.load(entry)
        assert loaded.latents.shape == (4, 8, 8)
        assert torch.isfinite(loaded.latents).all()
        assert loaded.flipped.shape == (4, 8, 8)
        assert loaded.alpha_mask.shape == (64, 64)
        assert torch.isfinite(loaded.alpha_mask).all()
        if reasons:
            raise LeftAsideError(f"made anew: {reasons}")

    return act


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _npz_bytes(members: dict[str, bytes], recipe) -> bytes:
    """The archive with arrays replaced, their headers edited and their bytes poked, and the sums right."""
    changes, packed, last = recipe
    members = dict(members)
    for what, place, value in changes:
        name = sorted(members)[place % len(members)]
        if what == "array":
            members[name] = _npy(value)
        elif what == "header":
            members[name] = _with_header(members[name], *value)
        elif what == "poke":
            members[name] = poked(members[name], value)
        elif what == "drop" and len(members) > 1:
            del members[name]
        elif what == "rename":
            members[value] = members.pop(name)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return poked(file.getvalue(), last)


def _npz_bomb(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
                for _ in range(BOMB // 2**24 if name == "latents_8x8.npy" else 0):
                    member.write(bytes(2**24))
    return file.getvalue()


def _with_header(data: bytes, key: str, value: Any) -> bytes:
    """An .npy file whose header says something else, its length right."""
    length = int.from_bytes(data[8:10], "little")
    try:
        header = ast.literal_eval(data[10 : 10 + length].decode("latin1"))
    except (ValueError, SyntaxError, MemoryError):
        return data
    if not isinstance(header, dict):  # it was replaced before
        return data
    text = value if key == "text" else repr({**header, key: value})
    text = text.encode("utf-8", "surrogatepass")[:65000]
    return data[:8] + len(text).to_bytes(2, "little") + text + data[10 + length :]


_ARRAYS = {
    "zeros": lambda: np.zeros((4, 8, 8), np.float32),
    "half": lambda: np.zeros((4, 8, 8), np.float16),
    "nan": lambda: np.full((4, 8, 8), np.nan, np.float32),
    "double": lambda: np.full((4, 8, 8), 1e300),
    "whole": lambda: np.zeros((4, 8, 8), np.int64),
    "complex": lambda: np.zeros((4, 8, 8), np.complex64),
    "texts": lambda: np.full((4, 8, 8), "a"),
    "dates": lambda: np.zeros((4, 8, 8), "datetime64[s]"),
    "records": lambda: np.zeros((4, 8, 8), [("a", "f4")]),
    "booleans": lambda: np.zeros((4, 8, 8), bool),
    "empty": lambda: np.zeros(0, np.float32),
    "scalar": lambda: np.float32(1),
    "mask": lambda: np.full((64, 64), 7.0, np.float32),
    "objects": lambda: np.array([None, 1], dtype=object),
    "text": lambda: np.array("70x66 default"),
    "void": lambda: np.zeros(3, "V7"),
    "reversed": lambda: np.zeros((4, 8, 8), ">f4"),
}


def _npy(name: str) -> bytes:
    file = io.BytesIO()
    np.save(file, _ARRAYS[name](), allow_pickle=True)
    return file.getvalue()


_NPY_SHAPES = ((), (2**40,), (2**62, 4), (-1,), (4, 8, 8.0), (4, 8, "8"), 5, None, [4, 8, 8], (0,))
_NPY_KINDS = ("<f8", "|O", "<U9", "x", "", None, 3, [("a", "<f4")], [], "|V0", "<f0", "M8[s]", "|S0")
_NPY_TEXTS = ("", "{", "[" * 5000, "None", "{}", "9" * 5000, "'\ud800'", "{'descr': '<f4'}", "-" * 9000, "(" * 5000)
_NPY_HEADERS = (
    *(("shape", shape) for shape in _NPY_SHAPES),
    *(("descr", kind) for kind in _NPY_KINDS),
    *(("fortran_order", value) for value in (True, None, 2, "x")),
    *(("text", text) for text in _NPY_TEXTS),
    ("text", "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + " " * 60000),
    ("extra", 1),
)
_NPY_NAMES = ("latents.npy", "latents_8x8.npy", "latents", "a/b", ".npy", "é.npy")
_NPZ_CHANGES = st.one_of(
    st.tuples(st.just("array"), st.integers(0, 99), st.sampled_from(sorted(_ARRAYS))),
    st.tuples(st.just("header"), st.integers(0, 99), st.sampled_from(_NPY_HEADERS)),
    st.tuples(st.just("poke"), st.integers(0, 99), pokes(2)),
    st.tuples(st.just("drop"), st.integers(0, 99), st.none()),
    st.tuples(st.just("rename"), st.integers(0, 99), st.sampled_from(_NPY_NAMES)),
)
_NPZ_RECIPES = st.tuples(
    st.lists(_NPZ_CHANGES, max_size=3), st.booleans(), st.one_of(st.just([]), st.just([]), pokes(2))
)
_NPZ_SEEDS = (
    ("bomb", True, []),
    *(([("header", place, header)], False, []) for header in _NPY_HEADERS for place in range(7)),
    *(([("array", place, name)], False, []) for name in _ARRAYS for place in range(7)),
)

TARGETS = (
    Target("state", _state, object_recipes(_STATE_KEYS), (None, [], False, []), _STATE_SEEDS, 250),
    Target("latents.npz", _npz, _NPZ_RECIPES, ([], False, []), _NPZ_SEEDS, 150),
)  # fmt: skip
