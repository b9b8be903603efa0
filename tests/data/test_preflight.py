"""preflight.py: what is said of a dataset before anything is loaded."""

import random
import shutil

import pytest
from datasets import data_of, make_image, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.captions import OBJECT_TEMPLATES, CaptionRules
from library.data.preflight import _Measure
from library.support.errors import UserError


def _captioned(tmp_path, captions, *, words=None, templates=None, dataset=None, size=(64, 64), **subset):
    for number, caption in enumerate(captions):
        make_image(tmp_path / "a" / f"{number}.png", size, caption)
    values = {"resolution": 64, **(dataset or {}), "subsets": [{"image_dir": str(tmp_path / "a"), **subset}]}
    return data_of(tmp_path, values, words=words, templates=templates)


def _warnings(data) -> str:
    return "\n".join(data.check().warnings)


# The report


def test_a_good_dataset_is_described_without_warnings(tmp_path):
    for number in range(3):
        make_image(tmp_path / "a" / f"{number}.png", (80, 50 + number), "mychar")
    make_image(tmp_path / "reg" / "r.png", (64, 64), "girl")
    subsets = [
        {"image_dir": str(tmp_path / "a"), "num_repeats": 4},
        {"image_dir": str(tmp_path / "reg"), "is_reg": True},
    ]
    values = {"resolution": 64, "enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 16, "batch_size": 5}
    report = data_of(tmp_path, {**values, "subsets": subsets}).check()
    assert report.warnings == []
    assert report.text.splitlines() == [
        "Training data: 4 images, 24 samples in 6 batches an epoch.",
        "  dataset 1: 64x64, batch size 5, buckets",
        f"    3 images, 12 samples: {tmp_path / 'a'}",
        f"    1 image, 12 samples: {tmp_path / 'reg'} (regularisation)",
        "    bucket     64x64: 1 image, 12 samples",
        "    bucket     80x48: 3 images, 12 samples",
        "  1 regularisation image without the token, as it should be: they cannot move its vectors",
    ]


def test_validation_images_are_counted(tmp_path):
    data = _captioned(tmp_path, ["mychar"] * 4, dataset={"validation_split": 0.5})
    assert "  2 images held out for validation" in data.check().lines


def test_many_buckets_are_not_all_listed(tmp_path):
    for number in range(20):
        make_image(tmp_path / "a" / f"{number}.png", (64 + 8 * number, 64), "mychar")
    values = {"resolution": 256, "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 8}
    report = data_of(tmp_path, {**values, "subsets": [{"image_dir": str(tmp_path / "a")}]}).check()
    assert report.lines[-1] == "    … and 8 more buckets"


# The word in the captions


def test_no_caption_with_the_word_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r'No caption holds the token "mychar".*7 image.*0\.png.*--use_object_template'):
        _captioned(tmp_path, ["mychars"] * 7).check()


def test_some_captions_without_the_word_are_a_warning_with_the_first_five(tmp_path):
    said = _warnings(_captioned(tmp_path, ["MyChar", "mychar_(x)", *["a girl"] * 7]))
    assert "7 of 9 captions lack the token" in said
    assert all(f"{number}.png" in said for number in (2, 3, 4, 5, 6))
    assert "7.png" not in said


def test_one_vector_by_its_name_is_the_word(tmp_path):
    assert _warnings(_captioned(tmp_path, ["mychar", "mychar1"], words=prompts(2))) == ""


def test_prefix_suffix_and_class_tokens_can_bring_the_word(tmp_path):
    assert _warnings(_captioned(tmp_path / "1", ["girl"], caption_prefix="mychar,")) == ""
    assert _warnings(_captioned(tmp_path / "2", ["girl"], caption_suffix="of mychar")) == ""
    assert _warnings(_captioned(tmp_path / "3", [None], class_tokens="mychar girl")) == ""


def test_a_line_or_choice_without_the_word_is_a_warning(tmp_path):
    said = _warnings(
        _captioned(tmp_path, ["mychar\ngirl", "{mychar|girl}", "a {red|blue} mychar"], enable_wildcard=True)
    )
    assert "2 captions with the token" in said
    assert "0.png" in said
    assert "1.png" in said
    assert "2.png" not in said


def test_of_several_lines_the_first_with_text_counts(tmp_path):
    assert _warnings(_captioned(tmp_path / "1", [None], class_tokens="\n\nmychar\ngirl")) == ""
    with pytest.raises(UserError, match="No caption holds the token"):
        _captioned(tmp_path / "2", [None], class_tokens="girl\nmychar").check()


def test_regularisation_images_with_the_word_are_a_warning(tmp_path):
    make_image(tmp_path / "a" / "0.png", (64, 64), "mychar")
    for number in range(2):
        make_image(tmp_path / "reg" / f"{number}.png", (64, 64), "girl" if number else "mychar")
    subsets = [
        {"image_dir": str(tmp_path / "a"), "num_repeats": 2},
        {"image_dir": str(tmp_path / "reg"), "is_reg": True},
    ]
    assert "1 of 2 regularisation captions hold" in _warnings(data_of(tmp_path, {"resolution": 64, "subsets": subsets}))


def test_images_without_captions_are_named(tmp_path):
    said = _warnings(_captioned(tmp_path, ["mychar", None]))
    assert "1 image without a caption" in said
    assert "1.png" in said


def test_templates_need_no_captions(tmp_path):
    report = _captioned(tmp_path, [None, "girl"], templates=OBJECT_TEMPLATES).check()
    assert report.warnings == []
    assert "27 templates" in report.text


# The length limit

LONG = "x " * 75


def test_a_long_caption_is_a_warning_that_names_the_way_out(tmp_path):
    said = _warnings(_captioned(tmp_path, ["mychar", "mychar " + LONG]))
    assert "1 caption is longer than 75 tokens" in said
    assert "1.png" in said
    assert "--max_token_length" in said
    assert _warnings(_captioned(tmp_path, ["mychar"], words=prompts(limit=150))) == ""


def test_the_limit_is_exact(tmp_path):
    assert _warnings(_captioned(tmp_path / "1", ["mychar " + "x " * 74])) == ""
    assert "longer than 75" in _warnings(_captioned(tmp_path / "2", ["mychar " + "x " * 75]))
    assert "cut off" in _warnings(_captioned(tmp_path / "3", ["mychar", "x " * 73 + "mychar"], words=prompts(3)))
    assert _warnings(_captioned(tmp_path / "4", ["mychar", "x " * 72 + "mychar"], words=prompts(3))) == ""


def test_a_word_that_is_cut_off_somewhere_is_a_warning(tmp_path):
    said = _warnings(_captioned(tmp_path, ["mychar", LONG + "mychar"]))
    assert "1 caption is so long that vectors" in said
    assert "1.png" in said


@pytest.mark.parametrize(
    ("rules", "strays"),
    [
        ({"shuffle_caption": True}, True),
        ({"shuffle_caption": True, "keep_tokens": 1}, False),
        ({"shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "best,"}, True),
        ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, False),
        ({}, False),
    ],
)
def test_a_word_that_shuffling_can_move_behind_the_limit_is_a_warning(tmp_path, rules, strays):
    said = _warnings(_captioned(tmp_path, ["mychar ||| a, " + "b, " * 80], **rules))
    assert ("shuffled" in said) == strays
    assert "longer than 75" in said


def test_a_word_that_is_cut_off_everywhere_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"Every caption cuts off .*: mychar\. .*--max_token_length"):
        _captioned(tmp_path, [LONG + "mychar", "girl"]).check()


def test_a_vector_that_is_cut_off_everywhere_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r": mychar2, mychar3\."):
        _captioned(tmp_path, ["x " * 73 + "mychar"], words=prompts(4)).check()


