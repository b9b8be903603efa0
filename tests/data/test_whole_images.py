"""whole_images.py: damaged files are named before a model is loaded, and whole ones are remembered."""

import json
import os

import numpy as np
import pytest
from datasets import configs_of, make_image
from PIL import Image, features

from library.data import whole_images
from library.data.image_sets import load_image_sets
from library.data.images import check_decodes, read_image
from library.data.whole_images import check_whole
from library.support.errors import UserError

ENDINGS = [".png", ".jpg", ".webp", ".bmp", *([".avif"] if features.check("avif") else [])]


def noise(file, size=(96, 80), **how):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file, **how)
    return file


def sets_of(folder, **subset):
    config, *_ = configs_of(folder, {"resolution": 32, "subsets": [{"image_dir": str(folder / "a"), **subset}]})
    return load_image_sets(config)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_image_is_refused_as_reading_refuses_it(tmp_path, ending, share, progressive):
    file = noise(tmp_path / f"a{ending}", progressive=progressive)
    check_decodes(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError) as reading:
        read_image(file)
    with pytest.raises(UserError) as checking:
        check_decodes(file)
    assert str(file) in str(checking.value)
    if not progressive:
        assert str(checking.value) == str(reading.value)


def test_a_png_that_can_be_read_in_spite_of_a_wrong_checksum_is_taken(tmp_path):
    file = noise(tmp_path / "a.png")
    content = bytearray(file.read_bytes())
    pixels = content.index(b"IDAT")
    length = int.from_bytes(content[pixels - 4 : pixels], "big")
    content[pixels + 4 + length] ^= 1
    file.write_bytes(content)
    assert read_image(file).shape == (80, 96, 3)
    check_decodes(file)


def test_all_that_are_damaged_are_named(tmp_path):
    for name in "abcd":
        make_image(tmp_path / "a" / f"{name}.png", (64, 64), "mychar")
    for name in "bd":
        file = tmp_path / "a" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        check_whole(sets_of(tmp_path))
    assert str(error.value).startswith(f"The image {tmp_path / 'a' / 'b.png'} cannot be read: ")
    assert str(error.value).endswith(f" 1 more image cannot be read: {tmp_path / 'a' / 'd.png'}.")


def test_what_is_whole_is_looked_through_once(tmp_path, monkeypatch):
    """With cache_info, until the file changes; a damaged one keeps nobody from remembering the others."""
    looked = []
    monkeypatch.setattr(whole_images, "check_decodes", lambda path: (looked.append(path[-5:]), check_decodes(path)))
    for name in "abc":
        make_image(tmp_path / "a" / f"{name}.png", (64, 64), "mychar")
    whole = (tmp_path / "a" / "c.png").read_bytes()
    (tmp_path / "a" / "c.png").write_bytes(whole[:-30])
    with pytest.raises(UserError):
        check_whole(sets_of(tmp_path, cache_info=True))
    assert sorted(looked) == ["a.png", "b.png", "c.png"]
    looked.clear()
    (tmp_path / "a" / "c.png").write_bytes(whole)
    os.utime(tmp_path / "a" / "b.png", (1, 1))
    check_whole(sets_of(tmp_path, cache_info=True))
    assert sorted(looked) == ["b.png", "c.png"]
    looked.clear()
    check_whole(sets_of(tmp_path, cache_info=True))
    assert looked == []
    check_whole(sets_of(tmp_path))
    assert len(looked) == 3
    noted = json.loads((tmp_path / "a" / "metadata_cache.json").read_text())
    assert [entry["whole"] for entry in noted.values()] == [True] * 3


def test_a_dry_run_leaves_no_notes(tmp_path):
    make_image(tmp_path / "a" / "a.png", (64, 64), "mychar")
    subset = {"image_dir": str(tmp_path / "a"), "cache_info": True}
    (config,) = configs_of(tmp_path, {"resolution": 32, "subsets": [subset]}, dry_run=True)
    check_whole(load_image_sets(config))
    assert not (tmp_path / "a" / "metadata_cache.json").exists()


def test_several_processes_share_the_work(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(whole_images, "check_decodes", looked.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in "abc":
        make_image(tmp_path / "a" / f"{name}.png", (64, 64), "mychar")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_whole(sets_of(tmp_path))
    assert sorted(path[-5:] for path in looked) == ["a.png", "b.png", "c.png"]


def test_masks_are_looked_through(tmp_path):
    make_image(tmp_path / "a" / "a.png", (64, 64), "mychar")
    mask = make_image(tmp_path / "m" / "a.png", (64, 64))
    mask.write_bytes(mask.read_bytes()[:-30])
    masks = {"image_dir": str(tmp_path / "a"), "conditioning_data_dir": str(tmp_path / "m")}
    (config,) = configs_of(tmp_path, {"resolution": 32, "subsets": [masks]}, masked_loss=True)
    with pytest.raises(UserError, match=r"m.a\.png cannot be read"):
        check_whole(load_image_sets(config))
