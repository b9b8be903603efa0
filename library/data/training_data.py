"""The pictures of a training as batches: drawn, captioned, augmented, and loaded by worker processes.

All random choices for a sample derive from (seed, epoch, position of the sample in the epoch), so a run is the same
with any number of loader workers and processes.
"""

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.data.batch_order import BatchRef, BatchSampler, EpochOrder
from library.data.batches import Batch, Sample, collate
from library.data.buckets import Size, size_conditioning_crop
from library.data.captions import CaptionMoment, process_caption, token_presence
from library.data.config import DatasetConfig
from library.data.image_sets import ImageSet
from library.data.image_table import ImageTable, calm_rules, load_tables
from library.data.images import Cut, channels_first, color_augment, flip, frame_image, frame_mask
from library.data.latent_cache import LatentCache, LatentEntry
from library.data.latent_files import content_hash
from library.data.preflight import Report, check
from library.data.random_masks import random_mask
from library.embedding.tokenizer import PromptTokenizer
from library.support.errors import UserError
from library.support.processes import usable_cores

# Epoch of batches that are not trained on: no run gets as far, so their noise is never trained on.
_FAR_AWAY = 1_000_000_000
# Of lines and wildcards, in search of a caption that holds the word.
_DRAWS = 64


def sample_seeds(seed: int, epoch: int, position: int) -> tuple[int, int, int]:
    """Seeds for one sample's pixels, caption and noise: independent streams, each below 2^63."""
    state = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, position]).generate_state(3, np.uint64)
    pixels, caption, noise = (int(number) >> 1 for number in state)
    return pixels, caption, noise


class SampleSource(Dataset):
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
    ):
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
        """Picture ``index`` of the table as it is drawn at a place of an epoch."""
        pixel_seed, caption_seed, noise_seed = sample_seeds(self.seed, moment.epoch, position)
        subset, config = self.table.subset(index), self.table.config(index)
        pixel_rng = random.Random(pixel_seed)
        flipped = subset.flip_aug and pixel_rng.random() < 0.5
        latents, image, mask, cut = self._picture(index, flipped, pixel_rng)
        hole = random_mask(self.table.bucket(index), pixel_rng) if config.train_inpainting else None
        caption = process_caption(
            self.table.caption(index),
            subset.captions,
            self.prompts.placeholder,
            random.Random(caption_seed),
            moment,
            self.templates,
        )
        input_ids = self.prompts.encode(caption)
        return Sample(
            key=self.table.path(index),
            caption=caption,
            input_ids=input_ids,
            has_token=self.prompts.hold_word(input_ids),
            latents=latents,
            image=image,
            mask=mask,
            loss_weight=config.prior_loss_weight if subset.is_reg else 1.0,
            size_conditioning=self._size_conditioning(index, flipped),
            seed=noise_seed,
            cut=cut,
            flipped=flipped,
            hole=None if hole is None else torch.from_numpy(hole).float(),
        )

    def _picture(
        self, index: int, flipped: bool, rng: random.Random
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Cut]:
        """(latents, None, mask, cut) from the cache, or (None, pixels, mask, cut) from the file."""
        if self.cache is not None:
            cached = self.cache.load(self.table.latent_entry(index))
            latents = cached.flipped if flipped else cached.latents
            cut = self.table.framing(index).centre
            return latents, None, self._mask(index, flipped, cached.alpha_mask, cut), cut
        subset = self.table.subset(index)
        path, framing, size = self.table.path(index), self.table.framing(index), self.table.image_size(index)
        picture = frame_image(path, framing, alpha=subset.alpha_mask, rng=rng, size=size)
        pixels = color_augment(picture.pixels, rng) if subset.color_aug else picture.pixels
        image = channels_first(flip(pixels) if flipped else pixels)
        return None, image, self._mask(index, flipped, picture.alpha, picture.cut), picture.cut

    def _mask(self, index: int, flipped: bool, alpha, cut: Cut) -> torch.Tensor | None:
        """The mask image, which wins over the alpha channel, cut and mirrored as its picture was."""
        path, mask_path = self.table.path(index), self.table.mask_path(index)
        if mask_path is not None:
            mask = frame_mask(mask_path, self.table.image_size(index), self.table.framing(index), cut, path)
        elif alpha is not None and self.table.subset(index).alpha_mask:
            mask = alpha
        else:
            return None
        mask = torch.as_tensor(mask, dtype=torch.float32)
        return mask.flip(-1) if flipped else mask

    def _size_conditioning(self, index: int, flipped: bool) -> tuple[int, int, int, int, int, int]:
        bucket, (width, height) = self.table.bucket(index), self.table.image_size(index)
        left, top, right, _ = size_conditioning_crop(bucket, (width, height))
        return height, width, int(top), int(bucket[0] - right if flipped else left), bucket[1], bucket[0]


