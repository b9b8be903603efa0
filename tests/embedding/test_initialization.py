"""--weights of another base model is said before a model is loaded; of the same one nothing is said."""

import hashlib
import shutil

import pytest
import torch
from option_effects import plan
from runs import TOKEN, arguments, write_dataset

from library.embedding.files import Origin, origin_of, write_embedding
from library.embedding.metadata import TrainingRecord
from library.model.base_model import BaseModel

OTHER = "0" * 64
WARNING = "was trained on"


def embedding(folder, base: str | None, digest: str | None, suffix: str = ".safetensors"):
    """An embedding for the tiny SD 1 model that says this of its base."""
    file = folder / f"old{suffix}"
    record = TrainingRecord(TOKEN, 1, base_model=base, base_model_hash=digest)
    write_embedding(file, {"emb_params": torch.randn(1, 32)}, record, metadata={})
    return file


@pytest.fixture
def said(tmp_path, tiny_sd1, tiny_sd1_file, monkeypatch):
    """What a run from an embedding says, up to the trainer; no model is loaded."""
    monkeypatch.setattr(BaseModel, "text_encoders", lambda *_: pytest.fail("a model was loaded"))
    data = write_dataset(tmp_path, count=1)

    def run_from(weights, model=tiny_sd1_file, code=0):
        argv = arguments("sd1", model, data, tmp_path / "out", f"--weights={weights}", "--init_word=")
        return plan("sd1", argv, code=code).said

    return run_from


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_base_is_said(suffix, said, tmp_path):
    text = said(embedding(tmp_path, "pony.safetensors", OTHER, suffix))
    assert "was trained on pony.safetensors, and this run's base model is tiny_sd1.safetensors" in text


def test_a_name_that_is_no_name_does_not_fill_the_screen(said, tmp_path):
    text = said(embedding(tmp_path, "evil\n\x1b[31m" + "x" * 100_000, OTHER))
    assert f"was trained on evil  [31m{'x' * 90}, and this run's" in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("shorten", [lambda digest: digest, lambda digest: digest[:10].upper()])
def test_the_hash_decides_whatever_the_name_is(shorten, suffix, said, tmp_path, tiny_sd1_file):
    digest = shorten(hashlib.sha256(tiny_sd1_file.read_bytes()).hexdigest())
    assert WARNING not in said(embedding(tmp_path, "renamed.safetensors", digest, suffix))
    same_name = embedding(tmp_path, tiny_sd1_file.name, OTHER, suffix)
    assert f"was trained on another file named {tiny_sd1_file.name}" in said(same_name)


def test_old_hashes_of_web_uis(said, tmp_path, tiny_sd1_file):
    old = hashlib.sha256(tiny_sd1_file.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert WARNING not in said(embedding(tmp_path, "x", old, ".pt"))
    assert WARNING in said(embedding(tmp_path, "x", "12345678", ".pt"))


@pytest.mark.parametrize(
    ("base", "same"), [("Tiny_SD1.safetensors", True), ("tiny_sd1", True), ("pony", False), (None, True)]
)
def test_names_decide_where_there_is_no_hash(base, same, said, tmp_path):
    assert (WARNING not in said(embedding(tmp_path, base, None))) == same


def test_a_folder_has_no_hash(said, tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "noob")
    assert "was trained on pony.safetensors" in said(embedding(tmp_path, "pony.safetensors", OTHER), folder)
    assert WARNING not in said(embedding(tmp_path, "noob", None), folder)


def test_a_file_that_says_nothing(said, tmp_path):
    file = embedding(tmp_path, None, None)
    assert origin_of(file) is None
    assert WARNING not in said(file)


def test_the_names_that_others_write(tmp_path):
    file = tmp_path / "a.safetensors"
    metadata = {"ss_sd_model_name": "noob.safetensors", "ss_new_sd_model_hash": OTHER}
    write_embedding(file, {"emb_params": torch.randn(1, 32)}, TrainingRecord("a", 1), metadata=metadata)
    assert origin_of(file) == Origin("noob.safetensors", OTHER)
    torch.save({"string_to_param": {"*": torch.randn(1, 32)}, "sd_checkpoint_name": "x", "step": 3}, tmp_path / "a.pt")
    assert origin_of(tmp_path / "a.pt") == Origin("x", None)


def test_a_missing_file_is_said_before_a_model_is_loaded(said, tmp_path):
    assert "does not exist" in said(tmp_path / "none.safetensors", code=1)
