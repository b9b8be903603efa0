"""Watches losses and gradients, and stops a run that can only spoil the embedding or cannot teach it anything."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from library.support.errors import UserError

logger = logging.getLogger(__name__)

# Steps in a row without a finite gradient (fp16 only), and first steps without any, before a run is stopped.
MAX_OVERFLOWS = 30
MAX_SILENT_STEPS = 10


class DivergenceGuard:
    """Looks at every step of one run. ``taught`` tells whether the rows have ever received a gradient."""

    def __init__(self, names: Sequence[str], total_steps: int, *, scales_loss: bool) -> None:
        """``names`` of the N vectors; ``scales_loss``: fp16, whose scaler overflows now and then and recovers."""
        self.names = names
        self.patience = min(MAX_SILENT_STEPS, total_steps)
        self.scales_loss = scales_loss
        self.taught = False
        self.silent_steps = 0
        self.overflows = 0

    def check_loss(self, loss: float, step: int) -> None:
        """Raise UserError for the loss of step ``step`` (from 1) if it is NaN or infinite."""
        if not math.isfinite(loss):
            raise _spoiling(f"the loss of step {step} is {loss}")

    def check_gradient(self, norms: Tensor, step: int) -> bool:
        """Stop a run before a NaN or infinite gradient reaches the rows, or when they get none at all.

        ``norms`` [text encoders, N], on the CPU, are the lengths of the rows' gradients at step ``step`` (from 1).
        Returns whether they are finite, which they need not be in fp16: such a step is to be skipped. Raises UserError.
        """
        if not torch.isfinite(norms).all():
            self.overflows += 1
            # fp16's scaler lowers its scale after such a step, which settles within a few.
            if not self.scales_loss or self.overflows == MAX_OVERFLOWS:
                raise _spoiling(f"the gradient of step {step} is NaN or infinite")
            return False
        self.overflows = 0
        if not self.taught:
            self._first_gradient(norms)
        return True

    def _first_gradient(self, norms: Tensor) -> None:
        if not norms.any():
            # One such step can be chance: a black mask, an image of weight 0, a timestep of pure noise.
            self.silent_steps += 1
            if self.silent_steps == self.patience:
                raise UserError(
                    f"Training stopped: the captions hold the token, but in {self.silent_steps} steps the new vectors "
                    "received a gradient of exactly zero. Look at the masks (black everywhere?), --prior_loss_weight "
                    "and the timestep limits; in fp16 try --mixed_precision=bf16, with --xformers leave it out."
                )
            return
        self.taught = True
        still = [name for name, norm in zip(self.names, norms.amin(dim=0), strict=True) if norm == 0]
        if still:
            logger.warning(
                "The first step gave no gradient to %s. A vector learns only where its name stands in a caption.",
                ", ".join(still),
            )


def _spoiling(reason: str) -> UserError:
    """The error for a step that is NaN or infinite, with what to try."""
    return UserError(
        f"Training stopped: {reason}. Going on would only spoil the embedding. Try --mixed_precision=bf16 or no in "
        "place of fp16, a lower --learning_rate, or --no_half_vae; if it happens at the first step, the model "
        "file or its VAE may be damaged."
    )
