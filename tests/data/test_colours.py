"""--color_aug: hues and gammas, compared with the standard library's own conversion."""

import colorsys
import random

import numpy as np
import pytest

from library.data.colours import color_augment, shift_gamma, shift_hue


def test_gamma_keeps_black_and_white_and_bends_the_middle():
    grey = np.array([[[0, 128, 255]]], dtype=np.uint8)
    assert shift_gamma(grey, 1.05).tolist() == [[[0, 124, 255]]]
    assert shift_gamma(grey, 0.95).tolist() == [[[0, 132, 255]]]


@pytest.mark.parametrize("degrees", [-16.0, 0.0, 7.5, 120.0])
def test_the_hue_is_turned_as_colorsys_does(degrees):
    pixels = np.vstack(
        [np.random.default_rng(0).integers(0, 256, (45, 3)), [[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 0]]]
    )
    made = shift_hue(pixels[None].astype(np.uint8), degrees)[0]
    for pixel, result in zip(pixels, made, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)) * 255
        assert np.abs(result - expected).max() <= 1


def test_a_third_of_the_images_is_augmented_half_by_hue_half_by_gamma():
    rng, coloured = random.Random(0), np.array([[[200, 100, 50]]], dtype=np.uint8)
    made = [color_augment(coloured, rng)[0, 0].tolist() for _ in range(3000)]
    same = made.count([200, 100, 50]) / 3000
    by_hue = sum(pixel[0] == 200 and pixel[2] == 50 and pixel[1] != 100 for pixel in made) / 3000
    assert 0.66 < same < 0.72
    assert 0.12 < by_hue < 0.18
    assert np.abs(np.array(made) - [200, 100, 50]).max() < 45
    assert len({tuple(color_augment(np.full((1, 1, 3), 255, np.uint8), rng)[0, 0]) for _ in range(50)}) == 1
