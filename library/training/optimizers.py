"""From ``--optimizer_type`` and its companions to an optimizer over the trained rows."""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from library.options.checks import chosen_optimizer
from library.options.training import OptimizerOptions
from library.support.errors import UserError, did_you_mean
from library.support.user_classes import construct, literal_arguments, load_class

logger = logging.getLogger(__name__)

Stages = tuple[tuple[float, int | None], ...]

# Below this rate, steps that are bounded by the rate barely move an embedding in a usual run.
SLOW_LEARNING_RATE = 1e-5
# Above this factor on a step that an optimizer finds, and this share of a usual coordinate in one step, no word stays
# among the others.
_LARGEST_FACTOR, _LARGEST_SHARE = 10, 2


@dataclass(frozen=True)
class KnownOptimizer:
    """Where an optimizer's class lives, and what it is always given (``fixed``) or given by default (``usual``)."""

    module: str
    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)


def _known_optimizers() -> dict[str, KnownOptimizer]:
    """The optimizers by the name the user writes (case does not matter); all others are a class path."""
    modules = {
        "torch.optim": ("AdamW",),
        "bitsandbytes.optim": (
            "AdamW8bit",
            "PagedAdamW",
            "PagedAdamW8bit",
            "PagedAdamW32bit",
            "Lion8bit",
            "PagedLion8bit",
        ),
        "lion_pytorch": ("Lion",),
        "dadaptation": ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"),
        "dadaptation.experimental": ("DAdaptAdamPreprint", "DAdaptAdanIP"),
        "prodigyopt": ("Prodigy",),
        "transformers.optimization": ("Adafactor",),
        "schedulefree": ("RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"),
    }
    known = {name: KnownOptimizer(module, name) for module, names in modules.items() for name in names}
    nesterov: dict[str, dict[str, Any]] = {"fixed": {"nesterov": True}, "usual": {"momentum": 0.9}}
    return known | {
        "SGDNesterov": KnownOptimizer("torch.optim", "SGD", **nesterov),
        "SGDNesterov8bit": KnownOptimizer("bitsandbytes.optim", "SGD8bit", **nesterov),
        "DAdaptation": KnownOptimizer("dadaptation.experimental", "DAdaptAdamPreprint"),
    }


