"""Measured vectors: labels that tell them apart, and one warning when they leave the vocabulary's range."""

import logging
from types import SimpleNamespace

import pytest
import torch

from library.output.vector_meter import VectorMeter, far_times


def meter(*keys: str, typical: float = 0.5) -> VectorMeter:
    vocabularies = [SimpleNamespace(typical_norm=typical) for _ in keys]
    return VectorMeter(("a", "a1"), keys, [torch.ones(2, 4) for _ in keys], vocabularies)


def test_vectors_of_two_encoders_are_told_apart():
    states = meter("clip_l", "clip_g").states([torch.ones(2, 4), 2 * torch.ones(2, 4)])
    assert [state.label for state in states] == ["clip_l/a", "clip_l/a1", "clip_g/a", "clip_g/a1"]
    assert [state.moved.percent for state in states] == pytest.approx([0.0, 0.0, 100.0, 100.0])
    assert states[3].times_typical == pytest.approx(4.0 / 0.5)
    assert [state.label for state in meter("emb_params").states([torch.ones(2, 4)])] == ["a", "a1"]


def test_vectors_that_go_too_far_are_said_once(caplog):
    one = meter("emb_params")
    near, far = one.states([torch.ones(2, 4)]), one.states([torch.ones(2, 4) * torch.tensor([[1.0], [15.0]])])
    assert far_times(near) is None
    with caplog.at_level(logging.WARNING, "library"):
        one.warn_if_far(near, 1)
        assert not caplog.records
        one.warn_if_far(far, 20)
        one.warn_if_far(far, 21)
    (record,) = caplog.records
    assert "At step 20 the norm of a1 is 30, 60 times that of a usual word (0.5)" in record.getMessage()
    assert "--learning_rate" in record.getMessage()
