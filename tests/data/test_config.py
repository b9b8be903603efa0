import logging
import re
from pathlib import Path

import pytest
from dataset_files import MINIMAL, dataset_options, load
from departures import departure
from golden_data import golden_cases

from library.data.buckets import BucketRules
from library.data.captions import CaptionRules
from library.data.config import check_caching, load_dataset_configs
from library.support.errors import UserError

# Golden cases

# Parts of the measured parameters that say nothing about the file.
NOT_IN_FILES = {"debug_dataset"}
NOT_OF_SUBSETS = {"validation_seed", "validation_split"}
SAME_NAMES = (
    *("num_repeats", "color_aug", "flip_aug", "random_crop", "face_crop_aug_range", "resize_interpolation"),
    *("custom_attributes", "image_dir", "metadata_file", "conditioning_data_dir", "is_reg", "class_tokens"),
    *("caption_extension", "cache_info", "alpha_mask"),
)


def in_their_names(subset):
    rules = subset.captions
    return {name: getattr(subset, name) for name in SAME_NAMES} | {
        "shuffle_caption": rules.shuffle,
        "caption_separator": rules.separator,
        "keep_tokens": rules.keep_tokens,
        "keep_tokens_separator": rules.keep_tokens_separator,
        "secondary_separator": rules.secondary_separator,
        "enable_wildcard": rules.wildcard,
        "caption_prefix": rules.prefix,
        "caption_suffix": rules.suffix,
        "caption_dropout_rate": rules.dropout_rate,
        "caption_dropout_every_n_epochs": rules.dropout_every_n_epochs,
        "caption_tag_dropout_rate": rules.tag_dropout_rate,
        "token_warmup_min": rules.warmup_min,
        "token_warmup_step": rules.warmup_step,
    }


def dataset_in_their_names(dataset):
    buckets = dataset.buckets
    names = ("network_multiplier", "validation_seed", "validation_split", "resize_interpolation", "batch_size")
    return {name: getattr(dataset, name) for name in (*names, "prior_loss_weight")} | {
        "resolution": buckets.resolution,
        "enable_bucket": buckets.enabled,
        "min_bucket_reso": buckets.min_reso,
        "max_bucket_reso": buckets.max_reso,
        "bucket_reso_steps": buckets.steps,
        "bucket_no_upscale": buckets.no_upscale,
    }


def as_lists(value):
    return list(value) if isinstance(value, tuple) else value


def load_golden(folder, case):
    """Load a golden case's file; a resolution is added where it has none, since the measured step does not ask."""
    argv = case["argv"]
    if not any(argument.startswith("--resolution") for argument in argv):
        argv = [*argv, "--resolution=512"]
    return load(folder, case["user_config"], argv, bucket_step=1)


