"""Slips of the hand, through the real scripts, that do not stop a run: what was meant is taken."""

import pytest
from runs import TOKEN, arguments, run, write_dataset

from library.support.version import version


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), count=2)


@pytest.fixture
def said(dataset, tmp_path, tiny_sd1, capsys):
    """What a run with more arguments says, and its exit code."""

    def run_with(*more, model=tiny_sd1, data=dataset):
        code = run("sd1", arguments("sd1", model, data, tmp_path / "out", *more))
        captured = capsys.readouterr()
        return captured.out + captured.err, code

    return run_with


def test_what_was_meant_is_taken(said, tmp_path):
    """Whole numbers as 1e0, dashes in names, quoted numbers in a file, and an ending behind the name."""
    file = tmp_path / "c.toml"
    file.write_text('seed = "7"\n')
    text, code = said(
        "--max_train_steps=1e0", "--learning-rate=0.02", "--cache-latents=false", "--output_name=my.safetensors",
        f"--config_file={file}",
    )  # fmt: skip
    assert code == 0, text
    assert '--output_name "my.safetensors" is taken as "my": --save_model_as adds the ending, .safetensors.' in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my.safetensors"]
    assert "1 step" in text


@pytest.mark.parametrize("name", ["v1.5", ".pt", "my.char"])
def test_a_point_in_a_name_is_no_ending(said, tmp_path, name):
    text, code = said(f"--output_name={name}", "--max_train_steps=1")
    assert code == 0, text
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.safetensors"]


def test_v_prediction_is_unusual_for_a_file_of_sd1(said, tiny_sd1_file):
    told = "nearly all models of Stable Diffusion 1.x predict noise"
    text, code = said("--v_parameterization", "--max_train_steps=1", model=tiny_sd1_file)
    assert (told in text, code) == (True, 0)
    assert told not in said("--max_train_steps=1", model=tiny_sd1_file)[0]


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        run("sd1", ["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"textual-inversion-trainer {version()}\n"
    assert TOKEN not in version()