def test_a_vector_that_no_caption_holds_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r": mychar\."):
        _captioned(tmp_path, ["mychar1"], words=prompts(2)).check()


@pytest.mark.parametrize("templates", [None, OBJECT_TEMPLATES])
def test_more_vectors_than_tokens_are_an_error(tmp_path, templates):
    with pytest.raises(UserError, match=r"--num_vectors_per_token=76 .* 75 tokens"):
        _captioned(tmp_path, ["mychar"], words=prompts(76), templates=templates).check()


def test_as_many_vectors_as_tokens_fit_alone(tmp_path):
    assert _warnings(_captioned(tmp_path, ["mychar"], words=prompts(75))) == ""
    with pytest.raises(UserError, match="mychar74"):
        _captioned(tmp_path, ["mychar"], words=prompts(75), templates=OBJECT_TEMPLATES).check()


TEXTS = st.lists(
    st.sampled_from(["mychar", "MYCHAR,", "mychar2", "a", "1girl,", "don't", "日本語", "😀", "{a|b}", "x" * 40, "é"]),
    max_size=40,
).map(" ".join)


@given(TEXTS, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_measuring_word_by_word_is_exact(text, vectors):
    words = prompts(vectors)
    measure = _Measure(words)
    assert measure(words.placeholder.expand(text)) == words.length(text)
    # The quick answer may be a false no, never a false yes.
    assert not measure.surely_fits(text, CaptionRules()) or words.length(text) <= 75


# Files


def test_copies_are_named(tmp_path):
    make_image(tmp_path / "a" / "one.png", (64, 64), "mychar")
    shutil.copy(tmp_path / "a" / "one.png", tmp_path / "a" / "two.png")
    (tmp_path / "a" / "two.txt").write_text("mychar")
    said = _warnings(data_of(tmp_path, {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "a")}]}))
    assert f"{tmp_path}/a/two.png = {tmp_path}/a/one.png" in said


