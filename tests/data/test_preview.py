"""preview.py: a table that a person can read, and an image of what the model sees."""

import numpy as np
import pytest
from datasets import data_of, make_image, prompts
from PIL import Image, ImageDraw

from library.data.captions import CaptionMoment
from library.data.image_table import ImageTable
from library.data.preview import SHEET_NAME, bucket_table, show_dataset


def _data(tmp_path, count=3, *, words=None, **subset):
    for number in range(count):
        size = (100, 60) if number else (64, 64)
        make_image(tmp_path / "a" / f"{number}.png", size, f"mychar, number {number}")
    buckets = {"enable_bucket": True, "min_bucket_reso": 16, "bucket_reso_steps": 16, "batch_size": 2}
    values = {"resolution": 64, **buckets, "subsets": [{"image_dir": str(tmp_path / "a"), **subset}]}
    return data_of(tmp_path, values, words=words or prompts(2))


def test_buckets_with_counts(tmp_path):
    assert bucket_table(_data(tmp_path, num_repeats=3).table).splitlines() == [
        "dataset       bucket    images   samples   batches",
        "      1        64x64         1         3         2",
        "      1        80x48         2         6         3",
    ]


def test_every_sample_with_caption_ids_bucket_and_crop(tmp_path, capsys):
    assert show_dataset(_data(tmp_path, num_repeats=2)) is None
    shown = capsys.readouterr().out
    assert "all 3 images" in shown
    for number in range(3):
        assert f"{number}.png" in shown
        assert f"caption: mychar mychar1, number {number}" in shown
    assert "64x64, resized to 64x64, bucket 64x64, no crop" in shown
    assert "100x60, resized to 80x48, bucket 80x48" in shown
    # "mychar mychar1, number 0": new ids in brackets, the padding left out
    assert "ids: 49406 [49408] [49409] 267 2842 271 49407\n" in shown


def test_a_warm_up_is_shown_as_it_begins(tmp_path, capsys):
    for share, steps, caption in ((0.5, 100, "mychar"), (0.5, 0, "mychar, red, blue"), (0, 100, "mychar, red, blue")):
        make_image(tmp_path / "a" / "0.png", caption="mychar, red, blue")
        subset = {"image_dir": str(tmp_path / "a"), "token_warmup_step": share}
        show_dataset(data_of(tmp_path, {"resolution": 32, "subsets": [subset]}), max_steps=steps)
        assert f"caption: {caption}\n" in capsys.readouterr().out


def test_crops_mirrors_and_masks_are_told(tmp_path, capsys):
    for number in range(6):
        make_image(tmp_path / "a" / f"{number}.png", (50, 32), "mychar", "RGBA")
    subset = {"image_dir": str(tmp_path / "a"), "alpha_mask": True, "flip_aug": True}
    show_dataset(data_of(tmp_path, {"resolution": 32, "subsets": [subset]}))
    shown = capsys.readouterr().out
    assert shown.count("crop left 9, top 0, right 9, bottom 0") == 6
    assert shown.count("masked") == 6
    assert 0 < shown.count("mirrored") < 6


def test_several_encoders_and_long_prompts(tmp_path, capsys):
    words = prompts(encoders=2, limit=150)
    show_dataset(_data(tmp_path, 1, words=words))
    shown = capsys.readouterr().out
    assert "ids 1: 49406 [49408] 267 2842 271 49407 | 49406 49407\n" in shown
    assert "ids 2: 49406 [49408] 267 2842 271 49407 | 49406 49407\n" in shown


def test_a_sample_without_the_word_is_pointed_out(tmp_path, capsys):
    make_image(tmp_path / "a" / "x.png", (64, 64), "a girl")
    show_dataset(_data(tmp_path, 1))
    assert capsys.readouterr().out.count("teaches it nothing") == 1


def test_only_the_first_images_of_many_are_shown(tmp_path, capsys):
    show_dataset(_data(tmp_path, 40, num_repeats=2))
    shown = capsys.readouterr().out
    assert "the first 30 of 40 images" in shown
    assert shown.count("caption:") == 30