class BatchLoader:
    """The batches of one process, epoch by epoch: call :meth:`set_epoch`, then iterate."""

    def __init__(self, source: Dataset, sampler: BatchSampler, *, workers: int, persistent: bool, pin_memory: bool):
        self.sampler = sampler
        # torch draws a base seed for its workers; from its global generator that would disturb the training.
        self._generator = torch.Generator()
        workers = min(workers, usable_cores(), len(sampler))
        self._loader = DataLoader(
            _Handing(source),
            sampler=sampler,
            batch_size=None,  # the sampler's items are whole batches already
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            generator=self._generator,
        )

    def set_epoch(self, epoch: int, steps_done: int, skip: int = 0) -> None:
        """Choose the epoch (from 1), the optimizer steps done before it, and how many of its batches to leave out."""
        self.sampler.set_epoch(epoch, steps_done, skip)
        self._generator.manual_seed(epoch)  # whatever epochs came before in this process

    def __len__(self) -> int:
        """Batches of this process in a whole epoch; the same number in every process."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch. Raises UserError for a picture that cannot be read any more."""
        for found in self._loader:
            if isinstance(found, UserError):
                raise found
            yield found


class _Handing(Dataset):
    """Hands a user's mistake over as a value: torch would put the worker's traceback into its text."""

    def __init__(self, source: Dataset):
        self.source = source

    def __getitem__(self, ref: BatchRef) -> Batch | UserError:
        try:
            return self.source[ref]
        except UserError as error:
            return UserError(str(error))


def _as_it_is(batch: Batch | UserError) -> Batch | UserError:
    return batch


