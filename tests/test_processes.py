"""The scripts as users start them, through ``accelerate launch``: one process, two processes, loader workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SCRIPTS, TOKEN, arguments, run, write_dataset
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def launch(family: str, argv: list[str], *launcher: str) -> subprocess.CompletedProcess:
    """Start the family's script in processes of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *launcher, SCRIPTS[family].__file__, *argv]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five photographs in batches of one: with two processes the last step has an empty batch."""
    folder = tmp_path_factory.mktemp("data")
    file = write_dataset(folder, count=5, subset="shuffle_caption = true", caption=f"{TOKEN}, red, green, blue")
    file.write_text(file.read_text().replace("batch_size = 2", "batch_size = 1"))
    return file


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_processes_equal_one_with_accumulation(family, dataset, tmp_path, request):
    model = request.getfixturevalue(f"tiny_{family}")
    more = ["--max_train_steps=5", "--num_vectors_per_token=2", "--optimizer_type=SGD", "--learning_rate=1"]
    alone = arguments(family, model, dataset, tmp_path / "one", *more, "--gradient_accumulation_steps=2")
    assert run(family, alone) == 0
    done = launch(
        family,
        arguments(family, model, dataset, tmp_path / "two", *more),
        *("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / f"{TOKEN}.safetensors") for name in ("one", "two"))
    assert done.stdout.count("The embedding is in") == 1
    for key, rows in one.items():
        assert torch.allclose(rows, two[key], atol=1e-6)


def test_a_mistake_through_the_launcher_is_a_sentence(dataset, tmp_path, tiny_sd1):
    argv = [*arguments("sd1", tiny_sd1, dataset, tmp_path / "out"), "--token_string=cat"]
    done = launch("sd1", argv, "--num_processes=1")
    assert done.returncode != 0
    assert 'error: --token_string "cat"' in done.stderr


def test_loader_workers_change_nothing(dataset, tmp_path, tiny_sd1):
    for workers in (0, 2):
        argv = arguments("sd1", tiny_sd1, dataset, tmp_path / str(workers), "--max_train_steps=6")
        argv = [a for a in argv if a != "--cache_latents"] + [f"--max_data_loader_n_workers={workers}"]
        assert run("sd1", [*argv, "--persistent_data_loader_workers"] if workers else argv) == 0
    first, second = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("0", "2"))
    assert torch.equal(first, second)
