"""Eight concepts that the miniatures have never seen: half for choosing recipes, half to look at once, at the end."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "configs" / "quickstart"))

import measures
import world

TOKEN = "mychar"
IMAGES, FRESH = 8, 16
_SUBJECTS = ("a photo of {}", "{}", "a photo of {}", "a rendering of {}")
# What no concept of objects is made of, so that a prompt can ask for it.
ASKED_COLOUR = "green"
ASKED_GROUNDS = (("red", "white", "stripes"), ("black", "white", "checks"))


@dataclass(frozen=True)
class Concept:
    """What a token is to mean: ``parts`` draws the object at a place, ``patterns`` are those of a style.

    ``init_word`` is the word that a user would start from; ``colours`` are those of the object.
    """

    name: str
    init_word: str
    choosing: bool
    colours: tuple[str, ...]
    parts: Callable[[tuple[float, float], float], tuple[world.Part, ...]] | None = None
    patterns: tuple[str, ...] = ()

    @property
    def is_style(self) -> bool:
        """Whether it is a pattern of two colours, and no object."""
        return self.parts is None

    def training_images(self) -> list[tuple[np.ndarray, str]]:
        """Images uint8 [SIZE, SIZE, 3] with captions that hold the token."""
        return self._scenes(IMAGES, random.Random(f"{self.name} to train on"))

    def fresh_images(self) -> list[tuple[np.ndarray, str]]:
        """Other images of the same, on other backgrounds and at other places; of a style, the same few."""
        return self._scenes(FRESH, random.Random(f"{self.name} afresh"))

    def composition(self) -> list[str]:
        """16 prompts that put the concept where it has not been: on patterned backgrounds, in another colour."""
        if self.is_style:
            shapes = ("circle", "star", "square", "heart") * 4
            return [f"a photo of a red {shape} on a {TOKEN} background" for shape in shapes]
        grounds = [
            f"a photo of {TOKEN} on a {one} and {two} {world.PATTERN_ADJECTIVES[pattern]} background"
            for one, two, pattern in ASKED_GROUNDS
        ]
        return grounds * 4 + [f"a photo of a {ASKED_COLOUR} {TOKEN} on a white background"] * 8

    def composed(self, pictures: Sequence[np.ndarray]) -> float:
        """How much of what the prompts of ``composition`` add is in the images: 0 to 1."""
        if self.is_style:
            grounds = [shares(measures.border(picture, 8), self.colours) for picture in pictures]
            things = [float(near(centre(picture), "red").mean()) for picture in pictures]
            return float(np.mean([0.5 * ground + 0.5 * thing for ground, thing in zip(grounds, things, strict=True)]))
        found = [
            shares(measures.border(picture, 8), ASKED_GROUNDS[number % 2][:2])
            for number, picture in enumerate(pictures[:8])
        ]
        for picture in pictures[8:]:
            mask = measures.object_mask(picture)
            found.append(float(near(picture[mask], ASKED_COLOUR).mean()) if mask.any() else 0.0)
        return float(np.mean(found))

    def _scenes(self, count: int, rng: random.Random) -> list[tuple[np.ndarray, str]]:
        return [self._scene(number, rng) for number in range(count)]

    def _scene(self, number: int, rng: random.Random) -> tuple[np.ndarray, str]:
        if self.parts is None:
            colours = self.colours if number % 2 else self.colours[::-1]
            phase = (8 * (number // 2 % 2), 8 * (number // 4 % 2))
            fill = world.Fill(colours, self.patterns[number % len(self.patterns)], phase)
            return world.draw(world.Scene(fill)), f"a painting in the style of {TOKEN}"
        ground = rng.choice([name for name in world.COLOURS if name not in self.colours])
        place = (32 + rng.uniform(-1, 1), 32 + rng.uniform(-1, 1))
        scene = world.Scene(world.Fill((ground,)), self.parts(place, rng.uniform(0.96, 1.04)))
        subject = _SUBJECTS[number % len(_SUBJECTS)].format(TOKEN)
        return world.draw(scene), f"{subject} on a {ground} background"


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Which of the pixels [..., 3] are near to a named colour (60 of 255, root mean square)."""
    away = pixels.astype(np.float32) - np.asarray(world.COLOURS[colour], np.float32)
    return np.sqrt(np.mean(away**2, axis=-1)) < 60


def shares(pixels: np.ndarray, colours: Sequence[str]) -> float:
    """1 where half of the pixels have the one colour and half the other, 0 where either is missing."""
    return min(1.0, 2 * min(float(near(pixels, colour).mean()) for colour in colours))


def centre(picture: np.ndarray) -> np.ndarray:
    """The middle quarter of a picture's width and height, where an object covers all."""
    begin, end = world.SIZE * 3 // 8, world.SIZE * 5 // 8
    return picture[begin:end, begin:end]


def _robot(head: str, body: str, colours: tuple[str, str]) -> Callable[..., tuple[world.Part, ...]]:
    return lambda place, scale: world.robot(head, body, colours, place, scale)


def _thing(*parts: tuple[str, str, float, float, bool], turn: float = 0.0) -> Callable[..., tuple[world.Part, ...]]:
    """Shapes one on another: shape, colour, height above the middle, radius, eyes."""

    def placed(place: tuple[float, float], scale: float) -> tuple[world.Part, ...]:
        return tuple(
            world.Part(shape, colour, (place[0], place[1] - up * scale), radius * scale, eyes, turn)
            for shape, colour, up, radius, eyes in parts
        )

    return placed


CONCEPTS = (
    Concept("star-headed moon", "star", True, ("yellow", "purple"), _robot("star", "moon", ("yellow", "purple"))),
    Concept("ring-headed cross", "ring", True, ("orange", "blue"), _robot("ring", "cross", ("orange", "blue"))),
    Concept("leaning heart with eyes", "heart", True, ("red",), _thing(("heart", "red", 0, 22, True), turn=35)),
    Concept("waves of purple and orange", "waves", True, ("purple", "orange"), patterns=("waves",)),
    Concept("moon-headed star", "moon", False, ("white", "blue"), _robot("moon", "star", ("white", "blue"))),
    Concept("cross-headed ring", "cross", False, ("red", "black"), _robot("cross", "ring", ("red", "black"))),
    Concept(
        "circle in a square",
        "square",
        False,
        ("purple", "yellow"),
        _thing(("square", "purple", 0, 22, False), ("circle", "yellow", 4, 11, True)),
    ),
    Concept("green and yellow checks", "checks", False, ("green", "yellow"), patterns=("checks",)),
)
