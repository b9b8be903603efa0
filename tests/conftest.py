"""Fixtures for every test: tiny models of each family, and a clean process between tests."""

import os
import sys
from pathlib import Path

import pytest

# Read by huggingface_hub and by torch when they are imported, hence before any of them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def _clean_process():
    """Undo what a training run leaves behind: accelerate's shared state and torch's number of threads.

    Neither library is imported for its sake, so tests of plain Python stay fast.
    """
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
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
