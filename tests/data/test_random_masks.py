"""Random masks: each kind's shape, against geometry worked out here and as it was drawn once; how often each comes."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from library.data import random_masks
from library.data.random_masks import clouds, ellipse, polygon, preview_mask, random_mask, rectangle

SIZE = (160, 96)
SEEDS = range(200)

# By kind and seed, what was drawn on 24 x 10 pixels when this was written: a resumed run goes on with the same masks.
PICTURES = {
    ("clouds", 4): """
.....................###
........................
........................
........................
........................
##.....#................
####..##................
#########...............
#########...............
######..................
""",
    ("polygon", 5): """
........................
........................
.............#..........
..........#########.....
..........#########.....
..........#########.....
..........#########.....
.........##########.....
.........#########......
.........#########......
""",
    ("rectangle", 3): """
........................
........................
############............
############............
############............
############............
############............
############............
........................
........................
""",
    ("ellipse", 5): """
........................
........................
........................
........................
..........##########....
........##############..
.......################.
.......################.
.......################.
........##############..
""",
    ("preview_mask", 2): """
........................
........................
........................
........................
.............#####......
...........#########....
..........##########....
...........########.....
........................
........................
""",
}


def drawn(kind, size=SIZE, seeds=SEEDS):
    return np.stack([kind(size, random.Random(seed)) for seed in seeds])


@pytest.mark.parametrize(("name", "seed"), PICTURES)
def test_the_same_seed_draws_the_same_mask_for_ever(name, seed):
    mask = getattr(random_masks, name)((24, 10), random.Random(seed))
    assert "\n".join("".join(".#"[int(hidden)] for hidden in row) for row in mask) == PICTURES[name, seed].strip()


@pytest.mark.parametrize("kind", [clouds, polygon, rectangle, ellipse, preview_mask, random_mask])
@pytest.mark.parametrize("size", [SIZE, (64, 64), (40, 200)])
def test_what_every_mask_is(kind, size):
    masks = drawn(kind, size, range(40))
    assert masks.dtype == bool
    assert masks.shape == (40, size[1], size[0])
    assert masks.any(axis=(1, 2)).all()
    assert not masks.all(axis=(1, 2)).any()
    assert len({mask.tobytes() for mask in masks}) == 40
    assert np.array_equal(masks, drawn(kind, size, range(40)))


def sides(mask):
    """First and last row, and first and last column, of what is hidden."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_rectangles_are_filled_and_have_their_size():
    inside = []
    for mask in drawn(rectangle):
        top, bottom, left, right = sides(mask)
        assert mask[top : bottom + 1, left : right + 1].all()
        assert mask.sum() == (bottom - top + 1) * (right - left + 1)
        if top > 0 and bottom < SIZE[1] - 1 and left > 0 and right < SIZE[0] - 1:
            inside.append(((bottom - top + 1) / SIZE[1], (right - left + 1) / SIZE[0]))
    low, high = math.sqrt(0.1), math.sqrt(0.6)
    assert len(inside) > 20
    assert low - 0.02 < np.min(inside) < low + 0.1
    assert high - 0.2 < np.max(inside) < high + 0.02


def test_ellipses_are_the_largest_within_the_rectangle_of_the_same_draw():
    for seed in SEEDS:
        box, mask = rectangle(SIZE, random.Random(seed)), ellipse(SIZE, random.Random(seed))
        assert not (mask & ~box).any()
        top, bottom, left, right = sides(box)
        if top > 0 and bottom < SIZE[1] - 1 and left > 0 and right < SIZE[0] - 1:
            middle, half = ((top + bottom) / 2, (left + right) / 2), ((bottom - top + 1) / 2, (right - left + 1) / 2)
            rows, columns = np.indices(mask.shape)
            expected = ((rows - middle[0]) / half[0]) ** 2 + ((columns - middle[1]) / half[1]) ** 2 <= 1
            assert (mask != expected).sum() <= 2 * sum(half)  # but for the pixels on the border
            assert mask.sum() == pytest.approx(math.pi / 4 * box.sum(), rel=0.05)


