"""fixed_loss.py: which samples are measured, and what their mean is. Real losses are in test_early_stopping.py."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from library.data.batches import Batch
from library.training.fixed_loss import DRAWS, FixedLoss, limited


def batch(*held: bool, first: int = 0) -> Batch:
    """A batch whose samples have their number as their latents."""
    count = len(held)
    numbers = torch.arange(first, first + count).float()
    return Batch(
        keys=[str(number) for number in range(first, first + count)],
        captions=[""] * count,
        input_ids=[torch.zeros(count, 1, 77, dtype=torch.int64)],
        has_token=torch.tensor(held),
        latents=numbers.reshape(-1, 1, 1, 1),
        images=None,
        masks=None,
        loss_weights=torch.ones(count),
        size_conditioning=torch.zeros(count, 6),
        seeds=list(range(first, first + count)),
        weight=1.0,
    )


@dataclass(frozen=True)
class Task:
    """Stands in for a denoising task: the loss of a sample is a tenth of its number."""

    bands: object = "those of the training"
    encoded_batches: list = field(default_factory=list)

    def losses(self, given: Batch) -> torch.Tensor:
        assert self.bands is None
        return given.latents.flatten() / 10

    def encoded(self, given: Batch) -> Batch:
        self.encoded_batches.append(given)
        return replace(given)


def found(samples: int):
    """Batches of three without end, of which every second sample holds the token."""
    assert samples == DRAWS * 5
    for number in range(10**6):
        first = 3 * number
        yield batch(*((first + place) % 2 == 0 for place in range(3)), first=first)


def test_only_samples_with_the_token_are_measured_and_images_are_encoded_once():
    task = Task()
    loss = FixedLoss.of(task, found, 5, torch.device("cpu"))
    assert [each.keys for each in loss.batches] == [["0", "2"], ["4"], ["6", "8"]]
    assert len(loss) == 5
    assert loss.mean() == loss.mean_of_all() == pytest.approx((0 + 2 + 4 + 6 + 8) / 50)
    assert loss.first(3).mean() == pytest.approx((0 + 2 + 4) / 30)
    assert len(task.encoded_batches) == 3


def test_no_more_batches_are_asked_for_than_are_needed():
    asked = []

    def batches():
        for number in range(9):
            asked.append(number)
            yield batch(True, False, first=2 * number)

    assert [each.keys for each in limited(batches(), 3)] == [["0"], ["2"], ["4"]]
    assert asked == [0, 1, 2]


def test_there_may_be_none():
    assert list(limited([batch(False), batch(False)], 3)) == []
