"""The running mean: unbiased from the first value on, and forgetting."""

import pytest

from library.support.running_mean import RunningMean, readable_span


def test_it_is_unbiased_and_forgets():
    mean = RunningMean(9)
    assert mean.add(4.0) == pytest.approx(4.0)
    assert mean.add(2.0) == pytest.approx((2.0 + 0.8 * 4.0) / 1.8)
    for _ in range(200):
        last = mean.add(1.0)
    assert last == pytest.approx(1.0)


def test_long_runs_are_smoothed_over_more_values_up_to_a_limit():
    assert [readable_span(count) for count in (1, 400, 9000)] == [4, 40, 100]
