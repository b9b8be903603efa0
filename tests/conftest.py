"""Fixtures for every test: tiny models of each family, and a clean process between tests.

A session runs either the tests of GPUs (``pytest -m gpu``) or the others, on the CPU whatever the machine has.
"""

import gc
import logging
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Read by huggingface_hub when it is imported, hence before it.
os.environ["HF_HUB_OFFLINE"] = "1"


def _stay_on_one_core() -> None:
    """Give each test process a core of its own, and so torch one thread.

    Tiny models are faster without threads that wait for each other, and sums do not depend on how threads share them.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        # Runs without workers that go on side by side do not all meet on the first core.
        number = int(worker.removeprefix("gw")) if worker else os.getpid()
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def pytest_addoption(parser):
    """Let the tests of GPUs be tried where there is none."""
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help="run -m gpu on the CPU, as far as that can be")


def _wants_gpu(config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "") is not None


def pytest_configure(config):
    """Choose the device, and pin xdist's workers, or the one process where there are none, to a core each.

    xdist's controller goes on choosing by all cores.
    """
    if not _wants_gpu(config) or config.option.gpu_tests_on_cpu:
        # Before torch is imported, and for child processes too: where a GPU is, nothing is to be seen of it.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        import torch

        if not torch.cuda.is_available():
            pytest.exit(f"No test was run: PyTorch {torch.__version__} sees no CUDA GPU here.", returncode=5)
        return
    if os.environ.get("PYTEST_XDIST_WORKER") or not getattr(config.option, "numprocesses", None):
        _stay_on_one_core()


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of GPUs unless they are asked for; the longest come first.

    What is begun last decides how long xdist's workers wait for each other.
    """
    if _wants_gpu(config):
        return
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    chosen = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = chosen


_MANY_MODULES = 50  # as many as a library brings
_modules_known = 0


def _spare_imports() -> None:
    """Let the garbage collector pass over what imports made: a million objects that stay, at every turn."""
    global _modules_known
    if len(sys.modules) >= _modules_known + _MANY_MODULES:
        _modules_known = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_finish():
    """What the tests' files import, and the tests themselves, stay."""
    _spare_imports()


@pytest.fixture
def bfloat16_cpu(monkeypatch) -> Callable[[bool], None]:
    """A CPU that works in bfloat16, whatever the machine has; called with False, one without such instructions."""
    import torch

    def choose(capable: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": capable})

    choose(True)
    return choose


@pytest.fixture(scope="session")
def on_gpu(pytestconfig) -> bool:
    """Whether the tests of GPUs run on one; if not, they are only tried out on the CPU."""
    return not pytestconfig.option.gpu_tests_on_cpu


@pytest.fixture(autouse=True)
def _clean_process():
    """Undo what a run leaves behind: accelerate's shared state, torch's number of threads, handlers of log records.

    Neither library is imported for its sake, so tests of plain Python stay fast.
    """
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    logger = logging.getLogger("library")
    for handler in logger.handlers[:]:  # pytest closes the stream that they write to
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
    if threads is not None:
        sys.modules["torch"].set_num_threads(threads)
    _spare_imports()


def _folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import save_folder

    return save_folder(family, tmp_path_factory.mktemp(f"tiny_{family}"), layers=1)


def _file(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import save_single_file

    return save_single_file(family, tmp_path_factory.mktemp("files") / f"tiny_{family}.safetensors")


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory) -> Path:
    """A diffusers folder of a tiny SD 1 model (width 32). Do not write into it."""
    return _folder("sd1", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory) -> Path:
    """A diffusers folder of a tiny SD 2 model (width 64, v-prediction). Do not write into it."""
    return _folder("sd2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A diffusers folder of a tiny SDXL model (widths 32 and 64). Do not write into it."""
    return _folder("sdxl", tmp_path_factory)


@pytest.fixture(scope="session")
def folder_of_file(tmp_path_factory) -> Callable[[str], Path]:
    """A diffusers folder with the very model of a family's ``tiny_…_file``. Do not write into it."""

    @cache
    def saved(family: str) -> Path:
        from tiny_models import save_folder

        return save_folder(family, tmp_path_factory.mktemp(f"whole_{family}"))

    return saved


@pytest.fixture(scope="session")
def tiny_sd1_file(tmp_path_factory) -> Path:
    """A tiny SD 1 model, of two layers a level where ``tiny_sd1`` has one, as one file in the LDM layout."""
    return _file("sd1", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd2_file(tmp_path_factory) -> Path:
    """A tiny SD 2 model, of two layers a level, as one file in the LDM layout with an OpenCLIP encoder."""
    return _file("sd2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sdxl_file(tmp_path_factory) -> Path:
    """A tiny SDXL model, of two layers a level, as one file in the SGM layout."""
    return _file("sdxl", tmp_path_factory)
