"""What a path below configs/ means, in the repository, in another folder, and once the project is installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.support.shipped_files import CONFIGS, shipped

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train_textual_inversion", "sdxl_train_textual_inversion")
TOOL = "textual_inversion_embedding"
# What a wheel is made from; a copy of it, since setuptools leaves a folder "build" that a later wheel would take in.
SOURCES = (
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "library",
    "configs",
    *(f"{s}.py" for s in SCRIPTS),
)
OTHERS = ["configs/none.toml", "configs/../README.md", "other/sd.toml", "", "configs/a\0b", "configs/" + 300 * "a"]
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("configs/quickstart/sd.toml")
    own.parent.mkdir(parents=True)
    own.touch()
    assert shipped(str(own)) == str(own)


def test_elsewhere_the_shipped_file_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shipped("configs/quickstart/sd")) == CONFIGS / "quickstart" / "sd"


@pytest.mark.parametrize(
    "path", ["configs/none.toml", "configs/../README.md", "other/sd.toml", "", "configs/a\0b", "configs/" + 300 * "a"]
)
def test_every_other_path_is_left_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(path) == path


def copied(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=IGNORED)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what ``pip install .`` puts into site-packages, from a wheel that is made without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copied(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    wheel.unlink()
    yield folder / "site"
    shutil.rmtree(folder)


def files_of(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_a_wheel_holds_the_package_and_the_configurations_once(installed):
    code = {name for name in files_of(ROOT / "library") if name.endswith((".py", ".html"))}
    configs = {f"configs/{name}" for name in files_of(ROOT / "configs")}
    assert files_of(installed / "library") == code | configs
    rest = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert rest == {"library", *(f"{script}.py" for script in SCRIPTS)}


def test_a_wheel_needs_what_requirements_txt_lists(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist:")]
    listed = [line for line in (ROOT / "requirements.txt").read_text().split() if "==" in line]
    assert [line.split()[1] for line in needed if "extra ==" not in line] == listed


def run_installed(installed: Path, script: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command as pip's launcher does, in a folder that is not the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry = EntryPoint(script, project["scripts"][script], "console_scripts")
    launcher = (
        f"import sys; from {entry.module} import {entry.attr}; sys.argv[0] = {script!r}; sys.exit({entry.attr}())"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", launcher, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("script", "word"), [*((script, "--token_string") for script in SCRIPTS), (TOOL, "inspect")])
def test_installed_commands_explain_themselves(script, word, installed, tmp_path):
    done = run_installed(installed, script, ["--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script} ")
    assert word in done.stdout


def test_the_installed_tool_looks_into_files(installed, tmp_path):
    write_embedding(tmp_path / "a.safetensors", {"emb_params": torch.ones(2, 768)}, TrainingRecord("mychar", 2))
    done = run_installed(installed, TOOL, ["inspect", "a.safetensors"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Stable Diffusion 1.x (vectors of width 768): 2 vectors" in done.stdout


def test_the_quickstart_runs_installed_from_any_folder(installed, tmp_path):
    given = ["--config_file=configs/quickstart/sd.toml", "--max_train_steps=1", "--learning_report=false"]
    done = run_installed(installed, SCRIPTS[0], given, tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("output/*/mychar.safetensors")
    assert result.stat().st_size > 0
    assert str(ROOT) not in done.stdout + done.stderr.replace(sys.prefix, "")
