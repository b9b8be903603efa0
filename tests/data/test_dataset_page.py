"""docs/dataset.md is up to date, tells of every key, and its examples are datasets that can be trained on."""

import re
from pathlib import Path

import pytest
from photos import make_photos
from PIL import Image
from runs import run

from library.data.dataset_page import page
from library.data.schema import DATASET, DREAMBOOTH, FILE, FINETUNING, GENERAL, MASK, SUBSET, known_keys

PAGE = page()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
JSON, JSONL = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LEVELS = (FILE, GENERAL, DATASET, SUBSET)


def test_the_page_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs" / "dataset.md").read_text(encoding="utf-8") == PAGE


def test_every_key_has_one_row_with_its_meaning():
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
    keys = {key for level in LEVELS for kind in (DREAMBOOTH, FINETUNING, MASK) for key in known_keys(level, kind)}
    assert sorted(row[0].strip(" `") for row in rows) == sorted(keys)
    assert all(len(row) == 5 and row[1].strip() and row[4].strip() for row in rows)


@pytest.mark.parametrize(
    ("key", "title", "default"),
    [
        ("batch_size", "Keys of `[general]` and `[[datasets]]`", "1"),
        ("keep_tokens", "Keys of `[general]`, `[[datasets]]` and `[[datasets.subsets]]`", "0"),
        ("image_dir", "Keys of `[[datasets.subsets]]` only", ""),
        ("subsets", "Keys of `[[datasets]]` only", ""),
    ],
)
def test_keys_stand_under_the_tables_that_may_hold_them(key, title, default):
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith(f"| `{key}`")]
    assert row.split(" | ")[2].strip(" `") == default


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The folders and files that the page's examples name, in the folder that the run starts in."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    size = (640, 576)
    make_photos(folder / "mychar", size=size)
    for name, caption, angle in (("mychar_faces", "a face of mychar", 90), ("girls", None, 180)):
        for photo in make_photos(folder / name, caption=caption, size=size):
            Image.open(photo).rotate(angle).save(photo)
    for photo in make_photos(folder / "cut_out", size=size):
        image = Image.open(photo).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(photo)
    (folder / "mychar_masks").mkdir()
    for photo in (folder / "mychar").glob("*.png"):
        Image.linear_gradient("L").resize(size).save(folder / "mychar_masks" / photo.name)
    for name, text, angle in (("listed.json", JSON, 90), ("more.jsonl", JSONL, 270)):
        (folder / name).write_text(text, encoding="utf-8")
        photos = make_photos(folder / name.partition(".")[0], caption=None, size=size)
        for photo, listed in zip(photos, ("1.jpg", "park/2.png"), strict=False):
            place = photo.parent / listed
            place.parent.mkdir(exist_ok=True)
            Image.open(photo).rotate(angle).save(place)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_can_be_trained_on(example, images, tiny_sd1_file, capfd, tmp_path):
    (tmp_path / "dataset.toml").write_text(example, encoding="utf-8")
    given = ["--dataset_config=dataset.toml", "--debug_dataset", "--output_dir=out"]
    given += ["--token_string=mychar", "--init_word=girl"]
    if "conditioning_data_dir" in example:
        given.append("--masked_loss")
    assert run("sd1", [f"--pretrained_model_name_or_path={tiny_sd1_file}", "--seed=1", *given]) == 0
    said = capfd.readouterr()
    assert "49408" in said.out
    assert not re.search("WARNING|no effect|does nothing", said.out + said.err)
    assert (tmp_path / "out" / "debug_dataset.png").is_file()
