"""What a run leaves behind, through the real scripts: the record in the file, the closing words, a full disk."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import TOKEN, arguments, run, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

from library.output.results import Results
from library.training.denoising import DenoisingTask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def metadata(folder, name: str = f"{TOKEN}.safetensors") -> dict[str, str]:
    with safe_open(folder / name, "pt") as file:
        return file.metadata()


def without(argv: list[str], *options: str) -> list[str]:
    return [argument for argument in argv if not argument.startswith(options)]


def test_the_record_names_the_optimizer_and_the_rate_that_were_used(dataset, tmp_path, tiny_sd1):
    argv = without(arguments("sd1", tiny_sd1, dataset, tmp_path), "--learning_rate")
    assert run("sd1", [*argv, "--use_8bit_adam", "--optimizer_args", "weight_decay=0.1"]) == 0
    record = metadata(tmp_path)
    assert record["ti.optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)"
    assert record["ti.learning_rate"] == "0.0005"
    assert record["ti.init_word"] == "girl"


def test_the_record_names_no_word_and_no_rate_that_were_not_used(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--learning_rate=1e-2:1,5e-3")
    assert run("sd1", argv) == 0
    assert metadata(tmp_path)["ti.learning_rate"] == "0.01:1,0.005"
    argv = [*without(argv, "--learning_rate"), f"--weights={tmp_path / TOKEN}.safetensors"]
    argv.append("--optimizer_type=Adafactor")
    assert run("sd1", argv) == 0
    record = metadata(tmp_path)
    assert not {"ti.learning_rate", "ti.init_word"} & record.keys()
    assert record["ti.optimizer"] == "transformers.optimization.Adafactor(relative_step=True)"


@pytest.mark.parametrize(
    ("family", "flags", "base", "architecture"),
    [
        ("sd1", ["--v2"], "Stable Diffusion 1.x", "stable-diffusion-v1"),
        ("sd2", ["--v_parameterization=false"], "Stable Diffusion 2.x", "stable-diffusion-v2-512"),
        ("sd2", [], "Stable Diffusion 2.x", "stable-diffusion-v2-768-v"),  # its scheduler says so
        ("sdxl", [], "Stable Diffusion XL", "stable-diffusion-xl-v1-base"),
    ],
)
def test_a_folder_says_itself_which_base_it_is(family, flags, base, architecture, dataset, tmp_path, request, capsys):
    model = request.getfixturevalue(f"tiny_{family}")
    argv = without(arguments(family, model, dataset, tmp_path), "--v2", "--v_param")
    assert run(family, [*argv, *flags]) == 0
    said = f".safetensors ({base}, trained on {model.name}; 1 vector, 1 of a prompt's 75 tokens)"
    assert said in capsys.readouterr().out
    assert metadata(tmp_path)["modelspec.architecture"] == f"{architecture}/textual-inversion"


def test_a_full_disk_costs_no_training(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    """Neither the result nor the rescued vectors fit into the output folder."""
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out")
    assert run("sd1", argv) == 0
    wanted = load_file(tmp_path / "out" / f"{TOKEN}.safetensors")["emb_params"]
    (tmp_path / "out" / f"{TOKEN}.safetensors").unlink()
    writes, sync = [], os.fsync

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) <= 2:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert run("sd1", argv) == 1
    said = capsys.readouterr().err
    kept = tmp_path / "temporary" / f"{TOKEN}-step00000002.safetensors"
    assert f"{TOKEN}.safetensors cannot be written: No space left on device" in said
    assert f"The vectors of step 2 are kept in {kept}" in said
    assert (load_file(kept)["emb_params"] == wanted).all()
    assert not list((tmp_path / "out").iterdir())


# ---- what stands in the place of a file


def rows(file) -> torch.Tensor:
    return load_file(file)["emb_params"]


def test_the_result_of_an_earlier_run_is_kept(dataset, tmp_path, tiny_sd1, capsys):
    """The next free number is taken, and its report goes with it."""
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=1")
    result, kept = tmp_path / f"{TOKEN}.safetensors", tmp_path / f"{TOKEN}-2.safetensors"
    assert run("sd1", argv) == 0
    assert "was kept" not in capsys.readouterr().err
    first = result.read_bytes()
    (tmp_path / f"{TOKEN}-1.safetensors").write_text("mine")
    (tmp_path / f"{TOKEN}_report.json").write_text("of the first")
    assert run("sd1", [*argv, "--seed=2"]) == 0
    assert f"{result} of an earlier run was kept: it is now {kept.name}." in capsys.readouterr().err
    assert kept.read_bytes() == first
    assert (tmp_path / f"{TOKEN}-2_report.json").read_text() == "of the first"
    assert result.read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [result.name, kept.name, f"{TOKEN}-1.safetensors", f"{TOKEN}-2_report.json"]
    )


@pytest.mark.parametrize("extension", ["safetensors", "pt"])
def test_files_of_the_same_run_are_replaced_when_it_is_resumed(extension, dataset, tmp_path, tiny_sd1, capsys):
    """And those of an earlier run are kept then, too; retention removes none of them."""
    more = ["--save_every_n_steps=1", "--save_last_n_steps=1", "--save_state", f"--save_model_as={extension}"]
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=3", *more)
    assert run("sd1", argv) == 0
    again = [*argv, "--resume=latest"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert run("sd1", again) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "was kept" not in capsys.readouterr().err
    (tmp_path / f"{TOKEN}-step00000001.{extension}").write_text("of an earlier run")
    shutil.rmtree(tmp_path / f"{TOKEN}-state")
    assert run("sd1", [*again, f"--resume={tmp_path / f'{TOKEN}-step00000002-state'}"]) == 0
    assert (tmp_path / f"{TOKEN}-step00000001.{extension}").read_text() == "of an earlier run"
    assert run("sd1", [*argv, "--seed=2"]) == 0
    numbered = sorted(path.name for path in tmp_path.glob(f"{TOKEN}*-1*") if "step" not in path.name)
    assert numbered == [f"{TOKEN}-1.{extension}", f"{TOKEN}-state-1"]


def test_a_longer_run_keeps_the_shorter_result(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--save_state_on_train_end")
    assert run("sd1", [*argv, "--max_train_steps=1"]) == 0
    short = rows(tmp_path / f"{TOKEN}.safetensors")
    assert run("sd1", [*argv, "--max_train_steps=2", "--resume=latest"]) == 0
    assert torch.equal(rows(tmp_path / f"{TOKEN}-1.safetensors"), short)
    assert not torch.equal(rows(tmp_path / f"{TOKEN}.safetensors"), short)
    assert metadata(tmp_path)["ti.resumed"] == "after step 1: 2 steps instead of 1"


def test_unfinished_files_of_dead_processes_are_swept(dataset, tmp_path, tiny_sd1):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "sample").mkdir()
    gone = [f".{TOKEN}-step00000001.safetensors.{dead.pid}.tmp", f"sample/.{TOKEN}_e000001_00_1.png.{dead.pid}.tmp"]
    stay = [f".{TOKEN}.safetensors.{os.getppid()}.tmp", f".{TOKEN}2.safetensors.{dead.pid}.tmp", f".{TOKEN}.notes.tmp"]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    (tmp_path / f".{TOKEN}-state.{dead.pid}.tmp").mkdir()
    (tmp_path / f".{TOKEN}-state.{dead.pid}.tmp" / "state.pt").touch()
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=1")) == 0
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {*stay, "sample", f"{TOKEN}.safetensors"}


# ---- the checkpoint's hash


def while_hashing(monkeypatch, work: Callable[[], None]) -> None:
    """Let this be done before a checkpoint is read for its hash."""
    digest = hashlib.file_digest

    def disturbed(file, name):
        if Path(file.name).suffix == ".safetensors":
            work()
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", disturbed)


@pytest.fixture
def hashing(monkeypatch):
    """Reading the checkpoint for its hash takes until this event is set, or half a minute."""
    released = threading.Event()
    while_hashing(monkeypatch, lambda: released.wait(30))
    yield released
    released.set()


def test_a_save_waits_for_the_hash_and_the_training_does_not(dataset, tmp_path, tiny_sd1_file, hashing, monkeypatch):
    losses, begin = DenoisingTask.losses, time.monotonic()

    def first_step(task, batch, **details):
        threading.Timer(1, hashing.set).start()
        return losses(task, batch, **details)

    monkeypatch.setattr(DenoisingTask, "losses", first_step)
    assert run("sd1", arguments("sd1", tiny_sd1_file, dataset, tmp_path, "--max_train_steps=1")) == 0
    assert time.monotonic() - begin < 30
    assert metadata(tmp_path)["ti.base_model_hash"] == hashlib.sha256(tiny_sd1_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("waiting", ["write", "write_state"])
def test_a_run_that_is_told_to_end_does_without_the_hash(
    waiting, dataset, tmp_path, tiny_sd1_file, hashing, monkeypatch, capsys
):
    """Whether it waits for it in its result or in its last state: what follows is a SIGKILL."""
    original, begin = getattr(Results, waiting), time.monotonic()

    def interrupted(*arguments, **options):
        if not options:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return original(*arguments, **options)

    monkeypatch.setattr(Results, waiting, interrupted)
    argv = arguments("sd1", tiny_sd1_file, dataset, tmp_path, "--save_state_on_train_end")
    assert run("sd1", without(argv, "--save_state") if waiting == "write" else argv) == 143
    assert time.monotonic() - begin < 30
    assert [path.name for path in tmp_path.iterdir()] == [f"{TOKEN}-step00000002.safetensors"]
    assert "The vectors of step 2 are kept in" in capsys.readouterr().err
    assert "ti.base_model_hash" not in metadata(tmp_path, f"{TOKEN}-step00000002.safetensors")


def test_a_checkpoint_that_is_gone_meanwhile_costs_its_hash(dataset, tmp_path, tiny_sd1_file, monkeypatch, capsys):
    def gone():
        raise OSError(116, "Stale file handle")

    while_hashing(monkeypatch, gone)
    assert run("sd1", arguments("sd1", tiny_sd1_file, dataset, tmp_path)) == 0
    assert "it cannot be read ([Errno 116] Stale file handle)" in capsys.readouterr().err
    assert "ti.base_model_hash" not in metadata(tmp_path)


def test_a_thumbnail_that_would_make_the_embedding_unreadable_is_refused(dataset, tmp_path, tiny_sd1, capsys):
    thumbnail = tmp_path / "photo.png"
    with thumbnail.open("wb") as file:
        file.truncate(20_000_000)
    given = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--metadata_thumbnail={thumbnail}")
    assert run("sd1", given) == 1
    assert "Give a smaller image as --metadata_thumbnail." in capsys.readouterr().err
    assert not (tmp_path / "out" / f"{TOKEN}.safetensors").exists()
    assert run("sd1", [*given, "--save_model_as=pt"]) == 0  # which has no place for it
