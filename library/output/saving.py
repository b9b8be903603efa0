"""Embedding files and states during a run and at its end, and their way to the Hugging Face hub."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from library.model.hub import HubUpload
from library.output.results import Results
from library.support.errors import UserError
from library.support.lookout import Vectors
from library.training.callbacks import Callback, Callbacks, StepResult
from library.training.optimizer_step import Learner
from library.training.optimizers import largest_rate
from library.training.progress import Progress
from library.training.save_schedule import Action, SaveSchedule
from library.training.state import TrainingState


class Saving(Callback):
    """Writes and removes what the schedule says; the others hear of every file."""

    def __init__(
        self,
        schedule: SaveSchedule,
        results: Results,
        learner: Learner,
        starts: Sequence[Tensor],
        current_state: Callable[[], TrainingState],
        callbacks: Callbacks,
    ) -> None:
        """``starts`` [N, D] per text encoder are the rows that the training began with.

        ``current_state`` is called in all processes.
        """
        self.schedule, self.results, self.learner, self.starts = schedule, results, learner, starts
        self.current_state, self.callbacks = current_state, callbacks
        self.writes = learner.accelerator.is_main_process

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Make up for what was due after the state was saved: old files go."""
        if state:
            closed, schedule = progress.epoch_closed, self.schedule
            actions = schedule.after_epoch(progress.epoch) if closed else schedule.after_step(progress.step)
            self.carry_out(progress, (action for action in actions if action.kind == "remove"))

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Do what is due."""
        self.carry_out(progress, self.schedule.after_step(progress.step))

    def after_epoch(self, progress: Progress) -> None:
        """Do what is due."""
        self.carry_out(progress, self.schedule.after_epoch(progress.epoch))

    def finish(self, progress: Progress) -> Path:
        """Save the result and say where it is, how far it moved and how to use it; returns the embedding file."""
        *before, result = self.schedule.at_end()
        try:
            self.carry_out(progress, before)
        except UserError:  # the result does not wait for a state that cannot be written
            self.save(progress, result.name)
            raise
        rows = self.save(progress, result.name)
        self.callbacks.after_save(progress, result)
        path = self.results.path(result.name)
        if self.writes:
            rate = largest_rate(self.learner.choice) or None
            moment = self.learner.result or progress
            self.results.report(path, self.starts, rows, moment.step, rate)
        return path

    def carry_out(self, progress: Progress, actions: Iterable[Action]) -> None:
        """Save and remove; all processes take part, one writes."""
        for action in actions:
            if action.kind == "remove":
                if self.writes:
                    self.results.remove(action.name)
                continue
            if action.kind == "save":
                self.save(progress, action.name)
            else:
                self.save_state(action.name)
            self.callbacks.after_save(progress, action)

    def save(self, progress: Progress, name: str) -> list[Tensor]:
        """Write the embedding file ``name`` and return the rows in it."""
        with self.learner.averaged_rows() as rows:
            vectors = self.learner.result or Vectors(rows, progress.step, progress.epoch)
            if self.writes:
                self.results.write(name, vectors, self.learner.choice)
        return rows

    def save_state(self, name: str) -> None:
        """Write the folder ``name`` for ``--resume``."""
        state = self.current_state()
        if self.writes:
            self.results.write_state(name, state)


class Uploads(Callback):
    """Brings what is saved to the hub; only the main process has it."""

    def __init__(self, hub: HubUpload, results: Results, *, states: bool) -> None:
        """``states``: with ``--save_state_to_huggingface``."""
        self.hub, self.results, self.states = hub, results, states

    def after_save(self, progress: Progress, action: Action) -> None:
        """Upload the file, or the folder of a state where that was asked for."""
        if action.kind == "save" or self.states:
            self.hub.upload(self.results.path(action.name))

    def close(self) -> None:
        """Wait for what is still on its way."""
        self.hub.finish()
