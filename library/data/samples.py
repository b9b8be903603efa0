"""The samples of image folders: an image and its caption as they are drawn at one place of an epoch.

All random choices for a sample derive from (seed, epoch, position of the sample in the epoch), so a run is the same
with any number of loader workers and processes.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from library.data.batch_order import BatchRef
from library.data.batches import Batch, Sample, collate
from library.data.buckets import size_conditioning_crop
from library.data.captions import CaptionMoment, deterministic_rules, process_caption
from library.data.colours import color_augment
from library.data.image_entry import ImageEntry
from library.data.image_table import ImageTable
from library.data.images import Cut, channels_first, flip, frame_image, frame_mask
from library.data.latent_cache import LatentCache
from library.data.random_masks import random_mask
from library.embedding.tokenizer import PromptTokenizer


def sample_seeds(seed: int, epoch: int, position: int) -> tuple[int, int, int]:
    """Seeds for one sample's pixels, caption and noise: independent streams, each below 2^63."""
    state = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, position]).generate_state(3, np.uint64)
    pixels, caption, noise = (int(number) >> 1 for number in state)
    return pixels, caption, noise


class SampleSource(Dataset[Batch]):
    """Makes a :class:`Batch` of each :class:`BatchRef`; worker processes hold a copy."""

    def __init__(
        self,
        table: ImageTable,
        prompts: PromptTokenizer,
        *,
        templates: Sequence[str] | None = None,
        seed: int = 0,
        max_steps: int = 0,
        cache: LatentCache | None = None,
    ) -> None:
        """``templates`` replace all captions; ``cache`` (filled) gives latents in place of pixels."""
        self.table = table
        self.prompts = prompts
        self.templates = templates
        self.seed = seed
        self.max_steps = max_steps
        self.cache = cache

    def __getitem__(self, ref: BatchRef) -> Batch:
        samples = [
            self.sample(index, CaptionMoment(ref.step, self.max_steps, ref.epoch), ref.position + offset)
            for offset, index in enumerate(ref.indices)
        ]
        return collate(samples, ref.weight, len(self.prompts.tokenizers))

    def sample(self, index: int, moment: CaptionMoment, position: int) -> Sample:
        """Image ``index`` of the table as it is drawn at a place of an epoch."""
        pixel_seed, caption_seed, noise_seed = sample_seeds(self.seed, moment.epoch, position)
        entry = self.table[index]
        subset = entry.subset
        pixel_rng = random.Random(pixel_seed)
        flipped = subset.flip_aug and pixel_rng.random() < 0.5
        latents, image, mask, cut = self._picture(entry, flipped, pixel_rng)
        hole = random_mask(entry.bucket, pixel_rng) if entry.config.train_inpainting else None
        caption = process_caption(
            entry.caption,
            subset.captions,
            self.prompts.placeholder,
            random.Random(caption_seed),
            moment,
            self.templates,
        )
        input_ids = self.prompts.encode(caption)
        return Sample(
            key=entry.path,
            caption=caption,
            input_ids=input_ids,
            has_token=self.prompts.hold_word(input_ids),
            latents=latents,
            image=image,
            mask=mask,
            loss_weight=entry.config.prior_loss_weight if subset.is_reg else 1.0,
            size_conditioning=_size_conditioning(entry, flipped),
            seed=noise_seed,
            cut=cut,
            flipped=flipped,
            hole=None if hole is None else torch.from_numpy(hole).float(),
        )

    def _picture(
        self, entry: ImageEntry, flipped: bool, rng: random.Random
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Cut]:
        """(latents, None, mask, cut) from the cache, or (None, pixels, mask, cut) from the file."""
        if self.cache is not None:
            cached = self.cache.load(entry.latent_entry)
            latents = cached.flipped if flipped else cached.latents
            cut = entry.framing.centre
            return latents, None, _mask(entry, flipped, cached.alpha_mask, cut), cut
        subset = entry.subset
        picture = frame_image(entry.path, entry.framing, alpha=subset.alpha_mask, rng=rng, size=entry.image_size)
        pixels = color_augment(picture.pixels, rng) if subset.color_aug else picture.pixels
        image = channels_first(flip(pixels) if flipped else pixels)
        return None, image, _mask(entry, flipped, picture.alpha, picture.cut), picture.cut


def _mask(entry: ImageEntry, flipped: bool, alpha: Any, cut: Cut) -> torch.Tensor | None:
    """The mask image, which wins over the alpha channel, cut and mirrored as its image was."""
    if entry.mask_path is not None:
        shares = frame_mask(entry.mask_path, entry.image_size, entry.framing, cut, entry.path)
    elif alpha is not None and entry.subset.alpha_mask:
        shares = alpha
    else:
        return None
    mask = torch.as_tensor(shares, dtype=torch.float32)
    return mask.flip(-1) if flipped else mask


def _size_conditioning(entry: ImageEntry, flipped: bool) -> tuple[int, int, int, int, int, int]:
    bucket, (width, height) = entry.bucket, entry.image_size
    left, top, right, _ = size_conditioning_crop(bucket, (width, height))
    return height, width, int(top), int(bucket[0] - right if flipped else left), bucket[1], bucket[0]


def deterministic_caption(
    entry: ImageEntry, prompts: PromptTokenizer, templates: Sequence[str] | None = None, draw: int = 0
) -> str:
    """An image's caption, the word expanded, nothing shuffled or dropped; ``draw`` chooses lines and wildcards."""
    rules = deterministic_rules(entry.subset.captions)
    return process_caption(entry.caption, rules, prompts.placeholder, random.Random(draw), templates=templates)
