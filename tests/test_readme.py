"""Every command of the README and the other pages runs: on tiny models, in few steps, in this environment."""

import json
import os
import re
import shlex
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import accelerate_cli
from departures import DEPARTURES
from PIL import Image
from runs import run, write_dataset
from safetensors.torch import load_file
from warm_processes import WarmProcess

from library.data.config import load_dataset_configs
from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.embedding.tool import main as embedding_tool
from library.options.data import DatasetOptions
from library.output import learning_report

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
QUICKSTART = ROOT / "configs" / "quickstart"
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", QUICKSTART / "README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q "
# As the guide has it that this project follows; what it says must work verbatim.
GUIDE = """\
accelerate launch --num_cpu_threads_per_process 1 train_textual_inversion.py \\
  --pretrained_model_name_or_path="path/to/model.safetensors" \\
  --dataset_config="dataset_config.toml" \\
  --output_dir="output" \\
  --output_name="my_textual_inversion" \\
  --save_model_as="safetensors" \\
  --token_string="mychar" \\
  --init_word="girl" \\
  --num_vectors_per_token=4 \\
  --max_train_steps=1600 \\
  --learning_rate=1e-6 \\
  --optimizer_type="AdamW8bit" \\
  --mixed_precision="fp16" \\
  --cache_latents \\
  --sdpa
"""
GUIDE_DATASET = """\
[general]
shuffle_caption = false
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 512          # Use 1024 for SDXL
batch_size = 4            # Can be larger than LoRA training
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "path/to/images"
  caption_extension = ".txt"
  num_repeats = 10
"""
# What a machine without a GPU, the tests' tiny models and two steps of training bring about.
EXPECTED_WARNINGS = (
    "fp16 needs a GPU",
    "bf16 is slow here: this CPU",
    "tiny_sd1.safetensors is no inpainting model",
    "THE EMBEDDING HAS HARDLY CHANGED",
)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, without the indentation of the list that they stand in."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", TEXTS[page], re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


BASH = [block for page in PAGES for block in blocks(page, "bash")]


def commands(block: str) -> list[list[str]]:
    """The commands of a block, each as its words; lines that end in a backslash go on."""
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def set_ups() -> list[str]:
    return [line for block in BASH for line in block.splitlines() if line.startswith(SET_UP)]


COMMANDS = [command for block in BASH for command in commands(block)]


def trainings() -> list[list[str]]:
    """The commands that start a script, in the pages' order."""
    return [command for command in COMMANDS if any(word.endswith("train_textual_inversion.py") for word in command)]


def tools() -> list[list[str]]:
    """The commands for embedding files, without what starts them."""
    return [command[3:] for command in COMMANDS if command[1:3] == ["-m", "library.embedding"]]


