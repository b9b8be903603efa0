"""The loss on the same samples with the same noise and timesteps, every time: the least noisy measure of vectors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum

import torch

from library.data.batches import Batch
from library.model.runtime import shared_out
from library.training.denoising import DenoisingTask

# A step goes forward and backward through networks that are frozen, which costs about two forward passes.
PASSES_OF_A_STEP = 2
DRAWS = 4  # for each sample, where lines and wildcards of a caption may leave the token out


@dataclass(frozen=True)
class FixedLoss:
    """Batches of samples that hold the token, with latents, on the device; ``task`` notes nothing of them."""

    task: DenoisingTask
    batches: Sequence[Batch]

    @classmethod
    def of(
        cls, task: DenoisingTask, found: Callable[[int], Iterable[Batch]], samples: int, device: torch.device
    ) -> "FixedLoss":
        """Over ``samples`` samples, or as many as there are; ``found`` gives batches of at least so many."""
        task = replace(task, bands=None)  # those are of the training
        batches = limited(found(DRAWS * samples), samples)
        return cls(task, [task.encoded(batch.to(device)) for batch in batches])

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(map(len, self.batches))

    def first(self, samples: int) -> "FixedLoss":
        """The same over the first so many samples."""
        return replace(self, batches=list(limited(self.batches, samples)))

    def mean(self) -> float:
        """The mean loss with the vectors as they are, measured by this process alone."""
        return _mean(self._losses(self.batches))

    def mean_of_all(self) -> float:
        """The same number in all processes, each of which measures a part; all must call it."""
        return _mean(shared_out(self.batches, self._losses))

    @torch.no_grad()
    def _losses(self, batches: Sequence[Batch]) -> list[float]:
        losses = [self.task.losses(batch) for batch in batches]
        return torch.cat(losses).tolist() if losses else []


def _mean(losses: Sequence[float]) -> float:
    return fsum(losses) / len(losses)


def limited(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """So many samples that hold the token, or as many as there are, in batches; no more batches are asked for."""
    left = samples
    for batch in batches:
        holding = batch.has_token.nonzero().flatten().tolist()[:left]
        if holding:
            yield batch.only(holding)
            left -= len(holding)
        if not left:
            return
