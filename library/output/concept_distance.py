"""How far generated images are from the images of a concept: one number, by which learning can be judged."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# Coarse enough that a thing a little further left is still the same thing, whatever the images' size.
GRID = 16


def concept_distance(pictures: Sequence[np.ndarray], concept: Sequence[np.ndarray]) -> float:
    """Mean distance of ``images`` to the nearest image of ``concept``; all uint8 [H, W, 3], of any sizes.

    An image counts as its averages over a grid of 16 × 16 fields. The distance of two images is the root mean square
    difference of these, in steps of 255. It sees colours and where they are, not identity: good for comparing two words
    of one model, no measure of quality.
    """
    targets = torch.stack([_fields(picture) for picture in concept])
    nearest = [(targets - _fields(picture)).square().mean(dim=(1, 2, 3)).sqrt().min() for picture in pictures]
    return float(torch.stack(nearest).mean())


def _fields(picture: np.ndarray) -> Tensor:
    """Averages over the fields of the grid, float32 [3, 16, 16]."""
    return adaptive_avg_pool2d(torch.tensor(picture).permute(2, 0, 1).float(), GRID)
