"""The verdict: one word for each way that a run can end, and the reason with its number."""

import pytest

from library.output.report import Movement
from library.output.vector_meter import VectorState
from library.output.verdict import Distances, judge


def vectors(percent: float = 100.0, norm: float = 0.5) -> list[VectorState]:
    return [VectorState("mychar", Movement("mychar", percent, 0.5, 0.4, norm), 0.4)]


def distances(ratio: float) -> Distances:
    return Distances('"girl"', 50.0, 50.0 * ratio)


@pytest.mark.parametrize(
    ("given", "measured", "word", "reason"),
    [
        (vectors(), distances(0.41), "LEARNED", '0.41 times as far from the training images as those of "girl"'),
        (vectors(), distances(0.97), "NOT LEARNED", "0.97 times"),
        (vectors(), distances(1.3), "NOT LEARNED", "1.30 times"),
        (vectors(), distances(0.9), "UNCLEAR", "0.90 times"),
        (vectors(0.4), distances(0.99), "HARDLY CHANGED", "less than 1 %"),
        (vectors(float("nan")), None, "HARDLY CHANGED", "less than 1 %"),
        (vectors(1e5, 1080.0), None, "TOO FAR", "2,700 times a usual word's"),
        (vectors(1e5, 1080.0), distances(0.5), "TOO FAR", "Lower --learning_rate"),
        (vectors(), None, "UNCLEAR", "--learning_report for a number, or --sample_prompts"),
    ],
)
def test_every_way_that_a_run_can_end(given, measured, word, reason):
    verdict = judge(given, measured, samples=False)
    assert verdict.verdict == word
    assert reason in verdict.reason


def test_one_vector_that_moved_is_a_change():
    assert judge([*vectors(0.1), *vectors(50.0)], None, samples=False).verdict == "UNCLEAR"


def test_sample_images_are_to_be_looked_at_where_there_are_some():
    reason = judge(vectors(), None, samples=True).reason
    assert "Look at the sample images" in reason
    assert "--sample_prompts" not in reason


def test_a_start_that_is_a_copy_divides_by_nothing():
    assert judge(vectors(), Distances('"a"', 0.0, 1.0), samples=False).verdict == "NOT LEARNED"
