"""Image files to pixels: reading, resizing, cropping, augmenting.

Sizes are (width, height) in pixels and mean the upright image: EXIF orientation is applied everywhere. Arrays are
[height, width, channels]. All randomness comes from the ``random.Random`` that is passed in.
"""

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from library.data.buckets import Size, centre_offset
from library.data.resizing import resize
from library.support.bounded_file import BoundedFile
from library.support.errors import UserError
from library.support.text_files import not_downloaded

with suppress(ImportError):  # Pillow reads JPEG XL only with this plugin, which registers itself.
    import pillow_jxl  # noqa: F401

if TYPE_CHECKING:  # what only looks for images does without it: a mistake is told at once
    import torch

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_EXTENSIONS += (".avif",) if features.check("avif") else ()
IMAGE_EXTENSIONS += (".jxl",) if "JXL" in Image.OPEN else ()
# What people have besides, and what would be left out without a word: from phones, cameras and drawing programs.
_OTHERS = "heic heif gif tif tiff jfif jp2 avif jxl psd svg ico tga dng cr2 cr3 nef arw raf orf"
UNREAD_EXTENSIONS = {f".{ending}" for ending in _OTHERS.split()} - {*IMAGE_EXTENSIONS}

# What Pillow may take a file for, whatever its name says. Others of its readers start programs, or are hardly used.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP")
FORMATS += (("AVIF",) if features.check("avif") else ()) + (("JXL",) if "JXL" in Image.OPEN else ())

# How to turn pixels [h, w, channels] upright, by their EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}

# Of one image file; more would take more than a gigabyte of memory in every loader worker.
MOST_PIXELS = 110_000_000
# Decoders that hold the image several times over.
_HUNGRY_FORMATS = {"WEBP": 2, "AVIF": 2, "JXL": 4}
# Of an image scaled to cover its bucket.
MOST_RESIZED_PIXELS = 64_000_000
_STRIP_PIXELS = 2**20
_METADATA_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


@dataclass(frozen=True, slots=True)
class Cut:
    """What is taken of an image: it is scaled to ``resized``, and the window begins at (``left``, ``top``)."""

    resized: Size
    left: int
    top: int


