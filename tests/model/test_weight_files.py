"""Headers first, tensors on demand, and what is said of files that are no weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.embedding.files import read_embedding
from library.model.weight_files import join_weights, open_weights
from library.support.errors import UserError
from tests.limits import outcome_in_locked


class Harmful:
    """Something that only a full unpickler makes."""


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    real = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    made = {f"real.{i}": torch.randn(3, 2).to(dtype) for i, dtype in enumerate(real)}
    made |= {f"whole.{i}": torch.randint(0, 100, (4,), dtype=dtype) for i, dtype in enumerate(whole)}
    return made | {"flags": torch.tensor([True, False]), "scalar": torch.tensor(4.6), "empty": torch.zeros(0, 3)}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name].float(), tensor.float())


@pytest.mark.parametrize("mmap", [True, False])
def test_safetensors_with_and_without_mapping(tmp_path, tensors, mmap):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"modelspec.title": "a model"})
    weights = open_weights(file, mmap=mmap)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert weights.metadata["modelspec.title"] == "a model"
    assert_same(weights.read_all(), tensors)
    assert_same(weights.read(["scalar", "real.1"]), {name: tensors[name] for name in ("scalar", "real.1")})


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": t, "global_step": 7}, lambda t: {"epoch": 1, **t}]
)
def test_torch_files(tmp_path, tensors, mmap, zipped, wrap):
    if not zipped:  # the old format is older than these types
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in str(tensor.dtype)}
    file = tmp_path / "model.ckpt"
    torch.save(wrap(tensors), file, _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(file, mmap=mmap).read_all(), tensors)


def test_content_counts_and_not_the_suffix(tmp_path, tensors):
    save_file(tensors, tmp_path / "blob")
    torch.save(tensors, tmp_path / "model.safetensors")
    assert_same(open_weights(tmp_path / "blob").read_all(), tensors)
    assert_same(open_weights(tmp_path / "model.safetensors").read_all(), tensors)


def test_shards_read_as_one_file(tmp_path, tensors):
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{number}.safetensors")
    weights = join_weights([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert weights.shapes.keys() == tensors.keys()
    assert_same(weights.read([names[0], names[-1]]), {name: tensors[name] for name in (names[0], names[-1])})


def test_old_embeddings_show_their_inner_names(tmp_path):
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "mychar"}, tmp_path / "mychar.pt")
    assert open_weights(tmp_path / "mychar.pt").shapes == {"string_to_param.*": (2, 768)}


def header(tensor_bytes: int) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, tensor_bytes]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"not weights at all, only a text of some length", "neither a safetensors nor a torch file"),
        (header(16)[:20], "cut off inside its header"),
        (header(16) + b"\0" * 9, r"is cut off: \d+ of \d+ bytes"),
        (b"\x08\0\0\0\0\0\0\0{notjson", "its header cannot be read"),
        (b"\x02\0\0\0\0\0\0\0[]", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04" + b"\0" * 100, "the end of the file is missing"),
        (b"\x80\x02" + b"\0" * 100, "refused|damaged or cut off"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, content, said):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        open_weights(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("keep", [0.5, 0.98])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_cut_off_download_is_named(tmp_path, tensors, keep, suffix):
    file = tmp_path / f"model.{suffix}"
    tensors["large"] = torch.zeros(1000)
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="cut off"):
        open_weights(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_could_run_code_is_refused(tmp_path, zipped):
    torch.save(
        {"weight": torch.zeros(1), "extra": Harmful()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match=r"refused.*\.safetensors"):
        open_weights(tmp_path / "a.ckpt")


def test_a_pickle_of_something_else(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no named tensors"):
        open_weights(tmp_path / "a.ckpt")


def test_mapped_tensors_take_no_memory_of_their_own(tmp_path):
    """The kernel counts them as file pages, which it can drop, and not as anonymous memory."""
    save_file({"large": torch.zeros(16 * 2**20)}, tmp_path / "large.safetensors")
    tensor = open_weights(tmp_path / "large.safetensors").read(["large"])["large"]
    before = anonymous_mib()
    tensor.sum()
    assert anonymous_mib() - before < 16  # of 64


def anonymous_mib() -> float:
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in status)
    except OSError:
        pytest.skip("needs Linux")
    return int(lines["RssAnon"].split()[0]) / 1024


@pytest.mark.parametrize("read", [open_weights, read_embedding])
def test_a_file_that_may_not_be_read(tmp_path, tensors, read):
    file = tmp_path / "locked" / "model.safetensors"
    file.parent.mkdir()
    save_file(tensors, file)
    found = outcome_in_locked(file.parent, lambda: read(file))
    assert found == ("error", f"{file} cannot be read: Permission denied. Check its permissions.")
