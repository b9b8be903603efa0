"""A run that can only spoil the embedding, or cannot teach it, is stopped; chance is not."""

import logging
import math

import pytest
import torch

from library.support.errors import UserError
from library.training.divergence_guard import MAX_OVERFLOWS, MAX_SILENT_STEPS, DivergenceGuard

NAMES = ("mychar", "mychar1")
GOOD, NONE = torch.ones(1, 2), torch.zeros(1, 2)
OVERFLOW = torch.tensor([[1.0, math.inf]])


def watch(total_steps: int = 100, scales_loss: bool = False) -> DivergenceGuard:
    return DivergenceGuard(NAMES, total_steps, scales_loss=scales_loss)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(loss):
    with pytest.raises(UserError, match=r"the loss of step 7 is .*--mixed_precision"):
        watch().check_loss(loss, 7)
    watch().check_loss(0.0, 7)


def test_a_gradient_that_is_not_finite_stops_at_once_without_a_scaler():
    with pytest.raises(UserError, match="the gradient of step 3 is NaN or infinite"):
        watch().check_gradient(OVERFLOW, 3)


def test_overflows_of_a_scaler_stop_only_when_they_do_not_end():
    patient = watch(scales_loss=True)
    for step in range(1, 2 * MAX_OVERFLOWS):
        patient.check_gradient(OVERFLOW if step % MAX_OVERFLOWS else GOOD, step)
    with pytest.raises(UserError, match="NaN or infinite"):
        patient.check_gradient(OVERFLOW, step + 1)


@pytest.mark.parametrize(("total", "patience"), [(100, MAX_SILENT_STEPS), (2, 2)])
def test_steps_without_any_gradient(total, patience):
    silent = watch(total)
    for step in range(1, patience):
        silent.check_gradient(NONE, step)
    assert not silent.taught
    with pytest.raises(UserError, match=rf"in {patience} steps the new vectors received a gradient of exactly zero"):
        silent.check_gradient(NONE, patience)


def test_a_vector_without_gradient_is_named_once(caplog):
    partly = watch()
    with caplog.at_level(logging.WARNING, logger="library"):
        partly.check_gradient(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1)
        partly.check_gradient(NONE, 2)
    assert partly.taught
    assert [record.getMessage() for record in caplog.records] == [
        "The first step gave no gradient to mychar1. A vector learns only where its name stands in a caption."
    ]