def places_of(where):
    """What a message says of a place like ``data['datasets'][0]['subsets'][1]['key']``.

    An item of a list that is wrong as a whole is shown as part of the list's value.
    """
    steps = re.findall(r"\['(\w+)'\](?:\[(\d+)\])?", re.sub(r"\[\d+\]$", "", where))
    tables = {"datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
    for i, (name, number) in enumerate(steps):
        if name in tables and number:
            yield f"{tables[name]} number {int(number) + 1}"
        elif name == "general" and i < len(steps) - 1:
            yield "[general]"
        else:
            yield f'"{name}"'


@pytest.mark.parametrize("case", golden_cases("dataset_config"))
def test_golden_dataset_config(tmp_path, case):
    found = departure("dataset_config", case)
    if found.why.startswith("refused") if found else "error" in case:
        with pytest.raises(UserError) as caught:
            load_golden(tmp_path, case)
        for place in places_of(case.get("where") or ""):
            assert place in str(caught.value)
        return
    datasets = load_golden(tmp_path, case)
    if "error" in case:
        assert_dropout_is_taken_over(case["user_config"], datasets)
        return
    assert len(datasets) == len(case["datasets_resolved"])
    for dataset, measured in zip(datasets, case["datasets_resolved"], strict=True):
        assert_is_as_measured(dataset, measured, unset_extension=".caption" if found is None else None)


def assert_is_as_measured(dataset, measured, unset_extension):
    kinds = {(True, False): "dreambooth", (False, False): "finetuning", (True, True): "mask"}
    assert dataset.kind == kinds[measured["is_dreambooth"], measured["is_controlnet"]]
    expected = {name: value for name, value in measured["params"].items() if name not in NOT_IN_FILES}
    expected["resolution"] = expected["resolution"] or [512, 512]
    if expected["enable_bucket"]:  # sd-scripts adjusts the limits in a later step
        steps = expected["bucket_reso_steps"]
        expected["min_bucket_reso"] = expected["min_bucket_reso"] // steps * steps
        expected["max_bucket_reso"] = -(-expected["max_bucket_reso"] // steps) * steps
    ours = dataset_in_their_names(dataset)
    assert {name: as_lists(ours[name]) for name in expected} == expected
    distinct = {
        str(Path(subset.get("metadata_file") or subset["image_dir"])): subset
        for subset in reversed(measured["subsets"])
        if subset["num_repeats"] >= 1
    }
    for subset, measured_subset in zip(dataset.subsets, reversed(distinct.values()), strict=True):
        expected = {name: value for name, value in measured_subset.items() if name not in NOT_OF_SUBSETS}
        if expected.get("caption_extension") == ".caption":
            expected["caption_extension"] = unset_extension
        ours = in_their_names(subset)
        assert {name: as_lists(ours[name]) for name in expected} == expected


def assert_dropout_is_taken_over(content, datasets):
    """Each dropout key reaches the subsets below it, the innermost value winning."""
    for dataset, table in zip(datasets, content["datasets"], strict=True):
        for subset, inner in zip(dataset.subsets, table["subsets"], strict=True):
            written = content.get("general", {}) | table | inner
            expected = {name: value for name, value in written.items() if "dropout" in name}
            assert {name: in_their_names(subset)[name] for name in expected} == expected


@pytest.mark.parametrize("case", golden_cases("bucket_adjust"))
def test_golden_bucket_limits(tmp_path, case):
    names = ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    dataset = {name: case[name] for name in names} | {"enable_bucket": True, "subsets": [{"image_dir": "d"}]}
    if "error" in case or departure("bucket_adjust", case):
        with pytest.raises(UserError, match=r'"(min|max)_bucket_reso" must be'):
            load(tmp_path, {"datasets": [dataset]}, bucket_step=1)
        return
    (loaded,) = load(tmp_path, {"datasets": [dataset]}, bucket_step=1)
    assert [loaded.buckets.min_reso, loaded.buckets.max_reso] == case["adjusted"]


# Inheritance


def test_the_innermost_value_wins(tmp_path):
    content = """
    [general]
    keep_tokens = 1
    flip_aug = true
    caption_prefix = "general"
    [[datasets]]
    resolution = [640, 512]
    keep_tokens = 2
    caption_prefix = "dataset"
    [[datasets.subsets]]
    image_dir = "a"
    keep_tokens = 3
    flip_aug = false
    [[datasets.subsets]]
    image_dir = "b"
    [[datasets]]
    resolution = 768
    [[datasets.subsets]]
    image_dir = "a"
    """
    first, second = load(tmp_path, content, ["--keep_tokens=9", "--shuffle_caption", "--caption_suffix=cli"])
    subsets = [*first.subsets, *second.subsets]
    assert [subset.captions.keep_tokens for subset in subsets] == [3, 2, 1]
    assert [subset.flip_aug for subset in subsets] == [False, True, True]
    assert [subset.captions.prefix for subset in subsets] == ["dataset", "dataset", "general"]
    assert all(subset.captions.shuffle and subset.captions.suffix == "cli" for subset in subsets)
    assert [first.buckets.resolution, second.buckets.resolution] == [(640, 512), (768, 768)]


def test_false_in_the_file_beats_a_flag(tmp_path):
    content = MINIMAL.replace("resolution", "shuffle_caption = false\nenable_bucket = false\nresolution")
    (dataset,) = load(tmp_path, content, ["--shuffle_caption", "--enable_bucket"])
    assert not dataset.subsets[0].captions.shuffle
    assert not dataset.buckets.enabled


def test_defaults_are_those_of_the_command_line(tmp_path):
    (dataset,) = load(tmp_path, MINIMAL)
    assert dataset.buckets == BucketRules((512, 512))
    assert dataset.subsets[0].captions == CaptionRules()
    assert (dataset.batch_size, dataset.validation_split, dataset.prior_loss_weight) == (1, 0.0, 1.0)


def test_places_are_remembered(tmp_path):
    (dataset,) = load(tmp_path, MINIMAL)
    assert dataset.place == f"{tmp_path / 'data.toml'}, [[datasets]] number 1"
    assert dataset.subsets[0].place == f"{dataset.place}, [[datasets.subsets]] number 1"


def test_the_shipped_example(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    options = dataset_options(dataset_config=Path("configs/dataset_config.toml"))
    (dataset,) = load_dataset_configs(options, bucket_step=64)
    assert dataset.batch_size == 4
    assert dataset.buckets == BucketRules((512, 512), enabled=True)
    (subset,) = dataset.subsets
    assert (subset.image_dir, subset.num_repeats, subset.caption_extension) == ("path/to/images", 10, ".txt")
    assert subset.captions == CaptionRules()


# Subsets that do not count


def test_subsets_without_repeats_are_left_out(tmp_path, caplog):
    content = MINIMAL + "num_repeats = 0\n[[datasets.subsets]]\nimage_dir = 'other'\n"
    (dataset,) = load(tmp_path, content)
    assert [subset.image_dir for subset in dataset.subsets] == ["other"]
    assert "[[datasets.subsets]] number 1 is left out: its num_repeats is 0" in caplog.text


@pytest.mark.parametrize("again", ["images", "images/", "./images", "x/../images"])
def test_the_same_folder_counts_once(tmp_path, caplog, again):
    content = MINIMAL + f"[[datasets.subsets]]\nimage_dir = '{again}'\n[[datasets.subsets]]\nimage_dir = 'pictures2'\n"
    (dataset,) = load(tmp_path, content)
    assert [subset.image_dir for subset in dataset.subsets] == ["images", "pictures2"]
    assert f'[[datasets.subsets]] number 2 is left out: "{again}" is in an earlier subset' in caplog.text


def test_a_link_to_the_same_folder_counts_once(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    subsets = [{"image_dir": str(tmp_path / name)} for name in ("images", "link")]
    (dataset,) = load(tmp_path, {"datasets": [{"resolution": 512, "subsets": subsets}]})
    assert len(dataset.subsets) == 1


def test_one_folder_may_serve_two_datasets(tmp_path):
    assert [len(dataset.subsets) for dataset in load(tmp_path, MINIMAL + MINIMAL)] == [1, 1]


# Buckets


@pytest.mark.parametrize(
    ("steps", "bucket_step", "accepted"), [(64, 64, True), (32, 64, False), (32, 32, True), (48, 32, False)]
)
def test_bucket_steps_fit_the_model(tmp_path, steps, bucket_step, accepted):
    content = MINIMAL.replace("resolution", f"enable_bucket = true\nbucket_reso_steps = {steps}\nresolution")
    if accepted:
        assert load(tmp_path, content, bucket_step=bucket_step)[0].buckets.steps == steps
    else:
        with pytest.raises(UserError, match=f'"bucket_reso_steps" must be a multiple of {bucket_step}'):
            load(tmp_path, content, bucket_step=bucket_step)


def test_bucket_limits_do_not_matter_without_buckets(tmp_path):
    content = MINIMAL.replace("resolution", "min_bucket_reso = 1000\nbucket_reso_steps = 7\nresolution")
    (dataset,) = load(tmp_path, content)
    assert (dataset.buckets.min_reso, dataset.buckets.steps) == (1000, 7)


def test_adjusted_limits_are_told(tmp_path, caplog):
    content = MINIMAL.replace("resolution", "enable_bucket = true\nmin_bucket_reso = 300\nresolution")
    (dataset,) = load(tmp_path, content)
    assert (dataset.buckets.min_reso, dataset.buckets.max_reso) == (256, 1024)
    assert "multiples of 64, so they go from 256 to 1024 instead of from 300 to 1024" in caplog.text


def test_resolution_of_the_command_line_is_checked(tmp_path):
    with pytest.raises(UserError, match=r'The command line: "resolution" must be .* it is \[4, 4\]'):
        load(tmp_path, MINIMAL, ["--resolution=4"])


# Masks

TWO = MINIMAL + '[[datasets.subsets]]\nimage_dir = "b"\n'


def test_masks_named_in_the_file(tmp_path):
    (dataset,) = load(tmp_path, MINIMAL + "conditioning_data_dir = 'm'", ["--masked_loss"])
    assert (dataset.kind, dataset.subsets[0].kind) == ("mask", "mask")
    assert dataset.subsets[0].conditioning_data_dir == "m"


def test_masks_of_the_command_line_serve_those_without(tmp_path):
    content = TWO.replace('"images"', '"images"\nconditioning_data_dir = "own"')
    (dataset,) = load(tmp_path, content, ["--masked_loss", "--conditioning_data_dir=shared"])
    assert [subset.conditioning_data_dir for subset in dataset.subsets] == ["own", "shared"]
    assert {subset.kind for subset in dataset.subsets} == {"mask"}


def test_masks_of_the_command_line_leave_class_tokens_and_regularisation(tmp_path):
    content = TWO.replace('"images"', '"images"\nclass_tokens = "girl"') + "is_reg = true\n"
    (dataset,) = load(tmp_path, content, ["--masked_loss", "--conditioning_data_dir=m"])
    assert dataset.kind == "mask"
    trained, regularisation = dataset.subsets
    assert (trained.kind, trained.class_tokens, trained.conditioning_data_dir) == ("mask", "girl", "m")
    assert (regularisation.kind, regularisation.conditioning_data_dir) == ("dreambooth", None)


def test_masks_of_the_command_line_serve_listed_images(tmp_path):
    content = MINIMAL.replace("image_dir", "metadata_file")
    (dataset,) = load(tmp_path, content, ["--masked_loss", "--conditioning_data_dir=m"])
    assert dataset.kind == "finetuning"
    assert dataset.subsets[0].conditioning_data_dir == "m"


def test_masked_loss_wants_masks(tmp_path):
    with pytest.raises(UserError, match="--masked_loss has no masks"):
        load(tmp_path, MINIMAL, ["--masked_loss"])


@pytest.mark.parametrize("argv", [["--masked_loss", "--alpha_mask"], ["--alpha_mask"]])
def test_transparency_is_a_mask_too(tmp_path, argv):
    assert load(tmp_path, MINIMAL, argv)[0].subsets[0].alpha_mask


def test_masks_without_masked_loss_are_idle(tmp_path, caplog):
    (dataset,) = load(tmp_path, MINIMAL, ["--conditioning_data_dir=m"])
    assert dataset.subsets[0].conditioning_data_dir is None
    assert "--conditioning_data_dir does nothing without --masked_loss" in caplog.text


# Keys without effect, and caching


IDLE = {
    "network_multiplier = 0.5": None,
    "custom_attributes = {a = 1}": None,
    "bucket_no_upscale = true": "enable_bucket = true",
    "token_warmup_min = 3": "token_warmup_step = 10",
    "keep_tokens = 1": "shuffle_caption = true",
    'keep_tokens_separator = "|||"': "caption_tag_dropout_rate = 0.1",
}


@pytest.mark.parametrize(("line", "use"), IDLE.items())
def test_idle_keys_are_told_once(tmp_path, caplog, line, use):
    caplog.set_level(logging.INFO)
    load(tmp_path, f"[general]\n{line}\n{TWO}")
    assert [line.split(" ")[0] in message for message in caplog.messages] == [True]
    caplog.clear()
    if use:
        load(tmp_path, f"[general]\n{line}\n{use}\n{TWO}")
        assert caplog.messages == []


def test_face_crops_without_effect_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ranged = "[general]\nface_crop_aug_range = [1.0, 2.0]\n"
    datasets = load(tmp_path, ranged + MINIMAL)
    check_caching(datasets, caching=False)
    assert caplog.messages == []
    check_caching(datasets, caching=True)
    load(tmp_path, f"{ranged}enable_bucket = true\n{MINIMAL}")
    assert ["--cache_latents" in message for message in caplog.messages] == [True, False]
    assert all("face_crop_aug_range does nothing" in message for message in caplog.messages)


@pytest.mark.parametrize("line", ["color_aug = true", "random_crop = true"])
def test_caching_forbids_what_varies_the_image(tmp_path, line):
    datasets = load(tmp_path, TWO + f"{line}\nflip_aug = true")
    check_caching(datasets, caching=False)
    with pytest.raises(UserError, match=rf"subsets\]\] number 2: {line.split(' ')[0]} cannot"):
        check_caching(datasets, caching=True)


def test_caching_allows_mirroring(tmp_path):
    check_caching(load(tmp_path, MINIMAL + "flip_aug = true"), caching=True)


def test_no_torch_is_needed():
    import subprocess
    import sys

    code = "import sys, library.data.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_bucket_keys_without_buckets_are_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    load(tmp_path, f"[general]\nmin_bucket_reso = 128\nbucket_reso_steps = 32\n{MINIMAL}{MINIMAL}")
    assert [message.split(": ")[1] for message in caplog.messages] == [
        "min_bucket_reso does nothing without enable_bucket.",
        "bucket_reso_steps does nothing without enable_bucket.",
    ]
    caplog.clear()
    load(tmp_path, f"[general]\nmin_bucket_reso = 128\nenable_bucket = true\n{MINIMAL}")
    assert caplog.messages == []
