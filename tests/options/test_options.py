"""Every option is declared once, agrees with sd-scripts' list, explains itself, and appears in docs/options.md."""

import dataclasses
import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from departures import departure
from golden_data import golden_cases

from library.options.config_file import FILE_OPTIONS
from library.options.declaration import checked
from library.options.option_types import (
    boolean,
    face_crop_range,
    int_or_float,
    learning_rate,
    number,
    resolution,
    text,
    text_or_boolean,
    texts,
    whole_number,
    written,
)
from library.options.options import Options, as_dict, declared_options, option_groups
from library.options.reference_page import page

SD_SCRIPTS = json.loads((Path(__file__).parent.parent / "sd_scripts_options.json").read_text(encoding="utf-8"))
DECLARED = dict(declared_options()) | FILE_OPTIONS
ADDED = {
    "dry_run",
    "no_report",
    "log_every_n_steps",
    "allow_tf32",
    "allow_outside_images",
    "cache_text_encoder_outputs",
    "average_last",
    "early_stopping",
    "early_stopping_every",
    "early_stopping_patience",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "init_word_candidates",
    "normalize_sample_gradients",
    "max_embedding_norm",
    "preserve_embedding_norm",
    "learning_report",
    "no_metadata",  # of sd-scripts' LoRA script, as the next
    "training_comment",
    "skip_image_resolution",  # this and the next are of a newer sd-scripts than the list's
    "train_inpainting",
}
OTHER_DEFAULTS = {
    "save_model_as": "safetensors",
    "caption_extension": None,
    "learning_rate": None,
    "mixed_precision": None,
    "v_parameterization": None,  # unset, both follow the model
    "zero_terminal_snr": None,
}
MORE_CHOICES = {"max_token_length": {75}, "dynamo_backend": {"no"}}
# A text in sd-scripts that is taken apart later; here it is read at once.
READ_AS = {
    "text": "str",
    "texts": "str",
    "text_or_boolean": "str",
    "resolution": "str",
    "face_crop_range": "str",
    "path": "Path",
    "whole_number": "int",
    "number": "float",
    "learning_rate": "float",
    "int_or_float": "int_or_float",
    "boolean": None,
}


def test_the_options_are_those_of_sd_scripts_and_some_more():
    names = [name for name, _ in declared_options()] + list(FILE_OPTIONS)
    assert len(names) == len(set(names))
    assert set(names) == {row["dest"] for row in SD_SCRIPTS} | ADDED


@pytest.mark.parametrize("row", SD_SCRIPTS, ids=lambda row: row["dest"])
def test_type_default_and_choices_are_those_of_sd_scripts(row):
    option = DECLARED[row["dest"]]
    assert READ_AS[option.read.__name__] == row["type"]
    assert option.many == (row["nargs"] == "*")
    assert option.default == OTHER_DEFAULTS.get(row["dest"], row["default"])
    choices = {choice for choice in row["choices"] or () if choice is not None}
    assert set(option.choices or ()) == choices | MORE_CHOICES.get(row["dest"], set())


@pytest.mark.parametrize("name", DECLARED)
def test_help_is_a_sentence_and_not_the_name_again(name):
    help_text = DECLARED[name].help
    assert help_text[-1] in '.")'
    assert len(help_text) > 6
    assert name.replace("_", " ") != help_text.lower().rstrip(".")


def test_defaults_lie_within_limits_and_choices():
    for name, option in DECLARED.items():
        if option.default not in (None, ""):
            assert not option.limits or option.allows(option.default), name
            assert not option.choices or option.default in option.choices, name


def test_options_cannot_be_changed():
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.model = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.model.v2 = True


def test_every_group_of_options_has_a_title():
    titles = [group.__doc__ for group in option_groups().values()]
    assert len(set(titles)) == len(titles)
    assert not any("(" in title and "=" in title for title in titles)  # dataclass' own docstring


def test_as_dict_leaves_secrets_out():
    options = Options.from_values({"wandb_api_key": "k", "huggingface_token": "t", "seed": 3})
    shown = as_dict(options)
    assert shown["seed"] == 3
    assert {"wandb_api_key", "huggingface_token"}.isdisjoint(shown)
    whole = as_dict(options, secrets=True)
    assert (whole["wandb_api_key"], whole["huggingface_token"]) == ("k", "t")
    assert len(whole) == len(shown) + 2
    assert "wandb_api_key" not in repr(options)


def test_the_reference_page_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8") == page()


def test_the_reference_page_has_one_row_for_each_option():
    rows = [line for line in page().splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1][2:] for row in rows] == [*FILE_OPTIONS, *(name for name, _ in declared_options())]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


