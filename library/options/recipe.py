"""Options that change how the vectors learn, each off unless it is asked for: the levers of a recipe."""

from dataclasses import dataclass

from library.options.declaration import flag, option
from library.options.option_types import number, whole_number


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe"""

    normalize_sample_gradients: bool = flag(
        "Bring the gradient of each sample to a norm of 1 (over all vectors of all text encoders) before their mean is "
        "taken, so that a timestep with large gradients does not drown the others. Prior-loss weights still count. The "
        "gradient norm is then not clipped, unless --max_grad_norm is another one than 1.",
        told=True,
    )
    max_embedding_norm: float | None = option(
        None,
        "Shorten each vector that is longer than this after a step, and leave the others alone; in lengths of a usual "
        "word's vector (the median over the vocabulary, for each text encoder). A softer --preserve_embedding_norm. "
        "Typical: 2 to 4. Unset: no limit.",
        read=number,
        above=0,
        yields_to=("preserve_embedding_norm",),
        told=True,
    )
    early_stopping: bool = flag(
        "Measure the loss with fixed noise every so many steps, on held-out images if there are any (else on training "
        "images), stop when it gets no lower or has settled, and keep the vectors with the lowest as the result.",
        told=True,
    )
    early_stopping_every: int | None = option(
        None,
        "Steps from one such measurement to the next. Unset: a fortieth of all steps, or more where measuring would "
        "take over a tenth of the time.",
        read=whole_number,
        zero_is_off=True,
        needs=("early_stopping",),
        told=True,
    )
    early_stopping_patience: int = option(
        8,
        "Stop after so many measurements in a row that are no lower than the lowest.",
        read=whole_number,
        at_least=1,
        needs=("early_stopping",),
        told=True,
    )
    average_last: float | None = option(
        None,
        "Save as the result the mean of the vectors over this share of the steps, the last ones: 0.33 for the last "
        "third, which takes the restlessness out of a constant learning rate. Samples in the end and the learning "
        "report use it; the training and its checkpoints stay as they are. Unset: the last vectors.",
        read=number,
        above=0,
        at_most=1,
        told=True,
    )
