"""Arithmetic of resolutions: which bucket an image belongs to, how large it is made, and what is cropped.

Sizes are (width, height) in pixels. Rules and numbers are those of sd-scripts, so its latent caches stay valid.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class BucketRules:
    """How one dataset sorts images by shape.

    Without ``enabled`` every image goes to ``resolution``. With it, buckets have about its area, sides that are
    multiples of ``steps`` and lie between ``min_reso`` and ``max_reso``. ``no_upscale`` makes buckets from the
    images' own sizes instead, and only images of a larger area are shrunk.
    """

    resolution: Size
    enabled: bool = False
    min_reso: int = 256
    max_reso: int = 1024
    steps: int = 64
    no_upscale: bool = False

    @property
    def area(self) -> int:
        """The largest number of pixels in a bucket."""
        return self.resolution[0] * self.resolution[1]

    def resolutions(self) -> list[Size]:
        """The buckets known beforehand, sorted: all of the list, one without buckets, none with ``no_upscale``."""
        if not self.enabled:
            return [self.resolution]
        return [] if self.no_upscale else bucket_resolutions(self)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one image goes.

    ``resized`` covers ``bucket``; what sticks out is cropped. ``aspect_error`` is the bucket's width / height minus
    the image's.
    """

    bucket: Size
    resized: Size
    aspect_error: float


def bucket_resolutions(rules: BucketRules) -> list[Size]:
    """The square bucket and, for each width allowed, the greatest height that fits the area; both ways round."""
    steps, area = rules.steps, rules.area
    side = math.isqrt(area) // steps * steps
    found = {(side, side)}
    for width in range(rules.min_reso, rules.max_reso + 1, steps):
        height = min(rules.max_reso, area // width // steps * steps)
        if height >= rules.min_reso:
            found |= {(width, height), (height, width)}
    return sorted(found)


def adjusted_limits(rules: BucketRules) -> Size:
    """``min_reso`` rounded down and ``max_reso`` rounded up to multiples of ``steps``."""
    return rules.min_reso // rules.steps * rules.steps, -(-rules.max_reso // rules.steps) * rules.steps


class BucketChooser:
    """Finds the bucket of each image; equal sizes are worked out once."""

    def __init__(self, rules: BucketRules) -> None:
        self.rules = rules
        self._known: dict[Size, Placement] = {}
        resolutions = rules.resolutions()
        self._listed = set(resolutions)
        # Of buckets with one aspect ratio the first in the list counts.
        first_of_ratio: dict[float, int] = {}
        for i, (width, height) in enumerate(resolutions):
            first_of_ratio.setdefault(width / height, i)
        self._ratios = sorted(first_of_ratio)
        self._positions = [first_of_ratio[ratio] for ratio in self._ratios]
        self._resolutions = resolutions

    def place(self, width: int, height: int) -> Placement:
        """Return the placement of an image of this size (both sides at least 1)."""
        size = (width, height)
        if size not in self._known:
            own_sizes = self.rules.enabled and self.rules.no_upscale
            bucket, resized = self._place_unscaled(size) if own_sizes else self._place_in_list(size)
            self._known[size] = Placement(bucket, resized, bucket[0] / bucket[1] - width / height)
        return self._known[size]

    def _place_in_list(self, size: Size) -> tuple[Size, Size]:
        bucket = size if size in self._listed else self._nearest(size[0] / size[1])
        return bucket, covering_size(size, bucket)

    def _nearest(self, ratio: float) -> Size:
        """The bucket whose aspect ratio differs least; the first in the list where two differ equally."""
        right = bisect_left(self._ratios, ratio)
        neighbours = range(max(right - 1, 0), min(right + 1, len(self._ratios)))
        best = min(neighbours, key=lambda i: (abs(self._ratios[i] - ratio), self._positions[i]))
        return self._resolutions[self._positions[best]]

    def _place_unscaled(self, size: Size) -> tuple[Size, Size]:
        width, height = size
        resized: Size | None = size
        if width * height > self.rules.area:
            resized = self._shrunk(width / height)
        if resized is None or min(resized) < self.rules.steps:
            return self._place_thin(size)
        return (self._down(resized[0]), self._down(resized[1])), resized

    def _shrunk(self, ratio: float) -> Size | None:
        """Fit this shape into the area, one side a multiple of ``steps``; None where a side would vanish.

        Of rounding the width or the height, the way that keeps the shape better wins, the height on a tie.
        """
        ideal_width = math.sqrt(self.rules.area * ratio)
        width = self._down(_rounded(ideal_width))
        height_then = self._down(_rounded(width / ratio))
        height = self._down(_rounded(self.rules.area / ideal_width))
        width_then = self._down(_rounded(height * ratio))
        by_width = abs(width / height_then - ratio) if width and height_then else math.inf
        by_height = abs(width_then / height - ratio) if width_then and height else math.inf
        if by_width < by_height:
            return width, _rounded(width / ratio)
        return None if by_height == math.inf else (_rounded(height * ratio), height)

    def _place_thin(self, size: Size) -> tuple[Size, Size]:
        """An image too thin or too small for one step: its short side becomes one step, its long side is cropped."""
        steps = self.rules.steps
        scale = steps / min(size)
        longest = max(steps, self._down(self.rules.area // steps))
        sides = [min(longest, max(steps, self._down(_rounded(side * scale)))) for side in size]
        bucket = (sides[0], sides[1])
        return bucket, covering_size(size, bucket)

    def _down(self, side: int) -> int:
        return side // self.rules.steps * self.rules.steps


def _rounded(length: float) -> int:
    """Halves are rounded up."""
    return int(length + 0.5)


def covering_size(size: Size, bucket: Size) -> Size:
    """The size with this image's shape that just covers the bucket."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:
        scale = bucket[1] / height
    else:
        scale = bucket[0] / width
    return _rounded(width * scale), _rounded(height * scale)


def centre_offset(resized: Size, bucket: Size) -> Size:
    """(left, top) of the centre crop of ``bucket`` pixels from ``resized`` pixels."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def size_conditioning_crop(bucket: Size, image_size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) that SDXL is told about an image in its bucket.

    These are the borders of the whole image fitted *into* the bucket, not the pixels that are really cut off.
    sd-scripts trains with these numbers and keeps them in its latent caches, rounding errors included: an image of
    exactly the bucket's shape can come out as starting at -1.
    """
    width, height = bucket
    ratio = image_size[0] / image_size[1]
    fitted_width: float = width
    fitted_height: float = height
    if width / height > ratio:
        fitted_width = height * ratio
    else:
        fitted_height = width / ratio
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return left, top, left + fitted_width, top + fitted_height
