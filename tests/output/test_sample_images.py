"""Sample images during training: when, under which names, with which rows, and that they change nothing."""

import hashlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import prompts as words
from option_effects import shows
from PIL import Image
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from library.model.vae import FrozenVae
from library.options.options import DatasetOptions, SampleOptions, SaveOptions
from library.output import learning_report
from library.output import sample_images as sample_album
from library.output.sample_images import SampleImages, epoch_mark, step_mark
from library.support.errors import UserError

PROMPTS = f"a photo of {TOKEN} --w 64 --h 64 --s 2 --d 7\n# a note\nno word --n bad --w 72 --h 64 --s 2 --l 1\n"


@pytest.fixture
def command(tmp_path, tiny_sd1):
    """Builds the command line of a run over two images, batch size 1: two steps are an epoch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    data = write_dataset(tmp_path, caption=f"a photo of {TOKEN}", subset="", dataset="", count=4)

    def build(*more: str, folder: str = "out", model=tiny_sd1, family="sd1") -> list[str]:
        given = arguments(family, model, data, tmp_path / folder, "--max_train_steps=4")
        return [*given, f"--sample_prompts={prompts}", *more]

    return build


def marks(folder) -> list[str]:
    """What stands between the output name and the time in each file's name."""
    pattern = rf"{TOKEN}_(e?\d{{6}}_\d\d)_\d{{14}}(_7)?\.png"
    found = [re.fullmatch(pattern, file.name) for file in sorted((folder / "sample").iterdir())]
    assert all(found)
    assert all(bool(match[2]) == match[1].endswith("_00") for match in found)  # only the first prompt has a seed
    return [match[1] for match in found]


@shows("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--sample_every_n_steps=3"], ["000003"]),
        (["--sample_every_n_epochs=1"], ["e000001", "e000002"]),
        (["--sample_every_n_epochs=2", "--sample_every_n_steps=1", "--sample_at_first"], ["e000000", "e000002"]),
    ],
)
def test_images_come_when_they_are_due(flags, wanted, command, tmp_path):
    assert run("sd1", command(*flags)) == 0
    assert marks(tmp_path / "out") == [f"{mark}_{number}" for mark in wanted for number in ("00", "01")]
    sizes = [Image.open(file).size for file in sorted((tmp_path / "out" / "sample").iterdir())]
    assert sizes == [(64, 64), (72, 64)] * len(wanted)


def test_images_show_the_rows_of_their_moment(command, tmp_path, tiny_sd1):
    assert run("sd1", command("--sample_every_n_steps=2", "--sample_at_first", "--learning_rate=1")) == 0
    files = sorted((tmp_path / "out" / "sample").glob("*_7.png"))
    pictures = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert len(pictures) == 3  # at step 2, 4, and before
    assert all(np.abs(one - pictures[-1]).max() > 0 for one in pictures[:-1])
    wanted = (
        f"a photo of {TOKEN}\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: {tiny_sd1.name}"
    )
    assert Image.open(files[0]).text == {"parameters": wanted}


def test_images_name_the_embedding_file_of_their_moment(command, tmp_path):
    """AUTOMATIC1111 finds an embedding by the first twelve characters of the SHA-256 of its file."""
    assert run("sd1", command("--sample_every_n_steps=1", "--save_every_n_steps=2")) == 0
    files = sorted((tmp_path / "out" / "sample").glob("*_7.png"))
    assert len(files) == 4
    for step, file in enumerate(files, start=1):
        saved = tmp_path / "out" / f"{TOKEN}-step{step:08d}.safetensors"
        told = Image.open(file).text["parameters"]
        assert saved.exists() == (step % 2 == 0) == ("TI hashes" in told)
        if saved.exists():
            assert told.endswith(f'TI hashes: "{TOKEN}: {hashlib.sha256(saved.read_bytes()).hexdigest()[:12]}"')


@shows("sample_sampler")
def test_the_sampler_is_the_prompts_own_or_the_options(command, tmp_path):
    prompts = tmp_path / "samplers.txt"
    line = f"{TOKEN} --w 64 --h 64 --s 3 --d 7"
    prompts.write_text(f"{line}\n{line} --ss euler_a\n")
    found = {}
    for sampler in ("ddim", "euler_a"):
        flags = (f"--sample_prompts={prompts}", "--sample_at_first", f"--sample_sampler={sampler}")
        assert run("sd1", command(*flags, folder=sampler)) == 0
        found[sampler] = [np.asarray(Image.open(file)) for file in sorted((tmp_path / sampler / "sample").iterdir())]
    plain, own = found["ddim"]
    assert not np.array_equal(plain, own)
    assert all(np.array_equal(picture, own) for picture in found["euler_a"])


def test_drawing_changes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr(learning_report, "_STEPS", 2)
    monkeypatch.setattr(learning_report, "PICTURES", 4)
    monkeypatch.setattr(learning_report, "_LOSS_SAMPLES", 8)
    assert run("sd1", command(folder="plain")) == 0
    drawn = ("--sample_every_n_steps=1", "--sample_at_first", "--sample_sampler=euler_a", "--learning_report")
    assert run("sd1", command(*drawn, folder="drawn")) == 0
    plain, drawn = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("plain", "drawn"))
    assert torch.equal(plain, drawn)


def test_both_encoders_of_the_larger_family(command, tmp_path, tiny_sdxl):
    assert run("sdxl", command("--sample_every_n_steps=4", model=tiny_sdxl, family="sdxl")) == 0
    assert marks(tmp_path / "out") == ["000004_00", "000004_01"]


