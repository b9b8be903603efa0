"""Teaches the rows, one optimizer step at a time. All that a training changes is held here, and nowhere else."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from library.batches import Batch
from library.denoising import DenoisingTask
from library.errors import UserError, first_line
from library.learning_watch import LearningWatch
from library.lr_schedulers import LearningRateSchedule, build_lr_schedule
from library.optimizers import OptimizerChoice, averaged_values, build_optimizer
from library.options import Options
from library.tokens import TrainableRows
from library.training_state import packed


class Learner:
    """The rows with their optimizer and its schedule.

    ``max_grad_norm`` limits the joint norm of all rows' gradient (0: no limit). With ``norms``, one per text encoder,
    every row is brought to that length after each step.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        rows: TrainableRows,
        choice: OptimizerChoice,
        schedule: LearningRateSchedule,
        watch: LearningWatch,
        *,
        max_grad_norm: float = 0.0,
        norms: Sequence[float] | None = None,
    ):
        """The rows and the optimizer become the accelerator's; ``prepared_rows`` is what the encoders must use."""
        self.accelerator, self.rows, self.choice, self.schedule, self.watch = accelerator, rows, choice, schedule, watch
        self.max_grad_norm, self.norms = max_grad_norm, norms
        self.optimizer: AcceleratedOptimizer
        self.optimizer, self.prepared_rows = accelerator.prepare(choice.optimizer, rows)

    def step(self, batches: Iterable[Batch], task: DenoisingTask, number: int) -> float:
        """Optimizer step ``number`` (from 1) from the batches of one accumulation group; returns their mean loss.

        Raises UserError where going on could only spoil the rows, or has never taught them anything.
        """
        loss = torch.zeros((), device=self.accelerator.device)
        taught = False
        for batch in batches:
            # Processes add up their gradients after every batch: a few kilobytes, and --ddp_static_graph cannot wait.
            part = self._batch_loss(batch, task) * batch.weight
            self.accelerator.backward(part)
            loss += part.detach()
            taught = taught or bool(batch.has_token.any())
        mean, taught = self.agree(loss, taught)
        self.watch.check_loss(mean, number)
        if taught:
            self._update_rows(number)
        self.schedule.step(mean)
        self.optimizer.zero_grad()
        return mean

    def rates(self) -> dict[str, float]:
        """The learning rate of the next step, and its product with the estimate of an optimizer that makes one."""
        rates = {"lr": self.schedule.get_last_lr()[0]}
        group = self.choice.optimizer.param_groups[0]
        if "d" in group:
            rates["lr/d*lr"] = float(group["d"] * group["lr"])
        return rates

    def agree(self, loss: Tensor, taught: bool) -> tuple[float, bool]:
        """The mean loss over the processes, and whether any of them saw the word."""
        if self.accelerator.num_processes == 1:
            return loss.item(), taught
        shared = torch.stack([loss, torch.tensor(float(taught), device=loss.device)])
        mean, share = self.accelerator.reduce(shared, reduction="mean").tolist()
        return mean, share > 0

    @contextmanager
    def averaged_rows(self) -> Iterator[list[Tensor]]:
        """The rows as they are to be used, within a ``with``: the average of an optimizer that keeps one.

        The training values come back bit by bit, so that saving more often does not change a run.
        """
        with self.rows.kept(), averaged_values(self.choice.optimizer):
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, with an optimizer and a schedule of the same kind. Raises UserError."""
        try:
            self.rows.assign(state["rows"])
            self.choice.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # whatever an optimizer or a schedule says of values that are not its own
            raise UserError(
                f"--resume: the state does not fit this optimizer, schedule or model ({first_line(error)}). Use "
                "another state, or start from an embedding file with --weights."
            ) from error
        self.watch.taught = state["taught"]

    def _batch_loss(self, batch: Batch, task: DenoisingTask) -> Tensor:
        """The mean loss of a batch, or a zero that depends on the rows where nothing in it can teach them."""
        if not batch.has_token.any():
            # The networks are skipped, but the rows stay in the graph: other processes may wait for their gradient.
            return sum(rows.sum() for rows in task.prompt_encoder.rows(None)) * 0.0
        return task.losses(batch.to(self.accelerator.device, non_blocking=True)).mean()

    def _update_rows(self, number: int) -> None:
        """Clip the joint gradient of all encoders' rows, look at it, and step the optimizer."""
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.rows.parameters(), self.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()
        gradients = torch.stack([rows.grad.norm(dim=1) for rows in self.rows.rows])
        self.watch.check_gradient(gradients, number)
        self.optimizer.step()
        if self.norms is not None:
            self.rows.rescale(self.norms)


def check_learning(options: Options, total_steps: int) -> None:
    """Find mistakes in the optimizer's and the schedule's options before anything is loaded. Raises UserError."""
    logging.disable(logging.WARNING)  # they are said when the real ones are built
    try:
        choice = build_optimizer(options.optimizer, [torch.nn.Parameter(torch.zeros(1, 1))])
        schedule = build_lr_schedule(options.schedule, choice, total_steps)
        if options.save.save_state or options.save.save_state_on_train_end:
            packed({"optimizer": choice.optimizer.state_dict(), "schedule": schedule.state_dict()})
    finally:
        logging.disable(logging.NOTSET)
