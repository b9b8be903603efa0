"""One image of a training, with all that is known of it before a pixel is read."""

from dataclasses import dataclass
from pathlib import Path

from library.data.buckets import Size, size_conditioning_crop
from library.data.config import DatasetConfig, SubsetConfig
from library.data.images import Framing
from library.data.latent_entry import LatentEntry


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """A row of an ``ImageTable``.

    ``caption`` is as it was found, perhaps in several lines; ``image_size`` is (width, height) of the file as shown,
    ``bucket`` that of what the model sees, and ``resized`` that of the file before it is cropped to the bucket. It
    comes ``repeats`` times an epoch.
    """

    path: str
    caption: str
    mask_path: str | None  # if its subset has masks
    image_size: Size
    subset: SubsetConfig
    config: DatasetConfig
    bucket: Size
    resized: Size
    repeats: int

    @property
    def framing(self) -> Framing:
        """How the file becomes the model's image."""
        subset, config = self.subset, self.config
        return Framing(
            resized=self.resized,
            bucket=self.bucket,
            interpolation=subset.resize_interpolation or config.resize_interpolation,
            random_crop=subset.random_crop,
            # Face detectors' numbers choose the crop; a bucket has its own rule.
            face_crop_range=None if config.buckets.enabled else subset.face_crop_aug_range,
        )

    @property
    def latent_entry(self) -> LatentEntry:
        """What the latent cache must know of the image."""
        return LatentEntry(
            path=Path(self.path),
            image_size=self.image_size,
            framing=self.framing,
            crop_ltrb=size_conditioning_crop(self.bucket, self.image_size),
            flip=self.subset.flip_aug,
            alpha_mask=self.subset.alpha_mask,
        )
