"""The drawn world of the quickstart: same seed, same images; all words of the templates; measures that read it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import measures  # noqa: E402
import world  # noqa: E402

from library.output.concept_distance import concept_distance  # noqa: E402


def drawn(count: int, seed: int) -> list[tuple[world.Scene, str]]:
    rng = random.Random(seed)
    return [world.any_scene(rng) for _ in range(count)]


def test_same_seed_gives_same_images_and_captions() -> None:
    first, second = drawn(20, 5), drawn(20, 5)
    assert [caption for _, caption in first] == [caption for _, caption in second]
    for (one, _), (two, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(world.draw(one), world.draw(two))
    assert drawn(20, 6) != first


def test_images_are_of_one_size_and_of_full_range_colour() -> None:
    picture = world.draw(world.Scene(world.Fill(("white",)), (world.Part("square", "black", (32, 32), 20),)))
    assert picture.shape == (world.SIZE, world.SIZE, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[0, 0], world.COLOURS["white"])
    np.testing.assert_array_equal(picture[world.SIZE // 2, world.SIZE // 2], world.COLOURS["black"])


def test_every_template_sentence_occurs() -> None:
    templates = json.loads((QUICKSTART.parents[1] / "tests/golden/templates.json").read_text())
    assert list(world.OBJECT_SENTENCES) == templates["object"]
    assert list(world.STYLE_SENTENCES) == templates["style"]
    text = "\n".join(caption for _, caption in drawn(4000, 1))
    for template in templates["object"] + templates["style"]:
        assert template.replace("{}", "").rstrip() in text


def test_most_captions_of_objects_name_the_background() -> None:
    captions = [caption for scene, caption in drawn(2000, 2) if scene.parts]
    assert sum("background" in caption for caption in captions) > 0.85 * len(captions)


def test_what_the_concepts_show_never_occurs_in_the_world() -> None:
    for scene, _ in drawn(4000, 3):
        shapes = tuple(part.shape for part in reversed(scene.parts))
        assert shapes not in world.UNSEEN_ROBOTS
        if scene.background.pattern is not None:
            assert frozenset(scene.background.colours) not in world.UNSEEN_PATTERN_COLOURS


@pytest.mark.parametrize("name", ["mychar", "mystyle"])
def test_shipped_concept_images_are_the_drawn_ones(name: str) -> None:
    examples = {"mychar": world.character_concept, "mystyle": world.style_concept}[name]()
    assert 6 <= len(examples) <= 8
    assert len(list((QUICKSTART / name).glob("*.png"))) == len(examples)
    for number, (picture, caption) in enumerate(examples, start=1):
        assert name in caption.split()
        assert (QUICKSTART / name / f"{number}.txt").read_text() == caption + "\n"
        with Image.open(QUICKSTART / name / f"{number}.png") as stored:
            np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), picture)


def test_reader_is_right_on_drawn_objects() -> None:
    rng = random.Random(4)
    for _ in range(200):
        background, colour = rng.sample(list(world.COLOURS), 2)
        shape, radius = rng.choice(world.SHAPES), rng.uniform(14, 24)
        centre = (32 + rng.uniform(-3, 3), 32 + rng.uniform(-3, 3))
        scene = world.Scene(world.Fill((background,)), (world.Part(shape, colour, centre, radius),))
        assert measures.read_plain(world.draw(scene)) == measures.Reading(background, colour, shape)


def test_reader_is_right_on_drawn_robots() -> None:
    rng, wrong, count = random.Random(3), 0, 0
    while count < 200:
        ground, *colours = rng.sample(list(world.COLOURS), 3)
        if world.eye_colour(colours[0]) in (ground, colours[1]):
            continue
        head, body = rng.choice(world.SHAPES), rng.choice(world.SHAPES)
        centre = (32 + rng.uniform(-1, 1), 32 + rng.uniform(-1, 1))
        parts = world.robot(head, body, tuple(colours), centre, rng.uniform(0.96, 1.04))
        picture = world.draw(world.Scene(world.Fill((ground,)), parts))
        wrong += measures.read_robot(picture, ground, *colours) != measures.RobotReading(head, body, True)
        count += 1
    assert wrong <= 2  # a seam between two colours may look like a third


def test_reader_misses_the_eyes_of_a_robot_without() -> None:
    body, head = world.robot("star", "moon", ("yellow", "purple"), (32, 32), 1)
    blind = world.Part(head.shape, head.colour, head.centre, head.radius)
    for face, eyes in ((head, True), (blind, False)):
        picture = world.draw(world.Scene(world.Fill(("blue",)), (body, face)))
        assert measures.read_robot(picture, "blue", "yellow", "purple") == measures.RobotReading("star", "moon", eyes)


def test_reader_takes_objects_at_the_rim() -> None:
    rim = world.Scene(world.Fill(("blue",)), (world.Part("square", "red", (32, 70), 20),))
    reading = measures.read_plain(world.draw(rim))
    assert (reading.background, reading.colour) == ("blue", "red")


def test_reader_knows_when_there_is_nothing_to_read() -> None:
    empty = world.draw(world.Scene(world.Fill(("blue",))))
    assert measures.read_plain(empty) == measures.Reading("blue", None, None)
    noise = np.random.default_rng(0).integers(0, 256, (world.SIZE, world.SIZE, 3)).astype(np.uint8)
    assert measures.read_plain(noise).background is None


def test_concept_distance_and_shape_are_perfect_for_the_concept_itself() -> None:
    pictures = [picture for picture, _ in world.character_concept()]
    assert concept_distance(pictures, pictures) == 0
    assert measures.shape_iou(pictures, pictures) == 1


def test_concept_measures_tell_known_words_from_the_concept() -> None:
    concept = [picture for picture, _ in world.character_concept()]
    stars = [
        world.draw(world.Scene(world.Fill((ground,)), (world.Part("star", "yellow", (32, 32), 20),)))
        for ground in ("white", "blue", "green")
    ]
    moved = [np.roll(picture, 2, axis=1) for picture in concept]
    assert concept_distance(stars, concept) > 3 * concept_distance(moved, concept)
    assert measures.shape_iou(stars, concept) < 0.4
    assert measures.shape_iou(moved, concept) > 0.8
    recoloured = [255 - picture for picture in concept]
    assert measures.shape_iou(recoloured, concept) > 0.95
