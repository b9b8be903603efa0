"""Small images as data URIs, so that a page holds all that it shows."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from library.data.images import opened_image

Box = tuple[float, float, float, float]
_QUALITY = 82


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG in a URI."""
    content = io.BytesIO()
    image.convert("RGB").save(content, format="jpeg", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


class Thumbnails:
    """Makes thumbnails of files, each once: they are expected not to change."""

    def __init__(self) -> None:
        self._made: dict[tuple[Path, int], str | None] = {}

    def of(self, path: Path, side: int, kept: Box | None = None) -> str | None:
        """The image at ``path``, at most ``side`` pixels wide and high, as a data URI; None if it cannot be read.

        ``kept`` is the part that a crop leaves, as shares of width and height (left, top, right, bottom); the rest is
        dimmed.
        """
        if (path, side) not in self._made:
            self._made[path, side] = _thumbnail(path, side, kept)
        return self._made[path, side]


def _thumbnail(path: Path, side: int, kept: Box | None) -> str | None:
    small = small_image(path, side)
    if small is None:
        return None
    small = _enlarged(small, side) if max(small.size) < side else small
    return data_uri(_dimmed(small, kept) if kept else small)


def small_image(path: Path, side: int) -> Image.Image | None:
    """The image at ``path``, upright and on white, at most ``side`` pixels wide and high; None if it cannot be read."""
    try:
        with opened_image(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # JPEG files are read at a fraction of their size
            image.thumbnail((2 * side, 2 * side))
            upright = _on_white(ImageOps.exif_transpose(image))
    except Exception:  # whatever is wrong with a file, a report is not the place to say so
        return None
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    return upright


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    white = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(white, whole).convert("RGB")


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    """Tiny images grow by a whole factor with sharp pixels: a browser would blur them."""
    factor = side // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _dimmed(image: Image.Image, kept: Box) -> Image.Image:
    left, top, right, bottom = (
        round(share * side) for share, side in zip(kept, (*image.size, *image.size), strict=True)
    )
    pale = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.78)
    pale.paste(image.crop((left, top, right, bottom)), (left, top))
    return pale
