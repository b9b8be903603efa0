"""Draws small "photographs" with captions, the same ones every time."""

import random
from pathlib import Path

from PIL import Image, ImageDraw


def make_photos(
    folder: Path, count: int = 4, size: tuple[int, int] = (96, 80), caption: str | None = "a photo of mychar"
) -> list[Path]:
    """Write ``photo_1.png`` … with ``photo_1.txt`` … (no caption files when ``caption`` is None); return the images.

    Each image is a coloured ground with an ellipse and a box, so images differ and have edges.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_make_photo(folder / f"photo_{number}.png", number, size, caption) for number in range(1, count + 1)]


def _make_photo(file: Path, number: int, size: tuple[int, int], caption: str | None) -> Path:
    rng = random.Random(number)
    width, height = size
    image = Image.linear_gradient("L").resize(size)
    shades = [rng.randrange(256) for _ in range(3)]
    image = Image.merge("RGB", [image.point([(v + shade) // 2 for v in range(256)]) for shade in shades])
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle):
        left, top = rng.randrange(width // 2), rng.randrange(height // 2)
        colour = tuple(rng.randrange(256) for _ in range(3))
        shape((left, top, left + width // 3, top + height // 3), fill=colour)
    image.save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return file
