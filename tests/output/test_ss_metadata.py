"""What model managers find in a saved file, read with the rule of each of them, and hashes by sd-scripts' rule."""

import hashlib
import json
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
import torch
from datasets import data_of, make_image
from option_effects import train
from runs import TOKEN, arguments
from safetensors import safe_open
from safetensors.torch import load_file

from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.model.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from library.options.options import ModelOptions
from library.output.ss_metadata import tag_frequency

CAPTIONS = ["mychar, Red hair, smile", "mychar,smile , , hat"]


def raw_header(file: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and data, taken apart by hand."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def webui_metadata(file: Path) -> dict:
    """AUTOMATIC1111 and SD.Next: values that begin with a brace are JSON."""
    header, _ = raw_header(file)
    said = header["__metadata__"]
    return {name: json.loads(value) if value.startswith("{") else value for name, value in said.items()}


def webui_tags(said: dict) -> list[tuple[str, int]]:
    """AUTOMATIC1111's list of tags: of all folders together, most frequent first."""
    counts = Counter()
    for tags in said.get("ss_tag_frequency", {}).values():
        counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    return sorted(counts.items(), key=lambda item: -item[1])


def lora_manager_words(file: Path) -> tuple[str | None, list[str]]:
    """ComfyUI's LoRA manager: the kind of base, and the tags of the first folder, most frequent first."""
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tags = next(iter(json.loads(said["ss_tag_frequency"]).values()))
    return said["ss_base_model_version"], [tag for tag, _ in sorted(tags.items(), key=lambda item: -item[1])]


def addnet_hashes(content: bytes) -> tuple[str, str]:
    """Web UIs' two hashes of a LoRA file: of all after the header, and the short one of 64 KB from 1 MB on."""
    start = 8 + int.from_bytes(content[:8], "little")
    old = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(content[start:]).hexdigest(), old


def dataset(folder: Path, **changes: str) -> Path:
    """Two folders of images, one of regularisation, and one of them once more in a second dataset."""
    for number, caption in enumerate(CAPTIONS):
        make_image(folder / "10_mychar" / f"{number}.png", (64, 64), caption)
    make_image(folder / "more" / "0.png", (64, 64), "mychar, tree")
    make_image(folder / "reg" / "0.png", (64, 64), "a girl")
    subsets = [("10_mychar", "num_repeats = 3"), ("more", ""), ("reg", "is_reg = true")]
    text = "[general]\ncaption_extension = '.txt'\n"
    for names, size in ((subsets, 64), (subsets[:1], 128)):
        text += f"[[datasets]]\nresolution = {size}\n"
        text += "".join(
            f"[[datasets.subsets]]\nimage_dir = '{(folder / name).as_posix()}'\n{more}\n" for name, more in names
        )
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    return folder / "dataset.toml"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_sd1_file):
    folder = tmp_path_factory.mktemp("saved")
    argv = arguments("sd1", tiny_sd1_file, dataset(folder), folder / "out", "--clip_skip=2", "--training_comment=try 1")
    return train("sd1", argv, folder / "out")


