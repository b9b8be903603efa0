"""Every command of README.md and docs/ runs: on tiny models, few steps, with this environment in place of a new one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from departures import DEPARTURES
from runs import run, write_dataset
from safetensors.torch import load_file

from library.data.config import load_dataset_configs
from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.options.data import DatasetOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {
    language: [
        match[1]
        for text in TEXTS.values()
        for match in re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    ]
    for language in ("bash", "toml")
}
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q "


def commands(block: str) -> list[list[str]]:
    """The commands of a block, each as its words; lines that end in a backslash go on."""
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def set_ups() -> list[str]:
    return [line for block in BLOCKS["bash"] for line in block.splitlines() if line.startswith(SET_UP)]


def trainings() -> list[list[str]]:
    """The commands that start a script, in the pages' order."""
    words = [command for block in BLOCKS["bash"] for command in commands(block)]
    return [command for command in words if any(word.endswith("train_textual_inversion.py") for word in command)]


def test_the_pages_hold_the_commands_they_should():
    assert len(set_ups()) == 2
    assert len(trainings()) >= 4
    others = [command for block in BLOCKS["bash"] for command in commands(block) if command not in trainings()]
    others = [command for command in others if command[:4] != shlex.split(SET_UP)[:4]]
    assert [command[2:] for command in others] == [
        ["pytest", "-q", "-n", "auto"],  # what is running now
        ["pytest", "-m", "gpu"],  # run by test_gpu_session.py
        ["tests.benchmarks", "--out", "benchmarks.md"],  # run by test_benchmarks.py
    ]


@pytest.mark.parametrize("line", set_ups())
def test_set_up(line):
    """The environment that runs this test was made by one of these lines; here only what they name is looked at."""
    wanted = shlex.split(line.removeprefix(SET_UP))
    if wanted[0] == "-r":
        assert (ROOT / wanted[1]).is_file()
        return
    extras = re.fullmatch(r"\.\[(.+)\]", wanted[1])[1].split(",")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def embedding_for(script: str, given: list[str], folder: Path) -> Path:
    """An embedding of the miniature models' widths with as many vectors as a command asks for."""
    count = int(next(word.partition("=")[2] for word in given if word.startswith("--num_vectors_per_token=")))
    widths = {"clip_l": 32, "clip_g": 64} if script.startswith("sdxl") else {"emb_params": 32}
    tensors = {key: torch.randn(count, width) for key, width in widths.items()}
    write_embedding(folder / "before.safetensors", tensors, TrainingRecord("mychar", count))
    return folder / "before.safetensors"


@pytest.mark.parametrize("command", trainings(), ids=lambda command: Path(command[-1]).name)
def test_training_commands(command, tmp_path, request):
    place = next(i for i, word in enumerate(command) if word.endswith("train_textual_inversion.py"))
    script, given = command[place], command[place + 1 :]
    family = "sdxl" if script.startswith("sdxl") else "sd1"
    dataset = write_dataset(tmp_path, dataset="enable_bucket = true\nmin_bucket_reso = 64")
    replaced = {
        "--pretrained_model_name_or_path": request.getfixturevalue(f"tiny_{family}_file"),
        "--dataset_config": dataset,
        "--output_dir": tmp_path / "output",
        "--max_train_steps": 2,
    }
    if any(word.startswith("--config_file") for word in given):  # the quickstart keeps its own model and pictures
        given += [f"--output_dir={tmp_path / 'output'}", "--max_train_steps=2"]
        if any(word.startswith(("--save_state", "--resume=")) for word in given):
            given.append("--learning_report=false")  # the quickstart's own command draws it already
    else:
        given = [f"{name}={replaced[name]}" if (name := w.partition("=")[0]) in replaced else w for w in given]
        if "--debug_dataset" not in given:
            given.append("--max_train_steps=2")  # not the default's 1,600 where a command leaves the number out
    if resumed := [word for word in given if word.startswith("--resume=")]:
        given.remove(*resumed)
        before = [*given, "--max_train_steps=1", "--save_state", f"--output_dir={tmp_path / 'before'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            assert run(family, before) == 0
        given.append(f"--resume={tmp_path / 'before' / 'mychar-state'}")
    if weights := [word for word in given if word.startswith("--weights=")]:
        given.remove(*weights)
        given.append(f"--weights={embedding_for(script, given, tmp_path)}")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *command[2:place]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, script, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if "--debug_dataset" in given:
        assert "49408" in done.stdout
        assert list((tmp_path / "output").glob("*.png"))
        return
    name = next((w.partition("=")[2] for w in given if w.startswith("--output_name=")), "*")
    (file,) = (tmp_path / "output").glob(f"{name}.safetensors")
    assert set(load_file(file)) == ({"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"})


@pytest.mark.parametrize("number", range(len(BLOCKS["toml"])))
def test_dataset_files(number, tmp_path):
    file = tmp_path / "dataset_config.toml"
    file.write_text(BLOCKS["toml"][number], encoding="utf-8")
    (config,) = load_dataset_configs(DatasetOptions(dataset_config=file), bucket_step=64)
    assert config.buckets.resolution == (512, 512)
    assert config.subsets[0].num_repeats == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_every_departure_is_a_decision_with_its_reason():
    """Numbers that the list of departures and the tests cite stand in docs/decisions.md, once each."""
    explained = re.findall(r"\*\*([QD]\d+)\*\*", TEXTS[ROOT / "docs" / "decisions.md"])
    assert len(explained) == len(set(explained))
    assert {departure.number for departure in DEPARTURES} <= set(explained)


def test_the_readme_names_every_page():
    assert all(f"(docs/{page.name})" in TEXTS[PAGES[0]] for page in PAGES[1:])
