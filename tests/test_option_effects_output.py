"""What each option about saving, metadata, messages and configuration files does, through the real script."""

import base64
import re
import tomllib
from pathlib import Path

import pytest
import toml
import torch
from option_effects import Bench, shows, train
from PIL import Image
from runs import TOKEN, arguments, write_dataset
from test_config_file import GUI_FILE

from library.embedding.files import read_embedding
from library.options.options import MetadataOptions


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1):
    return Bench({"sd1": tiny_sd1}, write_dataset(tmp_path_factory.mktemp("data"), count=2))


# ---- saving


@shows("output_dir", "output_name", "save_model_as", "save_precision")
def test_files(bench):
    plain = bench.plain()
    assert plain.files == [f"{TOKEN}.safetensors"]
    rows = plain.tensors()["emb_params"]
    assert rows.dtype == torch.float32
    for extension in ("pt", "ckpt"):
        other = bench("--output_name=my word", f"--save_model_as={extension}")
        assert other.files == [f"my word.{extension}"]
        file = other.folder / f"my word.{extension}"
        assert not file.read_bytes().startswith(b"PK")  # AUTOMATIC1111 reads torch's older format only
        assert torch.equal(torch.load(file, weights_only=True)["emb_params"], rows)
        assert torch.equal(read_embedding(file)["emb_params"], rows)
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("float", torch.float32)):
        saved = bench(f"--save_precision={precision}").tensors()["emb_params"]
        assert torch.equal(saved, rows.to(dtype))


STEPS = [f"step{number:08d}" for number in range(1, 7)]
EPOCHS = [f"{number:06d}" for number in range(1, 7)]
SAVED = [
    # options, flags, what is left beside the result of six epochs of one step
    (["save_every_n_steps"], ["--save_every_n_steps=2"], [STEPS[1], STEPS[3], STEPS[5]]),
    (["save_last_n_steps"], ["--save_every_n_steps=1", "--save_last_n_steps=2"], STEPS[3:]),
    (["save_every_n_epochs"], ["--save_every_n_epochs=2"], [EPOCHS[1], EPOCHS[3]]),
    (["save_last_n_epochs"], ["--save_every_n_epochs=1", "--save_last_n_epochs=2"], EPOCHS[3:5]),
    (["save_n_epoch_ratio"], ["--save_n_epoch_ratio=3", "--save_every_n_epochs=1"], [EPOCHS[1], EPOCHS[3]]),
]


@shows(*(name for names, _, _ in SAVED for name in names))
@pytest.mark.parametrize(("names", "flags", "kept"), SAVED, ids=[names[0] for names, _, _ in SAVED])
def test_what_is_saved_and_kept(bench, names, flags, kept):
    outcome = bench(*flags, steps=6)
    assert outcome.files == sorted([f"{TOKEN}.safetensors", *(f"{TOKEN}-{stem}.safetensors" for stem in kept)])
    for stem in kept:
        name, step = f"{TOKEN}-{stem}.safetensors", int(stem.removeprefix("step"))
        assert torch.equal(outcome.tensors(name)["emb_params"], outcome.rows[step - 1][0])
        assert outcome.metadata(name)["ti.steps"] == str(step)
    assert torch.equal(outcome.tensors()["emb_params"], bench.plain(steps=6).tensors()["emb_params"])


# ---- metadata

METADATA = {
    "metadata_title": "A title",
    "metadata_author": "Someone",
    "metadata_description": "What it is",
    "metadata_license": "CC0",
    "metadata_tags": "one,two",
    "metadata_usage_hint": "Say it",
    "metadata_merged_from": "a,b",
    "metadata_trigger_phrase": "abracadabra",
    "metadata_preprocessor": "none",
    "metadata_is_negative_embedding": "true",
}


@shows(*METADATA, "metadata_thumbnail")
def test_metadata(bench, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "small.png")
    thumbnail = base64.b64encode((tmp_path / "small.png").read_bytes()).decode()
    plain = bench.plain().metadata()
    flags = [f"--{name}={value}" for name, value in METADATA.items()]
    given = bench(*flags, f"--metadata_thumbnail={tmp_path / 'small.png'}").metadata()
    for name, value in (*METADATA.items(), ("metadata_thumbnail", f"data:image/png;base64,{thumbnail}")):
        key = name.replace("metadata_", "modelspec.")
        assert given[key] == value
        assert plain.get(key) != value
    declared = {name for name in MetadataOptions.__dataclass_fields__ if name.startswith("metadata_")}
    assert {*METADATA, "metadata_thumbnail"} == declared
    assert plain["modelspec.title"] == plain["modelspec.trigger_phrase"] == TOKEN
    assert f"--{name} is not written" in bench(*flags, f"--{name}=x", "--save_model_as=pt").said


@shows("training_comment", "no_metadata")
def test_what_a_file_says_of_its_training(bench):
    said = bench("--training_comment=a first try")
    assert said.metadata()["ss_training_comment"] == "a first try"
    silent = bench("--no_metadata", "--training_comment=x", "--metadata_author=Someone")
    assert "--training_comment is not written: --no_metadata leaves it out" in silent.said
    left = {name for name in silent.metadata() if not name.startswith(("modelspec.", "sshs_"))}
    assert left == {"ss_v2", "ss_base_model_version", "ti.token", "ti.num_vectors", "ti.run"}
    assert silent.metadata()["modelspec.author"] == "Someone"
    assert torch.equal(silent.tensors()["emb_params"], said.tensors()["emb_params"])
    old = bench("--no_metadata", "--save_model_as=pt")
    assert "--no_metadata is not written" not in old.said
    content = torch.load(old.folder / f"{TOKEN}.pt", weights_only=True)
    assert (content["sd_checkpoint_name"], content["sd_checkpoint"], content["step"]) == (None, None, None)


