"""What the tests of whole trainings share, unless a module has its own: a shuffled dataset, and runs on it."""

from pathlib import Path

import pytest
from inputs import write_shuffled_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The file of a dataset of five images. Do not write into its folder."""
    return write_shuffled_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bench(dataset, tiny_sd1, tiny_sdxl):
    """Watched runs of both scripts on the dataset."""
    from option_effects import Bench  # imports all of the library, which most tests of this folder do without

    return Bench({"sd1": tiny_sd1, "sdxl": tiny_sdxl}, dataset)
