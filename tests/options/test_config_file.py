"""--config_file and --output_config."""

import logging
import tomllib

import pytest
from departures import departure
from golden_data import golden_cases
from hypothesis import given
from hypothesis import strategies as st
from test_options import SD_SCRIPTS

from library.options.config_file import config_path, read_config_file, write_config_file
from library.options.declaration import checked
from library.options.options import declared_options
from library.options.parser import build_parser, parse, read_values
from library.support.errors import UserError

KNOWN = dict(declared_options())

# What the Textual Inversion tab of the kohya_ss GUI writes: empty texts, false and 0 are left out.
GUI_FILE = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 2
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 1
huber_c = 0.1
huber_schedule = "snr"
huggingface_repo_visibility = "private"
init_word = "girl"
learning_rate = 0.0001
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 0.1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "fp16"
multires_noise_discount = 0.3
no_token_padding = true
noise_offset_type = "Original"
num_vectors_per_token = 4
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "output"
output_name = "last"
persistent_data_loader_workers = 1
pretrained_model_name_or_path = "model.safetensors"
prior_loss_weight = 1
resolution = "512,512"
sample_prompts = "output/sample/prompt.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "fp16"
seed = 1234
stop_text_encoder_training = 5
token_string = "mychar"
train_batch_size = 1
train_data_dir = "images"
vae_batch_size = 1
wandb_run_name = "last"
weigts = "earlier.safetensors"
xformers = true
"""


@pytest.fixture
def read(tmp_path):
    """Read a configuration file with the given content."""
    path = tmp_path / "c.toml"

    def read_text(content: str) -> dict:
        path.write_text(content, encoding="utf-8")
        return read_config_file(path, KNOWN)

    return read_text


@pytest.fixture
def merged(tmp_path):
    """Read a configuration file together with a command line."""
    path = tmp_path / "c.toml"

    def read_both(content: str, *arguments: str) -> dict:
        path.write_text(content, encoding="utf-8")
        return read_values(build_parser("Train.", "sd"), [f"--config_file={path}", *arguments])

    return read_both


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ('seed = "0"', "seed", 0),
        ("seed = 3.0", "seed", 3),
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ("learning_rate = 1", "learning_rate", 1.0),
        ('learning_rate = "5e-3:100,5e-4"', "learning_rate", ((5e-3, 100), (5e-4, None))),
        ("noise_offset = 1", "noise_offset", 1.0),
        ("persistent_data_loader_workers = 1", "persistent_data_loader_workers", True),
        ("cache_latents = 0", "cache_latents", False),
        ('cache_latents = "true"', "cache_latents", True),
        ("resolution = 512", "resolution", (512, 512)),
        ("resolution = [512, 768]", "resolution", (512, 768)),
        ('resolution = "512,768"', "resolution", (512, 768)),
        ("face_crop_aug_range = [2.0, 4]", "face_crop_aug_range", (2.0, 4.0)),
        ("lr_warmup_steps = 100", "lr_warmup_steps", 100),
        ("lr_warmup_steps = 0.1", "lr_warmup_steps", 0.1),
        ('lr_warmup_steps = "10%"', "lr_warmup_steps", 0.1),
        ('optimizer_args = ["a=1", "b=2"]', "optimizer_args", ("a=1", "b=2")),
        ('optimizer_args = "a=1 b=2"', "optimizer_args", ("a=1", "b=2")),
        ("output_name = 123", "output_name", "123"),
        ("metadata_is_negative_embedding = true", "metadata_is_negative_embedding", "true"),
        ("max_token_length = 75", "max_token_length", 75),
        ('dynamo_backend = "no"', "dynamo_backend", "no"),
        ('weigts = "a.pt"', "weights", "a.pt"),
    ],
)
def test_values_are_converted(read, line, name, expected):
    values = read(line)
    assert values == {name: expected}
    assert type(values[name]) is type(expected)


@pytest.mark.parametrize("name", ["seed", "vae", "cache_latents", "optimizer_args", "save_precision", "resolution"])
@pytest.mark.parametrize("empty", ['""', "[]"])
def test_empty_values_mean_not_given(read, merged, name, empty):
    assert read(f"{name} = {empty}") == {}
    assert merged(f"{name} = {empty}")[name] == KNOWN[name].default


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("seed = true", "seed in PATH: true is not a whole number."),
        ("learning_rate = nan", "learning_rate in PATH: nan is not a finite number."),
        ("max_token_length = 100", "max_token_length in PATH: 100 is not one of: 75, 150, 225."),
        ("vae = true", "vae in PATH: true is not a string."),
        ("[a.seed]\nx = 1", "seed in PATH: it is a table where a value belongs."),
        ("wandb_api_key = [12345]", "wandb_api_key in PATH: its value is not a string."),
        ('vae = "C:\\models\\x"', "use single quotes"),
        ('vae = "C:\\Users\\x"', "use single quotes"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence(read, tmp_path, line, sentence):
    with pytest.raises(UserError) as caught:
        read(line)
    assert sentence.replace("PATH", str(tmp_path / "c.toml")) in str(caught.value)
    assert "12345" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml of --config_file does not exist"):
        read_config_file(tmp_path / "none.toml", KNOWN)
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_config_file(tmp_path, KNOWN)
    (tmp_path / "latin.toml").write_bytes(b'output_name = "\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        read_config_file(tmp_path / "latin.toml", KNOWN)


def test_a_byte_order_mark_is_no_part_of_the_first_key(read):
    assert read("\ufeffseed = 3") == {"seed": 3}


def test_tables_are_headings_and_later_keys_win(read):
    assert read("seed = 5\n[a]\nseed = 1\n[b]\nv2 = true") == {"seed": 1, "v2": True}


def test_unknown_keys_are_one_warning_with_guesses(read, caplog):
    with caplog.at_level(logging.WARNING):
        assert read("learning_rte = 1.0\nepoch = 1\nnoise_offset_type = 'Original'\n[a.b]\nseed = 1") == {}
    (record,) = caplog.records
    assert 'learning_rte (did you mean "learning_rate"?)' in record.getMessage()
    assert 'noise_offset_type (did you mean "noise_offset"?)' in record.getMessage()
    assert "epoch" in record.getMessage()


def test_the_command_line_wins_over_the_file(merged):
    content = 'seed = 1\nv2 = true\nvae = "a"\nlearning_rate = 1e-4\noptimizer_args = ["a=1"]\ncache_latents = true'
    values = merged(content, "--seed=2", "--v2=false", "--vae=", "--optimizer_args", "b=2")
    assert (values["seed"], values["v2"], values["vae"], values["learning_rate"]) == (2, False, None, 1e-4)
    assert (values["optimizer_args"], values["cache_latents"]) == (("b=2",), True)
    assert merged("seed = 1", "--seed=0")["seed"] == 0
    assert merged("max_train_steps = 5", "--max_train_steps=1600")["max_train_steps"] == 1600


@pytest.mark.parametrize(("word", "expected"), [("false", False), ("False", False), ("0", False), ("true", True)])
def test_every_flag_can_be_switched_off_again(merged, word, expected):
    for name in (name for name, option in KNOWN.items() if option.is_flag):
        assert merged(f"{name} = true", f"--{name}={word}")[name] is expected
    assert merged("", "--v2=false", "--v2")["v2"] is True
    assert merged("", "--v2", "--v2=false")["v2"] is False


def test_the_gui_file_runs_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gui.toml").write_text(GUI_FILE, encoding="utf-8")
    options = parse(build_parser("Train.", "sd"), ["--config_file=gui.toml"])
    assert options.token.max_token_length is None
    assert options.token.weights == "earlier.safetensors"
    assert options.dataset.resolution == (512, 512)
    assert options.optimizer.optimizer_args is None
    assert options.schedule.lr_warmup_steps == 0.1
    assert options.dataset.persistent_data_loader_workers is False
    assert options.save.save_every_n_epochs == 1


@pytest.mark.parametrize(("given_name", "path"), [("c", "c.toml"), ("c.toml", "c.toml"), ("c.json", "c.json.toml")])
def test_the_ending_may_be_left_out(given_name, path):
    assert str(config_path(given_name)) == path


def test_output_config_writes_what_differs_and_no_secrets(tmp_path, capsys):
    path = tmp_path / "out.toml"
    arguments = ["--seed=3", "--cache_latents", "--wandb_api_key=SECRET", "--huggingface_token=TT", "--resolution=512"]
    arguments += ["--learning_rate=5e-3:100,5e-4", "--max_train_steps=1600", "--lr_warmup_steps=10%"]
    with pytest.raises(SystemExit) as caught:
        parse(build_parser("Train.", "sd"), [f"--config_file={path}", "--output_config", *arguments])
    assert not caught.value.code
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {
        "seed": 3,
        "cache_latents": True,
        "resolution": "512,512",
        "learning_rate": "0.005:100,0.0005",
        "lr_warmup_steps": 0.1,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["out.toml"]
    assert "SECRET" not in capsys.readouterr().out


def test_output_config_overwrites_nothing(tmp_path):
    path = tmp_path / "out.toml"
    path.write_text("seed = 1")
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        parse(build_parser("Train.", "sd"), [f"--config_file={path}", "--output_config", "--seed=3"])
    assert path.read_text() == "seed = 1"
    with pytest.raises(UserError, match="cannot be written"):
        write_config_file(tmp_path / "none" / "out.toml", {"seed": 1})


@pytest.mark.parametrize("place", ["none/out.toml", "file/out.toml", "file/below/out.toml", f"{'x' * 300}.toml"])
def test_output_config_where_nothing_can_be_written(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"of --config_file cannot be written: .*\. Check its folder"):
        parse(build_parser("Train.", "sd"), [f"--config_file={tmp_path / place}", "--output_config", "--seed=3"])


def test_output_config_of_a_path_that_is_not_utf8(tmp_path):
    arguments = [f"--config_file={tmp_path / 'c.toml'}", "--output_config", "--train_data_dir=a/\udcff"]
    with pytest.raises(UserError, match=r"TOML is UTF-8, and .*udcff' is not"):
        parse(build_parser("Train.", "sd"), arguments)
    assert not list(tmp_path.iterdir())


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    number=st.floats(1e-12, 1.0),
    flag=st.booleans(),
)
def test_what_is_written_is_read_back(tmp_path_factory, text, number, flag):
    path = tmp_path_factory.mktemp("written") / "out.toml"
    values = {"metadata_title": text, "learning_rate": number, "v2": flag, "seed": 3, "optimizer_args": (text, "a=1")}
    write_config_file(path, values)
    assert read_config_file(path, KNOWN) == values


def _sd_scripts_defaults() -> dict:
    return {row["dest"]: row["default"] for row in SD_SCRIPTS}


def _assert_same_options(ours: dict, theirs: dict) -> None:
    """Compare the values that differ from either side's defaults, theirs converted as ours are."""
    for name in KNOWN.keys() & (ours.keys() | theirs.keys()):
        expected = theirs.get(name, _sd_scripts_defaults().get(name))
        expected = checked(KNOWN[name], expected) if expected not in (None, "") else KNOWN[name].default
        assert ours.get(name, KNOWN[name].default) == expected, name


