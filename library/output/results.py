"""What a run leaves behind: embedding files with their metadata, and the closing words to the user."""

import glob
import itertools
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from library.data.batched_data import BatchedData
from library.embedding.files import SAVE_DTYPES, run_of, write_embedding
from library.embedding.initialization import NewWord
from library.embedding.metadata import TrainedFor, TrainingRecord, check_length, modelspec_metadata
from library.model.architectures import SD2
from library.model.base_model import BaseModel
from library.model.family import ModelFamily
from library.model.runtime import decided_by_main
from library.options.console import say
from library.options.declaration import required
from library.options.option_types import written
from library.options.options import Options, told_options
from library.output.report import movement_table, movement_warning, movements, usage_card
from library.output.ss_metadata import ss_metadata
from library.support.atomic_files import move_away, sweep, write_atomically
from library.support.errors import UserError, survived
from library.support.lookout import Vectors
from library.training.optimizers import OptimizerChoice
from library.training.save_schedule import RunPlan, remove_checkpoint
from library.training.state import TrainingState, run_of_state

logger = logging.getLogger(__name__)

REPORT_ENDINGS = ("_report.json", "_report.png")  # of the files that --learning_report writes beside a result
USAGE_ENDING = "_usage.txt"


def make_room(result: Path, files: Iterable[Path]) -> None:
    """Give ``files`` of an earlier run, whose names begin with that of ``result``, the next number that is free.

    It is the number that the earlier result will get when this one is written.
    """
    there = [path for path in files if os.path.lexists(path)]
    endings = [result.suffix, *(path.name.removeprefix(result.stem) for path in there)]
    stems = (result.with_name(f"{result.stem}-{number}") for number in itertools.count(1))
    free = next(stem for stem in stems if not any(os.path.lexists(f"{stem}{ending}") for ending in endings))
    for path in there:
        kept = free.with_name(free.name + path.name.removeprefix(result.stem))
        move_away(path, kept)


