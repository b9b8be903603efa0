"""Mistakes in dataset files: every message holds the file, the place, the value and what would be right."""

import json

import pytest
from dataset_files import load

from library.data.schema import DATASET, DREAMBOOTH, FINETUNING, GENERAL, MASK, SUBSET, known_keys, shown
from library.support.errors import UserError

FIRST = "[[datasets]] number 1"
FIRST_SUBSET = "[[datasets.subsets]] number 1"


def in_general(line):
    return f'[general]\n{line}\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "d"\n'


def in_dataset(line):
    return f'[[datasets]]\nresolution = 512\n{line}\n[[datasets.subsets]]\nimage_dir = "d"\n'


def in_subset(line):
    return f'[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "d"\n{line}\n'


def in_listed(line):
    return f'[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nmetadata_file = "m.json"\n{line}\n'


BUCKETS_ON = "enable_bucket = true\n"

# What the file holds, and what the message must hold beside the file's name: place, value, nearest key or range.
MALFORMED = {
    # Names
    "typo in a subset": (in_subset("keep_tokns = 1"), [FIRST, FIRST_SUBSET, '"keep_tokns"', "1", '"keep_tokens"']),
    "typo in a dataset": (in_dataset("batchsize = 7"), [FIRST, '"batchsize"', "7", '"batch_size"']),
    "typo in general": (in_general('caption_extensoin = ".txt"'), ["[general]", '".txt"', '"caption_extension"']),
    "old spelling": (in_subset('caption_extention = ".txt"'), [FIRST_SUBSET, '".txt"', '"caption_extension"']),
    "option's name of repeats": (in_subset("dataset_repeats = 3"), [FIRST_SUBSET, "3", '"num_repeats"']),
    "only an option, weight": (in_general("prior_loss_weight = 0.5"), ["[general]", "0.5", "--prior_loss_weight"]),
    "nothing alike": (in_subset("zzz = 1"), [FIRST_SUBSET, '"zzz"', "1", "image_dir", "num_repeats"]),
    "unknown table": (in_subset("") + "[other]\n", ['"other"', "a table", "datasets, general"]),
    "key above all tables": ("resolution = 512\n" + in_subset(""), ["the file", "512", "[general] or [[datasets]]"]),
    "subset's key in general": (in_general('image_dir = "d"'), ["[general]", '"d"', "[[datasets.subsets]]"]),
    "folder's key beside metadata": (in_listed('class_tokens = "x"'), [FIRST_SUBSET, '"x"', "a folder of images"]),
    "caption files beside metadata": (in_listed('caption_extension = ".txt"'), [FIRST_SUBSET, '".txt"', "folder"]),
    # Structure
    "no datasets": ("[general]\nresolution = 512\n", ["[[datasets]]", "nothing to train on"]),
    "double general": ("[[general]]\nresolution = 512\n" + in_subset(""), ['"general"', "a list of tables", "a table"]),
    "second of several": (
        in_subset("") + '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "e"\n[[datasets.subsets]]\nflip_aug = 1\n',
        ["[[datasets]] number 2", "[[datasets.subsets]] number 2", "1", "true or false"],
    ),
    "kinds mixed": (
        in_subset("") + '[[datasets.subsets]]\nmetadata_file = "m.json"\n',
        [FIRST, "number 2", "number 1", "metadata_file"],
    ),
    "all left out": (in_subset("num_repeats = 0"), [FIRST, "num_repeats", "below 1"]),
    # Types
    "whole number as decimal": (in_dataset("batch_size = 2.0"), [FIRST, '"batch_size"', "2.0", "a whole number"]),
    "whole number as boolean": (in_dataset("batch_size = true"), [FIRST, "true", "a whole number from 1 to"]),
    "whole number as text": (in_subset('num_repeats = "10"'), [FIRST_SUBSET, '"10"', "a whole number"]),
    "boolean as text": (in_general('flip_aug = "true"'), ["[general]", '"true"', "true or false"]),
    "decimal as whole number": (in_dataset("validation_split = 0"), [FIRST, "0", "0.0 to below 1.0"]),
    "decimal as text": (in_dataset('network_multiplier = "1.0"'), [FIRST, '"1.0"', "decimal point"]),
    "text as number": (in_subset("caption_prefix = 3"), [FIRST_SUBSET, '"caption_prefix"', "3", "string"]),
    "text as list": (in_subset('class_tokens = ["a"]'), [FIRST_SUBSET, '["a"]', "string"]),
    "resolution as text": (in_general('resolution = "512"'), ["[general]", '"512"', "[width, height]"]),
    "resolution with one side": (in_general("resolution = [512]"), ["[general]", "[512]", "[width, height]"]),
    "resolution with three sides": (
        in_general("resolution = [1, 2, 3]"),
        ["[general]", "[1, 2, 3]", "[width, height]"],
    ),
    "resolution in decimals": (in_general("resolution = [512.0, 512.0]"), ["[512.0, 512.0]", "whole number"]),
    "face range of whole numbers": (
        in_subset("face_crop_aug_range = [1, 3]"),
        [FIRST_SUBSET, "[1, 3]", "decimal point"],
    ),
    "attributes as text": (in_subset('custom_attributes = "x"'), [FIRST_SUBSET, '"x"', "a table"]),
    "null": ({"datasets": [{"batch_size": None, "subsets": [{"image_dir": "d"}]}]}, [FIRST, "null", "a whole number"]),
    # Ranges
    "resolution 0": (in_general("resolution = 0"), ["[general]", "it is 0", "from 8 to 16384"]),
    "resolution of a slip": (in_general("resolution = [512, 51200]"), ["[general]", "[512, 51200]", "from 8 to 16384"]),
    "batch_size of a slip": (in_dataset("batch_size = 1000000000"), [FIRST, "1000000000", "from 1 to 4096"]),
    "bucket limit of a slip": (in_dataset("max_bucket_reso = 10000000000000000000"), [FIRST, "from 1 to 65536"]),
    "bucket limit of a slip below": (in_dataset("min_bucket_reso = 10000000000000000000"), [FIRST, "from 1 to 65536"]),
    "bucket steps of a slip": (in_dataset("bucket_reso_steps = 10000000000000000000"), [FIRST, "from 1 to 65536"]),
    "repeats of a slip": (in_subset("num_repeats = 100000000"), [FIRST_SUBSET, "100000000", "up to 1000000"]),
    "repeats that overflow": (in_subset("num_repeats = 10000000000"), [FIRST_SUBSET, "up to 1000000"]),
    "keep_tokens of a slip": (in_subset("keep_tokens = 10000000000000000000"), [FIRST_SUBSET, "from 0 to"]),
    "warm-up of a slip": (in_subset("token_warmup_step = 1e300"), [FIRST_SUBSET, "1e+300", "from 0 to"]),
    "negative dropout": (in_subset("caption_dropout_rate = -0.1"), [FIRST_SUBSET, "-0.1", "from 0 to 1"]),
    "dropout above 1": (in_general("caption_tag_dropout_rate = 1.5"), ["[general]", "1.5", "from 0 to 1"]),
    "dropout is not a number": (in_general("caption_dropout_rate = nan"), ["[general]", "NaN", "from 0 to 1"]),
    "negative epochs": (in_subset("caption_dropout_every_n_epochs = -2"), [FIRST_SUBSET, "-2", "from 0 to"]),
    "negative warm-up": (in_subset("token_warmup_step = -0.5"), [FIRST_SUBSET, "-0.5", "a number from 0 to"]),
    "negative warm-up minimum": (in_subset("token_warmup_min = -1"), [FIRST_SUBSET, "-1", "from 0 to"]),
    "empty separator": (in_subset('caption_separator = ""'), [FIRST_SUBSET, '""', "not empty"]),
    "empty extension": (in_general('caption_extension = ""'), ["[general]", '""', "not empty"]),
    "empty image_dir": ('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = " "', [FIRST_SUBSET, '" "']),
    "face range downwards": (
        in_subset("face_crop_aug_range = [3.0, 1.0]"),
        [FIRST_SUBSET, "[3.0, 1.0]", "[least, most]"],
    ),
    "face range from 0": (in_subset("face_crop_aug_range = [0.0, 1.0]"), [FIRST_SUBSET, "[0.0, 1.0]", "above 0.0"]),
    "interpolation": (in_dataset('resize_interpolation = "lanzcos"'), [FIRST, '"lanzcos"', "lanczos, nearest"]),
    "least bucket above": (
        in_dataset(BUCKETS_ON + "min_bucket_reso = 640"),
        [FIRST, '"min_bucket_reso"', "640", "512x512"],
    ),
    "largest bucket below": (
        in_dataset(BUCKETS_ON + "max_bucket_reso = 256"),
        [FIRST, '"max_bucket_reso"', "256", "512x512"],
    ),
    "least bucket below a step": (
        in_dataset(BUCKETS_ON + "min_bucket_reso = 63"),
        [FIRST, "63", "bucket_reso_steps (64)"],
    ),
    "bucket steps 0": (in_dataset("bucket_reso_steps = 0"), [FIRST, "it is 0", "from 1 to"]),
    "list of numbers for datasets": ({"datasets": [1, 2]}, ['"datasets"', "[1, 2]", "a list of tables"]),
}


