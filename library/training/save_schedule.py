"""When a run saves what under which name, what it removes again, when it draws, and the arithmetic of steps and epochs.

Pure functions and frozen objects: the trainer carries out the actions that a :class:`SaveSchedule` lists.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.output import SampleOptions, SaveOptions
from library.options.training import TrainingOptions
from library.support.atomic_files import remove_folder
from library.support.errors import counted


@dataclass(frozen=True)
class RunPlan:
    """How long a run is: ``total_steps`` optimizer steps in ``epochs`` passes over the data, the last maybe cut."""

    batches_per_process: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int
    epochs: int

    @classmethod
    def create(cls, options: TrainingOptions, batches: int, num_processes: int = 1) -> "RunPlan":
        """Plan a run over ``batches`` bucket batches an epoch, shared evenly by ``num_processes``.

        ``--max_train_epochs`` overrides ``--max_train_steps``. The batches left over at the end of an epoch make a
        smaller last step.
        """
        batches_per_process = math.ceil(batches / num_processes)
        steps_per_epoch = math.ceil(batches_per_process / options.gradient_accumulation_steps)
        total_steps = options.max_train_steps
        if options.max_train_epochs is not None:
            total_steps = options.max_train_epochs * steps_per_epoch
        return cls(
            batches_per_process=batches_per_process,
            accumulation=options.gradient_accumulation_steps,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            epochs=math.ceil(total_steps / steps_per_epoch),
        )

    def described(self, processes: int) -> str:
        """The plan in words, for so many processes."""
        several = f" in each of {processes} processes" if processes > 1 else ""
        batches = f"{self.batches_per_process:,} batch{'es' * (self.batches_per_process != 1)}"
        together = f", {self.accumulation} of them a step" if self.accumulation > 1 else ""
        steps, epochs = counted(self.total_steps, "step"), counted(self.epochs, "epoch")
        return f"{steps} in {epochs} of {batches}{several}{together}"

    def position(self, step: int, *, closed: bool = True) -> tuple[int, int]:
        """Where a run stands after ``step`` steps: (whole epochs done, batches each process has done in the next).

        After the last step of an epoch that is not ``closed``, what is due at its end is still to be done; the last
        step of all ends its epoch wherever it is.
        """
        if closed and step == self.total_steps:
            return self.epochs, 0
        epoch, steps_in_epoch = divmod(step, self.steps_per_epoch)
        if not closed and step and not steps_in_epoch:
            return epoch - 1, self.batches_per_process
        return epoch, steps_in_epoch * self.accumulation


@dataclass(frozen=True)
class CheckpointNames:
    """Names of embedding files and state folders; ``extension`` has no dot. Without an output name they are generic."""

    output_name: str | None
    extension: str

    def epoch(self, epoch: int) -> str:
        """The stem of what is saved at the end of ``epoch`` (from 1)."""
        return f"{self.output_name or 'epoch'}-{epoch:06d}"

    def step(self, step: int) -> str:
        """The stem of what is saved after optimizer step ``step`` (from 1)."""
        return f"{self.output_name or 'at'}-step{step:08d}"

    def last(self) -> str:
        """The stem of the run's result."""
        return self.output_name or "last"

    def file(self, stem: str) -> str:
        """The embedding file of a stem."""
        return f"{stem}.{self.extension}"

    @staticmethod
    def state(stem: str) -> str:
        """The state folder of a stem."""
        return f"{stem}-state"

    def is_state(self, name: str) -> bool:
        """Whether a folder of this name is a state of such a run."""
        stems = (
            re.escape(self.last()),
            re.escape(self.output_name or "epoch") + r"-\d{6,}",
            re.escape(self.output_name or "at") + r"-step\d{8,}",
        )
        return any(re.fullmatch(self.state(stem), name) for stem in stems)


@dataclass(frozen=True)
class Action:
    """One thing to do in the output folder: write an embedding or a state, or remove an older one if it is there."""

    kind: Literal["save", "state", "remove"]
    name: str


def epoch_to_remove(epoch: int, every: int, keep: int | None) -> int | None:
    """The epoch whose checkpoint goes when that of ``epoch`` is saved and the last ``keep`` are kept (None: all)."""
    if keep is None:
        return None
    old = epoch - every * keep
    return old if old >= 0 else None


def step_to_remove(step: int, every: int, keep: int | None) -> int | None:
    """The step whose checkpoint goes when that of ``step`` is saved, if those of the last ``keep`` steps are kept.

    None for no checkpoint; ``keep`` None keeps all.
    """
    if keep is None:
        return None
    old = step - keep - 1
    old -= old % every
    return old if old >= 0 else None