KNOWN_OPTIMIZERS = _known_optimizers()
_BY_LOWER_NAME = {name.lower(): known for name, known in KNOWN_OPTIMIZERS.items()}


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer and what has to be known about it.

    ``learning_rate`` is the rate it starts with, None if it finds its own (Adafactor's relative step); ``stages`` are
    the rates with the optimizer step each lasts until, if more than one was given; ``arguments`` is what the
    constructor got besides the rate; ``shown_rate`` is what logs show before a relative step has been taken.
    """

    optimizer: Optimizer
    arguments: dict[str, Any]
    learning_rate: float | None
    stages: Stages | None = None
    shown_rate: float = 0.0

    @property
    def name(self) -> str:
        """Full path of the optimizer's class."""
        kind = type(self.optimizer)
        return f"{kind.__module__}.{kind.__qualname__}"

    @property
    def relative_step(self) -> bool:
        """Whether the optimizer is an Adafactor that makes its own learning rate."""
        return self.learning_rate is None

    @property
    def schedule_free(self) -> bool:
        """Whether the optimizer averages instead of following a schedule, and has a train and an eval mode."""
        return "schedulefree" in type(self.optimizer).__name__.lower()

    @property
    def arguments_text(self) -> str:
        """The arguments as ``key=value`` joined by commas."""
        return ",".join(f"{key}={value}" for key, value in self.arguments.items())

    @property
    def description(self) -> str:
        """The optimizer with its arguments, for the record: ``torch.optim.adamw.AdamW(weight_decay=0.1)``."""
        return f"{self.name}({self.arguments_text})"

    @property
    def rates_text(self) -> str | None:
        """The rate, or the rates as ``--learning_rate`` takes them; None if the optimizer makes its own."""
        if self.stages:
            return ",".join(f"{rate}" if until is None else f"{rate}:{until}" for rate, until in self.stages)
        return None if self.relative_step else f"{self.learning_rate}"


def known_optimizer(name: str) -> KnownOptimizer:
    """Where the class for the user's ``name`` lives: the table, else a dotted path, else a class of torch.optim."""
    if name.lower() in _BY_LOWER_NAME:
        return _BY_LOWER_NAME[name.lower()]
    if name.lower().startswith("dadapt"):
        guess = did_you_mean(name, [known for known in KNOWN_OPTIMIZERS if known.startswith("DAdapt")])
        raise UserError(f'--optimizer_type: there is no D-Adaptation optimizer "{name}".{guess}')
    module, _, class_name = name.rpartition(".")
    if module:
        return KnownOptimizer(module, class_name)
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer:
        return KnownOptimizer("torch.optim", name)
    classes = [key for key, value in vars(torch.optim).items() if isinstance(value, type) and value is not Optimizer]
    raise UserError(
        f'--optimizer_type: unknown optimizer "{name}".{did_you_mean(name, [*KNOWN_OPTIMIZERS, *classes])} '
        "Other classes are named by their path, for example bitsandbytes.optim.AdEMAMix8bit; the names of "
        "torch.optim are case-sensitive."
    )


def trusted_modules(options: OptimizerOptions) -> set[str]:
    """Modules from which optimizers may be imported: those known here, and the one the user names. Raises UserError."""
    known = {optimizer.module for optimizer in KNOWN_OPTIMIZERS.values()}
    return known | {"torch.optim", known_optimizer(chosen_optimizer(options)).module}


def default_learning_rate(class_name: str) -> float:
    """The rate that suits a Textual Inversion with this optimizer, by its class name."""
    name = class_name.lower()
    for part, rate in (("prodigy", 1.0), ("dadapt", 1.0), ("lion", 1e-4), ("sgd", 5e-3)):
        if part in name:
            return rate
    return 5e-4


def build_optimizer(options: OptimizerOptions, parameters: Iterable[nn.Parameter]) -> OptimizerChoice:
    """Make the optimizer over ``parameters``; schedule-free ones are in training mode afterwards.

    Raises UserError for an unknown name, a package that is missing, arguments it does not take.
    """
    known = known_optimizer(chosen_optimizer(options))
    given = known.usual | literal_arguments("--optimizer_args", options.optimizer_args)
    kind = load_class("--optimizer_type", known.module, known.name)
    _check_kind(kind)
    asked = options.learning_rate
    stages, rate = (asked, asked[0][0]) if isinstance(asked, tuple) else (None, asked)
    if kind is Adafactor and _adafactor_is_relative(given):
        return _build_relative_adafactor(parameters, given, rate, stages)
    if rate is None:
        rate = default_learning_rate(kind.__name__)
        logger.info("--learning_rate is not set: %s starts with %g.", kind.__name__, rate)
    _warn_of_unusual_rate(kind.__name__, rate)
    parameters = list(parameters)
    optimizer = construct("--optimizer_args", kind, parameters, fixed={"lr": rate, **known.fixed}, given=given)
    _widen_states(optimizer, parameters)
    set_train_mode(optimizer, True)
    return OptimizerChoice(optimizer, given, rate, stages)


def _check_kind(kind: type) -> None:
    if not issubclass(kind, Optimizer):
        raise UserError(f"--optimizer_type: {kind.__module__}.{kind.__name__} is not an optimizer of PyTorch's kind.")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"--optimizer_type: {kind.__name__} computes the loss several times per step, which this training does "
            "not do. Choose another optimizer, for example AdamW."
        )
    if kind is torch.optim.SparseAdam:
        raise UserError(
            "--optimizer_type: SparseAdam wants sparse gradients, and those of the new vectors are dense. Use Adam."
        )


def _adafactor_is_relative(arguments: dict[str, Any]) -> bool:
    """Whether Adafactor makes its own rate: by default, and whenever its warm-up is asked for, which needs that."""
    if arguments.get("warmup_init") and not arguments.get("relative_step", True):
        logger.warning("--optimizer_args: warmup_init=True needs relative_step=True, which is therefore switched on.")
        return True
    return bool(arguments.get("relative_step", True))


def _build_relative_adafactor(
    parameters: Iterable[nn.Parameter], given: dict[str, Any], rate: float | None, stages: Stages | None
) -> OptimizerChoice:
    if stages:
        raise UserError(
            "--learning_rate: Adafactor with relative_step makes its own learning rate and cannot follow a list of "
            "rates. Add --optimizer_args relative_step=False, or give no rate."
        )
    given = given | {"relative_step": True}
    if rate is not None:
        logger.warning(
            "Adafactor with relative_step makes its own learning rate: --learning_rate=%g is only shown, not used. "
            "Add --optimizer_args relative_step=False to use it.",
            rate,
        )
    optimizer = construct("--optimizer_args", Adafactor, list(parameters), fixed={"lr": None}, given=given)
    return OptimizerChoice(optimizer, given, None, shown_rate=rate or 0.0)


