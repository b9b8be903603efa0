"""Where the trained vectors are: how far from their start, how long beside usual words, and next to which of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from library.embedding.vocabulary import Neighbour, Vocabulary
from library.output.report import Movement, movements

logger = logging.getLogger(__name__)

# Trainings that teach well end with norms of up to about 6 times a usual word's, and up to 30 with optimizers that find
# their own rate.
_FAR = 40.0


@dataclass(frozen=True)
class VectorState:
    """One vector as it is: ``label`` tells it from all others, ``typical_norm`` is a usual word's in its encoder."""

    label: str
    moved: Movement
    typical_norm: float

    @property
    def times_typical(self) -> float:
        """Its norm in norms of a usual word."""
        return self.moved.norm / max(self.typical_norm, 1e-12)


@dataclass
class VectorMeter:
    """Measures the vectors of one run; ``starts`` [N, D], vocabularies and ``keys`` by text encoder."""

    names: Sequence[str]
    keys: Sequence[str]
    starts: Sequence[Tensor]
    vocabularies: Sequence[Vocabulary]
    warned: bool = False

    def states(self, rows: Sequence[Tensor]) -> list[VectorState]:
        """Every vector of ``rows`` [N, D] per text encoder."""
        found = []
        for key, start, now, words in zip(self.keys, self.starts, rows, self.vocabularies, strict=True):
            moved = movements(self.names, start, now)
            found += [VectorState(self._label(key, one.name), one, words.typical_norm) for one in moved]
        return found

    def nearest(self, rows: Sequence[Tensor], count: int = 5) -> dict[str, list[Neighbour]]:
        """The ``count`` nearest words of the vocabulary by the label of each vector."""
        found: dict[str, list[Neighbour]] = {}
        for key, now, words in zip(self.keys, rows, self.vocabularies, strict=True):
            labels = [self._label(key, name) for name in self.names]
            found |= dict(zip(labels, words.nearest(now, count), strict=True))
        return found

    def warn_if_far(self, states: Sequence[VectorState], step: int) -> None:
        """Say once, while there is time to stop, that vectors have left the range of the vocabulary."""
        times = far_times(states)
        if not times or self.warned:
            return
        self.warned = True
        farthest = max(states, key=lambda state: state.times_typical)
        logger.warning(
            "At step %d the norm of %s is %.3g, %.0f times that of a usual word (%.2g): it will drown out the rest of "
            "a prompt. Stop with Ctrl-C, which keeps the vectors, and start again with a lower --learning_rate.",
            *(step, farthest.label, farthest.moved.norm, times, farthest.typical_norm),
        )

    def _label(self, key: str, name: str) -> str:
        return name if len(self.keys) == 1 else f"{key}/{name}"


def far_times(states: Sequence[VectorState]) -> float | None:
    """How many times a usual word's the largest norm is, where that is too far to be of use; else None."""
    times = max(state.times_typical for state in states)
    return times if times > _FAR else None