@dataclass(frozen=True, slots=True)
class Framing:
    """How a file becomes the model's image: scaled to ``resized``, which covers ``bucket``, then cropped to it.

    ``interpolation`` is one of ``resizing.INTERPOLATIONS``, or None for the usual choice. ``face_crop_range`` is for
    runs without buckets: where the file name holds a face (``name_cx_cy_w_h``), the face takes between these shares of
    the image's shorter side.
    """

    resized: Size
    bucket: Size
    interpolation: str | None = None
    random_crop: bool = False
    face_crop_range: tuple[float, float] | None = None

    @property
    def centre(self) -> Cut:
        """The cut without any chance in it; latent caches hold this one."""
        return Cut(self.resized, *centre_offset(self.resized, self.bucket))

    @property
    def face_shares(self) -> tuple[float, float]:
        """The least and the greatest share of a face; without a range a face fills the shorter side."""
        return self.face_crop_range or (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Face:
    """Centre and size of a face, in pixels of the file."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Picture:
    """``pixels`` uint8 [h, w, 3]; ``alpha`` float32 [h, w] in [0, 1] or None; ``cut`` is how it was taken."""

    pixels: np.ndarray
    alpha: np.ndarray | None
    cut: Cut


def image_size(path: Path | str) -> Size:
    """Size of the upright image, from the file's header. Says so if the file is animated.

    Raises UserError, naming the file, where there is no image.
    """
    if str(path).lower().endswith(".webp") and (size := _plain_webp_size(path)) and _plausible(size):
        _check_pixels(path, size, _HUNGRY_FORMATS["WEBP"])
        return size
    with opened_image(path) as image:
        _check_pixels(path, image.size, _hunger(image))
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with its preview
            logger.warning(f"{path} is animated; only its first frame is used.")
        return _upright_size(image)


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _hunger(image: Image.Image) -> float:
    """How many times the memory of an ordinary image its decoder takes."""
    if hasattr(image, "layer") and image.info.get("progressive"):  # other formats' texts may be named so
        # Two bytes a coefficient, of the whole image, beside Pillow's four bytes a pixel; nine a pixel are ordinary.
        areas: list[int] = [across * down for _, across, down, *_ in image.layer]
        return max(1, (4 + 2 * sum(areas) / max(areas)) / 9)
    return _HUNGRY_FORMATS.get(image.format or "", 1)


def _check_pixels(path: Path | str, size: Size, hunger: float) -> None:
    """Raise UserError for an image with more pixels than one process should hold."""
    most, (width, height) = int(MOST_PIXELS / hunger), size
    if width * height <= most:
        return
    side = math.sqrt(most / (width * height))
    raise UserError(
        f"The image {path} has {width}x{height} pixels; more than {most // 1_000_000} million take too much memory. "
        f"Scale it down, to at most {max(int(width * side), 1)}x{max(int(height * side), 1)}; training uses far fewer."
    )


def check_resized(path: Path | str, size: Size, resized: Size, bucket: Size) -> None:
    """Raise UserError for an image so long and thin that it would grow beyond measure to cover its bucket."""
    if resized[0] * resized[1] > max(MOST_RESIZED_PIXELS, 4 * bucket[0] * bucket[1]):
        raise UserError(
            f"The image {path} has {size[0]}x{size[1]} pixels, a shape that has to be scaled to "
            f"{resized[0]}x{resized[1]} to cover {bucket[0]}x{bucket[1]}. Crop it, or remove it."
        )


def _plain_webp_size(path: Path | str) -> Size | None:
    """Size of a WebP file without animation or metadata; None for any other file.

    Pillow sets up a whole canvas when it opens a WebP file, which takes ten times as long as other formats' headers.
    Layout: RFC 9649, sections 2.5 to 2.7.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(30)
    except (OSError, ValueError):  # a NUL in the path
        return None
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[12:16] == b"VP8X" and not head[20] & 0b1110:  # EXIF, XMP, animation
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


def _plausible(size: Size) -> bool:
    """Whether a size can be meant; Pillow has the words for those that cannot."""
    return 0 < size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or math.inf)


def check_decodes(path: Path | str) -> None:
    """Raise UserError, naming the file, unless its image can be decoded to the end.

    Far faster than reading the pixels: PNG has checksums, and of a JPEG an eighth of the size will do.
    """
    with suppress(UserError), opened_image(path) as image:
        image.draft("L", (1, 1))
        image.verify() if image.format == "PNG" else image.load()
        return
    with opened_image(path) as image:  # a wrong checksum alone keeps nobody from reading the pixels
        image.load()


def read_image(path: Path | str, *, alpha: bool = False, size: Size | None = None) -> np.ndarray:
    """Read the first frame upright: uint8 [H, W, 3], transparency laid on white, or with ``alpha`` uint8 [H, W, 4].

    16-bit values are scaled to 8 bits. Raises UserError, naming the file, where there is no whole image, or one that
    has not the ``size`` that it had when the run began.
    """
    pixels, orientation = _as_stored(path, alpha, size)
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in _UPRIGHT else pixels