def test_the_contact_sheet_shows_what_the_model_sees(tmp_path, capsys):
    data = _data(tmp_path, 1, words=prompts())
    output = tmp_path / "out" / "sub"
    file = show_dataset(data, str(output))
    assert file == output / SHEET_NAME
    assert str(file) in capsys.readouterr().out
    (batch,) = data.loader()
    seen = Image.fromarray(batch.images[0].permute(1, 2, 0).numpy())
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (320 + 16 + 2 * 19, 336, 3)
    # As large as its tile, on a ground that is neither black nor white, which images may be.
    shown = Image.fromarray(pixels[8:328, 8:328]).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(shown, int) - np.asarray(seen, int)).mean() < 2
    assert (pixels[:8] == 211).all()
    assert (pixels[328:] < 100).any()  # the text below


@pytest.mark.parametrize("flipped", [False, True])
def test_what_is_cropped_away_is_dimmed(tmp_path, flipped):
    picture = Image.new("RGB", (128, 64), "blue")
    picture.paste("red", (0, 0, 64, 64))
    make_image(tmp_path / "a" / "0.png", caption="mychar")
    picture.save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "0.txt").write_text("mychar", encoding="utf-8")
    subset = {"image_dir": str(tmp_path / "a"), "flip_aug": flipped}
    # A seed with which the only image is mirrored, if any is.
    data = next(
        data
        for seed in range(20)
        if (data := data_of(tmp_path, {"resolution": 64, "subsets": [subset]}, seed=seed))
        and data.source(0).sample(0, CaptionMoment(0, 0, 1), 0).flipped is flipped
    )
    with Image.open(show_dataset(data, str(tmp_path))) as sheet:
        # 128x64 fills the tile as 320x160, of which the middle 160 columns are seen.
        colours = [sheet.getpixel((8 + column, 8 + 160)) for column in (40, 120, 200, 280)]
    red, blue, pale_red, pale_blue = (255, 0, 0), (0, 0, 255), (224, 147, 147), (147, 147, 224)
    expected = [pale_red, red, blue, pale_blue]
    assert colours == (expected[::-1] if flipped else expected)


def test_a_whole_caption_stands_below_its_image(tmp_path, monkeypatch):
    """No line is wider than the tile, no word is lost, and one that is too wide is cut."""
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda _, place, text, **more: drawn.append((text, more["font"])))
    data = _data(tmp_path, 1)
    caption = "mychar, " + " ".join(f"word{number}" for number in range(40)) + " " + "x" * 100
    data.table.sets[0].captions[0] = caption
    show_dataset(data, str(tmp_path))
    lines = [text for text, _ in drawn]
    assert lines[0] == "1. 0.png"
    assert "".join(lines[1:]).replace(" ", "") == caption.replace("mychar,", "mychar mychar1,").replace(" ", "")
    assert all(font.size >= 14 and font.getlength(text) <= 320 for text, font in drawn)
    assert len(lines) < 20


def test_what_a_mask_hides_is_dark(tmp_path):
    picture = Image.new("RGBA", (64, 64), "white")
    picture.paste((255, 255, 255, 0), (0, 0, 32, 64))
    make_image(tmp_path / "a" / "0.png", caption="mychar")
    picture.save(tmp_path / "a" / "0.png")
    subset = {"image_dir": str(tmp_path / "a"), "alpha_mask": True}
    file = show_dataset(data_of(tmp_path, {"resolution": 64, "subsets": [subset]}), str(tmp_path))
    with Image.open(file) as sheet:
        assert sheet.getpixel((80, 160)) == (64, 64, 64)
        assert sheet.getpixel((250, 160)) == (255, 255, 255)


@pytest.mark.parametrize("count", [5, 7, 30])
def test_the_sheet_has_rows_of_six(tmp_path, count):
    with Image.open(show_dataset(_data(tmp_path, count), str(tmp_path))) as sheet:
        assert sheet.size == (min(count, 6) * 336, -(-count // 6) * (336 + 2 * 19))


def test_any_script_can_be_a_caption(tmp_path):
    data = _data(tmp_path, 1)
    data.table.sets[0].captions[0] = "mychar の 😀 " * 50
    assert isinstance(data.table, ImageTable)
    assert show_dataset(data, str(tmp_path)).is_file()
