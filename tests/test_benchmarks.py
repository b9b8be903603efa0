"""The benchmarks themselves: that they run from end to end, measure both loops, and write what they find."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from option_effects import train
from runs import arguments, write_dataset

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.__main__ import PROFILES, Measuring
from tests.benchmarks.bare_loop import BareLoop
from tests.benchmarks.case import Result, measure
from tests.benchmarks.page import written

ROOT = Path(__file__).parents[1]


def cells(page: str) -> list[list[str]]:
    """The lines of all tables, without headings and rules."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| model")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_command_of_the_page_is_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m tests.benchmarks ")


def test_it_measures_and_writes(tmp_path, monkeypatch):
    """The first case in a process of its own, as all are; the others here, where everything is imported."""
    cases = []

    def measured(case, folder) -> Result:
        cases.append(case)
        if len(cases) == 1:
            return in_its_process(case, folder)
        own = folder / f"case{len(cases)}"
        own.mkdir()
        AcceleratorState._reset_state(True)
        return measure(case, own, time.time())

    in_its_process = benchmarks.measured
    monkeypatch.setattr(Measuring.__init__, "__defaults__", (measured,))
    command = ["--out", str(tmp_path / "benchmarks.md"), "--profile", "tiny", "--only", "caching", "steps"]
    assert benchmarks.main(command) == 0
    assert len(cases) == 6
    page = (tmp_path / "benchmarks.md").read_text()
    assert "Computing on the CPU" in page
    sd, sdxl = ["sd1", "64", "1", "no"], ["sdxl", "64", "1", "no"]
    cached, steps = cells(page)[:2], cells(page)[2:]
    assert [row[:4] for row in cached] == [sd, sdxl]
    for row in cached:
        assert float(row[5]) > 0
        assert re.match(r"\d+\.\d{3} \(≤ 1\.05: ", row[-1])
    checkpointing = "--gradient_checkpointing"
    assert [row[:5] for row in steps] == [[*each, flag] for each in (sd, sdxl) for flag in ("–", checkpointing)]
    for row in steps:
        assert float(row[5]) > 0
        assert float(row[6]) > 0
        assert re.match(r"\d+\.\d{3}" + (r" \(≤ 1\.03: " if row[4] == "–" else "$"), row[7])


def test_the_bare_loop_runs_the_weights_of_the_training(bench_outcome):
    """Its prediction is that of the training's own networks, and its gradient reaches the shift of the embeddings."""
    task, batch = bench_outcome.setup.task, bench_outcome.batches[0][0]
    loop = BareLoop(task, batch, checkpointing=False)
    assert loop.unet.conv_in.weight.data_ptr() == task.unet.conv_in.weight.data_ptr()
    family, encoders = bench_outcome.job.family, task.prompt_encoder.text_encoders
    ids = [torch.randint(0, 49406, ids.shape) for ids in batch.input_ids]
    for merged in task.prompt_encoder.embeddings:
        merged.rows = None
    ours, bare = (family.encode_prompts(each, ids) for each in (encoders, loop.encoders))
    assert torch.allclose(ours.context, bare.context, atol=1e-5)
    predictions = [
        family.predict_noise(unet, loop.noisy, loop.timesteps, bare, loop.sizes) for unet in (task.unet, loop.unet)
    ]
    assert torch.equal(*predictions)
    predictions[1].square().mean().backward()
    assert all(shift.grad.abs().sum() > 0 for shift in loop.shifts)


@pytest.fixture(params=["sd1", "sdxl"])
def bench_outcome(request, tmp_path):
    model = request.getfixturevalue(f"tiny_{request.param}")
    argv = arguments(request.param, model, write_dataset(tmp_path, count=2), tmp_path / "out", "--max_train_steps=1")
    return train(request.param, argv, tmp_path / "out")


def pretended(case, _) -> Result:
    """Twice as fast with each option; 1 % slower than the bare loop."""
    seconds = 0.4 / (1 + len(case.flags))
    return Result(seconds, 0.396 if case.bare else None, int(9e9 / (1 + len(case.flags))), int(8e9), 12.5)


def test_the_page_says_what_is_reached(tmp_path):
    measuring = Measuring(PROFILES["full"], tmp_path, measure=pretended)
    measuring.models = {"sd1": "a", "sdxl": "b"}
    sections = [measuring.steps(), measuring.sizes(), measuring.vectors(), measuring.caching()]
    page = written("full", sections)
    rows = cells(page)
    assert rows[0][:10] == ["sd1", "512", "1", "bf16", "–", "0.4", "0.396", "1.010 (≤ 1.03: yes)", "1.0%", "9.00"]
    compiled = next(row for row in rows if row[4] == "--torch_compile")
    assert compiled[7:9] == ["0.505 (≤ 0.8: yes)", "–"]
    assert compiled[11] == "4.50"
    large = next(row for row in rows if row[:3] == ["sdxl", "1024", "1"] and row[4] == "--gradient_checkpointing")
    assert large[9] == "4.50 (≤ 10.00: yes)"
    assert sum("**no**" in cell for row in rows for cell in row) == 0
    assert len(measuring.results) == len(set(measuring.results))


def test_a_case_that_fails_is_said(tmp_path):
    measuring = Measuring(PROFILES["tiny"], tmp_path, measure=lambda case, _: Result(failed="exit code 1"))
    measuring.models = {"sd1": "a"}
    assert [row[4] for row in cells(written("tiny", [measuring.vectors()]))] == ["exit code 1"] * 2
