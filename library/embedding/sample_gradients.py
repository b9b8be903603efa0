"""The gradient of each sample by itself, out of one backward: the vectors are tiny, so every sample gets a copy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-12


class _Normalized(torch.autograd.Function):
    """Forward: a copy of the rows for each sample. Backward: the samples' gradients, normalized, weighed and added."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(shares)
        return tuple(each.repeat(len(shares), 1, 1) for each in rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (shares,) = ctx.saved_tensors
        norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients]).norm(dim=0)
        # The samples' losses hold their shares too, and with them their gradients; a share of 0 must not divide by 0.
        divisors = norms + _SMALLEST_NORM * shares.abs() + torch.finfo(norms.dtype).tiny
        factors = (shares / divisors).reshape(-1, 1, 1)
        return None, *((each * factors).sum(dim=0) for each in gradients)


def with_normalized_gradients(rows: Sequence[Tensor], shares: Tensor) -> list[Tensor]:
    """A copy [B, N, D] of each encoder's rows [N, D] for every sample, through which gradients come back normalized.

    Sample i adds ``shares[i]`` · gᵢ / (‖gᵢ‖ + 1e-12) to the rows' gradient, its norm taken over all vectors of all
    encoders. ``shares`` [B] is what each sample's own loss counts in what the backward begins with: its weight, the
    batch's share of the step, the scale of fp16's scaler.
    """
    return list(_Normalized.apply(shares, *rows))  # type: ignore[no-untyped-call]  # torch's is not annotated