def test_images_of_equal_length_are_told_apart(tmp_path):
    """Uncompressed files of one size have one length, and the same first kilobytes where the images end alike."""
    for number in range(3):
        picture = make_image(tmp_path / "a" / f"{number}.bmp", (64, 64), "mychar")
        content = bytearray(b"\xff" * (picture.stat().st_size - 54))
        content[-1] = number
        picture.write_bytes(picture.read_bytes()[:54] + content)
    assert _warnings(data_of(tmp_path, {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "a")}]})) == ""


def test_one_image_in_two_datasets_is_no_copy(tmp_path):
    make_image(tmp_path / "a" / "one.png", (64, 64), "mychar")
    values = {"subsets": [{"image_dir": str(tmp_path / "a")}]}
    assert _warnings(data_of(tmp_path, {"resolution": 64, **values}, {"resolution": 48, **values})) == ""


def test_images_that_are_enlarged_a_lot_are_named(tmp_path):
    said = _warnings(_captioned(tmp_path, ["mychar"], size=(40, 25)))
    assert "1 image is much smaller" in said
    assert "0.png (2.6 times)" in said
    assert _warnings(_captioned(tmp_path / "other", ["mychar"], size=(40, 40))) == ""


def test_images_that_are_mostly_cropped_are_named(tmp_path):
    assert "0.png (40% is seen)" in _warnings(_captioned(tmp_path, ["mychar"], size=(160, 64)))
    assert _warnings(_captioned(tmp_path / "less", ["mychar"], size=(120, 64))) == ""
    buckets = {"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 16}
    assert _warnings(_captioned(tmp_path / "buckets", ["mychar"], size=(160, 64), dataset=buckets)) == ""


def test_images_below_one_bucket_step_are_named(tmp_path):
    values = {"enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 32, "min_bucket_reso": 32}
    said = _warnings(_captioned(tmp_path, ["mychar"], size=(30, 64), dataset=values))
    assert "smaller than one bucket step" in said
    assert "0.png" in said
    assert _warnings(_captioned(tmp_path / "other", ["mychar"], size=(33, 40), dataset=values)) == ""


def test_the_check_leaves_generators_alone(tmp_path):
    data = _captioned(tmp_path, ["mychar"] * 2)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    data.check()
    assert random.random() == expected


def test_what_is_counted_is_in_its_right_form(tmp_path):
    assert "1 of 2 captions lacks the token" in _warnings(_captioned(tmp_path / "1", ["mychar", "girl"]))
    data = _captioned(tmp_path / "2", ["mychar", "mychar"])
    shutil.copy(tmp_path / "2" / "a" / "0.png", tmp_path / "2" / "a" / "1.png")
    said = _warnings(data)
    assert "1 image appears to be copied from others in the same dataset; each copy is trained on" in said