def test_polygons_have_straight_sides_around_their_middle(monkeypatch):
    """Each is what six half-planes make of it: seen from the middle, a corner every 60 degrees or so."""
    corners = []
    original = random_masks.ImageDraw.Draw

    def recorded(mask):
        draw = original(mask)
        polygon_of = draw.polygon
        draw.polygon = lambda points, fill: (corners.append(points), polygon_of(points, fill=fill))
        return draw

    monkeypatch.setattr(random_masks.ImageDraw, "Draw", recorded)
    masks = drawn(polygon, seeds=range(60))
    for mask, points in zip(masks, corners, strict=True):
        rows, columns = np.indices(mask.shape) + 0.5
        inside = np.zeros(mask.shape, dtype=bool)
        for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):  # even-odd rule
            crosses = (y1 > rows) != (y2 > rows)
            inside ^= crosses & (columns < x1 + (rows - y1) * (x2 - x1) / (y2 - y1))
        border = sum(math.dist(a, b) for a, b in zip(points, points[1:] + points[:1], strict=True))
        assert (mask != inside).sum() <= 1.5 * border
        assert len(points) == 6
        area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True)))
        assert 0.02 < area / 2 / math.prod(SIZE) < 0.6
    assert masks.mean(axis=(1, 2)).max() > 0.25


def borders(mask):
    """How many pixels differ from their neighbour on the right or below."""
    return (mask[:, 1:] != mask[:, :-1]).sum() + (mask[1:] != mask[:-1]).sum()


def test_clouds_are_coherent_and_hide_a_tenth_to_three_tenths():
    masks = drawn(clouds)
    shares = masks.mean(axis=(1, 2))
    assert 0.0999 < shares.min() < 0.11
    assert 0.29 < shares.max() < 0.3001
    noise = np.random.default_rng(1)
    for mask in masks[:20]:
        scattered = noise.permuted(mask.ravel()).reshape(mask.shape)
        assert borders(mask) < 0.2 * borders(scattered)
    # Anywhere in the image, a little more often at its edge, where smooth noise goes farthest up and down.
    often = masks.mean(axis=0)
    assert 0.01 < often.min() < often.max() < 0.5


def test_previews_lie_inside():
    masks = drawn(preview_mask)
    assert not masks[:, [0, -1]].any()
    assert not masks[:, :, [0, -1]].any()
    assert 0.1 < masks.mean(axis=(1, 2)).min() < masks.mean(axis=(1, 2)).max() < 0.3


def test_how_often_each_kind_comes_and_what_is_joined(monkeypatch):
    made = []
    for name in ("clouds", "polygon", "rectangle", "ellipse"):
        original = getattr(random_masks, name)

        def recorded(size, rng, name=name, original=original):
            made.append((name, original(size, rng)))
            return made[-1][1]

        monkeypatch.setattr(random_masks, name, recorded)
    counts = Counter()
    for seed in range(2000):
        made.clear()
        mask = random_mask((16, 16), random.Random(seed))
        assert np.array_equal(mask, np.any([part for _, part in made], axis=0))
        counts["+".join(name for name, _ in made)] += 1
    expected = {
        "clouds": 0.40 * 2 / 3,
        "clouds+polygon": 0.40 / 6,
        "clouds+rectangle": 0.40 / 12,
        "clouds+ellipse": 0.40 / 12,
        "polygon": 0.175,
        "polygon+polygon": 0.175,
        "rectangle": 0.125,
        "ellipse": 0.125,
    }
    assert counts.keys() == expected.keys()
    for kinds, share in expected.items():
        spread = math.sqrt(share * (1 - share) / 2000)
        assert abs(counts[kinds] / 2000 - share) < 4 * spread, kinds