@pytest.mark.parametrize("case", golden_cases("int_or_float"))
def test_golden_int_or_float(case):
    assert departure("int_or_float", case) is None
    if "error" in case:
        with pytest.raises(ArgumentTypeError):
            int_or_float(case["string"])
        return
    result = int_or_float(case["string"])
    assert result == case["value"]
    assert type(result).__name__ == case["type"]


@pytest.mark.parametrize("case", golden_cases("resolution_arg"))
def test_golden_resolution_arg(case):
    assert departure("resolution_arg", case) is None
    if "error" in case:
        with pytest.raises(ArgumentTypeError):
            resolution(case["resolution_arg"])
    else:
        assert list(resolution(case["resolution_arg"])) == case["resolution"]


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (whole_number, "3", 3),
        (whole_number, " 3", 3),
        (whole_number, 3.0, 3),
        (whole_number, "-3", -3),
        (number, 3, 3.0),
        (number, "1e-4", 1e-4),
        (text, 3, "3"),
        (text, "", None),
        (boolean, 1, True),
        (boolean, 0, False),
        (boolean, "False", False),
        (text_or_boolean, True, "true"),
        (text_or_boolean, "yes", "yes"),
        (texts, ["a=1"], ("a=1",)),
        (texts, " a=1  b=0.9,0.99", ("a=1", "b=0.9,0.99")),
        (texts, [], None),
        (int_or_float, 10, 10),
        (int_or_float, 0.1, 0.1),
        (int_or_float, "5%", 0.05),
        (resolution, 512, (512, 512)),
        (resolution, [512, 768], (512, 768)),
        (resolution, " 512 , 768 ", (512, 768)),
        (resolution, "", None),
        (face_crop_range, "2.0,4.0", (2.0, 4.0)),
        (face_crop_range, [1, 1], (1.0, 1.0)),
        (learning_rate, "1e-4", 1e-4),
        (learning_rate, 1, 1.0),
        (learning_rate, "5e-3:100, 1e-3:1000, 5e-4", ((5e-3, 100), (1e-3, 1000), (5e-4, None))),
        (learning_rate, "5e-3:100", ((5e-3, 100),)),
        (learning_rate, "", None),
    ],
)
def test_values_are_read(read, value, expected):
    result = read(value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (whole_number, "3.5"),
        (whole_number, 3.5),
        (whole_number, float("inf")),
        (whole_number, float("nan")),
        (whole_number, True),
        (whole_number, [1]),
        (number, "nan"),
        (number, "inf"),
        (number, True),
        (number, "1,5"),
        (number, [1.0]),
        (number, 10**400),
        (text, True),
        (text, ["a"]),
        (boolean, 2),
        (boolean, 1.0),
        (boolean, "maybe"),
        (texts, [1]),
        (texts, 5),
        (int_or_float, True),
        (int_or_float, 1.0),
        (int_or_float, "nan"),
        (int_or_float, []),
        (resolution, "0"),
        (resolution, "512,-512"),
        (resolution, [512, 512, 512]),
        (resolution, True),
        (resolution, ","),
        (face_crop_range, "4.0,2.0"),
        (face_crop_range, "0,2"),
        (face_crop_range, "2.0"),
        (face_crop_range, 2.0),
        (learning_rate, "0"),
        (learning_rate, -1e-4),
        (learning_rate, "nan"),
        (learning_rate, "1e-3,5e-4"),
        (learning_rate, "1e-3:100,5e-4:100"),
        (learning_rate, "1e-3:0,5e-4"),
        (learning_rate, "1e-3:100:200,5e-4"),
        (learning_rate, "1e-3:,5e-4"),
        (learning_rate, [1e-3]),
    ],
)
def test_what_is_not_a_value_is_refused_with_a_sentence(read, value):
    with pytest.raises(ArgumentTypeError, match=r"\.$"):
        read(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", (512, 768)),
        ("face_crop_aug_range", (2.0, 4.0)),
        ("learning_rate", ((0.005, 100), (0.0005, None))),
        ("learning_rate", 1e-6),
        ("optimizer_args", ("weight_decay=0.1", "betas=0.9,0.99")),
        ("dataset_config", Path("a/b.toml")),
        ("lr_warmup_steps", 0.1),
        ("v2", True),
    ],
)
def test_what_is_written_is_read_back_the_same(name, value):
    option = DECLARED[name]
    assert option.read(written(value)) == value
    assert not isinstance(written(value), tuple | Path)


def test_choices_are_checked():
    assert checked(DECLARED["zero_stage"], "3") == 3
    with pytest.raises(ArgumentTypeError, match=r'"fp32" is not one of: no, fp16, bf16\.'):
        checked(DECLARED["mixed_precision"], "fp32")
