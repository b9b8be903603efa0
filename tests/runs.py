"""Runs the real scripts in this process on tiny models, and keeps hold of what they built."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from inputs import TOKEN, arguments, write_dataset

import sdxl_train_textual_inversion
import train_textual_inversion
from library import trainer
from library.model import base_model
from library.setup import Job, Setup

SCRIPTS = {"sd1": train_textual_inversion, "sd2": train_textual_inversion, "sdxl": sdxl_train_textual_inversion}
# What the scripts are given is in ``inputs``; most tests take it from here.
__all__ = ["SCRIPTS", "TOKEN", "Training", "arguments", "recorded_trainings", "run", "trainers", "write_dataset"]


_read_tokenizer = base_model._read_tokenizer
_tokenizers = {}


def _tokenizer_read_once(folder: Path):
    """The tokenizer of a folder, which no run changes: reading it takes as long as a step of a tiny model."""
    files = ((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    key = (folder, *sorted(files))
    if key not in _tokenizers:
        _tokenizers[key] = _read_tokenizer(folder)
    return _tokenizers[key]


def run(family: str, argv: list[str]) -> int:
    """The exit code of the family's script."""
    with patch.object(base_model, "_read_tokenizer", _tokenizer_read_once):
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