class BatchedData(ABC):
    """What a training asks of its data, wherever the batches come from."""

    order: EpochOrder
    fingerprint: str
    contents = ""
    resolution: Size
    table: ImageTable | None = None  # of images found in folders
    templates: Sequence[str] | None = None
    sizes: Collection[Size] = ()  # (width, height) of the batches' images, as far as they are known
    inpainting = False  # whether random masks hide parts of the images

    @abstractmethod
    def source(self, max_steps: int) -> Dataset:
        """What makes a :class:`Batch` of each :class:`BatchRef`; ``max_steps`` are those of the whole run."""

    def loader(
        self,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
        max_steps: int = 0,
        workers: int = 0,
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> BatchLoader:
        """The batches of one process, in another order every epoch.

        ``max_steps`` (of the whole run) scales a token warm-up given as a share.
        """
        sampler = BatchSampler(
            self.order, process_index=process_index, num_processes=num_processes, accumulation=accumulation
        )
        source = self.source(max_steps)
        return BatchLoader(source, sampler, workers=workers, persistent=persistent, pin_memory=pin_memory)


class TrainingData(BatchedData):
    """Everything a training reads from picture folders, found and checked without any model."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        prompts: PromptTokenizer,
        *,
        templates: Sequence[str] | None = None,
        seed: int = 0,
        sets: Sequence[list[ImageSet]] | None = None,
    ):
        """Find all pictures and captions, unless ``sets`` holds them by dataset. Raises UserError for what is amiss."""
        self.configs = tuple(configs)
        self.prompts = prompts
        self.templates = templates
        self.seed = seed
        self.inpainting = any(config.train_inpainting for config in configs)
        table, validation_table = load_tables(configs, seed, sets)
        # Before anything is looked for in a caption: the word, tags, wildcards.
        self.table = table.with_rewritten_captions(prompts.repaired)
        self.validation_table = validation_table and validation_table.with_rewritten_captions(prompts.repaired)
        self.order = self._order(self.table)
        self.cache: LatentCache | None = None

    @property
    def resolution(self) -> Size:
        """(width, height) of the dataset with the most pixels."""
        return max((config.buckets.resolution for config in self.configs), key=lambda size: size[0] * size[1])

    @property
    def sizes(self) -> Collection[Size]:
        """(width, height) of the images in the batches that are trained on."""
        counts = self.table.samples_in_buckets()
        return {bucket.size for bucket, count in zip(self.table.buckets, counts, strict=True) if count}

    @property
    def has_validation(self) -> bool:
        """Whether pictures are held out for a validation loss."""
        return self.validation_table is not None

    @cached_property
    def fingerprint(self) -> str:
        """Another one for other captions, repeats, sizes or rules; names and folders do not matter."""
        digest = hashlib.sha256()
        for found in self.table.sets:
            rules = replace(found.subset, image_dir=None, metadata_file=None, conditioning_data_dir=None, place="")
            digest.update(repr((rules, list(found.captions), found.sizes.tolist())).encode())
        for column in (self.table.repeats, self.table.bucket_of, self.table.resized, self.table.batch_sizes):
            digest.update(column.tobytes())
        return digest.hexdigest()

    @cached_property
    def contents(self) -> str:
        """Another one for other latents and masks, or where nothing is cached for other image files.

        Without a cache it reads every file.
        """
        numbers = range(len(self.table))
        files = [path for index in numbers if (path := self.table.mask_path(index))]
        cached = ""
        if self.cache is None:
            files += [self.table.path(index) for index in numbers]
        else:
            cached = self.cache.digest(self.table.latent_entry(index) for index in numbers)
        with ThreadPoolExecutor(usable_cores()) as readers:
            try:
                hashes = dict(zip(files, readers.map(content_hash, files), strict=True))
            except OSError as error:
                raise UserError(f"The image {error.filename} cannot be read: {error.strerror or error}.") from error
        return hashlib.sha256("/".join([cached, *(hashes[path] for path in files)]).encode()).hexdigest()

    def check(self) -> Report:
        """Look through captions, sizes and files; see ``preflight.check``. Raises UserError for a pointless run."""
        return check(self.table, self.prompts, validation=self.validation_table, templates=self.templates)

    def latent_entries(self) -> list[LatentEntry]:
        """What the latent cache must hold: every picture once per way it is framed, validation included."""
        tables = [self.table] if self.validation_table is None else [self.table, self.validation_table]
        entries = [table.latent_entry(index) for table in tables for index in range(len(table))]
        return list(dict.fromkeys(entries))

    def loader(self, *, workers: int = 0, persistent: bool = False, **details: Any) -> BatchLoader:
        """See ``BatchedData.loader``. Worker processes are started only for what takes time: files to be read.

        They live through all epochs (starting them takes seconds), which changes nothing: no draw depends on a process.
        """
        if self.cache is not None and not self.cache.to_disk and not self.table.has_masks:
            workers = 0
        return super().loader(workers=workers, persistent=persistent or workers > 0, **details)

    def use_cache(self, cache: LatentCache) -> None:
        """Take latents from ``cache`` (filled) instead of pixels, in loaders made from now on."""
        self.cache = cache

    def first_prompts(self) -> Iterator[list[torch.Tensor]]:
        """Ids of one draw of every caption, int64 [1, chunks, 77] per tokenizer: all there are where nothing is random.

        Where captions are dropped at times, the empty prompt comes too.
        """
        tables = [self.table] if self.validation_table is None else [self.table, self.validation_table]
        texts = {}
        for table in tables:
            for index in range(len(table)):
                rules = table.subset(index).captions
                texts[self._calm_caption(table, index)] = None
                if rules.dropout_rate or rules.dropout_every_n_epochs:
                    texts[""] = None
        for text in texts:
            yield [ids.unsqueeze(0) for ids in self.prompts.encode(text)]

    def _calm_caption(self, table: ImageTable, index: int, draw: int = 0) -> str:
        """A picture's caption, the word expanded, nothing shuffled or dropped; ``draw`` chooses lines and wildcards."""
        rules = calm_rules(table.subset(index).captions)
        rng = random.Random(draw)
        return process_caption(table.caption(index), rules, self.prompts.placeholder, rng, templates=self.templates)

    def validation_loader(self, *, process_index: int = 0, num_processes: int = 1, workers: int = 0) -> BatchLoader:
        """The held-out pictures, the same in every pass: order, framing, captions and noise seeds.

        The batches count as one optimizer step, so the weighted sum of their mean losses, averaged over the processes,
        is the mean over all held-out pictures.
        """
        table = self.validation_table
        order = self._order(table)
        sampler = BatchSampler(
            order,
            process_index=process_index,
            num_processes=num_processes,
            accumulation=max(1, order.num_batches),
            shuffle=False,
        )
        sampler.set_epoch(0, 0)
        return BatchLoader(self._source(table, 0), sampler, workers=workers, persistent=False, pin_memory=False)

    def fixed_batches(self, samples: int, *, held_out: bool) -> Iterator[Batch]:
        """The same batches at every call, of the pictures whose caption can hold the word: held-out ones, or others.

        ``samples`` samples or a few more, if there are any: the pictures come again with other noise until it is so.
        Nothing in their captions is shuffled or dropped; lines and wildcards may still leave the word out.
        """
        table = (self.validation_table if held_out else self.table).with_calm_captions()
        teaching = np.zeros_like(table.repeats)
        teaching[self._teaching(table)] = 1
        order = self._order(replace(table, repeats=teaching))
        if not order.num_samples:
            return
        loader = BatchLoader(self._source(table, 0), BatchSampler(order), workers=0, persistent=False, pin_memory=False)
        given = 0
        for passes in itertools.count():
            loader.set_epoch(_FAR_AWAY + passes, 0)
            for batch in loader:
                yield batch
                given += len(batch)
                if given >= samples:
                    return

    def concept_pictures(self, limit: int) -> list[np.ndarray]:
        """Up to ``limit`` of the pictures that teach the word, as framed for training: uint8 [H, W, 3]."""
        teaching = self._teaching(self.table)
        chosen = _spread(teaching, min(limit, len(teaching)))
        return [frame_image(self.table.path(index), self.table.framing(index)).pixels for index in chosen]

    def concept_captions(self, count: int) -> list[tuple[str, Size]]:
        """``count`` captions that hold the word, the word expanded, with their pictures' (width, height).

        Nothing in them is shuffled or dropped. The pictures take turns. Raises UserError where the length limit cuts
        the word off everywhere.
        """
        captions = []
        for number, index in enumerate(_spread(self._teaching(self.table), count)):
            draws = (self._calm_caption(self.table, index, number * _DRAWS + draw) for draw in range(_DRAWS))
            caption = next((text for text in draws if self.prompts.hold_word(self.prompts.encode(text))), None)
            if caption is not None:
                captions.append((caption, self.table.bucket(index)))
        if not captions:
            raise UserError("No caption holds the word within the length limit when its tags are not shuffled.")
        return list(itertools.islice(itertools.cycle(captions), count))

    def _teaching(self, table: ImageTable) -> list[int]:
        """Numbers of the pictures whose caption can hold the word; with templates all but regularisation pictures."""
        word = self.prompts.placeholder
        return [
            index
            for index in range(len(table))
            if not table.subset(index).is_reg
            and (self.templates or token_presence(table.caption(index), table.subset(index).captions, word) != "never")
        ]

    def source(self, max_steps: int) -> SampleSource:
        """Draws the pictures to train on."""
        return self._source(self.table, max_steps)

    def _order(self, table: ImageTable) -> EpochOrder:
        return EpochOrder(table.bucket_of, table.repeats, table.batch_sizes, self.seed)

    def _source(self, table: ImageTable, max_steps: int) -> SampleSource:
        return SampleSource(
            table, self.prompts, templates=self.templates, seed=self.seed, max_steps=max_steps, cache=self.cache
        )


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of the numbers, from all over them; they take turns where there are fewer."""
    given = len(numbers)
    return [numbers[i * given // count if given > count else i % given] for i in range(count)]
