"""Thumbnails: data URIs that can be read, crops that are dimmed, and no error for a file that is none."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from library.output.thumbnails import Thumbnails


def opened(uri: str) -> np.ndarray:
    assert uri.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


def test_large_images_shrink_and_tiny_ones_grow(tmp_path):
    for name, size in (("large", (900, 300)), ("tiny", (16, 8))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / f"{name}.png")
    assert opened(Thumbnails().of(tmp_path / "large.png", 300)).shape == (100, 300, 3)
    assert opened(Thumbnails().of(tmp_path / "tiny.png", 320)).shape == (160, 320, 3)


def test_what_a_crop_takes_away_is_dimmed(tmp_path):
    Image.new("RGB", (200, 100), (255, 0, 0)).save(tmp_path / "a.png")
    pixels = opened(Thumbnails().of(tmp_path / "a.png", 200, (0.25, 0.0, 0.75, 1.0)))
    assert pixels[50, 100] == pytest.approx([254, 0, 0], abs=4)
    for column in (20, 180):
        assert abs(pixels[50, column] - 128).max() < 60


def test_transparent_images_stand_on_white_and_turned_ones_upright(tmp_path):
    Image.new("RGBA", (100, 100), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert opened(Thumbnails().of(tmp_path / "clear.png", 100)).min() > 250
    turned = Image.new("RGB", (100, 50))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert opened(Thumbnails().of(tmp_path / "turned.jpg", 100)).shape[:2] == (100, 50)


def test_what_cannot_be_read_is_none(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert Thumbnails().of(tmp_path / "broken.png", 100) is None
    assert Thumbnails().of(tmp_path / "missing.png", 100) is None


def test_only_the_formats_of_images_are_opened(tmp_path):
    """Whatever a name ends in: others of Pillow's readers start programs."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    assert Thumbnails().of(tmp_path / "a.png", 64) is None
