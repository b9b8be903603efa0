"""From ``--lr_scheduler`` and its companions to a schedule of the learning rate over the optimizer's steps.

One axis: a run of ``total_steps`` optimizer steps, whatever the number of processes. The formulas are those of
transformers, diffusers and torch.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

from diffusers.optimization import get_piecewise_constant_schedule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import optimization

from library.options.training import ScheduleOptions
from library.support.errors import UserError, did_you_mean
from library.support.user_classes import construct, literal_arguments, load_class
from library.training.optimizers import OptimizerChoice, Stages

logger = logging.getLogger(__name__)

ARGUMENTS_OPTION = "--lr_scheduler_args"


class UnchangedRate(LRScheduler):
    """Leaves the learning rate to the optimizer, for those that need no schedule."""

    def get_lr(self) -> list[float | Tensor]:
        """The rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]


class StagedRate(LRScheduler):
    """The rates of ``--learning_rate=5e-3:100,1e-3:1000,5e-4``, after a linear warm-up from 0.

    A rate holds for the steps before its number; the last one holds to the end of the run.
    """

    def __init__(self, optimizer: Optimizer, stages: Stages, warmup_steps: int = 0) -> None:
        self.stages = stages
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The current stage's rate, for every parameter group."""
        step = self.last_epoch
        rate = next((rate for rate, until in self.stages if until is None or step < until), self.stages[-1][0])
        if step < self.warmup_steps:
            rate *= step / self.warmup_steps
        return [rate] * len(self.optimizer.param_groups)


