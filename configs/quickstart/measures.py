"""What a picture of the small world shows, and how near pictures are to a concept.

Pictures are uint8 [SIZE, SIZE, 3] throughout (``world.SIZE``). How far they are from a concept in colour is
``library.output.concept_distance``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import world
from PIL import Image


@dataclass(frozen=True)
class Reading:
    """What a picture of one plain object shows; ``None`` where nothing fits."""

    background: str | None
    colour: str | None
    shape: str | None


def _main_colour(pixels: np.ndarray) -> str | None:
    """The named colour that most of the pixels [n, 3] are near to (60 of 255); None where there is no such colour."""
    palette = np.asarray(list(world.COLOURS.values()), np.float32)
    distances = np.sqrt(np.mean((pixels.astype(np.float32)[:, None] - palette) ** 2, axis=2))
    near = (distances.argmin(axis=1)[:, None] == np.arange(len(palette))) & (distances < 60)
    shares = near.sum(axis=0)
    best = int(shares.argmax())
    return list(world.COLOURS)[best] if 2 * shares[best] > len(pixels) else None


def border(picture: np.ndarray, part: int = 16) -> np.ndarray:
    """The outermost pixels of a picture, a ``part``-th of its side wide: float32 [n, 3]."""
    frame, wide = np.ones(picture.shape[:2], bool), world.SIZE // part
    frame[wide:-wide, wide:-wide] = False
    return picture[frame].astype(np.float32)


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Each pixel as most of the 3 × 3 pixels around it."""
    padded = np.pad(mask, 1, mode="edge").astype(int)
    height, width = mask.shape
    return sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) >= 5


def _differs(picture: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Root mean square difference of each pixel from a colour: float32 [SIZE, SIZE]."""
    return np.sqrt(np.mean((picture.astype(np.float32) - colour) ** 2, axis=2))


def object_mask(picture: np.ndarray) -> np.ndarray:
    """Where the picture (uint8 [SIZE, SIZE, 3]) differs from its background, the middle colour of its border: bool."""
    return _without_specks(_differs(picture, np.median(border(picture), axis=0)) > 30)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what a mask covers; a few stray pixels do not count."""
    least = world.SIZE // 32
    columns, rows = np.flatnonzero(mask.sum(axis=0) >= least), np.flatnonzero(mask.sum(axis=1) >= least)
    if len(columns) == 0 or len(rows) == 0:
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _stretched(mask: np.ndarray) -> np.ndarray:
    """What a mask covers, brought to 32 × 32 with its proportions kept: float32 in [0, 1]."""
    left, top, right, bottom = _box(mask)
    side = max(right - left, bottom - top, 1)
    # A margin all around, since a square box around a flat object may stick out of the picture.
    x, y = (left + right - side) / 2 + world.SIZE, (top + bottom - side) / 2 + world.SIZE
    image = Image.fromarray(np.pad(mask, world.SIZE).astype(np.uint8) * 255)
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX, (x, y, x + side, y + side)), np.float32) / 255


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks with values in [0, 1]."""
    union = float(np.maximum(first, second).sum())
    return float(np.minimum(first, second).sum()) / union if union else 0.0


@cache
def _shape_template(shape: str) -> np.ndarray:
    return _stretched(world.shape_mask(world.Part(shape, "white", (32, 32), 20)) > 0.5)


def _best_shape(outline: np.ndarray, templates: dict[str, np.ndarray]) -> str | None:
    """The shape whose template agrees best with an outline; None where none fits."""
    scores = {shape: _agreement(outline, template) for shape, template in templates.items()}
    best = max(scores, key=scores.get)
    return best if scores[best] > 0.6 else None


def read_plain(picture: np.ndarray) -> Reading:
    """Background, object colour and shape of a picture (uint8 [SIZE, SIZE, 3]) of one object on a plain ground."""
    background = _main_colour(border(picture))
    mask = object_mask(picture)
    if mask.mean() < 0.005:
        return Reading(background, None, None)
    ground, ink = np.median(border(picture), axis=0), np.median(picture[mask], axis=0)
    outline = _stretched(_without_specks(_differs(picture, ink) < _differs(picture, ground)))
    templates = {shape: _shape_template(shape) for shape in world.SHAPES}
    return Reading(background, _main_colour(picture[mask]), _best_shape(outline, templates))


@dataclass(frozen=True)
class RobotReading:
    """What a picture of one robot shows: the shapes of its parts (``None`` where nothing fits), and two eyes or not."""

    head: str | None
    body: str | None
    eyes: bool


def _robot_masks(picture: np.ndarray, colours: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where head with eyes, body, and eyes alone are: each pixel is what of ``colours`` it is nearest to.

    Colours are the background's, the head's, the body's and the eyes'. Heads are looked for above, bodies below: seams
    between two colours can look like a third.
    """
    palette = np.asarray([world.COLOURS[name] for name in colours], np.float32)
    nearest = ((picture.astype(np.float32)[..., None, :] - palette) ** 2).sum(axis=3).argmin(axis=2)
    height = np.arange(world.SIZE)[:, None] / world.SIZE
    above, below = height < 0.56, height > 0.36
    eyes = above & (nearest == 3)
    return _without_specks(eyes | (above & (nearest == 1))), _without_specks(below & (nearest == 2)), eyes


@cache
def _robot_templates(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Outlines of a head and of a body of this shape."""
    colours = ("green", "red", "blue", world.eye_colour("red"))
    templates = []
    for part, (head, body) in enumerate(((shape, "circle"), ("circle", shape))):
        parts = world.robot(head, body, ("red", "blue"), (32, 32), 1)
        drawn = world.draw(world.Scene(world.Fill(("green",)), parts))
        templates.append(_stretched(_robot_masks(drawn, colours)[part]))
    return templates[0], templates[1]


def _two_blots(mask: np.ndarray) -> bool:
    """Whether a mask's columns fall into two parts, of three pixels a column and more."""
    filled = np.pad((mask.sum(axis=0) >= 3).astype(int), 1)
    return int((np.diff(filled) == 1).sum()) == 2


def read_robot(picture: np.ndarray, background: str, head: str, body: str) -> RobotReading:
    """The parts of a robot (uint8 [SIZE, SIZE, 3]) whose colours are known.

    The colour of its eyes must not be the background's or the body's.
    """
    masks = _robot_masks(picture, (background, head, body, world.eye_colour(head)))
    shapes: list[str | None] = []
    for part, mask in enumerate(masks[:2]):
        templates = {shape: _robot_templates(shape)[part] for shape in world.SHAPES}
        shapes.append(_best_shape(_stretched(mask), templates) if mask.mean() > 0.005 else None)
    return RobotReading(shapes[0], shapes[1], _two_blots(masks[2]))


def shape_iou(pictures: Sequence[np.ndarray], concept: Sequence[np.ndarray]) -> float:
    """How well the outlines of generated pictures agree with a concept's, whatever the colours: mean best IoU."""
    targets = [object_mask(picture).astype(np.float32) for picture in concept]
    best = [max(_agreement(object_mask(picture).astype(np.float32), mask) for mask in targets) for picture in pictures]
    return float(np.mean(best))
