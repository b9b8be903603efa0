"""Teaches the rows, one optimizer step at a time. All that a training changes is held here, and nowhere else."""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from library.data.batches import Batch
from library.embedding.tokenizer import TrainableRows
from library.options.console import silenced
from library.options.options import Options
from library.support.errors import UserError, first_line
from library.support.lookout import Vectors
from library.support.signals import in_one_piece
from library.training.denoising import DenoisingTask
from library.training.divergence_guard import DivergenceGuard
from library.training.lr_schedulers import LearningRateSchedule, build_lr_schedule
from library.training.optimizers import OptimizerChoice, averaged_values, build_optimizer
from library.training.progress import Progress
from library.training.state import packed

# What a schedule may set in an optimizer's parameter groups.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum")


@dataclass(frozen=True)
class StepRules:
    """What a step does besides following the mean gradient; by default nothing.

    ``max_grad_norm`` limits the joint norm of all rows' gradient (0: no limit). ``normalizes_samples``: the gradient of
    each sample has a norm of 1 before their mean is taken. With ``norms``, one per text encoder, every row is brought
    to that length after each step; with ``max_norms`` none is left longer.
    """

    max_grad_norm: float = 0.0
    normalizes_samples: bool = False
    norms: Sequence[float] | None = None
    max_norms: Sequence[float] | None = None