def _warn_of_unusual_rate(class_name: str, rate: float) -> None:
    if default_learning_rate(class_name) == 1.0 and rate <= 0.1:
        logger.warning(
            "--learning_rate=%g is a factor on the step that %s finds by itself and should be near 1.", rate, class_name
        )


def set_train_mode(optimizer: Optimizer, training: bool) -> None:
    """Switch a schedule-free optimizer between training (True) and its averaged values (False); others stay as is."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextmanager
def averaged_values(optimizer: Optimizer) -> Iterator[None]:
    """Hold the parameters at the values to save and to sample with: a schedule-free optimizer's average."""
    set_train_mode(optimizer, False)
    try:
        yield
    finally:
        set_train_mode(optimizer, True)


def _widen_states(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Keep the states of bitsandbytes' 8-bit optimizers in 32 bits on Apple's GPUs, and say so: it has no other there.

    Only parameters of 4096 numbers or more have 8-bit states at all.
    """
    settings = getattr(optimizer, "args", None)
    if settings is None or parameters[0].device.type != "mps" or not hasattr(settings, "min_8bit_size"):
        return
    numbers = [parameter.numel() for parameter in parameters]
    if max(numbers) >= settings.min_8bit_size:
        logger.info("%s keeps its states in 32 bits: it has no other on Apple's GPUs.", type(optimizer).__name__)
    settings.min_8bit_size = max(numbers) + 1


def slow_learning_warning(choice: OptimizerChoice, total_steps: int, spread: float) -> str | None:
    """A sentence if the rate is so low that no coordinate can get far, else None.

    Adam and Lion move a coordinate by at most about the rate per step. ``spread`` is the standard deviation of a
    coordinate in the model's embedding table (about 0.014 for CLIP-L).
    """
    name = type(choice.optimizer).__name__
    bounded = any(part in name.lower() for part in ("adam", "lion")) and default_learning_rate(name) < 1.0
    if not bounded or choice.relative_step or largest_rate(choice) >= SLOW_LEARNING_RATE:
        return None
    reach = farthest_movement(choice.stages or ((largest_rate(choice), None),), total_steps)
    return (
        f"--learning_rate={largest_rate(choice):g} is very low for {name}: in {total_steps} steps no coordinate can "
        f"move by more than {reach:.2g} (rate × steps), and coordinates of usual words spread by {spread:.2g}, so the "
        f"word can change by at most {reach / spread:.0%} of that. Textual Inversion usually needs 1e-4 to 5e-3."
    )


def fast_learning_warning(choice: OptimizerChoice, spread: float) -> str | None:
    """A sentence if the rate is so high that single steps leave the range of usual words, else None.

    ``spread`` is as in :func:`slow_learning_warning`.
    """
    name, rate = type(choice.optimizer).__name__, largest_rate(choice)
    if choice.relative_step:
        return None
    if default_learning_rate(name) == 1.0:
        sentence = f"is a factor on the step that {name} finds by itself and should be near 1."
        return f"--learning_rate={rate:g} {sentence}" if rate > _LARGEST_FACTOR else None
    if not any(part in name.lower() for part in ("adam", "lion")) or rate <= _LARGEST_SHARE * spread:
        return None
    return (
        f"--learning_rate={rate:g} is very high for {name}: a single step can move a coordinate by {rate:g}, and "
        f"coordinates of usual words spread by {spread:.2g}, so the word will soon be unlike any other. Textual "
        "Inversion usually needs 1e-4 to 5e-3."
    )


def largest_rate(choice: OptimizerChoice) -> float:
    """The highest rate that will be used, 0 if the optimizer makes its own."""
    return max(rate for rate, _ in choice.stages) if choice.stages else choice.learning_rate or 0.0


def farthest_movement(stages: Stages, total_steps: int) -> float:
    """The sum of the rates over ``total_steps``: how far a coordinate can get if every step goes the same way."""
    reach, done = 0.0, 0
    for place, (rate, until) in enumerate(stages):
        end = total_steps if until is None or place == len(stages) - 1 else min(until, total_steps)
        reach += rate * max(0, end - done)
        done = max(done, end)
    return reach
