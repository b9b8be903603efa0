"""Options that change how the vectors learn, each off unless it is asked for: the levers of a recipe."""

from dataclasses import dataclass

from library.options.declaration import flag


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe"""

    normalize_sample_gradients: bool = flag(
        "Bring the gradient of each sample to a norm of 1 (over all vectors of all text encoders) before their mean is "
        "taken, so that a timestep with large gradients does not drown the others. Prior-loss weights still count. The "
        "gradient norm is then not clipped, unless --max_grad_norm is another one than 1.",
        told=True,
    )
