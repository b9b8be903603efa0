"""``--dry_run``: all but the training, nothing written, and what the run would take and leave."""

import re

import pytest
from option_effects import shows
from runs import arguments, run, write_dataset


@pytest.fixture
def scene(tmp_path, tiny_sd1):
    """A folder with a dataset, and the command line of a run that would write whatever a run can."""
    file = write_dataset(tmp_path, count=3, size=(64, 64), dataset="enable_bucket = true\nmin_bucket_reso = 64")
    tables = file.read_text(encoding="utf-8")
    wide = tables[tables.index("[[datasets]]") :].replace("resolution = 64", "resolution = [128, 64]")
    write_dataset(tmp_path / "wide", count=2, size=(128, 64))
    wide = wide.replace((tmp_path / "images").as_posix(), (tmp_path / "wide" / "images").as_posix())
    file.write_text(tables + wide, encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("mychar --w 64 --h 64 --s 1\n", encoding="utf-8")
    every = ("--save_every_n_steps=1", "--save_state", "--sample_every_n_steps=1", f"--sample_prompts={prompts}")
    writing = ("--no_report=false", "--cache_latents_to_disk", "--cache_info", f"--logging_dir={tmp_path / 'logs'}")
    log = f"--console_log_file={tmp_path / 'log.txt'}"
    return tmp_path, arguments("sd1", tiny_sd1, file, tmp_path / "out", "--dry_run", *every, *writing, log)


def state_of(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


@shows("dry_run")
def test_nothing_is_written_and_what_would_be_is_said(scene, capsys):
    folder, argv = scene
    before = state_of(folder)
    assert run("sd1", argv) == 0
    assert state_of(folder) == before
    said = capsys.readouterr().out
    assert "Dry run: all is well. Nothing was trained, and nothing was written." in said
    assert "It would train 1 vector for 2 steps in 1 epoch of 3 batches" in said
    out = folder / "out"
    for written in (
        f"  {out / 'mychar.safetensors'}\n",
        "  mychar-step00000001.safetensors and so on, after every 1 steps: 2 times\n",
        "  mychar-state and a state beside each of these files\n",
        f"  {out / 'mychar'}.html\n",
        f"  {out / 'mychar'}_metrics.jsonl\n",
        f"  {out / 'mychar'}_usage.txt\n",
        f"  {out / 'sample'}, with the images of 1 prompt each time they are drawn\n",
        "  latents beside 5 images, where they are not cached yet\n",
        f"  {folder / 'images' / 'metadata_cache.json'}\n",
        f"  logs for tensorboard in {folder / 'logs'}\n",
        f"  {folder / 'log.txt'}, with its messages\n",
    ):
        assert written in said


def test_time_and_memory_are_measured(scene, capsys):
    _, argv = scene
    assert run("sd1", [*argv, "--max_train_steps=1000", "--gradient_accumulation_steps=2", "--early_stopping"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"Time: ([\d.e-]+) s a step, so about (?:(\d+) min )?(\d+) s for 1,000 steps", said)
    assert found, said
    step, all_steps = float(found[1]), 60 * int(found[2] or 0) + int(found[3])
    # Two digits of a step are at most 5 % off, and whole seconds half a second.
    assert all_steps == pytest.approx(1000 * step, rel=0.06, abs=1)
    assert "measured in 2 trial steps on 4 images of 128x64 pixels, the largest batch of the run" in said
    assert re.search(r"Memory: \d+\.\d GiB of main memory at most", said)
    on_top = (
        "encoding 5 images whose latents are not cached yet, measuring for --early_stopping and drawing sample images"
    )
    assert f"{on_top} come on top." in said


def test_what_the_run_writes_is_what_was_said(scene, capsys):
    folder, argv = scene
    assert run("sd1", argv) == 0
    said = capsys.readouterr().out
    assert run("sd1", [argument for argument in argv if argument != "--dry_run"]) == 0
    for path in (folder / "out").iterdir():
        assert path.name.replace("step00000002", "step00000001").removesuffix("-state") in said, path
    assert (folder / "log.txt").is_file()
    assert (folder / "images" / "metadata_cache.json").is_file()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--optimizer_type=Adamm", "--optimizer_type"),
        ("--clip_skip=40", "--clip_skip"),
        ("--weights=/nowhere/w.pt", "/nowhere/w.pt"),
    ],
)
def test_a_mistake_is_an_error(scene, more, sentence, capsys):
    assert run("sd1", [*scene[1], more]) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert "all is well" not in said.out


def test_of_a_run_that_goes_on_only_the_rest_counts(scene, capsys):
    folder, argv = scene
    first = [argument for argument in argv if argument != "--dry_run"]
    assert run("sd1", first) == 0
    before = state_of(folder)
    capsys.readouterr()
    assert run("sd1", [*argv, "--resume=latest", "--max_train_steps=12"]) == 0
    captured = capsys.readouterr()
    assert "for 10 steps." in captured.out
    assert "the images or masks are not the same" not in captured.err
    assert state_of(folder) == before


def test_a_file_that_is_there_is_told(scene, capsys):
    folder, argv = scene
    (folder / "out").mkdir()
    (folder / "out" / "mychar.safetensors").write_bytes(b"mine")
    assert run("sd1", argv) == 0
    assert "mychar.safetensors (the file that is there is kept under another name)" in capsys.readouterr().out
    assert (folder / "out" / "mychar.safetensors").read_bytes() == b"mine"
