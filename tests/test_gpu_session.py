"""Sessions of tests with and without a GPU: what is chosen, what is said, and that the tests of GPUs can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm_processes import WarmProcess

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """That of a session of its own, on a machine without GPUs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def warm_session(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a session of its own that finds its libraries imported."""
    return WarmProcess(folder, 0, Path(pytest.__file__).with_name("__main__.py"), arguments, environment()).ended(580)


def test_this_session_sees_no_gpu_and_neither_do_its_children():
    assert not torch.cuda.is_available()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ACCELERATE_USE_CPU"]) == ("", "true")


def test_without_a_gpu_their_tests_say_so_in_a_line():
    command = [sys.executable, "-m", "pytest", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    (said,) = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert f"No test was run: PyTorch {torch.__version__} sees no CUDA GPU here." in said
    assert done.returncode == 5


def test_other_sessions_leave_their_tests_out(request, tmp_path):
    assert request.session.items
    assert not any(item.get_closest_marker("gpu") for item in request.session.items)
    _, said, _ = warm_session(tmp_path, "--collect-only", "-q", "tests/test_gpu.py", "-m", "not gpu")
    assert "::" not in said
    assert "deselected" in said


def test_their_tests_can_be_tried_out_on_the_cpu(tmp_path):
    chosen = "(computes_what and sd1) or mem_eff_attn-sd1 or images and sd1 or channels_last"
    arguments = ("-m", "gpu", "--gpu-tests-on-cpu", "-n0", "-q", "tests/test_gpu.py", "-k", chosen)
    code, said, errors = warm_session(tmp_path, *arguments)
    assert code == 0, said + errors
    assert "8 passed, 3 skipped" in said
