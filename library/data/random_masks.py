"""Random masks for inpainting: clouds, polygons, rectangles and ellipses, alone and joined.

Masks are bool [height, width], True where the image is hidden, to be painted anew. Sizes are (width, height). All
chance comes from the ``random.Random`` that is passed in. The kinds, their shares and their sizes are sd-scripts'; the
shapes are drawn in a way of our own.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from library.data.buckets import Size

# Of the image's area: the least and the most that one shape has (as far as it lies within), and that clouds have.
_SHAPE_SHARES = 0.1, 0.6
_CLOUD_SHARES = 0.1, 0.3
_CORNERS = 6
_DENT = 0.4  # how much nearer than others a corner may be to the middle
_OCTAVES = 4
_COARSEST = 4  # cells of the coarsest clouds, along the longer side


def random_mask(size: Size, rng: random.Random) -> np.ndarray:
    """Clouds in 40 % of the calls (a third of them with another shape), one or two polygons in 35 %, else one shape."""
    kind = rng.choices(("clouds", "polygons", "one shape"), weights=(40, 35, 25))[0]
    if kind == "clouds":
        mask = clouds(size, rng)
        return mask | rng.choice((polygon, box_shape))(size, rng) if rng.random() < 1 / 3 else mask
    if kind == "polygons":
        mask = polygon(size, rng)
        return mask | polygon(size, rng) if rng.random() < 0.5 else mask
    return box_shape(size, rng)


def clouds(size: Size, rng: random.Random) -> np.ndarray:
    """The highest tenth to three tenths of a landscape of smooth noise: finer and finer layers, each half as high."""
    share = rng.uniform(*_CLOUD_SHARES)
    heights = np.random.default_rng(rng.getrandbits(64))
    landscape = np.zeros((size[1], size[0]), dtype=np.float32)
    for octave in range(_OCTAVES):
        cell = max(size) / (_COARSEST * 2**octave)
        columns, rows = (max(2, round(side / cell)) for side in size)
        layer = Image.fromarray(heights.random((rows, columns), dtype=np.float32))
        landscape += np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    return landscape >= np.quantile(landscape, 1 - share)


def polygon(size: Size, rng: random.Random) -> np.ndarray:
    """An uneven polygon around a place anywhere in the image."""
    x, y = _place(size, rng)
    radius = math.sqrt(rng.uniform(*_SHAPE_SHARES) * size[0] * size[1] / math.pi)
    corners = []
    for number in range(_CORNERS):
        angle = 2 * math.pi * (number + rng.random()) / _CORNERS
        reach = radius * rng.uniform(1 - _DENT, 1)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    return np.array(mask)


def box_shape(size: Size, rng: random.Random) -> np.ndarray:
    """A rectangle or an ellipse."""
    return rng.choice((rectangle, ellipse))(size, rng)


def rectangle(size: Size, rng: random.Random) -> np.ndarray:
    """An upright rectangle around a place anywhere in the image."""
    across, down = _distances(size, _place(size, rng), _half_sides(size, rng))
    return (across <= 1) & (down <= 1)


def ellipse(size: Size, rng: random.Random) -> np.ndarray:
    """An upright ellipse around a place anywhere in the image."""
    across, down = _distances(size, _place(size, rng), _half_sides(size, rng))
    inside: np.ndarray = across**2 + down**2 <= 1
    return inside


def preview_mask(size: Size, rng: random.Random) -> np.ndarray:
    """An ellipse of about a fifth of the image, well inside: what a sample prompt without a mask hides."""
    middle = (size[0] * rng.uniform(0.35, 0.65), size[1] * rng.uniform(0.35, 0.65))
    half_sides = (size[0] * rng.uniform(0.2, 0.3), size[1] * rng.uniform(0.2, 0.3))
    across, down = _distances(size, middle, half_sides)
    inside: np.ndarray = across**2 + down**2 <= 1
    return inside


def _place(size: Size, rng: random.Random) -> tuple[float, float]:
    return rng.uniform(0, size[0]), rng.uniform(0, size[1])


def _half_sides(size: Size, rng: random.Random) -> tuple[float, float]:
    least, most = (math.sqrt(share) / 2 for share in _SHAPE_SHARES)
    return size[0] * rng.uniform(least, most), size[1] * rng.uniform(least, most)


def _distances(size: Size, middle: tuple[float, float], half_sides: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """How far the middles of columns [1, width] and rows [height, 1] are from a place, as shares of the half sides."""
    columns, rows = (
        np.abs(np.arange(side) + 0.5 - place) / half for side, place, half in zip(size, middle, half_sides, strict=True)
    )
    return columns[None], rows[:, None]
