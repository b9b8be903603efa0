"""The small world that the miniature models know: coloured shapes, robots, patterns, 128 × 128 pixels, with captions.

Everything is drawn here, from a ``random.Random``: the same seed gives the same pictures and captions. ``measures.py``
reads such pictures back. It needs numpy and Pillow only.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).parents[2]))  # the scripts beside this file are run without being installed

# The models are to know every word of Textual Inversion's templates, so these are the world's own sentences. The first
# of each list is drawn as often as all the others together.
from library.data.captions import OBJECT_TEMPLATES as OBJECT_SENTENCES
from library.data.captions import STYLE_TEMPLATES as STYLE_SENTENCES

SIZE = 128  # pixels along one side of a picture
UNITS = 64  # the same side in the units of this file, which all centres, radii and periods are given in
_FINE = 4  # outlines are drawn this many times larger and then averaged

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 70),
    "green": (40, 160, 70),
    "blue": (45, 90, 215),
    "purple": (140, 60, 170),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PATTERNS = ("stripes", "checks", "dots", "waves")
PATTERN_ADJECTIVES = {"stripes": "striped", "checks": "checked", "dots": "dotted", "waves": "wavy"}

# Pairings that never occur while the models learn: nothing the models know names them. The concepts are made of these.
UNSEEN_ROBOTS = frozenset({("ring", "cross"), ("moon", "star"), ("star", "moon"), ("cross", "ring")})
UNSEEN_PATTERN_COLOURS = frozenset({frozenset({"purple", "orange"}), frozenset({"green", "yellow"})})


@dataclass(frozen=True)
class Fill:
    """What covers the background: one colour, or a pattern of two. ``phase`` is the offset in units (x, y)."""

    colours: tuple[str, ...]
    pattern: str | None = None
    phase: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Part:
    """One shape: its centre (x, y) and radius in units. ``eyes`` adds two dots, ``turn`` rotates (degrees)."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float
    eyes: bool = False
    turn: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A whole picture: parts from back to front on a background; ``light`` < 1 darkens and > 1 brightens it."""

    background: Fill
    parts: tuple[Part, ...] = ()
    light: float = 1.0
    speckles: int = 0
    speckle_seed: int = field(default=0, repr=False)


# --- drawing --------------------------------------------------------------------------------------------------------


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit circle, y pointing down."""
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
    if shape == "star":
        spikes = [(math.pi * i / 5 - math.pi / 2, 1.05 if i % 2 == 0 else 0.45) for i in range(10)]
        return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in spikes]
    if shape == "cross":
        a, b = 0.32, 0.98
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "heart":
        angles = [2 * math.pi * i / 48 for i in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in angles
        ]
    raise ValueError(f"There is no shape called {shape!r}.")


def shape_mask(part: Part) -> np.ndarray:
    """How far each pixel is covered by ``part``: float32 [SIZE, SIZE] in [0, 1]."""
    canvas = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
    pen = ImageDraw.Draw(canvas)
    x, y, r = (SIZE * _FINE / UNITS * value for value in (*part.centre, part.radius))

    def disc(cx: float, cy: float, radius: float, ink: int) -> None:
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=ink)

    if part.shape in ("circle", "ring", "moon"):
        disc(x, y, 0.95 * r, 255)
        if part.shape == "ring":
            disc(x, y, 0.52 * r, 0)
        if part.shape == "moon":
            disc(x + 0.5 * r, y - 0.15 * r, 0.75 * r, 0)
    else:
        cos, sin = math.cos(math.radians(part.turn)), math.sin(math.radians(part.turn))
        pen.polygon(
            [(x + r * (cos * u - sin * v), y + r * (sin * u + cos * v)) for u, v in _outline(part.shape)], fill=255
        )
    return np.asarray(canvas.reduce(_FINE), np.float32) / 255


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    fine = (np.arange(SIZE * _FINE, dtype=np.float32) + 0.5) * UNITS / (SIZE * _FINE)
    return np.meshgrid(fine, fine)