class Learner:
    """The rows with their optimizer, its schedule and the ``rules`` of a step.

    ``progress`` counts the steps; ``gradient_norm`` is that of the last one's gradient over all rows, before it was
    limited. ``best`` are the best vectors so far, where that is measured; ``result`` those to save and to use in the
    end, where they are not those of the last step.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        rows: TrainableRows,
        choice: OptimizerChoice,
        schedule: LearningRateSchedule,
        watch: DivergenceGuard,
        *,
        progress: Progress,
        rules: StepRules,
    ) -> None:
        """The rows and the optimizer become the accelerator's; ``prepared_rows`` is what the encoders must use."""
        self.accelerator, self.rows, self.choice, self.schedule, self.watch = accelerator, rows, choice, schedule, watch
        self.progress, self.rules = progress, rules
        self.gradient_norm = 0.0
        self.best: Vectors | None = None
        self.result: Vectors | None = None
        self.optimizer: AcceleratedOptimizer
        self.optimizer, self.prepared_rows = accelerator.prepare(choice.optimizer, rows)

    def step(self, batches: Iterable[Batch], task: DenoisingTask) -> float | None:
        """The next optimizer step, from the batches of one accumulation group; returns the mean loss of what taught.

        None where no sample holds the token: such a step counts, and a schedule goes on, but nothing is learned.
        Raises UserError where going on could only spoil the rows, or has never taught them anything.
        """
        batches, again, counted = itertools.tee(batches, 3)
        mean, norms = self._gradient(batches, task, check=False)
        if mean is not None and not math.isfinite(mean) and task.vae:
            self.optimizer.zero_grad()
            mean, norms = self._gradient(again, task, check=True)  # the VAE may have overflowed in half precision
        finite = mean is not None and self._judge(mean, norms)
        self.gradient_norm = self._unscaled(norms.norm().item())
        # What is interrupted here would be neither this step nor the next.
        with in_one_piece():
            if mean is not None:
                self._update_rows(finite)
            if finite or mean is None:  # torch's schedules pass over a step that overflowed in fp16
                self.schedule.step(mean)
            self.progress.step_done(sum(1 for _ in counted))
        self.optimizer.zero_grad()
        return mean

    def rates(self) -> dict[str, float]:
        """The learning rate of the next step, and its product with the estimate of an optimizer that makes one."""
        rates = {"lr": self.schedule.get_last_lr()[0]}
        group = self.choice.optimizer.param_groups[0]
        if "d" in group:
            rates["lr/d*lr"] = float(group["d"] * group["lr"])
        return rates

    def agreed(self, number: Tensor) -> float:
        """The mean over the processes of a number that each has."""
        return float(self._of_all(number))

    def _of_all(self, taught: Tensor) -> Tensor:
        return self.accelerator.reduce(taught, reduction="mean") if self.accelerator.num_processes > 1 else taught

    @contextmanager
    def averaged_rows(self) -> Iterator[list[Tensor]]:
        """The rows as they are to be used, within a ``with``: the average of an optimizer that keeps one.

        Once the ``result`` is chosen, it is that. The training values come back bit by bit, so that saving more often
        does not change a run.
        """
        with self.rows.kept(), averaged_values(self.choice.optimizer):
            if self.result is not None:
                self.rows.assign(self.result.rows)
            yield self.values()

    def values(self) -> list[Tensor]:
        """A copy of the rows as they are, on the CPU: [N, D] per text encoder."""
        return [rows.detach().cpu().clone() for rows in self.rows.rows]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on as if nothing had happened."""
        scaler = self.accelerator.scaler
        return {
            "rows": self.values(),
            "optimizer": self.choice.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "taught": self.watch.taught,
        }

    def load_state_dict(self, state: dict[str, Any], *, new_rates: bool = False) -> None:
        """Go on where ``state`` was taken, with an optimizer of the same kind. Raises UserError.

        With ``new_rates`` the learning rate and the schedule are those of today, at the place where the old one was.
        """
        try:
            self._load(state, new_rates)
        except Exception as error:  # whatever an optimizer or a schedule says of values that are not its own
            raise UserError(
                f"--resume: the state does not fit this optimizer, schedule or model ({first_line(error)}). Use "
                "another state, or start from an embedding file with --weights."
            ) from error

    def _load(self, state: dict[str, Any], new_rates: bool) -> None:
        self.rows.assign(state["rows"])
        groups = self.choice.optimizer.param_groups
        today = [{name: group[name] for name in _SCHEDULED if name in group} for group in groups]
        self.choice.optimizer.load_state_dict(state["optimizer"])
        if new_rates:
            for group, values in zip(self.choice.optimizer.param_groups, today, strict=True):
                group.update(values)
            self.schedule.go_to(state["schedule"].get("last_epoch", self.progress.step))
        else:
            self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.watch.taught = state["taught"]

    def _gradient(self, batches: Iterable[Batch], task: DenoisingTask, *, check: bool) -> tuple[float | None, Tensor]:
        """The batches' gradient into the rows; their mean loss, and the gradient's norms on the CPU, [encoders, N].

        The one place of a step that waits for the device: whatever is to be known is read at once, at the end.
        """
        # The sum of the losses of the samples that hold the token, and how many they are, both as shares of the step.
        taught = torch.zeros(2, device=self.accelerator.device)
        for batch in batches:
            # Processes add up their gradients after every batch: a few kilobytes, and --ddp_static_graph cannot wait.
            losses = self._losses(batch, task, check)
            self.accelerator.backward(losses.mean() * batch.weight)
            # By numbers, one by one: a mask on the device would have to be read to know how many it leaves.
            if held := [losses.detach()[i] for i, holds in enumerate(batch.has_token.tolist()) if holds]:
                total = torch.stack(held).sum()
                taught += torch.stack([total, torch.full_like(total, len(held))]) * (batch.weight / len(batch))
        norms = torch.stack([rows.grad.norm(dim=1) for rows in self.rows.rows])
        numbers = torch.cat([self._of_all(taught), norms.flatten()]).cpu()
        return _mean(numbers[:2]), numbers[2:].reshape(norms.shape)

    def _unscaled(self, norm: float) -> float:
        scaler = self.accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()

    def _judge(self, mean: float, norms: Tensor) -> bool:
        """Whether the gradient is finite, and so can be followed. Raises UserError where it is no use to go on."""
        step = self.progress.step + 1
        self.watch.check_loss(mean, step)
        return self.watch.check_gradient(norms, step)

    def _losses(self, batch: Batch, task: DenoisingTask, check: bool) -> Tensor:
        """The loss of each sample [B], or one zero that depends on the rows where nothing in it can teach them."""
        if not batch.has_token.any():
            # The networks are skipped, but the rows stay in the graph: other processes may wait for their gradient.
            total: Tensor = sum(rows.sum() for rows in task.prompt_encoder.rows(None))
            return total * torch.zeros(1, device=self.accelerator.device)
        batch = batch.to(self.accelerator.device)
        return task.losses(batch, check=check, shares=self._shares(batch) if self.rules.normalizes_samples else None)

    def _shares(self, batch: Batch) -> Tensor:
        """What the loss of each sample [B] counts in what a backward begins with, fp16's scale included."""
        shares = batch.loss_weights * (batch.weight / len(batch))
        scaler = self.accelerator.scaler
        return shares if scaler is None else scaler.scale(shares)

    def _update_rows(self, finite: bool) -> None:
        """Follow the gradient, clipped jointly for all encoders; fp16's scaler sees one that is not ``finite`` too."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.choice.optimizer)
        if self.rules.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.rows.parameters(), self.rules.max_grad_norm)
        # Not through the scaler, nor accelerate: they would read once more from the device what is known here.
        if finite:
            self.choice.optimizer.step()
        if scaler is not None:
            scaler.update()
        if self.rules.norms is not None:
            self.rows.rescale(self.rules.norms)
        if self.rules.max_norms is not None:
            self.rows.shorten(self.rules.max_norms)


def _mean(taught: Tensor) -> float | None:
    total, weight = taught.tolist()
    return total / weight if weight else None


def check_learning(options: Options, total_steps: int) -> None:
    """Find mistakes in the optimizer's and the schedule's options before anything is loaded. Raises UserError."""
    with silenced():  # what there is to say is said when the real ones are built
        choice = _stand_in(options)
        if choice.schedule_free and options.recipe.average_last:
            raise UserError(
                f"--average_last: {type(choice.optimizer).__name__} saves an average of its own already. Leave one of "
                "them out."
            )
        asked = {
            "--preserve_embedding_norm": options.token.preserve_embedding_norm,
            "--max_embedding_norm": options.recipe.max_embedding_norm,
        }
        if choice.schedule_free and (flag := next((name for name, given in asked.items() if given), None)):
            # It derives the average from the vectors and a second copy of its own: changing one alone spoils it.
            raise UserError(
                f"{flag}: {type(choice.optimizer).__name__} saves an average that a change of the vectors' lengths "
                "would spoil. Leave one of them out."
            )
        schedule = build_lr_schedule(options.schedule, choice, total_steps)
        if options.save.save_state or options.save.save_state_on_train_end:
            packed({"optimizer": choice.optimizer.state_dict(), "schedule": schedule.state_dict()})


def planned_rates(options: Options, total_steps: int) -> list[float]:
    """The learning rate of each of the run's steps; one that follows the loss stays as it begins."""
    with silenced(), warnings.catch_warnings(action="ignore"):  # torch: the optimizer makes no steps
        schedule = build_lr_schedule(options.schedule, _stand_in(options), total_steps)
        rates = []
        for _ in range(total_steps):
            rates += schedule.get_last_lr()[:1]
            schedule.go_to(1)
    return rates


def _stand_in(options: Options) -> OptimizerChoice:
    """The run's optimizer over a single number."""
    return build_optimizer(options.optimizer, [torch.nn.Parameter(torch.zeros(1, 1))])
