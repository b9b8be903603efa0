"""The distance of images to a concept: 0 for copies, the nearest image counts, sizes do not matter."""

import numpy as np
import pytest

from library.output.concept_distance import concept_distance


def flat(value: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_copies_are_at_distance_0():
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 80, 3)).astype(np.uint8)
    assert concept_distance(list(noise), list(noise)) == 0


def test_the_nearest_image_counts_and_images_are_averaged():
    concept = [flat(0), flat(100)]
    assert concept_distance([flat(10)], concept) == pytest.approx(10)
    assert concept_distance([flat(10), flat(94)], concept) == pytest.approx((10 + 6) / 2)


@pytest.mark.parametrize("size", [(64, 64), (512, 768), (100, 37), (8, 8)])
def test_sizes_may_differ(size):
    assert concept_distance([flat(30, *size)], [flat(50)]) == pytest.approx(20)


def test_a_half_that_differs():
    picture = flat(0)
    picture[:, :32] = 80
    assert concept_distance([picture], [flat(0)]) == pytest.approx(80 / 2**0.5)


def test_details_within_a_field_do_not_count():
    stripes = flat(0)
    stripes[::2] = 200
    assert concept_distance([stripes], [flat(100)]) == pytest.approx(0, abs=1e-4)