@dataclass(frozen=True)
class Results:
    """Writes a run's files into ``--output_dir`` and reports on the last one.

    ``folder`` is where the files go; ``metadata`` holds the ModelSpec keys that all of them share. ``run`` and
    ``resumed`` go into their record (see ``TrainingRecord``).
    """

    folder: Path
    options: Options
    family: ModelFamily
    model: BaseModel
    word: NewWord
    seed: int
    metadata: dict[str, str]
    run: str
    resumed: str | None = None

    @classmethod
    def create(
        cls, options: Options, family: ModelFamily, model: BaseModel, word: NewWord, data: BatchedData
    ) -> "Results":
        """Collect what is known before a new run. Raises UserError for metadata that cannot be written."""
        # A folder says itself what it is, whether --v2 is given or not.
        base = replace(options.model, v2=model.architecture is SD2)
        trained_for = TrainedFor(
            architecture=family.modelspec_architecture(base),
            prediction_type="v_prediction" if options.model.v_parameterization else "epsilon",
            resolution=data.resolution,
            min_timestep=options.noise.min_timestep,
            max_timestep=options.noise.max_timestep,
            clip_skip=options.model.clip_skip,
        )
        metadata = modelspec_metadata(options.metadata, trained_for, options.save.output_name)
        metadata |= ss_metadata(options, family, model, data)
        if not options.metadata.no_metadata:
            metadata |= {f"ti.{name}": str(written(value)) for name, value in told_options(options).items()}
        if options.save.save_model_as == "safetensors":
            check_length(metadata)
        folder = Path(required(options.save.output_dir, "output_dir"))
        return cls(folder, options, family, model, word, data.seed, metadata, _new_run())

    def continuing(self, state: TrainingState, plan: RunPlan, data: str, processes: int) -> "Results":
        """The same for a run that goes on from a state; what makes it another run than it was is said.

        Such a run keeps the files that are there. ``data`` is the fingerprint of its images. Raises UserError where
        the run is over before the state, or has another base. The main process decides, for it alone knows the hash.
        """
        run, resumed = decided_by_main(lambda: self._compared(state, plan, data, processes))
        return replace(self, run=run, resumed=resumed)

    def as_another_run(self) -> "Results":
        """The same for a run that has left the course of the one that it goes on with: it keeps the files there."""
        return replace(self, run=_new_run())

    def _compared(self, state: TrainingState, plan: RunPlan, data: str, processes: int) -> tuple[str, str | None]:
        if state.step > plan.total_steps:
            raise UserError(
                f"--resume: the state was saved at step {state.step}, and the run has {plan.total_steps} steps in all. "
                "Raise --max_train_steps or --max_train_epochs, or use an earlier state."
            )
        base, length = self.model.hash(), plan.total_steps
        state.check_base(base)
        changes = state.changes(self.options, length, data, processes, base)
        if changes:
            logger.warning("The resumed run will not reproduce the original run exactly: %s.", "; ".join(changes))
        if length != state.total_steps:
            logger.info("The run has %d steps in all; it had %d when the state was saved.", length, state.total_steps)
        same = state.run and not changes and length == state.total_steps
        return state.run if same else self.run, state.resumed_with(self.options, length)

    def owns(self, path: Path) -> bool:
        """Whether an embedding file or a state folder was written by this run."""
        return (run_of_state(path) if path.is_dir() else run_of(path)) == self.run

    def sweep(self) -> None:
        """Remove what killed runs of the same name left unfinished."""
        name = self.options.save.output_name or ""
        for folder in (self.folder, self.folder / "sample"):
            sweep(folder, name)
        for state in self.folder.glob(f"{glob.escape(name)}*-state"):
            sweep(state, "state")

    def path(self, name: str) -> Path:
        """Where the file ``name`` is or will be."""
        return self.folder / name

    def write(self, name: str, vectors: Vectors, choice: OptimizerChoice, *, in_haste: bool = False) -> None:
        """Write an embedding file.

        ``choice`` is the optimizer that trained the vectors. ``in_haste`` does without the checkpoint's hash where it
        is not known yet. A file of another run that stands in the place is kept under the next free number, and so is
        its report.
        """
        record = TrainingRecord(
            token=self.word.placeholder.text,
            num_vectors=self.word.placeholder.count,
            steps=vectors.step,
            epoch=vectors.epoch,
            init_word=None if self.options.token.weights else self.options.token.init_word,
            base_model=self.model.name,
            base_model_hash=self.model.hash(wait=not in_haste),
            seed=self.seed,
            learning_rate=choice.rates_text,
            optimizer=choice.description,
            run=self.run,
            resumed=self.resumed,
            chosen=vectors.chosen,
        )
        if self.options.metadata.no_metadata:
            record = record.without_training()
        path = self.path(name)
        kept = write_embedding(
            path,
            dict(zip(self.family.embedding_keys, vectors.rows, strict=True)),
            record,
            dtype=SAVE_DTYPES.get(self.options.save.save_precision or ""),
            metadata=self.metadata,
            keep_old=not self.owns(path),
        )
        if kept:
            for ending in (*REPORT_ENDINGS, USAGE_ENDING):
                report, place = (file.with_name(file.stem + ending) for file in (path, kept))
                if report.exists() and not place.exists():
                    with suppress(OSError):
                        report.rename(place)

    def write_state(self, name: str, state: TrainingState) -> None:
        """Write a state folder; what stands in the place is kept unless it is a state of this run."""
        replace(state, run=self.run, base=self.model.hash(), resumed=self.resumed).write(self.path(name))

    def remove(self, name: str) -> None:
        """Remove an older embedding file or state folder of this run, if it is there."""
        path = self.path(name)
        if self.owns(path):
            remove_checkpoint(path)

    def report(
        self, path: Path, starts: Sequence[Tensor], rows: Sequence[Tensor], steps: int, learning_rate: float | None
    ) -> None:
        """Print where the file is, how far each vector moved from its start, and how to use the file.

        The latter goes into a text file beside it, where the run has a report.
        """
        say(f"\nThe embedding is in {path}\n")
        moved = []
        for key, start, now in zip(self.family.embedding_keys, starts, rows, strict=True):
            compared = movements(self.word.placeholder.names, start, now)
            if len(self.family.embedding_keys) > 1:
                say(f"{key}:")
            say(movement_table(compared) + "\n")
            moved += compared
        if warning := movement_warning(moved, learning_rate, steps):
            logger.warning(warning)
        keys, count = self.family.embedding_keys, self.word.placeholder.count
        base = f"{self.model.architecture.title}, trained on {self.model.name}"
        card = usage_card(path, self.word.placeholder.text, keys, count, base)
        if self.options.logging.no_report:
            say(card)
            return
        with survived("The text file on how to use the embedding could not be written."):
            write_atomically(path.with_name(path.stem + USAGE_ENDING), f"{card}\n".encode())


def _new_run() -> str:
    """A name for a run that no other has; the same in all its processes."""
    return decided_by_main(lambda: secrets.token_hex(8))
