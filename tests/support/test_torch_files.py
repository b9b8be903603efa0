"""Torch files that lie about what they hold, or hold what no embedding, state or checkpoint has."""

import io
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch

from library.embedding.files import read_embedding
from library.model.weight_files import open_weights
from library.support.errors import UserError
from library.support.torch_files import load_torch
from library.support.torch_pickle import DamagedError, RefusedError
from tests.limits import outcome

ROWS = torch.arange(16, dtype=torch.float32).reshape(2, 8)


def of_itself():
    content = {}
    content["state_dict"] = content
    return content


def deep(levels: int = 400):
    inner = content = {}
    for _ in range(levels):
        inner["state_dict"] = {}
        inner = inner["state_dict"]
    return content


def doubled(levels: int = 400):
    """2 ** levels lists, each of them twice in the next."""
    content = []
    for _ in range(levels):
        content = [content, content]
    return {"emb_params": ROWS, "list": content}


UNUSUAL = {
    "expanded": (lambda: {"a": torch.zeros(1).expand(2**34)}, "not as many numbers"),
    "expanded twice": (lambda: {"a": torch.zeros(1).as_strided((2**18, 2**18), (0, 0))}, "not as many numbers"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "sparse"),
    "sparse rows": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "sparse"),
    "meta": (lambda: {"a": torch.zeros(2**40, device="meta")}, "meta tensors"),
    "complex": (lambda: {"a": torch.zeros(3, dtype=torch.complex64)}, "complex"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(torch.eye(3), 1.0, 0, torch.qint8)}, "quantized"),
    "nested": (lambda: {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "nested"),
    "of itself": (of_itself, "not an embedding|holds no tensors"),
    "deep": (deep, "not an embedding|holds no tensors"),
    "a tuple as a name": (lambda: {("a", "b"): ROWS}, "Python objects"),
    "code": (lambda: {"a": print}, "could run code"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_named_and_costs_nothing(case, zipped, tmp_path):
    make, said = UNUSUAL[case]
    file = tmp_path / "x.pt"
    torch.save(make(), file, _use_new_zipfile_serialization=zipped)
    assert file.stat().st_size < 2**20
    found = outcome(lambda: read_embedding(file))
    assert found.kind == "error", found.detail
    assert any(part in found.detail for part in said.split("|"))
    assert outcome(lambda: open_weights(file).read_all()).sound


def rewritten(content, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The zip archive of a torch file, its parts changed, well formed in itself."""
    file, result = io.BytesIO(), io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(result, "w", compression) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return result.getvalue()


def set_part(name: str, value: bytes):
    return lambda parts: parts.update({f"archive/{name}": value})


def test_compressed_parts_are_refused_before_they_unfold(tmp_path):
    file = tmp_path / "x.pt"
    for part in ("data/0", "data.pkl", "byteorder"):
        file.write_bytes(rewritten({"a": ROWS}, set_part(part, bytes(2**28)), zipfile.ZIP_DEFLATED))
        assert file.stat().st_size < 2**20
        for read in (read_embedding, open_weights, lambda path: load_torch(path.open("rb"))):
            found = outcome(lambda read=read: read(file))
            assert "not stored as torch stores them" in found.detail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_part("data/0", bytes(63)), "some of its numbers are missing"),
        (lambda parts: parts.pop("archive/data/0"), "some of its numbers are missing"),
        (set_part("byteorder", b"big"), "byte order"),
        (set_part("data.pkl", b"\x80\x02}"), "list of tensors cannot be read"),
        (set_part("data.pkl", b"\x80\x02" + b"]" * 1_100_000 + b"."), "far more objects"),
        (set_part("data.pkl", b"\x80\x02]r\xff\xff\xff\xff."), "holds no named tensors"),
        (set_part("data.pkl", b"\x80\x02X\xff\xff\xff\x7fa."), "list of tensors cannot be read"),
        (set_part("data.pkl", pickle.dumps({"a": 1}, protocol=5)), "Python objects"),
        (lambda parts: parts.clear(), "cannot be read as|list of parts"),
    ],
)
def test_parts_that_do_not_fit_together(change, said, tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(rewritten({"a": ROWS}, change))
    found = outcome(lambda: open_weights(file))
    assert found.kind == "error", found.detail
    assert any(part in found.detail for part in said.split("|"))


def test_a_zip_over_several_disks(tmp_path):
    data = rewritten({"a": ROWS}, lambda parts: None)
    end = data.rindex(b"PK\5\6")
    locator = b"PK\6\7" + (1).to_bytes(4, "little") + (0).to_bytes(8, "little") + (7).to_bytes(4, "little")
    (tmp_path / "x.pt").write_bytes(data[:end] + locator + data[end:])
    found = outcome(lambda: open_weights(tmp_path / "x.pt"))
    assert found.kind == "error", found.detail
    with (tmp_path / "x.pt").open("rb") as file, pytest.raises(DamagedError):
        load_torch(file)


def test_a_part_that_claims_gigabytes(tmp_path):
    """The list of a zip archive gives two lengths, and zipfile reads by the one that torch does not look at."""
    data = bytearray(rewritten({"a": ROWS}, lambda parts: None))
    entry = data.index(b"PK\1\2", 0)
    while entry >= 0:
        data[entry + 20 : entry + 24] = (3 * 2**30).to_bytes(4, "little")
        entry = data.find(b"PK\1\2", entry + 4)
    (tmp_path / "x.pt").write_bytes(data)
    found = outcome(lambda: open_weights(tmp_path / "x.pt"))
    assert "not stored as torch stores them" in found.detail


def test_what_states_hold_comes_back(tmp_path):
    table = torch.randn(5, 3)
    parameter = torch.nn.Parameter(ROWS.clone())
    parameter.is_paged = True
    content = {
        "tensors": [ROWS.t(), table[1:3], torch.tensor(3), torch.ones(2, dtype=torch.bool), ROWS.to(torch.float8_e5m2)],
        "parameter": parameter,
        "plain": (1, -1, 2**40, 10**30, 0.5, True, None, "ä", b"\0\xff", bytearray(b"z"), 1j, {1, "a"}, [[], {}]),
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        "dicts": [OrderedDict(a=1), Counter("aab"), {0: {"step": torch.tensor(1.0)}, "b": 2}],
    }
    file = io.BytesIO()
    torch.save(content, file)
    found, wanted = load_torch(file), torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert found["parameter"].is_paged
    assert torch.equal(found["parameter"], ROWS)
    for got, tensor in zip(found["tensors"], wanted["tensors"], strict=True):
        assert got.dtype == tensor.dtype
        assert torch.equal(got.float(), tensor.float())
        assert got.stride() == tensor.stride()
    for name in ("plain", "torch", "dicts"):
        assert str(found[name]) == str(wanted[name])
    assert [type(one) for one in found["dicts"]] == [OrderedDict, Counter, dict]


@pytest.mark.parametrize("make", [doubled, lambda: {"a": deep()}])
def test_lists_in_lists(make):
    file = io.BytesIO()
    torch.save(make(), file)
    found = outcome(lambda: load_torch(file))
    assert "DamagedError" in found.detail


# 2 ** 40 strings in tuples of two, each of them twice in the next.
_TUPLES = b"X\x01\0\0\0a\x85" + 40 * b"q\x01h\x01\x86"
_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + _TUPLES + b"X\x03\0\0\0cpuK\x01tQ"
# Python's dicts compare each of these with all before it: their hashes are 0.
_ALIKE = b"".join(b"\x8a\x0a" + (n * sys.hash_info.modulus).to_bytes(10, "little") + b"N" for n in range(1, 40_000))


@pytest.mark.parametrize(
    "instructions",
    [_STORAGE, b"}(" + _ALIKE + b"u", b"ccollections\nCounter\n(](" + _TUPLES + b"K\x01tatR"],
    ids=["the name of a storage", "keys that are alike", "keys of a counter"],
)
def test_names_and_keys_that_take_for_ever(instructions):
    file = io.BytesIO(rewritten({}, set_part("data.pkl", b"\x80\x02" + instructions + b".")))
    found = outcome(lambda: load_torch(file))
    assert "DamagedError" in found.detail or "RefusedError" in found.detail, found


def test_many_names_for_the_same_numbers():
    large = torch.zeros(2**20)
    file = io.BytesIO()
    torch.save([large.view(2**20) for _ in range(1000)], file)
    found = outcome(lambda: load_torch(file))
    assert "the same numbers many times" in found.detail


def test_a_flipped_bit_is_seen():
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, file)
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= 1
    with pytest.raises(DamagedError):
        load_torch(io.BytesIO(bytes(data)))
    with pytest.raises(RefusedError):
        load_torch(io.BytesIO(rewritten({"a": torch.float16}, set_part("data.pkl", pickle.dumps(print, protocol=2)))))


@pytest.fixture
def lightning_class(monkeypatch):
    """A class by the name of the one under which PyTorch Lightning keeps a callback's values in a checkpoint."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for known in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, known, module)
    return module.ModelCheckpoint


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_checkpoint_as_a_trainer_left_it(zipped, lightning_class, tmp_path):
    """With optimizer states, and what the first Stable Diffusion's own checkpoints hold besides."""
    layer = torch.nn.Linear(8, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(8)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": layer.state_dict(),
        "callbacks": {lightning_class: {"best_model_score": np.float64(0.5), "history": np.arange(3)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "last": np.float32(1)}],
    }
    file = tmp_path / "x.ckpt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    found = open_weights(file).read_all()
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], layer.weight)


def test_objects_of_a_trainer_are_no_names(lightning_class, tmp_path):
    torch.save({"a": ROWS, "callback": lightning_class()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="could run code"):
        open_weights(tmp_path / "x.ckpt")


def test_states_hold_nothing_of_numpy(tmp_path):
    torch.save({"a": ROWS, "score": np.float64(0.5)}, tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("rb") as file, pytest.raises(RefusedError, match="Python objects"):
        load_torch(file)
