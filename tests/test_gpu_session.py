"""Sessions of tests with and without a GPU: what is chosen, what is said, and that the tests of GPUs can run."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def session(*arguments: str) -> subprocess.CompletedProcess:
    """A session of its own, on a machine without GPUs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )


def test_this_session_sees_no_gpu_and_neither_do_its_children():
    assert not torch.cuda.is_available()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ACCELERATE_USE_CPU"]) == ("", "true")


def test_without_a_gpu_their_tests_say_so_in_a_line():
    done = session("-m", "gpu")
    (said,) = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert f"No test was run: PyTorch {torch.__version__} sees no CUDA GPU here." in said
    assert done.returncode == 5


def test_other_sessions_leave_their_tests_out(request):
    assert request.session.items
    assert not any(item.get_closest_marker("gpu") for item in request.session.items)
    done = session("--collect-only", "-q", "tests/test_gpu.py", "-m", "not gpu")
    assert "::" not in done.stdout
    assert "deselected" in done.stdout


def test_their_tests_can_be_tried_out_on_the_cpu():
    chosen = "(computes_what and sd1) or mem_eff_attn-sd1 or images and sd1 or channels_last"
    done = session("-m", "gpu", "--gpu-tests-on-cpu", "-n0", "-q", "tests/test_gpu.py", "-k", chosen)
    assert done.returncode == 0, done.stdout
    assert "8 passed, 3 skipped" in done.stdout