@pytest.mark.parametrize("mistake", MALFORMED)
def test_mistakes_are_explained(tmp_path, mistake):
    content, expected = MALFORMED[mistake]
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    missing = [
        text for text in [*expected, "data.json" if isinstance(content, dict) else "data.toml"] if text not in message
    ]
    assert not missing, message
    assert message.endswith((".", "?"))


def test_there_are_at_least_forty_mistakes():
    assert len(MALFORMED) >= 40


def test_masks_and_class_tokens_do_not_go_together(tmp_path):
    content = in_subset('conditioning_data_dir = "m"\nclass_tokens = "x"')
    with pytest.raises(UserError, match=r'subsets\]\] number 1: "class_tokens" \(here "x"\) does not go with'):
        load(tmp_path, content, ["--masked_loss"])


@pytest.mark.parametrize("level", [GENERAL, DATASET, SUBSET])
@pytest.mark.parametrize("kind", [DREAMBOOTH, FINETUNING, MASK])
def test_every_subset_key_is_known_on_every_level(level, kind):
    shared = {"num_repeats", "shuffle_caption", "keep_tokens", "caption_dropout_rate", "token_warmup_step"}
    assert shared <= set(known_keys(level, kind))
    assert ("batch_size" in known_keys(level, kind)) == (level != SUBSET)
    assert ("image_dir" in known_keys(level, kind)) == (level == SUBSET)


@pytest.mark.parametrize("value", ["a", 1, 1.5, True, [1, 2], ["x"]])
def test_values_are_shown_as_they_are_written(value):
    assert json.loads(shown(value)) == value
