"""``--average_last``: the result is the mean of the vectors over the last part of a run."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from library.support.errors import counted
from library.support.lookout import Vectors
from library.training.callbacks import Callback, StepResult
from library.training.optimizer_step import Learner
from library.training.progress import Progress
from library.training.state import TrainingState

logger = logging.getLogger(__name__)


class TailAverage(Callback):
    """Keeps a running mean of the vectors; the training, checkpoints and states stay as they are."""

    def __init__(self, share: float, total_steps: int, learner: Learner) -> None:
        """The mean is over a ``share`` of ``total_steps``, rounded up."""
        self.share, self.learner = share, learner
        steps = math.ceil(round(share * total_steps, 6))  # 0.07 × 100 is a little more than 7
        self.begin = total_steps - steps  # the last step that is left out
        self.mean: list[Tensor] | None = None
        self.count = 0
        self.dropped = False

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """A resumed run goes on with its mean; where that lacks steps, it is dropped."""
        if state is None or progress.step <= self.begin:
            return
        memory = state.averaging
        if memory is None or not self._fits(memory, progress.step):
            self.dropped = True
            logger.warning(
                "--average_last is dropped, and the result will be the last vectors: the mean is to begin after step "
                "%d, and the state of step %d has none from there. Resume from a state of step %d or before.",
                *(self.begin, progress.step, self.begin),
            )
            return
        self.count = memory["count"]
        self.mean = [mean.to(rows) for mean, rows in zip(memory["mean"], self.learner.rows.rows, strict=True)]

    @torch.no_grad()
    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Let the vectors count in the mean, on their device: nobody waits for it."""
        if self.dropped or progress.step <= self.begin:
            return
        self.count += 1
        rows = [rows.detach() for rows in self.learner.rows.rows]
        self.mean = self.mean or [torch.zeros_like(each) for each in rows]
        for mean, each in zip(self.mean, rows, strict=True):
            mean += (each - mean) / self.count

    def before_result(self, progress: Progress) -> None:
        """Make the mean the result, brought to the norms that the vectors have after each step, if any."""
        if self.mean is None:
            return
        chosen = f"the mean of those of the last {counted(self.count, 'step')} (--average_last={self.share:g})"
        logger.info("The vectors of the result are %s.", chosen)
        rows, norms = self.learner.rows, self.learner.rules.norms
        with rows.holding(self.mean):
            if norms is not None:
                rows.rescale(norms)
            self.learner.result = Vectors(self.learner.values(), progress.step, progress.epoch, chosen)

    def state_dict(self) -> dict[str, Any] | None:
        """What is needed to go on, None before the mean begins; see ``TrainingState.averaging``."""
        if self.mean is None:
            return None
        return {"mean": [mean.cpu().clone() for mean in self.mean], "count": self.count, "begin": self.begin}

    def _fits(self, memory: dict[str, Any], step: int) -> bool:
        """Whether it is the mean of all steps from the beginning to ``step``."""
        shapes = [each.shape for each in memory["mean"]] == [rows.shape for rows in self.learner.rows.rows]
        return shapes and (memory["begin"], memory["count"]) == (self.begin, step - self.begin)