# ---- messages


@shows("console_log_level", "console_log_file", "console_log_simple")
def test_messages(bench, tmp_path):
    plain = bench.plain()
    assert re.search(r"^\d\d:\d\d:\d\d INFO +Training data", plain.err, re.MULTILINE)
    assert "Training data" not in plain.out

    simple = bench("--console_log_simple")
    assert re.search("^Training data", simple.out, re.MULTILINE)
    assert "Training data" not in simple.err

    quiet = bench("--console_log_level=WARNING", "--init_word=")
    assert "Training data" not in quiet.said
    assert "WARNING No --init_word" in quiet.err
    assert (quiet.out, "steps:" in quiet.err) == ("", False)
    assert bench("--console_log_level=ERROR", "--init_word=").said == ""

    filed = bench(f"--console_log_file={tmp_path / 'log.txt'}", "--console_log_simple")
    assert "--console_log_simple has no effect" in (tmp_path / "log.txt").read_text()
    assert re.search(r"^\d\d:\d\d:\d\d INFO +This run:", (tmp_path / "log.txt").read_text(), re.MULTILINE)
    assert "Training data" not in filed.said
    assert "Training data" in (tmp_path / "log.txt").read_text()


@shows("console_log_level", "console_log_file")
def test_messages_about_the_options_themselves(bench, tmp_path):
    """They come up before it is known where messages go, and go there all the same."""
    early = "--cache_latents_to_disk switches --cache_latents on."
    flags = ["--cache_latents=false", "--cache_latents_to_disk"]
    assert re.search(rf"^\d\d:\d\d:\d\d WARNING {early}", bench(*flags).err, re.MULTILINE)
    assert early not in bench(*flags, "--console_log_level=ERROR").said
    assert early not in bench(*flags, f"--console_log_file={tmp_path / 'log.txt'}").said
    assert (tmp_path / "log.txt").read_text().count(early) == 1
    refused = bench(*flags, "--min_timestep=9", "--max_timestep=8", code=1).err
    assert refused.index(early) < refused.index("error: --min_timestep 9")


# ---- configuration files


def small_gui_file(folder: Path, model: Path) -> str:
    """The GUI's file for a tiny run: its own paths, sizes and steps, without what needs a GPU or an earlier run."""
    content = tomllib.loads(GUI_FILE)
    for name in ("stop_text_encoder_training", "weigts", "xformers"):
        del content[name]
    content |= {"huber_scale": 1, "logging_dir": "", "sdpa": True}
    content |= {"max_train_steps": 4, "lr_warmup_steps": 0.5, "mixed_precision": "bf16"}
    content |= {"min_bucket_reso": 64, "resolution": "64,64", "pretrained_model_name_or_path": model.as_posix()}
    places = {"output_dir": "output", "sample_prompts": "output/sample/prompt.txt", "train_data_dir": "images"}
    return toml.dumps(content | {name: f"{folder.as_posix()}/{place}" for name, place in places.items()})


def test_the_file_of_a_gui_runs_as_it_is(tmp_path, tiny_sd1):
    """What the Textual Inversion tab of kohya_ss writes: its own types, and keys that only the GUI knows."""
    write_dataset(tmp_path / "drawn", count=2, size=(96, 64))
    (tmp_path / "images").mkdir()
    (tmp_path / "drawn" / "images").rename(tmp_path / "images" / "2_mychar girl")
    file = tmp_path / "gui.toml"
    file.write_text(small_gui_file(tmp_path, tiny_sd1), encoding="utf-8")
    done = train("sd1", [f"--config_file={file}"], tmp_path / "output")
    assert done.files == ["last.html", "last.safetensors", "last_metrics.jsonl", "last_usage.txt"]
    rows = done.tensors("last.safetensors")["emb_params"]
    assert (rows.shape, rows.dtype) == ((4, 32), torch.float16)
    assert done.rates == pytest.approx([0, 5e-5, 1e-4, 5e-5])
    assert done.batches[0][0].latents.shape[0] == 1
    assert done.batches[0][0].captions == ["a photo of mychar mychar1 mychar2 mychar3"]
    for key in ("epoch", "no_token_padding", "noise_offset_type"):
        assert key in done.err
    assert len(re.findall("WARNING.*unknown keys", done.err)) == 1


def test_config_file_and_output_config(bench, tmp_path):
    argv = [*arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path / "out"), "--max_train_steps=1"]
    file = tmp_path / "written.toml"
    with pytest.raises(SystemExit) as end:
        train("sd1", [*argv, "--output_config", f"--config_file={file}"], tmp_path / "out")
    assert end.value.code == 0
    assert 'token_string = "mychar"' in file.read_text()
    assert not (tmp_path / "out").exists()
    done = train("sd1", [f"--config_file={file}"], tmp_path / "out")
    assert torch.equal(done.rows[0][0], bench.plain().rows[0][0])
    louder = train("sd1", [f"--config_file={file}", "--learning_rate=0.02"], tmp_path / "out")
    assert louder.rates == [0.02]
