"""Where the description of the data comes from: files that can or cannot be read, and folder flags."""

import logging

import pytest
from dataset_files import MINIMAL, dataset_options, load
from golden_data import golden_cases

from library.data.config import load_dataset_configs
from library.support.errors import UserError


def load_flags(argv):
    return load_dataset_configs(dataset_options(["--resolution=512", *argv]), bucket_step=64)


def refusal(load_it):
    with pytest.raises(UserError) as caught:
        load_it()
    return str(caught.value)


@pytest.mark.parametrize("case", golden_cases("subdirs"))
@pytest.mark.parametrize("flag", ["train_data_dir", "reg_data_dir"])
def test_golden_subdirs(tmp_path, case, flag):
    for folder in case["folders"]:
        (tmp_path / "base" / folder).mkdir(parents=True)
    (tmp_path / "base" / case["extra_plain_file"]).touch()
    (tmp_path / "train" / "1_x").mkdir(parents=True)
    folders = {"train_data_dir": tmp_path / "train", flag: tmp_path / "base"}
    (dataset,) = load_flags([f"--{name}={folder}" for name, folder in folders.items()])
    ours = [
        {
            "image_dir": subset.image_dir.removeprefix(f"{tmp_path / 'base'}/"),
            "num_repeats": subset.num_repeats,
            "is_reg": subset.is_reg,
            "class_tokens": subset.class_tokens,
        }
        for subset in dataset.subsets
        if subset.image_dir.startswith(str(tmp_path / "base"))
    ]
    assert ours == case[flag]


def test_folder_flags_make_one_dataset(tmp_path):
    for folder in ("train/10_mychar", "train/2_mychar side", "reg/1_girl"):
        (tmp_path / folder).mkdir(parents=True)
    argv = [f"--train_data_dir={tmp_path / 'train'}", f"--reg_data_dir={tmp_path / 'reg'}", "--train_batch_size=3"]
    (dataset,) = load_flags([*argv, "--flip_aug", "--prior_loss_weight=0.5"])
    assert dataset.kind == "dreambooth"
    assert dataset.batch_size == 3
    assert dataset.prior_loss_weight == 0.5
    assert [(s.num_repeats, s.class_tokens, s.is_reg, s.flip_aug) for s in dataset.subsets] == [
        (10, "mychar", False, True),
        (2, "mychar side", False, True),
        (1, "girl", True, True),
    ]


def test_ignored_folders_are_named(tmp_path, caplog):
    for folder in ("1.5_z", "0_zero", "-2_neg", "notes", "3_x"):
        (tmp_path / folder).mkdir()
    load_flags([f"--train_data_dir={tmp_path}"])
    for folder in ("1.5_z", "0_zero", "-2_neg", "notes"):
        assert f"{tmp_path / folder} is ignored" in caplog.text
    assert "3_x" not in caplog.text


def test_folder_without_usable_sub_folders(tmp_path):
    (tmp_path / "a.png").touch()
    message = refusal(lambda: load_flags([f"--train_data_dir={tmp_path}"]))
    assert str(tmp_path) in message
    assert "10_mychar" in message


@pytest.mark.parametrize("repeats", ["1000001", "100000000", "9" * 100])
def test_repeats_of_a_folders_name_have_an_end(repeats, tmp_path):
    """An order of that many samples would fill the memory."""
    (tmp_path / f"{repeats}_mychar").mkdir()
    message = refusal(lambda: load_flags([f"--train_data_dir={tmp_path}"]))
    assert f'"num_repeats" must be a whole number up to 1000000, but it is {repeats}.' in message


def test_metadata_flag(caplog):
    (dataset,) = load_flags(["--in_json=meta.json", "--train_data_dir=images", "--reg_data_dir=r", "--cache_info"])
    (subset,) = dataset.subsets
    assert (dataset.kind, subset.kind) == ("finetuning", "finetuning")
    assert (subset.metadata_file, subset.image_dir) == ("meta.json", "images")
    assert not subset.cache_info
    assert "--reg_data_dir" in caplog.text


def test_metadata_flag_with_absolute_paths_needs_no_folder():
    (dataset,) = load_flags(["--in_json=meta.json"])
    assert dataset.subsets[0].image_dir is None


def test_file_makes_folder_flags_idle(tmp_path, caplog):
    (dataset,) = load(tmp_path, MINIMAL, ["--train_data_dir=x", "--in_json=y"])
    assert [subset.image_dir for subset in dataset.subsets] == ["images"]
    assert "--train_data_dir, --in_json: ignored" in caplog.text


# Files


def test_toml_and_json_mean_the_same(tmp_path):
    content = {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "images"}]}]}
    (from_json,) = load(tmp_path, content)
    (from_toml,) = load(tmp_path, MINIMAL)
    assert from_json.subsets[0].place != from_toml.subsets[0].place
    assert from_json.buckets == from_toml.buckets
    assert from_json.subsets[0].captions == from_toml.subsets[0].captions
    assert from_json.subsets[0].image_dir == from_toml.subsets[0].image_dir


@pytest.mark.parametrize("name", ["data.TOML", "my data.toml"])
def test_names_of_files(tmp_path, name):
    assert load(tmp_path, MINIMAL, name=name)[0].buckets.resolution == (512, 512)


def test_byte_order_mark_is_taken_off(tmp_path):
    assert load(tmp_path, "\ufeff" + MINIMAL)[0].buckets.resolution == (512, 512)


def test_valid_toml_that_the_toml_package_cannot_read(tmp_path):
    with pytest.raises(UserError, match=r'"resolution" must be .* but it is \[512, 768\.0\]'):
        load(tmp_path, MINIMAL.replace("512", "[512, 768.0]"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[general]\nflip_aug = tru\n", ["line 2"]),
        ("[[datasets]]\nresolution = \n", ["line 2"]),
        ("[general\n", ["line 1"]),
        ("[general]\na = {b = 1\n", ["line 2"]),
        ("[datasets]\nx = 1\n[[datasets]]\ny = 1\n", ["line 3"]),
        ('image_dir = "d:\\images\\x"\n', ["line 1", "single quotes"]),
        ("flip_aug = true\nflip_aug = false\n", ["line 2"]),
    ],
)
def test_broken_toml(tmp_path, text, expected):
    message = refusal(lambda: load(tmp_path, text))
    assert message.startswith(f"The dataset file {tmp_path / 'data.toml'} is not valid TOML")
    for part in expected:
        assert part in message


@pytest.mark.parametrize(("text", "expected"), [('{"a": 1,}', "line 1"), ("[1]", "one JSON object"), ("", "line 1")])
def test_broken_json(tmp_path, text, expected):
    message = refusal(lambda: load(tmp_path, text, name="data.json"))
    assert message.startswith(f"The dataset file {tmp_path / 'data.json'} ")
    assert expected in message


def test_quiet_where_all_is_well(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load(tmp_path, MINIMAL)
    assert not caplog.records