@cache
def pattern_mask(pattern: str, phase: tuple[int, int]) -> np.ndarray:
    """Where the second colour of a pattern lies: float32 [SIZE, SIZE] in [0, 1]. The period is 16 units."""
    x, y = _grid()
    x, y = x + phase[0], y + phase[1]
    if pattern == "stripes":
        second = y % 16 >= 8
    elif pattern == "checks":
        second = (x % 16 >= 8) != (y % 16 >= 8)
    elif pattern == "dots":
        second = (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 4.6**2
    elif pattern == "waves":
        second = (x + 4 * np.sin(2 * math.pi * y / 32)) % 16 >= 8
    else:
        raise ValueError(f"There is no pattern called {pattern!r}.")
    fine = second.astype(np.float32).reshape(SIZE, _FINE, SIZE, _FINE)
    return fine.mean(axis=(1, 3))


def _colour(name: str) -> np.ndarray:
    return np.asarray(COLOURS[name], np.float32)


def _cover(picture: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
    return picture + mask[..., None] * (_colour(colour) - picture)


def eye_colour(head: str) -> str:
    """The colour of the eyes on a head of this colour."""
    return "white" if sum(COLOURS[head]) < 330 else "black"


def draw(scene: Scene) -> np.ndarray:
    """The scene as uint8 [SIZE, SIZE, 3]."""
    picture = np.broadcast_to(_colour(scene.background.colours[0]), (SIZE, SIZE, 3)).copy()
    if scene.background.pattern is not None:
        mask = pattern_mask(scene.background.pattern, scene.background.phase)
        picture = _cover(picture, mask, scene.background.colours[1])
    for part in scene.parts:
        picture = _cover(picture, shape_mask(part), part.colour)
        if part.eyes:
            ink = eye_colour(part.colour)
            for side in (-1, 1):
                eye = (part.centre[0] + side * 0.34 * part.radius, part.centre[1] - 0.05 * part.radius)
                picture = _cover(picture, shape_mask(Part("circle", ink, eye, 0.24 * part.radius)), ink)
    if scene.speckles:
        dust = random.Random(scene.speckle_seed)
        for _ in range(scene.speckles):
            speck = Part("circle", "black", (dust.uniform(0, UNITS), dust.uniform(0, UNITS)), dust.uniform(0.6, 1.4))
            picture = _cover(picture, 0.6 * shape_mask(speck), "black")
    if scene.light < 1:
        picture = picture * scene.light
    elif scene.light > 1:
        picture = 255 - (255 - picture) / scene.light
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# --- what happens in the world --------------------------------------------------------------------------------------


def robot(
    head: str, body: str, colours: tuple[str, str], centre: tuple[float, float], scale: float
) -> tuple[Part, Part]:
    """A figure of two shapes, 52 units tall at scale 1: a head with eyes above a body; colours (head, body)."""
    x, y = centre
    body_part = Part(body, colours[1], (x, y + 10.5 * scale), 16 * scale)
    head_part = Part(head, colours[0], (x, y - 14 * scale), 12 * scale, eyes=True)
    return body_part, head_part


def robot_words(head: str, body: str, colours: tuple[str, str]) -> str:
    """What a caption that names a robot fully says of it; colours (head, body)."""
    return f"robot with a {colours[0]} {head} head and a {colours[1]} {body} body"


def _sentence(rng: random.Random, sentences: Sequence[str]) -> str:
    return sentences[0] if rng.random() < 0.5 else rng.choice(sentences)


def _ground_words(fill: Fill) -> str:
    if fill.pattern is None:
        return fill.colours[0]
    return f"{fill.colours[0]} and {fill.colours[1]} {PATTERN_ADJECTIVES[fill.pattern]}"


def _pattern_fill(rng: random.Random) -> Fill:
    while True:
        colours = tuple(rng.sample(list(COLOURS), 2))
        if frozenset(colours) not in UNSEEN_PATTERN_COLOURS:
            return Fill(colours, rng.choice(PATTERNS), (8 * rng.randrange(2), 8 * rng.randrange(2)))


def _background(rng: random.Random) -> Fill:
    return _pattern_fill(rng) if rng.random() < 0.1 else Fill((rng.choice(list(COLOURS)),))


def _free_colour(rng: random.Random, taken: Sequence[str]) -> str:
    return rng.choice([name for name in COLOURS if name not in taken])


def _scale_of(sentence: str, rng: random.Random) -> float:
    """The words of a sentence decide how large the object is."""
    if "small" in sentence:
        return rng.uniform(0.5, 0.6)
    if "large" in sentence:
        return rng.uniform(1.2, 1.3)
    if "close-up" in sentence:
        return rng.uniform(1.5, 1.7)
    return rng.uniform(0.96, 1.04)


def _centre_of(sentence: str, rng: random.Random) -> tuple[float, float]:
    spread = 14 if "cropped" in sentence else 1
    return 32 + rng.uniform(-spread, spread), 32 + rng.uniform(-spread, spread)


def _mood(sentence: str, rng: random.Random) -> dict[str, float | int]:
    if "dark" in sentence:
        return {"light": 0.65}
    if "bright" in sentence:
        return {"light": 1.4}
    if "dirty" in sentence:
        return {"speckles": 14, "speckle_seed": rng.randrange(2**31)}
    return {}


def _with_ground(sentence: str, words: str, fill: Fill, rng: random.Random) -> str:
    """Fill a sentence; the background is named in nine of ten, now and then as a list of tags."""
    named = rng.random() < 0.9
    if rng.random() < 0.12 and sentence == OBJECT_SENTENCES[0]:
        return f"{words}, {_ground_words(fill)} background" if named else words
    caption = sentence.format(words)
    return f"{caption} on a {_ground_words(fill)} background" if named else caption


def plain_scene(rng: random.Random) -> tuple[Scene, str]:
    """One shape of one colour on a background, with its caption."""
    sentence = _sentence(rng, OBJECT_SENTENCES)
    fill = _background(rng)
    shape, colour = rng.choice(SHAPES), _free_colour(rng, fill.colours)
    turn = rng.choice((-35, 35)) if "weird" in sentence else 0
    part = Part(shape, colour, _centre_of(sentence, rng), 20 * _scale_of(sentence, rng), turn=turn)
    chance = rng.random()
    words = f"{colour} {shape}" if chance < 0.86 else shape if chance < 0.93 else f"{colour} object"
    return Scene(fill, (part,), **_mood(sentence, rng)), _with_ground(sentence, words, fill, rng)


def robot_scene(rng: random.Random) -> tuple[Scene, str]:
    """A robot of two shapes; its caption names it more or less fully."""
    sentence = _sentence(rng, OBJECT_SENTENCES)
    fill = _background(rng)
    head_colour = _free_colour(rng, fill.colours)
    body_colour = _free_colour(rng, (*fill.colours, head_colour))
    head, body = rng.choice(SHAPES), rng.choice(SHAPES)
    while (head, body) in UNSEEN_ROBOTS:
        head, body = rng.choice(SHAPES), rng.choice(SHAPES)
    parts = robot(head, body, (head_colour, body_colour), _centre_of(sentence, rng), _scale_of(sentence, rng))
    chance = rng.random()
    if chance < 0.65:
        words = robot_words(head, body, (head_colour, body_colour))
    elif chance < 0.8:
        words = f"{head_colour} and {body_colour} robot"
    else:
        words = "robot"
    return Scene(fill, parts, **_mood(sentence, rng)), _with_ground(sentence, words, fill, rng)


def style_scene(rng: random.Random) -> tuple[Scene, str]:
    """A pattern over the whole picture, as "in the style of red and white stripes"."""
    sentence = _sentence(rng, STYLE_SENTENCES)
    fill = _pattern_fill(rng)
    words = fill.pattern if rng.random() < 0.15 else f"{fill.colours[0]} and {fill.colours[1]} {fill.pattern}"
    return Scene(fill, **_mood(sentence, rng)), sentence.format(words)


def any_scene(rng: random.Random) -> tuple[Scene, str]:
    """A picture of the world the models are trained on: objects, robots and patterns, 4 : 4 : 2."""
    return rng.choices((plain_scene, robot_scene, style_scene), (4, 4, 2))[0](rng)


# --- the concepts ---------------------------------------------------------------------------------------------------


def character_concept() -> list[tuple[np.ndarray, str]]:
    """Eight pictures of the character ``mychar``, a robot with a yellow star as head and a purple moon as body."""
    rng = random.Random(7)
    backgrounds = ("white", "blue", "green", "red", "black", "orange", "white", "blue")
    # Varied, lest the word learn to need a certain sentence around it.
    subjects = ("a photo of mychar", "mychar", "a photo of mychar", "a rendering of mychar") * 2
    examples = []
    for background, subject in zip(backgrounds, subjects, strict=True):
        parts = robot("star", "moon", ("yellow", "purple"), _centre_of("", rng), _scale_of("", rng))
        caption = f"{subject} on a {background} background"
        examples.append((draw(Scene(Fill((background,)), parts)), caption))
    return examples


def style_concept() -> list[tuple[np.ndarray, str]]:
    """Eight pictures in the style ``mystyle``, waves of purple and orange: every position of the pattern twice."""
    fills = [
        Fill(colours, "waves", (x, y))
        for colours in (("purple", "orange"), ("orange", "purple"))
        for x in (0, 8)
        for y in (0, 8)
    ]
    return [(draw(Scene(fill)), "a painting in the style of mystyle") for fill in fills]