def test_the_pages_hold_the_commands_they_should():
    assert len(set_ups()) == 2
    assert len(trainings()) >= 4
    assert Path(trainings()[0][0]).name == "python"  # the launcher is for several GPUs
    others = [command for command in COMMANDS if command not in trainings()]
    others = [command for command in others if command[:4] != shlex.split(SET_UP)[:4] and command[3:] not in tools()]
    assert [command[2:] for command in others] == [
        ["pytest", "-q", "-n", "auto"],  # what is running now
        # not run, which the page says: it needs PyTorch's own index
        [*shlex.split("&& uv pip install -r requirements.txt --reinstall-package torch --torch-backend=auto")],
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


@pytest.mark.parametrize("command", tools(), ids=lambda command: command[0])
def test_tools(command, tiny_sd1_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(tiny_sd1_file) if word == "path/to/model.safetensors" else word for word in command]
    for name in ("mychar", "mychar-step00000800", "mychar-step00001200"):
        write_embedding(
            Path(f"output/{name}.safetensors"), {"emb_params": torch.ones(4, 32)}, TrainingRecord("mychar", 4)
        )
    assert embedding_tool(command) == 0
    assert (Path(command[-1]).is_file() and "Written: " in capsys.readouterr().out) or command[0] == "inspect"


def embedding_for(family: str, given: list[str], folder: Path) -> Path:
    """An embedding of the tiny models' widths with as many vectors as a command asks for."""
    count = int(next(word.partition("=")[2] for word in given if word.startswith("--num_vectors_per_token=")))
    widths = {"clip_l": 32, "clip_g": 64} if family == "sdxl" else {"emb_params": 32}
    tensors = {key: 0.02 * torch.randn(count, width) for key, width in widths.items()}
    write_embedding(folder / "before.safetensors", tensors, TrainingRecord("mychar", count))
    return folder / "before.safetensors"


def replaced(given: list[str], family: str, folder: Path, request: pytest.FixtureRequest) -> list[str]:
    """The options of a command with what exists here in place of the user's files, and two steps of training."""
    if any(word.startswith("--config_file") for word in given):  # the quickstart keeps its own model and images
        return [*given, f"--output_dir={folder / 'output'}", "--max_train_steps=2"]
    own = {
        "--pretrained_model_name_or_path": request.getfixturevalue(f"tiny_{family}_file"),
        "--dataset_config": write_dataset(folder, dataset="enable_bucket = true\nmin_bucket_reso = 64"),
        "--output_dir": folder / "output",
    }
    given = [f"{name}={own[name]}" if (name := word.partition("=")[0]) in own else word for word in given]
    # Not the default's 1,600 where a command leaves the number out.
    return given if "--debug_dataset" in given else [*given, "--max_train_steps=2"]


def prepared(given: list[str], family: str, folder: Path) -> list[str]:
    """The options of a command with a state and an embedding file of its own in place of those that it names."""
    if resumed := [word for word in given if word.startswith("--resume=")]:
        given = [word for word in given if word not in resumed]
        saving = ["--save_every_n_steps=1", "--save_state", f"--output_dir={folder / 'before'}"]
        assert run(family, [*given, *saving]) == 0
        given.append(f"--resume={folder / 'before' / 'mychar-step00000001-state'}")
    if weights := [word for word in given if word.startswith("--weights=")]:
        given = [word for word in given if word not in weights]
        given.append(f"--weights={embedding_for(family, given, folder)}")
    return given


def result_of(
    command: list[str], place: int, given: list[str], folder: Path, capfd: pytest.CaptureFixture
) -> tuple[int, str]:
    """Exit code and output of a command: Python's in this process, the launcher's in processes of its own."""
    program, script = Path(command[0]).name, command[place]
    assert (Path(sys.executable).parent / program).exists(), "the README's environment holds it"
    if program == "python":
        capfd.readouterr()
        code = run("sdxl" if script.startswith("sdxl") else "sd1", given)
        return code, "".join(capfd.readouterr())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = Path(accelerate_cli.__file__)
    code, out, errors = WarmProcess(folder, 0, launcher, [*command[1:place], script, *given], environment).ended(300)
    return code, out + errors


def scolded(said: str) -> list[str]:
    """Lines that tell the user of something odd in a command, but for what this machine brings about."""
    lines = [line for line in said.splitlines() if re.search("WARNING|no effect|does nothing|do nothing", line)]
    return [line for line in lines if not any(words in line for words in EXPECTED_WARNINGS)]


@pytest.mark.parametrize("command", trainings(), ids=lambda command: Path(command[-1]).name)
def test_training_commands(command, tmp_path, request, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(learning_report, "_STEPS", 2)  # the images show nothing after two steps of training anyway
    monkeypatch.setattr(learning_report, "_LOSS_SAMPLES", 16)
    place = next(i for i, word in enumerate(command) if word.endswith("train_textual_inversion.py"))
    family = "sdxl" if command[place].startswith("sdxl") else "sd1"
    given = replaced(command[place + 1 :], family, tmp_path, request)
    if command != trainings()[0]:  # which draws it already
        given.append("--learning_report=false")
    given = prepared(given, family, tmp_path)
    code, said = result_of(command, place, given, tmp_path, capfd)
    assert code == 0, said
    assert scolded(said) == []
    if "configs/accelerate.yaml" in command:
        assert "The following values were not passed" not in said
    if "--debug_dataset" in given:
        assert "49408" in said
        assert list((tmp_path / "output").glob("*.png"))
        return
    name = next((w.partition("=")[2] for w in given if w.startswith("--output_name=")), "*")
    (file,) = (tmp_path / "output").glob(f"{name}.safetensors")
    assert set(load_file(file)) == ({"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"})


def test_the_command_of_the_guide_works_as_it_is(tmp_path, request, monkeypatch, capfd):
    (command,) = commands(GUIDE)
    monkeypatch.chdir(ROOT)
    given = replaced(command[command.index("train_textual_inversion.py") + 1 :], "sd1", tmp_path, request)
    code, said = result_of(command, command.index("train_textual_inversion.py"), given, tmp_path, capfd)
    assert code == 0, said
    assert set(load_file(tmp_path / "output" / "my_textual_inversion.safetensors")) == {"emb_params"}


def test_a_mistake_behind_the_quiet_launcher_is_one_sentence(tmp_path, monkeypatch, capfd):
    """What docs/hardware.md says of ``--quiet`` and configs/accelerate.yaml."""
    monkeypatch.chdir(ROOT)
    command = next(command for command in trainings() if "--quiet" in command)
    place = command.index("train_textual_inversion.py")
    code, said = result_of(command, place, [*command[place + 1 :], "--token_string=cat"], tmp_path, capfd)
    assert code == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: --token_string")


@pytest.mark.parametrize("block", [*blocks(README, "toml"), GUIDE_DATASET])
def test_dataset_files(block, tmp_path):
    """Those of docs/dataset.md are trained on by test_dataset_page.py."""
    file = tmp_path / "dataset_config.toml"
    file.write_text(block, encoding="utf-8")
    (config,) = load_dataset_configs(DatasetOptions(dataset_config=file), bucket_step=64)
    assert config.buckets.resolution == (512, 512)
    assert config.subsets[0].num_repeats == 10


def test_the_dataset_file_of_the_readme_lies_in_configs():
    assert blocks(README, "toml") == [(ROOT / "configs" / "dataset_config.toml").read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", [README, QUICKSTART / "README.md"], ids=["README", "quickstart"])
def test_python_with_the_quickstart(page, tmp_path, monkeypatch):
    """In as few steps as show that it works, and with vectors that were not trained."""
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    width = json.loads((QUICKSTART / "sd" / "text_encoder" / "config.json").read_text())["hidden_size"]
    vectors = {"emb_params": 0.01 * torch.randn(4, width)}
    write_embedding(tmp_path / "output" / "quickstart" / "mychar.safetensors", vectors, TrainingRecord("mychar", 4))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(page, "python")
    assert block.count("num_inference_steps=25") == 1
    exec(block.replace("num_inference_steps=25", "num_inference_steps=2"), {})
    (image,) = tmp_path.glob("*.png")
    assert Image.open(image).size == (128, 128)


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
    assert all(f"(docs/{page.name})" in TEXTS[README] for page in DOCS)


def test_hooks_run_the_tools_of_the_environment():
    """So that no network is needed before a commit."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {Path(hook["entry"].split()[0]).name for hook in repository["hooks"]}
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lint"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert tools == {requirement.partition("==")[0] for requirement in lint}


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 180