def test_web_uis(saved, tiny_sd1_file):
    said = webui_metadata(saved.folder / f"{TOKEN}.safetensors")
    assert said["ss_tag_frequency"] == {
        "10_mychar": {"mychar": 2, "red hair": 1, "smile": 2, "hat": 1},
        "more": {"mychar": 1, "tree": 1},
        "reg": {"a girl": 1},
    }
    assert webui_tags(said)[:2] == [("mychar", 3), ("smile", 2)]
    assert said["ss_dataset_dirs"] == {
        "10_mychar": {"n_repeats": 3, "img_count": 2},
        "more": {"n_repeats": 1, "img_count": 1},
        "10_mychar (2)": {"n_repeats": 3, "img_count": 2},
    }
    table = {name: said[f"ss_{name}"] for name in ("sd_model_name", "clip_skip", "training_comment")}
    assert table == {"sd_model_name": tiny_sd1_file.name, "clip_skip": "2", "training_comment": "try 1"}
    whole = hashlib.sha256(tiny_sd1_file.read_bytes()).hexdigest()
    short = hashlib.sha256(tiny_sd1_file.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert (said["ss_new_sd_model_hash"], said["ss_sd_model_hash"]) == (whole, short)
    assert (said["ss_num_train_images"], said["ss_num_reg_images"]) == (str(2 * 3 + 1 + 2 * 3), "1")
    assert (said["ss_steps"], said["ss_learning_rate"], said["ss_resolution"]) == ("2", "0.01", "(128, 128)")
    assert (said["ss_v2"], said["ss_base_model_version"]) == ("False", "sd_v1")


def test_the_closing_words_name_the_base(saved, tiny_sd1_file):
    assert f"(Stable Diffusion 1.x, trained on {tiny_sd1_file.name}; 1 vector, 1 of a prompt's 75 tokens)" in saved.out


def test_lora_manager(saved):
    base, words = lora_manager_words(saved.folder / f"{TOKEN}.safetensors")
    assert base == "sd_v1"
    assert words == ["mychar", "smile", "red hair", "hat"]


def test_stability_matrix(saved):
    """It reads the header as JSON up to ``__metadata__``, as strings by name, and whole numbers out of the tags."""
    header, _ = raw_header(saved.folder / f"{TOKEN}.safetensors")
    assert next(iter(header)) == "__metadata__"
    assert all(isinstance(value, str) for value in header["__metadata__"].values())
    tags = json.loads(header["__metadata__"]["ss_tag_frequency"])
    assert all(type(count) is int and tag for counts in tags.values() for tag, count in counts.items())


def test_swarm_ui_and_modelspec(saved):
    header, data = raw_header(saved.folder / f"{TOKEN}.safetensors")
    said = {name.removeprefix("modelspec."): value for name, value in header["__metadata__"].items()}
    assert said["architecture"] == "stable-diffusion-v1/textual-inversion"
    assert [int(side) for side in said["resolution"].split("x")] == [128, 128]
    assert said["hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert said["trigger_phrase"] == TOKEN


def test_hashes_by_the_rule_of_web_uis(saved):
    content = (saved.folder / f"{TOKEN}.safetensors").read_bytes()
    said = saved.metadata()
    assert (said["sshs_model_hash"], said["sshs_legacy_hash"]) == addnet_hashes(content)


def test_the_short_hash_is_that_of_the_file_with_its_ss_keys_alone(tmp_path):
    """A file over 1 MB, edited by hand as sd-scripts' tools write it: without any key but ss_*."""
    rows = torch.randn(75, 8000)
    write_embedding(tmp_path / "a.safetensors", {"emb_params": rows}, TrainingRecord("a", 75, steps=3), metadata={})
    header, data = raw_header(tmp_path / "a.safetensors")
    said = header["__metadata__"]
    header["__metadata__"] = {"ss_steps": "3"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    assert len(content) > 0x110000
    assert (said["sshs_model_hash"], said["sshs_legacy_hash"]) == addnet_hashes(content)


class Noon:
    """A clock that stands still."""

    @staticmethod
    def now() -> datetime:
        return datetime(2026, 1, 2, 12)


def test_the_same_file_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("library.embedding.metadata.datetime", Noon)
    said = {f"modelspec.key{number}": "value ünï \ud800" for number in range(20)}
    record = TrainingRecord("a", 2, steps=3, seed=1)
    for name in ("x", "y"):
        file = tmp_path / name / "a.safetensors"
        file.parent.mkdir()
        write_embedding(file, {"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 12)}, record, metadata=said)
    first = (tmp_path / "x" / "a.safetensors").read_bytes()
    assert first == (tmp_path / "y" / "a.safetensors").read_bytes()
    assert int.from_bytes(first[:8], "little") % 8 == 0  # readers map the tensors
    assert torch.equal(load_file(tmp_path / "x" / "a.safetensors")["clip_g"], torch.ones(2, 12))
    with safe_open(tmp_path / "x" / "a.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.key3"] == "value ünï ?"  # half a character cannot be written


def test_what_does_not_apply_is_left_out(tmp_path, tiny_sd1):
    """A folder has no hash of a file, and templates have no tags."""
    file = dataset(tmp_path)
    argv = arguments("sd1", tiny_sd1, file, tmp_path / "out", "--use_object_template", "--max_train_steps=1")
    said = train("sd1", argv, tmp_path / "out").metadata()
    absent = {"ss_sd_model_hash", "ss_new_sd_model_hash", "ss_tag_frequency", "ss_clip_skip", "ss_training_comment"}
    assert absent.isdisjoint(said)
    assert said["ss_sd_model_name"] == tiny_sd1.name


def test_captions_that_are_sentences_do_not_make_a_large_file(tmp_path):
    words = ",".join(f"tag{number}" for number in range(6000))
    for name in ("a", "b"):
        make_image(tmp_path / name / "0.png", (64, 64), f"mychar,{words},tag7")
    subsets = [{"image_dir": str(tmp_path / name)} for name in ("a", "b")]
    one, two = (
        tag_frequency(data_of(tmp_path, {"resolution": 64, "subsets": subsets[:count]}).table) for count in (1, 2)
    )
    assert len(one["a"]) == 5000
    assert next(iter(one["a"].items())) == ("tag7", 2)
    assert [len(tags) for tags in two.values()] == [2500, 2500]


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        (STABLE_DIFFUSION, ModelOptions(), "sd_v1"),
        (STABLE_DIFFUSION, ModelOptions(v_parameterization=True), "sd_v1_v"),
        (STABLE_DIFFUSION, ModelOptions(v2=True), "sd_v2"),
        (STABLE_DIFFUSION, ModelOptions(v2=True, v_parameterization=True), "sd_v2_v"),
        (STABLE_DIFFUSION_XL, ModelOptions(v_parameterization=True), "sdxl_base_v1-0"),
    ],
)
def test_sd_scripts_names_of_the_bases(family, options, name):
    assert family.base_model_version(options) == name
