"""Slips of the hand, through the real scripts: what was meant is taken, or what to write is said."""

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


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--learning_rate=0,0005", '--learning_rate: "0,0005" is not a number. Use a point: 0.0005.'),
        ("--max_grad_norm=0,5", '--max_grad_norm: "0,5" is not a number. Use a point: 0.5.'),
        ("--max_train_steps=1,000", '"1,000" is not a whole number. Write it without a comma: 1000.'),
        ("--lr_warmup_steps=1e2", "such as 0.1 or 10%. Write 100."),
        ("--network_dim=8", "--network_dim is an option of LoRA training, and this trains an embedding."),
        ("--unet_lr=1e-4", "--unet_lr is an option of LoRA training, and this trains an embedding."),
        ("--network-module=networks.lora", "--network-module is an option of LoRA training"),
    ],
)
def test_what_to_write_is_said(said, argument, sentence):
    text, code = said(argument)
    assert f"error: {sentence}" in text or sentence in text
    assert (code, "Traceback" in text) == (1, False)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("output_name = my char", "Write output_name = 'my char': text needs quotes."),
        ("output_name = mychar # a name", "Write output_name = 'mychar': text needs quotes."),
        ("output_dir = C:\\new", "Write output_dir = 'C:\\new': text needs quotes."),
        ("seed = 2", "seed is given twice in its table: keep one of them."),
        ("cache_latents = True", "Write cache_latents = true, in lowercase."),
        ("learning_rate = 0,0005", "Write learning_rate = 0.0005, with a point."),
    ],
)
def test_what_to_write_into_a_toml_file_is_said(said, tmp_path, line, sentence):
    file = tmp_path / "c.toml"
    file.write_text(f"seed = 1\n{line}\n")
    text, code = said(f"--config_file={file}")
    assert f"{sentence}\n" in text
    assert "at line 2" in text
    assert code == 1


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("resolution = 64", 'resolution = "64"', "Write it without quotes: 64."),
        ("resolution = 64", 'resolution = "64,64"', "Write it without quotes: [64, 64]."),
        ("batch_size = 2", 'batch_size = "2"', "Write it without quotes: 2."),
        ("batch_size = 2", 'enable_bucket = "True"', "Write it without quotes: true."),
        (
            "caption_extension = '.txt'",
            "caption_extension = .txt",
            "Write caption_extension = '.txt': text needs quotes.",
        ),
    ],
)
def test_what_to_write_into_a_dataset_file_is_said(said, tmp_path, dataset, old, new, sentence):
    file = tmp_path / "d.toml"
    file.write_text(dataset.read_text().replace(old, new))
    text, code = said(data=file)
    assert f"{sentence}\n" in text
    assert code == 1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            "resolution = 64",
            '"min_bucket_reso" is needed here. It must be at most the shorter side of the resolution 64x64, and '
            "left out it is 256.",
        ),
        (
            "resolution = 1536",
            '"max_bucket_reso" is needed here. It must be at least the longer side of the resolution 1536x1536, '
            "and left out it is 1024.",
        ),
        (
            "resolution = 512\nbucket_reso_steps = 320",
            '"min_bucket_reso" is needed here. It must be at least bucket_reso',
        ),
        ("resolution = 64\nmin_bucket_reso = 128", '"min_bucket_reso" must be at most the shorter side'),
        ("resolution = 640\nmax_bucket_reso = 512", '"max_bucket_reso" must be at least the longer side'),
    ],
)
def test_a_default_never_gets_the_blame(said, tmp_path, dataset, keys, sentence):
    file = tmp_path / "d.toml"
    file.write_text(dataset.read_text().replace("resolution = 64", f"enable_bucket = true\n{keys}"))
    text, code = said(data=file)
    assert sentence in text
    assert code == 1


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


def test_options_of_a_lora_in_a_file_are_named_as_such(said, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("network_dim = 8\nlearning_rat = 1\n")
    text, _ = said(f"--config_file={file}", "--max_train_steps=0")
    assert "network_dim (of LoRA training; this trains an embedding), learning_rat (did you mean" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        run("sd1", ["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"textual-inversion-trainer {version()}\n"
    assert TOKEN not in version()