@dataclass(frozen=True)
class SaveSchedule:
    """What is due after a step, at the end of an epoch and at the end of the run, in the order in which to do it."""

    options: SaveOptions
    epochs: int
    names: CheckpointNames

    @classmethod
    def create(cls, options: SaveOptions, epochs: int) -> "SaveSchedule":
        """The schedule of a run of ``epochs`` epochs."""
        return cls(options, epochs, CheckpointNames(options.output_name, options.save_model_as))

    @property
    def every_n_epochs(self) -> int | None:
        """The distance of epoch saves; ``--save_n_epoch_ratio`` (so many files in a run) wins over the plain option."""
        ratio = self.options.save_n_epoch_ratio
        if ratio is not None and ratio > 0:
            return max(1, self.epochs // ratio)
        return self.options.save_every_n_epochs

    def after_step(self, step: int) -> list[Action]:
        """Actions after optimizer step ``step`` (from 1); the last step is no exception."""
        every, options = self.options.save_every_n_steps, self.options
        if not every or step % every:
            return []
        name = self.names.step
        old_file = _old_stem(name, step_to_remove, step, every, options.save_last_n_steps)
        old_state = _old_stem(
            name, step_to_remove, step, every, options.save_last_n_steps_state or options.save_last_n_steps
        )
        return [self._save(name(step)), *self._state(name(step), old_state), *self._remove(old_file)]

    def after_epoch(self, epoch: int) -> list[Action]:
        """Actions at the end of ``epoch`` (from 1); the last epoch has none, since the result itself follows."""
        every, options = self.every_n_epochs, self.options
        if not every or epoch % every or epoch >= self.epochs:
            return []
        name = self.names.epoch
        old_file = _old_stem(name, epoch_to_remove, epoch, every, options.save_last_n_epochs)
        old_state = _old_stem(
            name, epoch_to_remove, epoch, every, options.save_last_n_epochs_state or options.save_last_n_epochs
        )
        return [self._save(name(epoch)), *self._remove(old_file), *self._state(name(epoch), old_state)]

    def at_end(self) -> list[Action]:
        """Actions at the end of the run: its state, if wanted, and its result."""
        wanted = self.options.save_state or self.options.save_state_on_train_end
        state = [Action("state", self.names.state(self.names.last()))] if wanted else []
        return [*state, self._save(self.names.last())]

    def _save(self, stem: str) -> Action:
        return Action("save", self.names.file(stem))

    def _remove(self, old_stem: str | None) -> list[Action]:
        return [Action("remove", self.names.file(old_stem))] if old_stem else []

    def _state(self, stem: str, old_stem: str | None) -> list[Action]:
        if not self.options.save_state:
            return []
        removal = [Action("remove", self.names.state(old_stem))] if old_stem else []
        return [Action("state", self.names.state(stem)), *removal]


def _old_stem(
    name: Callable[[int], str],
    rule: Callable[[int, int, int | None], int | None],
    now: int,
    every: int,
    keep: int | None,
) -> str | None:
    """The stem of the checkpoint that makes room for that of ``now`` when the last ``keep`` stay (None: all)."""
    number = rule(now, every, keep)
    return name(number) if number else None


@dataclass(frozen=True)
class SampleSchedule:
    """When the images of ``--sample_prompts`` are due: before training, after steps or at the ends of epochs."""

    before_training: bool
    every_n_steps: int | None
    every_n_epochs: int | None

    @classmethod
    def create(cls, options: SampleOptions) -> "SampleSchedule":
        """The schedule that the options ask for; ``--sample_every_n_epochs`` wins over the steps."""
        every_n_steps = None if options.sample_every_n_epochs else options.sample_every_n_steps
        return cls(options.sample_at_first, every_n_steps, options.sample_every_n_epochs)

    def at_first(self) -> bool:
        """Whether they are due before the first step."""
        return self.before_training

    def after_step(self, step: int) -> bool:
        """Whether they are due after optimizer step ``step`` (from 1)."""
        return _is_due(step, self.every_n_steps)

    def after_epoch(self, epoch: int) -> bool:
        """Whether they are due at the end of ``epoch`` (from 1)."""
        return _is_due(epoch, self.every_n_epochs)


def _is_due(number: int, every: int | None) -> bool:
    return bool(every and number % every == 0)


def remove_checkpoint(path: Path) -> bool:
    """Remove an embedding file or a state folder at once; returns whether there was one."""
    if path.is_dir():
        remove_folder(path)
        return True
    existed = path.is_file()
    path.unlink(missing_ok=True)
    return existed
