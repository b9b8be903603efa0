"""What the fields of a saved state may hold. Whoever resumes from a file that breaks this would fail much later."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.options.declaration import OnResume
from library.options.options import options_with

_NUMPY_KEYS = 624  # of the generator MT19937


def malformed_field(content: Mapping[str, Any]) -> str | None:
    """The name of a field that has not the type and shape that a training writes, or None. Others are not looked at."""
    return next((name for name, is_sound in _CHECKS.items() if name in content and not is_sound(content[name])), None)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_seed(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**64


def _are_options(value: Any) -> bool:
    """Options by name; those that the state decides are used again, the others compared."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    texts = (value.get(name, 0) for name in options_with(OnResume.STATE_COUNTS))
    return all(text is None or isinstance(text, str) for text in texts) and all(map(_is_option, value.values()))


def _is_option(value: Any) -> bool:
    """A value, a list of values, or learning rates: a list of pairs, each rate with the step it lasts until."""
    items = value if isinstance(value, list) else [value]
    return all(_is_single(item) or _is_rate(item) for item in items)


def _is_single(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def _is_rate(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_single, value))


def _are_rows(value: Any) -> bool:
    """Vectors [N, D] of one or two text encoders."""
    return isinstance(value, list) and len(value) in (1, 2) and all(map(_is_table, value))


def _is_table(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 2 or value.dtype != torch.float32 or not value.numel():
        return False
    return bool(value.isfinite().all())


def _is_learner(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"rows", "optimizer", "schedule", "scaler", "taught"}:
        return False
    optimizer = value["optimizer"] if isinstance(value["optimizer"], dict) else {}
    groups = optimizer.get("param_groups")
    named = (value["schedule"], value["scaler"], optimizer.get("state"))
    return (
        _are_rows(value["rows"])
        and isinstance(groups, list)
        and len(groups) > 0
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(part, dict) for part in named)
        and isinstance(value["taught"], bool)
    )


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(loss, float) for loss in value)


def _is_stopping(value: Any) -> bool:
    """The losses that ``--early_stopping`` has measured and, of any, the vectors with the lowest."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"losses", "best"} or not _are_losses(value["losses"]):
        return False
    best = value["best"]
    return best is None or (
        isinstance(best, dict)
        and best.keys() == {"rows", "step", "epoch"}
        and _are_rows(best["rows"])
        and all(_is_step(best[name]) for name in ("step", "epoch"))
    )


def _is_averaging(value: Any) -> bool:
    """The mean that ``--average_last`` has so far, of how many steps, and where it began."""
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == {"mean", "count", "begin"}
        and _are_rows(value["mean"])
        and all(_is_step(value[name]) for name in ("count", "begin"))
    )


def _are_random_states(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_random_state, value))


def _is_random_state(value: Any) -> bool:
    """Whether generators of their own take it, so that the global ones will."""
    if not isinstance(value, dict) or value.keys() - {"cuda"} != {"python", "numpy", "torch"}:
        return False
    cuda = value.get("cuda", torch.empty(0, dtype=torch.uint8))
    if not isinstance(cuda, Tensor) or cuda.dtype != torch.uint8 or cuda.ndim != 1:
        return False
    try:
        kind, keys, position, *rest = value["numpy"]
        if len(keys) != _NUMPY_KEYS or not 0 <= position <= _NUMPY_KEYS:  # numpy itself does not look
            return False
        np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), position, *rest))
        random.Random().setstate(value["python"])
        torch.Generator().set_state(value["torch"])
    except (TypeError, ValueError, OverflowError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    return True


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "step": _is_step,
    "total_steps": _is_step,
    "epoch_closed": lambda value: isinstance(value, bool),
    "seed": _is_seed,
    "data": lambda value: isinstance(value, str),
    "options": _are_options,
    "starts": _are_rows,
    "learner": _is_learner,
    "epoch_losses": _are_losses,
    "random_states": _are_random_states,
    "run": lambda value: isinstance(value, str),
    "base": lambda value: value is None or isinstance(value, str),
    "resumed": lambda value: value is None or isinstance(value, str),
    "contents": lambda value: isinstance(value, str),
    "stopping": _is_stopping,
    "averaging": _is_averaging,
}
