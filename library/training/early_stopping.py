"""``--early_stopping``: a run stops when its loss with fixed noise gets no lower; its best vectors are the result."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import pvariance
from typing import Any

from library.data.batched_data import BatchedData
from library.options.options import Options
from library.support.errors import UserError, counted
from library.support.lookout import Vectors
from library.training.callbacks import Callback, Callbacks, StepResult
from library.training.denoising import DenoisingTask
from library.training.fixed_loss import DRAWS, PASSES_OF_A_STEP, FixedLoss
from library.training.optimizer_step import Learner, planned_rates
from library.training.progress import Progress
from library.training.save_schedule import RunPlan
from library.training.state import TrainingState, random_states_kept

logger = logging.getLogger(__name__)

_SAMPLES = 16  # that are measured
_MEASUREMENTS = 40  # of a whole run, as long as they take no more than this share of its time
_SHARE = 0.1
# DVAR's rule ("Is This Loss Informative?", NeurIPS 2023): the loss has settled when its variance over the last
# measurements is a small part of that over all. A window of very few says nothing.
_SETTLED, _SMALLEST_WINDOW = 0.15, 8
# A learning rate has come down to another one if that is a smaller part of it.
_COME_DOWN = 0.9
# Of a loss that is measured again elsewhere: another device or precision makes less of a difference.
_SAME = 1e-3


@dataclass(frozen=True)
class StopRule:
    """When the loss is measured, and when a run of ``total_steps`` that has measured it stops."""

    every: int
    patience: int
    total_steps: int

    @classmethod
    def create(cls, options: Options, plan: RunPlan, samples: float) -> "StopRule":
        """The rule for a run with so many ``samples`` a step, of all processes."""
        recipe, total = options.recipe, plan.total_steps
        affordable = math.ceil(_SAMPLES / (_SHARE * PASSES_OF_A_STEP * samples))
        every = recipe.early_stopping_every or max(math.ceil(total / _MEASUREMENTS), affordable)
        return cls(every, recipe.early_stopping_patience, total)

    @property
    def window(self) -> int:
        """Over how many measurements the variance is taken."""
        return max(self.patience, _SMALLEST_WINDOW)

    def is_due(self, step: int) -> bool:
        """Whether the loss is to be measured after ``step`` steps; after the last one it always is."""
        return step % self.every == 0 or step == self.total_steps

    def reason(self, losses: Sequence[float]) -> str | None:
        """Why to stop after these measurements, or None: the rest of a sentence that begins with the loss."""
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        since = len(finite) - 1 - finite.index(min(finite)) if finite else 0
        if since >= self.patience:
            return f"has not got lower in the last {counted(since, 'measurement')}"
        if len(finite) < 2 * self.window or math.inf in finite:
            return None
        ratio = pvariance(finite[-self.window :]) / (pvariance(finite) or math.inf)
        if ratio < _SETTLED:
            return f"has settled: its variance in the last {self.window} measurements is {ratio:.2g} of that in all"
        return None


def check_stopping(options: Options, rule: StopRule) -> None:
    """Say what keeps a run from stopping as it should. Raises UserError where there is nothing to choose from."""
    if not options.recipe.early_stopping:
        return
    total, every = rule.total_steps, rule.every
    if total < 2 * every:
        raise UserError(
            f"--early_stopping would measure the loss every {counted(every, 'step')}, and the run has {total} in all: "
            "there would be nothing to compare. Set --early_stopping_every lower, or train longer."
        )
    if (last := every * (1 + rule.patience)) >= total:
        logger.warning(
            "--early_stopping cannot shorten this run, and only chooses the best vectors of it: with a measurement "
            "every %s and a patience of %d it stops after step %d at the earliest, and the run has %d.",
            *(_steps(every), rule.patience, last, total),
        )
    rates = planned_rates(options, total)
    if rates[-1] < _COME_DOWN * max(rates):
        logger.warning(
            "--early_stopping: the learning rate is to come down to %.3g by step %d, and a run that stops before has "
            "the less settled vectors of a higher rate. A constant learning rate suits it better.",
            *(rates[-1], total),
        )


class EarlyStopping(Callback):
    """Measures the loss every so many steps, keeps the best vectors, and stops the run by its rule."""

    def __init__(
        self, loss: FixedLoss, rule: StopRule, learner: Learner, callbacks: Callbacks, *, images: str, options: Options
    ) -> None:
        """``images`` names those that are measured; each measurement is told to the ``callbacks``."""
        self.loss, self.rule, self.learner, self.callbacks = loss, rule, learner, callbacks
        self.images, self.options = images, options
        self.losses: list[float] = []

    @classmethod
    def create(
        cls,
        options: Options,
        rule: StopRule,
        data: BatchedData,
        task: DenoisingTask,
        learner: Learner,
        callbacks: Callbacks,
    ) -> "EarlyStopping":
        """Take the samples from ``data``. Raises UserError where none holds the token."""
        device = learner.accelerator.device
        kinds = {"held-out": True, "training": False}
        losses = (
            (FixedLoss.of(task, partial(data.fixed_batches, held_out=held_out), _SAMPLES, device), kind)
            for kind, held_out in kinds.items()
        )
        with random_states_kept():  # a dataset of the user's own may draw from them
            loss, kind = next(((loss, kind) for loss, kind in losses if len(loss)), (None, ""))
        if loss is None:
            raise UserError(
                "--early_stopping measures the loss of samples that hold the token, and none of the first "
                f"{DRAWS * _SAMPLES} does. Put the token into more of the captions, or leave --early_stopping out."
            )
        return cls(loss, rule, learner, callbacks, images=f"{kind} images", options=options)

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Say what is measured; a resumed run goes on with what was measured before."""
        logger.info(
            "--early_stopping: the loss is measured every %s on %s, with fixed noise.",
            *(_steps(self.rule.every), f"{counted(len(self.loss), 'sample')} of the {self.images}"),
        )
        if state and state.stopping:
            self._go_on(state.stopping)
            self._stop_where_due(progress)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Measure where it is due, and stop where the rule says so."""
        if not self.rule.is_due(progress.step):
            return
        with self.learner.averaged_rows() as rows:
            loss = self.loss.mean_of_all()
        lowest = loss < self._lowest
        self.losses.append(loss)
        if lowest:
            self._take_as_best(Vectors(rows, progress.step, progress.epoch))
        logger.info("Step %d: loss/fixed %.5f%s", progress.step, loss, ", the lowest so far" if lowest else "")
        self.callbacks.after_fixed_loss(progress, loss)
        self._stop_where_due(progress)

    def before_result(self, progress: Progress) -> None:
        """Make the best vectors the result, and say so."""
        if progress.stopped:
            total, reason = self.rule.total_steps, self.rule.reason(self.losses)
            logger.info("Stopped after step %d of %d: loss/fixed %s.", progress.step, total, reason)
        best = self.learner.best
        if best is None:
            logger.warning("--early_stopping: loss/fixed was never a finite number; the last vectors are the result.")
            return
        logger.info("The vectors of the result are %s.", best.chosen)
        self.learner.result = best
        self._tell_of_rates(best.step)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on; see ``TrainingState.stopping``."""
        best = self.learner.best
        kept = best and {"rows": list(best.rows), "step": best.step, "epoch": best.epoch}
        return {"losses": list(self.losses), "best": kept}

    @property
    def _lowest(self) -> float:
        return min(filter(math.isfinite, self.losses), default=math.inf)

    def _stop_where_due(self, progress: Progress) -> None:
        progress.stopped = progress.step < self.rule.total_steps and self.rule.reason(self.losses) is not None

    def _go_on(self, memory: dict[str, Any]) -> None:
        """Take over what was measured, or the best vectors alone where the measure is another one than it was."""
        self.losses, best = list(memory["losses"]), memory["best"]
        if best is None:
            return
        if [rows.shape for rows in best["rows"]] != [rows.shape for rows in self.learner.rows.rows]:
            raise UserError("--resume: the best vectors in the state are not of this model. Use another state.")
        with self.learner.rows.holding(best["rows"]):
            now = self.loss.mean_of_all()
        if not math.isclose(now, self._lowest, rel_tol=_SAME):
            logger.warning(
                "--early_stopping begins anew: the loss of the best vectors so far is %.5f now and was %.5f, so the "
                "images, the noise or the model are not what they were.",
                *(now, self._lowest),
            )
            self.losses = [now]
        self._take_as_best(Vectors(**best))

    def _take_as_best(self, vectors: Vectors) -> None:
        chosen = f"those of step {vectors.step}, with the lowest loss/fixed on {self.images}: {self._lowest:.5f}"
        self.learner.best = replace(vectors, chosen=chosen)

    def _tell_of_rates(self, step: int) -> None:
        """Say where the best vectors are of a learning rate that was still to come down."""
        rates = planned_rates(self.options, self.rule.total_steps)
        if rates[-1] < _COME_DOWN * rates[step - 1]:
            logger.warning(
                "The learning rate of step %d was %.3g, and was to come down to %.3g by step %d: the result is of a "
                "rate that had not come down. --max_train_steps=%d without --early_stopping trains one that has.",
                *(step, rates[step - 1], rates[-1], self.rule.total_steps, step),
            )


def _steps(every: int) -> str:
    """What stands after "every"."""
    return "step" if every == 1 else f"{every:,} steps"
