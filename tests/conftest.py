"""Fixtures for every test: tiny models of each family, and a clean process between tests."""

import logging
import os
import sys
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
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def pytest_configure(config):
    """Pin xdist's workers, or the one process where there are none; their controller goes on choosing by all cores."""
    if os.environ.get("PYTEST_XDIST_WORKER") or not getattr(config.option, "numprocesses", None):
        _stay_on_one_core()


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


def _folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import save_folder

    return save_folder(family, tmp_path_factory.mktemp(f"tiny_{family}"))


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
def tiny_sd1_file(tmp_path_factory) -> Path:
    """The model of ``tiny_sd1`` as one file in the LDM layout."""
    return _file("sd1", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd2_file(tmp_path_factory) -> Path:
    """The model of ``tiny_sd2`` as one file in the LDM layout with an OpenCLIP encoder."""
    return _file("sd2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sdxl_file(tmp_path_factory) -> Path:
    """The model of ``tiny_sdxl`` as one file in the SGM layout."""
    return _file("sdxl", tmp_path_factory)
