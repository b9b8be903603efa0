"""What must be known of an image before its latents are made or looked for."""

from dataclasses import dataclass
from pathlib import Path

from library.data.buckets import Size
from library.data.images import Framing
from library.data.latent_files import slot_shapes

PIXELS_PER_LATENT = 8  # along each side, in every family


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """One image to cache. ``crop_ltrb`` is what SDXL is told of its crop; ``flip`` asks for a mirrored variant too."""

    path: Path
    image_size: Size
    framing: Framing
    crop_ltrb: tuple[float, float, float, float]
    flip: bool = False
    alpha_mask: bool = False

    @property
    def latent_size(self) -> Size:
        """(height, width) of the latents."""
        return self.framing.bucket[1] // PIXELS_PER_LATENT, self.framing.bucket[0] // PIXELS_PER_LATENT

    @property
    def mask_size(self) -> Size:
        """(height, width) of the alpha mask."""
        return self.framing.bucket[1], self.framing.bucket[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What a cache must hold of the image: keys of its file with their shapes."""
        return slot_shapes(self.latent_size, self.mask_size, self.flip, self.alpha_mask)