@pytest.mark.parametrize("case", golden_cases("config_file"))
def test_golden_config_file(case, tmp_path, caplog):
    (tmp_path / case["file"]).write_text(case["toml"], encoding="utf-8")
    given_file = tmp_path / case["config_file_given"]
    argv = [f"--config_file={given_file}", *case["argv"]]
    theirs = dict(case.get("non_default", {}))
    changed = departure("config_file", case)
    if "non_default" not in case or (changed and changed.why == "a value that cannot be converted is refused"):
        with pytest.raises(UserError):
            read_values(build_parser("Train.", "sd"), argv)
        return
    values = read_values(build_parser("Train.", "sd"), argv)
    ours = {name: value for name, value in values.items() if value != KNOWN[name].default}
    assert config_path(str(given_file)).with_suffix("") == tmp_path / theirs.pop("config_file").removeprefix("@D/")
    _assert_same_options(ours, theirs)
    unknown = theirs.keys() - KNOWN.keys()
    if changed:
        assert all(name in caplog.text for name in unknown)
    else:
        assert not unknown
        assert all(values[name] == value for name, value in theirs.items())


@pytest.mark.parametrize("case", golden_cases("output_config"))
def test_golden_output_config(case, tmp_path):
    path = tmp_path / f"{case['config_file_given']}.toml"
    if case["exit"]:
        path.write_text(case["files"].get(path.name, ""), encoding="utf-8")
    argv = [f"--config_file={tmp_path / case['config_file_given']}", "--output_config", *case["argv"]]
    with pytest.raises((SystemExit, UserError)) as caught:
        parse(build_parser("Train.", "sd"), argv)
    assert bool(case["exit"]) == isinstance(caught.value, UserError)
    assert [file.name for file in tmp_path.iterdir()] == list(case["files"])
    theirs = tomllib.loads(case["files"][path.name])
    if departure("output_config", case):
        theirs.pop("huggingface_token")
    _assert_same_options(read_config_file(path, KNOWN), theirs)
