"""Runs the real scripts in this process on tiny models, and keeps hold of what they built."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from photos import make_photos

import sdxl_train_textual_inversion
import train_textual_inversion
from library import trainer
from library.setup import Job, Setup

SCRIPTS = {"sd1": train_textual_inversion, "sd2": train_textual_inversion, "sdxl": sdxl_train_textual_inversion}
FAMILY_FLAGS = {"sd1": [], "sd2": ["--v2", "--v_parameterization"], "sdxl": []}
TOKEN = "mychar"


def write_dataset(folder: Path, general: str = "", dataset: str = "", subset: str = "", **photos) -> Path:
    """Draw photographs (see ``make_photos``) and write a dataset file that names them; returns the file."""
    images = folder / "images"
    make_photos(images, **photos)
    file = folder / "dataset.toml"
    file.write_text(
        f"[general]\ncaption_extension = '.txt'\n{general}\n[[datasets]]\nresolution = 64\nbatch_size = 2\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n{subset}\n",
        encoding="utf-8",
    )
    return file


def arguments(family: str, model: Path, dataset: Path | None, output: Path, *more: str) -> list[str]:
    """The command line of a short run; ``more`` is appended and may override. ``--no_report=false`` adds the report."""
    given = [f"--pretrained_model_name_or_path={model}", f"--output_dir={output}", f"--token_string={TOKEN}"]
    given += ["--init_word=girl", "--max_train_steps=2", "--learning_rate=1e-2", "--seed=1", "--cache_latents"]
    given += ["--max_data_loader_n_workers=0", "--no_report", *FAMILY_FLAGS[family]]
    if dataset is not None:
        given.append(f"--dataset_config={dataset}")
    return [*given, *more]


def run(family: str, argv: list[str]) -> int:
    """The exit code of the family's script."""
    return SCRIPTS[family].main(argv)


@dataclass
class Training:
    """A training as it was begun, and what it worked with if it came so far."""

    job: Job
    setup: Setup | None = None


@contextmanager
def recorded_trainings() -> Iterator[list[Training]]:
    """Every training that begins meanwhile, in order, as it is at its end."""
    seen: list[Training] = []
    train_and_save, set_up = trainer.train_and_save, trainer.set_up

    def begun(job: Job) -> Path:
        seen.append(Training(job))
        return train_and_save(job)

    def made(job: Job) -> Setup:
        seen[-1].setup = set_up(job)
        return seen[-1].setup

    with patch("library.run.train_and_save", begun), patch.object(trainer, "set_up", made):
        yield seen


@pytest.fixture
def trainers() -> Iterator[list[Training]]:
    """Every training that begins during the test, in order, as it is at its end."""
    with recorded_trainings() as seen:
        yield seen
