"""What happens in a training besides its steps: one list, to which every feature of that kind adds an entry."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.training.progress import Progress
from library.training.save_schedule import Action
from library.training.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """An optimizer step: the mean ``loss`` of what taught (None: nothing did), and its learning rates by name.

    ``smoothed`` is the running mean of the losses up to this one; the step took so many ``seconds``, its data included.
    """

    loss: float | None
    rates: Mapping[str, float]
    smoothed: float | None = None
    seconds: float = 0.0


class Callback:
    """An entry of the list, which takes up what concerns it.

    All processes call the same methods in the same order, so that entries may wait for each other in them; files are
    the business of the main process.
    """

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Before the first step; ``state`` is what the run resumes from, if anything."""

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """After every optimizer step."""

    def after_epoch(self, progress: Progress) -> None:
        """At the end of every epoch."""

    def after_validation(self, progress: Progress, loss: float) -> None:
        """The loss on held-out images is known."""

    def after_fixed_loss(self, progress: Progress, loss: float) -> None:
        """The loss with fixed noise is known."""

    def after_samples(self, progress: Progress, images: Mapping[int, np.ndarray]) -> None:
        """All processes have drawn their sample images: uint8 [H, W, 3] by the number of their prompt."""

    def after_save(self, progress: Progress, action: Action) -> None:
        """An embedding file or a state is complete, the result of the run included."""

    def before_result(self, progress: Progress) -> None:
        """No more steps follow, and the result is about to be saved."""

    def after_result(self, path: Path) -> None:
        """The result is the embedding file ``path``, and what it was trained with can still be used."""

    def close(self) -> None:
        """The training is over, however it ended."""

    def after_training(self, path: Path) -> None:
        """The training went well, its result is the embedding file ``path``, and everything is closed."""


class Callbacks(Callback):
    """The list: what happens is told to each entry in order. An entry tells the others of what it did through it."""

    def __init__(self) -> None:
        self.entries: list[Callback] = []

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.on_start(progress, state)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_step(progress, result)

    def after_epoch(self, progress: Progress) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_epoch(progress)

    def after_validation(self, progress: Progress, loss: float) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_validation(progress, loss)

    def after_fixed_loss(self, progress: Progress, loss: float) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_fixed_loss(progress, loss)

    def after_samples(self, progress: Progress, images: Mapping[int, np.ndarray]) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_samples(progress, images)

    def after_save(self, progress: Progress, action: Action) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_save(progress, action)

    def before_result(self, progress: Progress) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.before_result(progress)

    def after_result(self, path: Path) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_result(path)

    def close(self) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.close()

    def after_training(self, path: Path) -> None:
        """Tell each entry."""
        for entry in self.entries:
            entry.after_training(path)
