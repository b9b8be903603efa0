"""Runs of the real scripts on tiny models that are watched from inside, for tests of what each option does.

A test says with :func:`shows` which options' effects it asserts; ``test_option_effects.py`` holds the list against the
declared options.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from runs import TOKEN, arguments, run
from safetensors import safe_open
from safetensors.torch import load_file

from library import trainer
from library.model import runtime
from library.setup import Job, Setup
from library.training import denoising
from library.training.diffusion import NoiseDraw
from library.training.optimizer_step import Learner


def shows(*options: str) -> Callable:
    """Mark a test as the one that shows what these options do."""

    def mark(test: Callable) -> Callable:
        test.shows = options
        return test

    return mark


@dataclass(frozen=True)
class Judged:
    """One call of the loss: what the U-Net answered, what it should have, and the loss of each sample."""

    prediction: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    mask: torch.Tensor | None
    losses: torch.Tensor


@dataclass
class Outcome:
    """What a run of a script did. ``rates``, ``losses`` and ``rows`` have one entry per optimizer step."""

    folder: Path
    code: int = -1
    out: str = ""
    err: str = ""
    job: Job | None = None
    setup: Setup | None = None
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: list[list[torch.Tensor]] = field(default_factory=list)
    batches: list[list[Any]] = field(default_factory=list)
    draws: list[NoiseDraw] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)

    @property
    def said(self) -> str:
        """All that was printed or logged."""
        return self.out + self.err

    @property
    def files(self) -> list[str]:
        """Names in the output folder."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def tensors(self, name: str = f"{TOKEN}.safetensors") -> dict[str, torch.Tensor]:
        """The tensors of an output file."""
        return load_file(self.folder / name)

    def metadata(self, name: str = f"{TOKEN}.safetensors") -> dict[str, str]:
        """The metadata of an output file."""
        with safe_open(self.folder / name, "pt") as file:
            return file.metadata()


def train(family: str, argv: list[str], folder: Path, *patches: Any, code: int | None = 0) -> Outcome:
    """Run a family's script and watch it. ``patches`` are entered around it; ``code`` is the expected exit code."""
    outcome = Outcome(folder)
    with _process(outcome), _watching(outcome), ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        outcome.code = run(family, argv)
    assert code is None or outcome.code == code, outcome.said
    return outcome


@contextmanager
def _process(outcome: Outcome) -> Iterator[None]:
    """Catch the output, and leave no state of accelerate behind; one thread, since the models are tiny."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), patch.object(runtime, "_use_all_cores"):
            yield
    finally:
        outcome.out, outcome.err = out.getvalue(), err.getvalue()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@contextmanager
def _watching(outcome: Outcome) -> Iterator[None]:
    train_and_save, set_up, optimizer_step = trainer.train_and_save, trainer.set_up, Learner.step
    draw_noise, per_sample_loss = denoising.draw_noise, denoising.per_sample_loss

    def running(job: Job) -> Path:
        outcome.job = job
        return train_and_save(job)

    def making(job: Job) -> Setup:
        outcome.setup = set_up(job)
        return outcome.setup

    def stepping(learner: Learner, batches: list, *more: Any) -> float:
        batches = list(batches)
        outcome.rates.append(learner.schedule.get_last_lr()[0])
        loss = optimizer_step(learner, batches, *more)
        outcome.losses.append(loss)
        outcome.rows.append([rows.detach().clone() for rows in learner.rows.rows])
        outcome.batches.append(batches)
        return loss

    def drawing(*args: Any) -> NoiseDraw:
        outcome.draws.append(draw_noise(*args))
        return outcome.draws[-1]

    def judging(prediction, target, timesteps, *args: Any, **details: Any) -> torch.Tensor:
        losses = per_sample_loss(prediction, target, timesteps, *args, **details)
        seen = (prediction.detach().clone(), target.clone(), timesteps, details["mask"], losses.detach().clone())
        outcome.judged.append(Judged(*seen))
        return losses

    with (
        patch("library.run.train_and_save", running),
        patch.object(trainer, "set_up", making),
        patch.object(Learner, "step", stepping),
        patch.object(denoising, "draw_noise", drawing),
        patch.object(denoising, "per_sample_loss", judging),
    ):
        yield


def plan(family: str, argv: list[str], *, code: int = 0) -> Outcome:
    """Run a script up to the training, which is made with all its data and then not begun: no model is loaded."""
    outcome = Outcome(Path())

    def keep(job: Job) -> None:
        outcome.job = job

    with _process(outcome), patch("library.run.train_and_save", keep):
        outcome.code = run(family, argv)
    assert outcome.code == code, outcome.said
    return outcome


def epoch_of(outcome: Outcome, epoch: int = 1, steps_done: int = 0, workers: int = 0) -> list:
    """The batches of one epoch as the trainer of a plan would see them; without a cache they bring pixels."""
    job = outcome.job
    loader = job.data.loader(accumulation=job.plan.accumulation, max_steps=job.plan.total_steps, workers=workers)
    loader.set_epoch(epoch, steps_done)
    return list(loader)


def captions_of(outcome: Outcome, epoch: int = 1, steps_done: int = 0) -> list[str]:
    """All captions of one epoch, sorted."""
    return sorted(caption for batch in epoch_of(outcome, epoch, steps_done) for caption in batch.captions)


class Bench:
    """Short runs on one dataset: ``bench(flag, …)`` is one step of SD 1 (``family`` and ``steps`` say otherwise)."""

    def __init__(self, models: dict[str, Path], dataset: Path):
        self.models, self.dataset = models, dataset
        self._plain: dict[tuple[str, int], Outcome] = {}

    def __call__(self, *more: str, family: str = "sd1", steps: int = 1, patches=(), **details: Any) -> Outcome:
        """Run with more flags and return what happened."""
        folder = Path(tempfile.mkdtemp(dir=self.dataset.parent))
        argv = arguments(
            family, self.models[family], details.pop("dataset", self.dataset), folder, f"--max_train_steps={steps}"
        )
        return train(family, [*argv, *more], folder, *patches, **details)

    def plain(self, family: str = "sd1", steps: int = 1) -> Outcome:
        """The same run without more flags; made once."""
        if (family, steps) not in self._plain:
            self._plain[family, steps] = self(family=family, steps=steps)
        return self._plain[family, steps]