class LearningRateSchedule:
    """A torch scheduler that is stepped with the loss, whether it looks at it or not."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def step(self, loss: float | None) -> None:
        """Go on by one step. ``loss`` must be the same on all processes, or their rates part ways.

        It is None where nothing was taught and the optimizer did not move: what follows the loss, or Adafactor's own
        count of its steps, has none of that.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if loss is not None:
                self.scheduler.step(loss)
        elif loss is not None or not isinstance(self.scheduler, optimization.AdafactorSchedule):
            self.scheduler.step()

    def go_to(self, step: int) -> None:
        """Go on from the beginning to where ``step`` steps have been done; one that follows the loss begins there."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            return
        with warnings.catch_warnings(action="ignore"):  # torch: the optimizer has made no step
            for _ in range(step):
                self.scheduler.step()

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group for the next optimizer step."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.scheduler.load_state_dict(state)


def steps_of(value: int | float, total_steps: int, option: str) -> int:
    """A number of steps as it is (int), a share of ``total_steps`` (float) as a whole number of steps."""
    steps = int(value * total_steps) if isinstance(value, float) else value
    if steps < 0:
        raise UserError(f"{option}={value} is negative.")
    return steps


def build_lr_schedule(options: ScheduleOptions, choice: OptimizerChoice, total_steps: int) -> LearningRateSchedule:
    """Make the schedule for ``choice``'s optimizer over ``total_steps`` optimizer steps.

    In this order: Adafactor's own steps, several rates, schedule-free optimizers, ``lr_scheduler_type``,
    ``lr_scheduler``. Raises UserError for unknown names, missing or unknown arguments, and a warm-up where there is
    none.
    """
    warmup = steps_of(options.lr_warmup_steps, total_steps, "--lr_warmup_steps")
    if choice.relative_step:
        scheduler = _adafactor_schedule(options, choice, warmup)
    elif choice.stages:
        scheduler = _staged_rate(options, choice, warmup)
    elif choice.schedule_free:
        scheduler = _no_schedule(options, choice, warmup)
    elif options.lr_scheduler_type:
        scheduler = _class_by_name(options, choice.optimizer, warmup)
    else:
        scheduler = _schedule_by_name(options, choice.optimizer, warmup, total_steps)
    return LearningRateSchedule(scheduler)


def _refuse_warmup(warmup: int, what: str, remedy: str) -> None:
    if warmup:
        raise UserError(f"--lr_warmup_steps: {what} has no warm-up. {remedy}")


def _adafactor_schedule(options: ScheduleOptions, choice: OptimizerChoice, warmup: int) -> LRScheduler:
    _refuse_warmup(
        warmup, "Adafactor with relative_step", "Use --optimizer_args warmup_init=True, or relative_step=False."
    )
    if options.lr_scheduler_type or options.lr_scheduler not in ("constant", "adafactor"):
        name = "lr_scheduler_type" if options.lr_scheduler_type else "lr_scheduler"
        logger.warning(
            "Adafactor with relative_step makes its own learning rate; the scheduler named is not used: "
            "--%s=%s has no effect without --optimizer_args relative_step=False.",
            name,
            getattr(options, name),
        )
    schedule: LRScheduler = optimization.get_adafactor_schedule(choice.optimizer, choice.shown_rate)
    return schedule


def _staged_rate(options: ScheduleOptions, choice: OptimizerChoice, warmup: int) -> LRScheduler:
    if options.lr_scheduler_type or options.lr_scheduler not in ("constant", "constant_with_warmup"):
        name = options.lr_scheduler_type or options.lr_scheduler
        raise UserError(
            f'--learning_rate gives rates with steps, which is a schedule already, and "{name}" is another one. '
            "Give a single rate, or leave the scheduler out."
        )
    if options.lr_scheduler == "constant":
        _refuse_warmup(warmup, "the constant schedule", "Use --lr_scheduler=constant_with_warmup.")
    return StagedRate(choice.optimizer, choice.stages or (), warmup)


def _no_schedule(options: ScheduleOptions, choice: OptimizerChoice, warmup: int) -> LRScheduler:
    if options.lr_scheduler_type or options.lr_scheduler != "constant" or warmup:
        logger.warning(
            "%s needs no schedule: the scheduler and warm-up named are not used. For a warm-up give "
            "--optimizer_args warmup_steps=N, where the optimizer takes it.",
            type(choice.optimizer).__name__,
        )
    return UnchangedRate(choice.optimizer)


def _class_by_name(options: ScheduleOptions, optimizer: Optimizer, warmup: int) -> LRScheduler:
    name = options.lr_scheduler_type
    _refuse_warmup(warmup, f"--lr_scheduler_type={name}", "Set it to 0; such a class has arguments of its own.")
    module, _, class_name = name.rpartition(".")
    kind = load_class("--lr_scheduler_type", module or "torch.optim.lr_scheduler", class_name)
    if not issubclass(kind, LRScheduler):
        raise UserError(f"--lr_scheduler_type: {name} is not a scheduler of PyTorch's kind.")
    arguments = literal_arguments(ARGUMENTS_OPTION, options.lr_scheduler_args)
    return construct(ARGUMENTS_OPTION, kind, optimizer, fixed={}, given=arguments)


SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    "constant": optimization.get_constant_schedule,
    "constant_with_warmup": optimization.get_constant_schedule_with_warmup,
    "linear": optimization.get_linear_schedule_with_warmup,
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "cosine_with_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
    "inverse_sqrt": optimization.get_inverse_sqrt_schedule,
    "cosine_with_min_lr": optimization.get_cosine_with_min_lr_schedule_with_warmup,
    "cosine_warmup_with_min_lr": optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    "warmup_stable_decay": optimization.get_wsd_schedule,
    "piecewise_constant": get_piecewise_constant_schedule,
    "reduce_lr_on_plateau": ReduceLROnPlateau,
}
WITH_FLOOR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
WITHOUT_WARMUP = ("constant", "piecewise_constant", "reduce_lr_on_plateau")


def _schedule_by_name(options: ScheduleOptions, optimizer: Optimizer, warmup: int, total_steps: int) -> LRScheduler:
    name = options.lr_scheduler
    if name.partition(":")[0] == "adafactor":
        raise UserError(
            "--lr_scheduler=adafactor only shows the rates that Adafactor makes itself. It needs "
            "--optimizer_type=Adafactor with relative_step=True."
        )
    if name not in SCHEDULES:
        raise UserError(
            f'--lr_scheduler: there is no schedule "{name}".{did_you_mean(name, SCHEDULES)} '
            f"The schedules are {', '.join(SCHEDULES)}."
        )
    decay = steps_of(options.lr_decay_steps, total_steps, "--lr_decay_steps")
    _check_phases(name, warmup, decay, total_steps)
    given = literal_arguments(ARGUMENTS_OPTION, options.lr_scheduler_args)
    _check_needed(name, options, given)
    return construct(
        ARGUMENTS_OPTION,
        SCHEDULES[name],
        optimizer,
        fixed=_phase_arguments(name, warmup, decay, total_steps) | _shape_arguments(name, options),
        given=given,
    )


def _check_phases(name: str, warmup: int, decay: int, total_steps: int) -> None:
    """Refuse or report a warm-up or a decay that the schedule ``name`` does not have."""
    if name in ("constant", "reduce_lr_on_plateau"):
        _refuse_warmup(warmup, f"the {name} schedule", "Set it to 0, or use --lr_scheduler=constant_with_warmup.")
    if warmup and name == "piecewise_constant":
        logger.warning("--lr_warmup_steps has no effect on piecewise_constant; begin its step_rules with low factors.")
    if decay and name != "warmup_stable_decay":
        logger.warning("--lr_decay_steps has no effect on the %s schedule, only on warmup_stable_decay.", name)
    if warmup + (decay if name == "warmup_stable_decay" else 0) > total_steps:
        logger.warning("Warm-up and decay of the learning rate are longer than the run of %d steps.", total_steps)


def _check_needed(name: str, options: ScheduleOptions, given: dict[str, Any]) -> None:
    """UserError if the schedule ``name`` lacks what it cannot do without."""
    if name == "piecewise_constant" and "step_rules" not in given:
        raise UserError(
            "--lr_scheduler=piecewise_constant needs factors with the steps they last until, for example "
            "--lr_scheduler_args \"step_rules='1:500,0.1:1000,0.01'\"."
        )
    if name in WITH_FLOOR and options.lr_scheduler_min_lr_ratio is None and "min_lr" not in given:
        raise UserError(f"--lr_scheduler={name} needs --lr_scheduler_min_lr_ratio, for example 0.1.")


def _phase_arguments(name: str, warmup: int, decay: int, total_steps: int) -> dict[str, int]:
    """How long the phases last, under the names the schedule's function has for them."""
    if name in WITHOUT_WARMUP:
        return {}
    if name in ("constant_with_warmup", "inverse_sqrt"):
        return {"num_warmup_steps": warmup}
    if name == "polynomial":
        # A warm-up that ends with the run would make transformers divide by the zero steps that are left.
        return {"num_warmup_steps": warmup, "num_training_steps": total_steps + (warmup == total_steps)}
    if name == "warmup_stable_decay":
        stable = total_steps - warmup - decay
        return {"num_warmup_steps": warmup, "num_stable_steps": stable, "num_decay_steps": decay}
    return {"num_warmup_steps": warmup, "num_training_steps": total_steps}


def _shape_arguments(name: str, options: ScheduleOptions) -> dict[str, Any]:
    """What the options say about the curve.

    A "cycle" is a restart for cosine_with_restarts and half a wave elsewhere; cosine takes its cycles from
    ``lr_scheduler_args`` alone, as in sd-scripts.
    """
    half_waves = options.lr_scheduler_num_cycles / 2
    floor = options.lr_scheduler_min_lr_ratio
    shapes: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": options.lr_scheduler_num_cycles},
        "polynomial": {"power": options.lr_scheduler_power},
        "inverse_sqrt": {"timescale": options.lr_scheduler_timescale},
        "cosine_with_min_lr": {"num_cycles": half_waves, "min_lr_rate": floor},
        "cosine_warmup_with_min_lr": {"num_cycles": half_waves, "min_lr_rate": floor},
        "warmup_stable_decay": {"num_cycles": half_waves, "min_lr_ratio": floor or 0.0},
    }
    return shapes.get(name, {})
