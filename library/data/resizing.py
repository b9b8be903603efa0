"""Pixels from one size to another: OpenCV's and Pillow's filters, without OpenCV.

The names are those of sd-scripts' ``resize_interpolation``. There, `lanczos` and `box` are Pillow's filters (they widen
when shrinking, and resample RGBA with premultiplied alpha); all others are OpenCV's (fixed support, straight alpha).
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from library.support.errors import UserError, did_you_mean

_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_TORCH = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "bicubic": "bicubic",
    "cubic": "bicubic",
}
# Numbers that are held as floats at a time: a quarter of a gigabyte; some of the filters hold them two or three times.
_MOST_FLOATS = 2**26
_MOST_AREA_FLOATS = 2**24
INTERPOLATIONS = (*_PILLOW, *_TORCH, "nearest", "area")

# (line of the target, lines of the source, lines of the target) → first source line, and the share of each from there.
Weights = Callable[[int, int, int], tuple[int, np.ndarray]]


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: str | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Resize ``image``, uint8 [H, W, 3 or 4], to ``size`` (width, height); of it return ``window``, or all.

    The window is (left, top, right, bottom), in pixels of the resized image.
    Without an interpolation: "area" where neither side grows, else "lanczos", as sd-scripts does. An image that has the
    size already is returned as it is.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = window or (0, 0, *size)
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation == "area" and (width, height) != tuple(size):
        return _area_resize(image, size, range(left, right), range(top, bottom))
    whole = _resize_whole(image, size, interpolation)
    return whole if window is None else whole[top:bottom, left:right]


def _resize_whole(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    if interpolation in _PILLOW:
        return np.array(Image.fromarray(image).resize(size, _PILLOW[interpolation]))
    if interpolation in _TORCH:
        return _torch_resize(image, size, _TORCH[interpolation])
    if interpolation == "nearest":
        nearest: np.ndarray = image[_nearest(height, size[1])][:, _nearest(width, size[0])]
        return nearest
    raise UserError(
        f'resize_interpolation "{interpolation}" is unknown.{did_you_mean(interpolation, INTERPOLATIONS)} '
        f"Choose one of {', '.join(INTERPOLATIONS)}."
    )


def _torch_resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """torch's interpolation without antialiasing is OpenCV's, within one step of 255."""
    import torch  # here, because what only looks for images does without it

    if image.size > _MOST_FLOATS and image.shape[2] > 1:
        channels = [_torch_resize(image[:, :, i : i + 1], size, mode) for i in range(image.shape[2])]
        return np.concatenate(channels, axis=2)
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(planes, size=(size[1], size[0]), mode=mode)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def _area_resize(image: np.ndarray, size: tuple[int, int], across: range, down: range) -> np.ndarray:
    """OpenCV's INTER_AREA: the mean over the source area of each target pixel; linear as soon as one side grows.

    Only the columns ``across`` and the rows ``down`` of the target are made.
    """
    height, width, channels = image.shape
    weights = _coverage if size[0] <= width and size[1] <= height else _linear
    lines = image.reshape(height, width * channels)
    made = np.empty((len(down), len(across), channels), dtype=np.uint8)
    # An ordinary image is one block.
    block = max(1, _MOST_AREA_FLOATS // (max(width, size[0]) * channels))
    for start in range(0, len(down), block):
        wanted = down[start : start + block]
        rows = _weigh_lines(lines, wanted, size[1], weights)
        columns = rows.reshape(len(wanted), width, channels).swapaxes(0, 1).reshape(width, len(wanted) * channels)
        pixels = _weigh_lines(columns, across, size[0], weights).reshape(len(across), len(wanted), channels)
        made[start : start + block] = pixels.swapaxes(0, 1).round().clip(0, 255)
    return made


def _weigh_lines(lines: np.ndarray, wanted: range, count: int, weights: Weights) -> np.ndarray:
    """Make the ``wanted`` of ``count`` lines, float32 [wanted, m], each a weighted sum of a few neighbouring ``lines``.

    Line by line, so that a large photo costs no large float copy and no large, almost empty weight matrix.
    """
    made = np.empty((len(wanted), lines.shape[1]), dtype=np.float32)
    for place, index in enumerate(wanted):
        first, factors = weights(index, len(lines), count)
        made[place] = factors @ lines[first : first + len(factors)].astype(np.float32)
    return made


def _coverage(index: int, source: int, target: int) -> tuple[int, np.ndarray]:
    """First source line and how much of each source line the target line ``index`` covers (sum 1)."""
    start, stop = index * source / target, min((index + 1) * source / target, source)
    first, last = math.floor(start), math.ceil(stop)
    covered = np.ones(last - first)
    covered[0] -= start - first
    covered[-1] -= last - stop
    return first, (covered / covered.sum()).astype(np.float32)


def _linear(index: int, source: int, target: int) -> tuple[int, np.ndarray]:
    """First source line and the one or two factors of OpenCV's linear rule for INTER_AREA where an image grows.

    Where a target line begins exactly on a source line, the rounding of ``scale`` decides; hence OpenCV's own order.
    """
    inverse = target / source
    scale = 1 / inverse
    first = math.floor(index * scale)
    share = float(np.float32((index + 1) - (first + 1) * inverse))
    share = share - math.floor(share) if share > 0 else 0.0
    if first + 1 >= source:
        return source - 1, np.ones(1, dtype=np.float32)
    return first, np.array([1 - share, share], dtype=np.float32)


def _nearest(source: int, target: int) -> np.ndarray:
    """The source line of each target line: OpenCV's INTER_NEAREST_EXACT, which counts in 65536ths of a line."""
    step = ((source << 16) + target // 2) // target
    start = step // 2 - source % 2
    return ((step * np.arange(target, dtype=np.int64) + start) >> 16).clip(0, source - 1)