def test_latents_that_are_not_cached(command, tmp_path):
    assert run("sd1", command("--cache_latents=false", "--sample_every_n_steps=4")) == 0
    assert marks(tmp_path / "out") == ["000004_00", "000004_01"]


@pytest.mark.usefixtures("bfloat16_cpu")  # others decode in float32
def test_a_decoder_that_overflows_changes_nothing(command, tmp_path, monkeypatch, capsys):
    """Batches are encoded by the same VAE at every step."""
    original = FrozenVae._pixels

    def overflowing(vae, latents):
        return original(vae, latents) * (1 if vae.decoding_dtype == torch.float32 else torch.inf)

    monkeypatch.setattr(FrozenVae, "_pixels", overflowing)
    flags = ("--cache_latents=false", "--mixed_precision=bf16", "--max_train_steps=2")
    assert run("sd1", command(*flags, folder="plain")) == 0
    assert run("sd1", command(*flags, "--sample_every_n_steps=1", folder="drawn")) == 0
    assert capsys.readouterr().err.count("it draws in float32 from here on") == 1
    plain, drawn = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("plain", "drawn"))
    assert torch.equal(plain, drawn)
    assert marks(tmp_path / "drawn")


def test_a_image_that_is_lost_costs_no_training(command, tmp_path, monkeypatch, capsys):
    """Too little memory for one, a full disk for another, a surprise with the last; the third is drawn and written."""
    prompts = tmp_path / "three.txt"
    prompts.write_text("".join(f"{TOKEN} --w {width} --h 64 --s 1 --d 7\n" for width in (256, 64, 72, 80)))
    assert run("sd1", command(folder="plain")) == 0
    decode, write = FrozenVae.decode, sample_album.write_png

    def little_memory(vae, latents):
        if latents.shape[-1] == 256 // 8:
            raise torch.OutOfMemoryError("out of memory")
        return decode(vae, latents)

    def full_disk(path, picture, notes):
        if picture.width == 80:
            raise ValueError("odd")
        if picture.width == 64:
            raise UserError(f"{path.name} cannot be written: No space left on device.")
        write(path, picture, notes)

    monkeypatch.setattr(FrozenVae, "decode", little_memory)
    monkeypatch.setattr(sample_album, "write_png", full_disk)
    assert run("sd1", command(f"--sample_prompts={prompts}", "--sample_every_n_steps=3", folder="drawn")) == 0
    said = capsys.readouterr().err
    assert said.count("A sample image was lost; the training goes on without it. OutOfMemoryError: out of memory") == 1
    assert said.count("the training goes on without it. ValueError: odd") == 1
    assert said.count("cannot be written: No space left on device.") == 1
    (kept,) = (tmp_path / "drawn" / "sample").iterdir()
    assert kept.name.startswith(f"{TOKEN}_000003_02_")
    plain, drawn = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("plain", "drawn"))
    assert torch.equal(plain, drawn)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sample_prompts=", "--sample_at_first"], "--sample_prompts is missing"),
        (["--sample_prompts=nowhere.txt", "--sample_at_first"], "nowhere.txt"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(flags, sentence, command, trainers, capsys):  # noqa: F811
    assert run("sd1", command(*flags)) == 1
    assert sentence in capsys.readouterr().err
    assert trainers == []


def test_a_file_in_the_folders_place_is_refused(command, tmp_path, trainers, capsys):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("mine")
    assert run("sd1", command("--sample_at_first")) == 1
    assert "sample is a file, but sample images go into a folder of this name" in capsys.readouterr().err
    assert trainers == []


def test_an_unused_sampler_is_said(command, capsys):
    assert run("sd1", command("--sample_prompts=", "--sample_sampler=heun")) == 0
    assert "--sample_sampler has no effect" in capsys.readouterr().err


def test_weak_prompts_are_said(command, tmp_path, capsys):
    prompts = tmp_path / "weak.txt"
    prompts.write_text(f"{'cat, ' * 60} --w 64 --h 64 --s 1\n")
    assert run("sd1", command(f"--sample_prompts={prompts}", "--sample_at_first")) == 0
    said = capsys.readouterr().err
    assert f"No prompt of --sample_prompts holds the token {TOKEN}" in said
    assert "has 120 tokens; only the first 75 count" in said


@pytest.mark.parametrize(
    ("word", "prompt", "holds"),
    [
        ("mychar", "a mychar --n bad", True),
        ("mychar", "a cat --n mychar", True),
        ("mychar", "a my --n char", False),
        ("mychar_(x)", r"a photo of (mychar_\(x\):1.2)", True),
        ("mychar_(x)", "a photo of mychar_(x)", True),
        ("[V]", "a photo of [V]", True),
        ("[V]", "a photo of [W]", False),
        ("mychar", "1girl(mychar)", True),
        ("mychar", "my(char:1.2)", False),
    ],
)
def test_where_a_prompt_holds_the_word(word, prompt, holds, tmp_path, caplog):
    (tmp_path / "p.txt").write_text(prompt)
    sample = SampleOptions(sample_prompts=str(tmp_path / "p.txt"), sample_at_first=True)
    with caplog.at_level("WARNING"):
        save = SaveOptions(output_dir=str(tmp_path), output_name="a")
        options = SimpleNamespace(sample=sample, save=save, dataset=DatasetOptions())
        SampleImages.create(options, words(word=word), "a model")
    assert ("No prompt of --sample_prompts holds the token" in caplog.text) != holds


def test_prompts_that_are_never_drawn_are_said(command, tmp_path, capsys):
    assert run("sd1", command()) == 0
    assert "--sample_prompts has no effect" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sample").exists()


def test_marks():
    assert (epoch_mark(3), step_mark(1200)) == ("e000003", "001200")
