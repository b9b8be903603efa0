"""Losses by timestep: means of the samples that taught, and nothing else."""

import pytest
import torch

from library.training.loss_bands import BANDS, LossBands


def losses(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True) * 1.0


def test_the_bands_cover_every_timestep_once():
    covered = [timestep for low, high in BANDS for timestep in range(low, high + 1)]
    assert covered == list(range(1000))


def test_means_by_band_and_each_sample_once():
    bands = LossBands()
    bands.see(torch.tensor([0, 249, 250]), losses(1.0, 3.0, 5.0))
    bands.see(torch.tensor([999]), losses(7.0))
    assert bands.take() == pytest.approx({"loss/0-249": 2.0, "loss/250-499": 5.0, "loss/750-999": 7.0})
    assert bands.take() == {}


def test_measurements_and_what_is_not_finite_do_not_count():
    bands = LossBands()
    bands.see(torch.tensor([1]), torch.tensor([9.0]))  # validation: no gradient
    bands.see(torch.tensor([1, 2, 3]), losses(float("nan"), 4.0, float("inf")))
    assert bands.take() == pytest.approx({"loss/0-249": 4.0})


def test_what_is_kept_holds_no_graph():
    bands, loss = LossBands(), losses(1.0)
    bands.see(torch.tensor([1]), loss)
    assert not any(kept.requires_grad for _, kept in bands._seen)
