"""Keeps what an interrupted training has learned, in whichever process is left to do so."""

import logging
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

from library.output.results import Results
from library.support.errors import UserError
from library.support.lookout import Lookout, Vectors, appears
from library.training.optimizer_step import Learner
from library.training.save_schedule import CheckpointNames

logger = logging.getLogger(__name__)


class Rescue:
    """Writes the vectors under the name of their step when a run ends early; its ``lookout`` where nothing else can.

    Whoever ends a run may soon kill it, so it waits for nothing that is not needed.
    """

    def __init__(
        self,
        learner: Learner,
        results: Results,
        names: CheckpointNames,
        *,
        process: int,
        watch: bool,
        patience: float | None,
    ) -> None:
        """``process`` is the number of this one, from 0; for ``watch`` and ``patience`` see :class:`Lookout`."""
        self.learner, self.results, self.names, self.process = learner, results, names, process
        self.lookout = Lookout(self.keep, watch=watch, patience=patience)
        self.began = time.time()

    def vectors(self, step: int, epoch: int) -> Vectors | None:
        """A copy of the vectors as they would be saved now; None while they hold nothing worth keeping."""
        if step == 0 or not self.learner.watch.taught:
            return None
        with self.learner.averaged_rows() as rows:
            finite = all(torch.isfinite(each).all() for each in rows)
        return (self.learner.result or Vectors(rows, step, epoch)) if finite else None

    def save(self, step: int, epoch: int) -> None:
        """Keep the vectors, or those of shortly before where their device is lost; and the best so far, if others.

        A result that was chosen already is what is kept, but never in place of a checkpoint of its step.
        """
        chosen = self.learner.result
        if chosen and self._has_checkpoint(chosen):
            self.learner.result = None
        try:
            vectors = self.vectors(step, epoch)
        except RuntimeError:
            vectors = self.lookout.copy
        self.lookout.stop()
        self.keep(vectors)

    def keep(self, last: Vectors | None) -> None:
        """Write the last vectors and the best so far under the names of their steps; see :meth:`_unsaved_best`.

        Not where a process of a lower number does: it may be lost.
        """
        wanted = [(last, "")] if last else []
        if best := self._unsaved_best(last):
            wanted.append((best, ", the best so far,"))
        if not wanted or self._appears(wanted[0][0], seconds=min(3 * self.process, 12)):
            return
        with ExitStack() as all_of_them:  # each is tried, also where another one cannot be written
            for vectors, which in reversed(wanted):
                if not self._appears(vectors, seconds=0):
                    all_of_them.callback(self._write, vectors, which)

    def _unsaved_best(self, last: Vectors | None) -> Vectors | None:
        """The best vectors so far, where they are worth keeping, not the last ones, and in no checkpoint."""
        best = self.learner.best
        if best is None or not self.learner.watch.taught or self._has_checkpoint(best):
            return None
        return None if last and last.step == best.step else best

    def _appears(self, vectors: Vectors, seconds: float) -> bool:
        """Whether a process of a lower number writes the file within so many seconds."""
        return self.process > 0 and appears(self.results.path(self._name(vectors)), self.began, seconds)

    def _write(self, vectors: Vectors, which: str) -> None:
        """Where the output folder takes no more (a full disk), the few kilobytes go to the temporary folder."""
        name = self._name(vectors)
        try:
            path = self._written(self.results, name, vectors)
        except UserError:
            path = self._written(replace(self.results, folder=Path(tempfile.gettempdir())), name, vectors)
        # Other processes than the main one say errors only.
        level = logging.ERROR if self.process else logging.WARNING
        logger.log(level, "The vectors of step %d%s are kept in %s.", vectors.step, which, path)

    def _written(self, results: Results, name: str, vectors: Vectors) -> Path:
        results.write(name, vectors, self.learner.choice, in_haste=True)
        return results.path(name)

    def _has_checkpoint(self, vectors: Vectors) -> bool:
        with suppress(OSError):  # of a disk that fails
            return self.results.owns(self.results.path(self._name(vectors)))
        return False

    def _name(self, vectors: Vectors) -> str:
        return self.names.file(self.names.step(vectors.step))
