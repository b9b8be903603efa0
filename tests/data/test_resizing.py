import numpy as np
import pytest
from golden_data import golden_arrays, golden_cases
from limits import outcome
from PIL import Image

from library.data.resizing import INTERPOLATIONS, resize
from library.support.errors import UserError


@pytest.mark.parametrize("case", golden_cases("resize"))
def test_golden_resize(case):
    arrays = golden_arrays("resize")
    made = resize(arrays[case["npz_prefix"] + "in"], tuple(case["to_wh"]), case["interpolation"])
    expected = arrays[case["npz_prefix"] + "out"]
    assert made.shape == expected.shape
    assert made.dtype == np.uint8
    assert np.abs(made.astype(int) - expected).max() <= 2


def _noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_area_is_the_exact_mean_over_the_covered_pixels():
    image = _noise(35, 23)
    made = resize(image, (10, 7), "area")
    # Repeating each pixel 10 (7) times makes the borders of all target pixels fall between pixels.
    fine = image.repeat(7, axis=0).repeat(10, axis=1).astype(float)
    expected = fine.reshape(7, 23, 10, 35, 3).mean((1, 3))
    assert np.abs(made - expected).max() <= 0.51


def test_area_equals_numpy_means_for_whole_factors():
    image = _noise(30, 20, 4)
    expected = image.reshape(5, 4, 10, 3, 4).mean((1, 3))
    assert np.abs(resize(image, (10, 5), "area") - expected).max() <= 0.5


@pytest.mark.parametrize(("size", "same_as"), [((12, 8), "area"), ((24, 16), "area"), ((25, 16), "lanczos")])
def test_without_a_name_area_shrinks_and_lanczos_enlarges(size, same_as):
    image = _noise(24, 17)
    assert np.array_equal(resize(image, size), resize(image, size, same_as))


def test_an_image_of_the_size_is_returned_as_it_is():
    image = _noise(9, 5)
    assert resize(image, (9, 5), "bicubic") is image


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("source", [(1, 1), (1, 7), (50, 3)])
@pytest.mark.parametrize("target", [(1, 1), (3, 20), (64, 64)])
def test_a_plain_image_stays_plain_at_any_size(interpolation, source, target):
    image = np.full((source[1], source[0], 3), (7, 128, 250), dtype=np.uint8)
    made = resize(image, target, interpolation)
    assert made.shape == (target[1], target[0], 3)
    assert np.abs(made.astype(int) - (7, 128, 250)).max() <= 1


def test_pillow_filters_ignore_colours_that_alpha_hides_and_the_others_do_not():
    image = np.zeros((4, 4, 4), dtype=np.uint8)
    image[:, ::2] = (255, 255, 255, 255)
    pillow = np.asarray(Image.fromarray(image).resize((2, 2), Image.Resampling.BOX))
    assert np.array_equal(resize(image, (2, 2), "box"), pillow)
    assert resize(image, (2, 2), "box")[0, 0, 0] == 255
    assert abs(int(resize(image, (2, 2), "area")[0, 0, 0]) - 128) <= 1


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match=r'"lancsos".*Did you mean "lanczos".*bicubic'):
        resize(_noise(4, 4), (2, 2), "lancsos")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (24, [0, 2, 3, 4, 6, 7, 9, 10, 11, 13, 14, 16, 17, 19, 20, 21, 23]),
        (15, [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9, 9, 10, 11, 11, 12, 12, 13, 14, 14]),
    ],
)
def test_nearest_decides_between_two_pixels_as_opencv_does(source, expected):
    """Columns that OpenCV 4.10 takes; where a middle falls between two pixels, torch takes the other one."""
    image = np.repeat(np.arange(source, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert resize(image, (len(expected), 1), "nearest")[0, :, 0].tolist() == expected


def test_area_that_enlarges_decides_between_two_pixels_as_opencv_does():
    """Some of OpenCV 4.10's values for 36 → 51; in column 34, which begins on a source pixel, the left one counts."""
    row = [95, 130, 194, 217, 207, 235, 15, 163, 33, 215, 217, 130, 248, 189, 16, 69, 184, 232]
    row += [205, 78, 169, 61, 125, 10, 29, 240, 66, 19, 182, 39, 59, 4, 59, 81, 222, 44]
    image = np.repeat(np.array(row, dtype=np.uint8)[None, :, None], 3, axis=2)
    made = resize(image, (51, 1), "area")[0, :, 0].astype(int)
    assert np.abs(made[:8] - [95, 115, 141, 194, 211, 214, 207, 233]).max() <= 1
    assert np.abs(made[29:37] - [142, 61, 114, 77, 10, 10, 152, 211]).max() <= 1


@pytest.mark.parametrize("interpolation", [*INTERPOLATIONS, None])
@pytest.mark.parametrize("size", [(30, 20), (90, 10), (70, 61), (33, 45)])
def test_a_window_is_a_part_of_the_whole(size, interpolation):
    image, window = _noise(33, 45), (7, 3, 29, 9)
    part = resize(image, size, interpolation, window)
    assert np.array_equal(part, resize(image, size, interpolation)[3:9, 7:29])


def test_a_window_of_a_long_image_takes_little():
    """The largest that is read: only what is kept of it is made."""
    image = np.zeros((1000, 100_000, 3), dtype=np.uint8)
    window = (25_000, 0, 25_512, 512)
    found = outcome(lambda: resize(image, (51_200, 512), "area", window).shape, seconds=4, memory=2**29)
    assert found == ("ok", "(512, 512, 3)")