def _as_stored(path: Path | str, alpha: bool, size: Size | None) -> tuple[np.ndarray, int]:
    """The pixels as the file has them, and its EXIF orientation.

    Strip by strip, for each step of a conversion holds a whole copy of what it is given.
    """
    with opened_image(path) as image:
        _check_pixels(path, image.size, _hunger(image))
        _refuse_other_size(path, _upright_size(image), size)
        orientation = _orientation(image)
        image.load()
        _forget_texts(image)  # those behind the pixels
        width, height = image.size
        pixels = np.empty((height, width, 4 if alpha else 3), dtype=np.uint8)
        rows = max(1, _STRIP_PIXELS // width)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            strip = image if rows >= height else image.crop((0, top, width, bottom))
            strip = _to_eight_bits(strip)
            pixels[top:bottom] = np.asarray(strip.convert("RGBA") if alpha else _on_white(strip))
        return pixels, orientation


def _refuse_other_size(path: Path | str, found: Size, noted: Size | None) -> None:
    if noted is not None and found != tuple(noted):
        raise UserError(
            f"The image {path} had {noted[0]}x{noted[1]} pixels when this run began and now has "
            f"{found[0]}x{found[1]}: its bucket and size conditioning no longer fit. Put the old one back, or start "
            "again with the new one."
        )


@contextmanager
def opened_image(path: Path | str) -> Iterator[Image.Image]:
    """An image of the user's, not decoded yet. Raises UserError where it cannot be read, also while it is in use."""
    try:
        with warnings.catch_warnings():
            # Of large photos (twice as large ones are an error) and odd metadata; they name no file and change nothing.
            warnings.simplefilter("ignore")
            with BoundedFile(path) as file, Image.open(file, formats=FORMATS) as image:
                _forget_texts(image)
                yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds of errors for damaged files.
        raise UserError(_why_unreadable(Path(path), error)) from error


def _forget_texts(image: Image.Image) -> None:
    """Take out a PNG's text that is named as Pillow names its transparency, which is never a text."""
    if isinstance(image.info.get("transparency"), str):
        del image.info["transparency"]


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        reason = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        return f"The image {path} {reason}."
    if isinstance(error, OSError) and error.errno:
        return f"The image {path} cannot be read: {error.strerror}."
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"The image {path} has more than {limit} million pixels. Scale it down; training uses far fewer."
    if path.is_file() and path.stat().st_size == 0:
        return f"The image {path} is empty (0 bytes). Copy it again or remove it."
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            if missing := not_downloaded(file.read(64)):
                return f"The image {path} cannot be read: {missing}. Fetch it again, or remove it."
        return f"{path} is not an image in a format known here ({', '.join(FORMATS)}). Convert it, or remove it."
    reason = str(error).rstrip(".") or type(error).__name__
    return f"The image {path} cannot be read: {reason}. Copy or export it again, or remove it."


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, as far as it stands before the pixels (so that size and pixels agree on it)."""
    orientation = 1
    if any(key in image.info for key in _METADATA_KEYS):
        with suppress(Exception):  # damaged metadata says nothing, and the image beside it is whole
            # Not image.getexif(): PNG's own version would decode the whole image.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _UPRIGHT else 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (Pillow's own conversion would clip it); leave other modes alone."""
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def face_in_name(path: Path | str) -> Face | None:
    """The face that a file name of the form ``name_cx_cy_w_h`` tells of, or None."""
    pieces = Path(path).stem.split("_")
    if len(pieces) < 5:
        return None
    try:
        face = Face(*map(int, pieces[-4:]))
    except ValueError:
        return None
    return face if face.x > 0 and max(face.width, face.height) > 0 else None


def frame_image(
    source: Path | str | np.ndarray,
    framing: Framing,
    *,
    alpha: bool = False,
    rng: random.Random | None = None,
    face: Face | None = None,
    size: Size | None = None,
) -> Picture:
    """Read ``source`` (or take pixels as :func:`read_image` gives them), resize it and cut the bucket out of it.

    With ``alpha`` the image has an alpha mask (all ones for an opaque file), and hidden colours of transparent pixels
    stay. Without ``rng`` the cut is the centre, whatever the framing allows. ``face`` is read from the file name if
    not given; ``size`` is what the file must have.
    """
    image = source if isinstance(source, np.ndarray) else read_image(source, alpha=alpha, size=size)
    if face is None and not isinstance(source, np.ndarray):
        face = face_in_name(source)
    cut = choose_cut(framing, (image.shape[1], image.shape[0]), face, rng)
    image = _take(image, cut, framing)
    transparency = image[:, :, 3].astype(np.float32) / 255 if alpha else None
    return Picture(np.ascontiguousarray(image[:, :, :3]), transparency, cut)


def frame_mask(
    path: Path | str, image_size: Size, framing: Framing, cut: Cut | None = None, image_path: Path | str = "its image"
) -> np.ndarray:
    """Read a mask image and resize and cut it as its image was: float32 [h, w] in [0, 1], from the red channel.

    ``cut`` is that of the image's :class:`Picture`; None is the centre cut, as in latent caches. Raises UserError,
    naming both files, where the mask has not the image's size.
    """
    mask = read_image(path)
    check_mask_size((mask.shape[1], mask.shape[0]), path, image_size, image_path)
    return _take(mask, cut or framing.centre, framing)[:, :, 0].astype(np.float32) / 255


def check_mask_size(mask_size: Size, path: Path | str, image_size: Size, image_path: Path | str) -> None:
    """Raise UserError unless a mask has its image's size."""
    if mask_size != tuple(image_size):
        raise UserError(
            f"The mask {path} has {mask_size[0]}x{mask_size[1]} pixels, but {image_path} has "
            f"{image_size[0]}x{image_size[1]}. A mask must have the size of its image."
        )


def _take(image: np.ndarray, cut: Cut, framing: Framing) -> np.ndarray:
    width, height = framing.bucket
    window = (cut.left, cut.top, cut.left + width, cut.top + height)
    return resize(image, cut.resized, framing.interpolation, window)


def choose_cut(framing: Framing, size: Size, face: Face | None, rng: random.Random | None) -> Cut:
    """Choose what to take of an image of ``size``: around its face, anywhere, or in the centre."""
    if rng is None:
        return framing.centre
    if face is not None and framing.face_crop_range is not None:
        return _face_cut(framing, size, face, rng)
    if framing.random_crop:
        left, top = (rng.randint(0, whole - part) for whole, part in zip(framing.resized, framing.bucket, strict=True))
        return Cut(framing.resized, left, top)
    return framing.centre


def _face_cut(framing: Framing, size: Size, face: Face, rng: random.Random) -> Cut:
    """Scale the image so that the face gets its share, and put the face into the middle, or near it."""
    if tuple(size) == tuple(framing.bucket):
        return Cut(framing.bucket, 0, 0)
    scale = _face_scale(framing, size, face, rng)
    # Rounding must not make the image smaller than the bucket.
    width, height = (max(int(side * scale + 0.5), least) for side, least in zip(size, framing.bucket, strict=True))
    resized = (width, height)
    across = _face_start(framing, (resized[0], framing.bucket[0]), int(face.x * scale + 0.5), face, rng)
    down = _face_start(framing, (resized[1], framing.bucket[1]), int(face.y * scale + 0.5), face, rng)
    return Cut(resized, across, down)


def _face_scale(framing: Framing, size: Size, face: Face, rng: random.Random) -> float:
    """Between the least and the greatest scale that the range asks for; enlarged only if the image is too small."""
    shorter, face_side = min(framing.bucket), max(face.width, face.height)
    covering = max(framing.bucket[0] / size[0], framing.bucket[1] / size[1])
    smallest_share, greatest_share = framing.face_shares
    lower = min(1.0, max(covering, shorter / (face_side * greatest_share)))
    upper = min(1.0, max(lower, shorter / (face_side * smallest_share)))
    return max(covering, rng.uniform(lower, upper) if lower < upper else lower)


def _face_start(framing: Framing, lengths: tuple[int, int], centre: int, face: Face, rng: random.Random) -> int:
    """Where the window begins on one axis; ``lengths`` are those of the image and of the window."""
    whole, window = lengths
    start, face_side = centre - window // 2, max(face.width, face.height)
    if framing.random_crop:
        # The sum of two dice makes the middle likelier than the border.
        reach = max(whole - centre, centre)
        start += rng.randint(0, reach) + rng.randint(0, reach) - reach
    elif framing.face_shares[0] < framing.face_shares[1] and face_side >= max(40, min(framing.bucket) // 10 + 1):
        start += rng.randint(-(face_side // 20), face_side // 20)
    return max(0, min(start, whole - window))


def flip(array: np.ndarray) -> np.ndarray:
    """Mirror pixels or a mask, [h, w, …], left to right."""
    return np.ascontiguousarray(array[:, ::-1])


def to_tensor(pixels: np.ndarray) -> "torch.Tensor":
    """Uint8 [h, w, 3] to what the VAE reads: float32 [3, h, w] in [-1, 1]."""
    return normalized(channels_first(pixels))


def channels_first(pixels: np.ndarray) -> "torch.Tensor":
    """Uint8 [h, w, 3] as a tensor, uint8 [3, h, w]: a quarter of the bytes that :func:`normalized` makes of it."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def normalized(images: "torch.Tensor") -> "torch.Tensor":
    """Uint8 of any shape to float32 in [-1, 1], on the device where it is."""
    return images.float() / 127.5 - 1
