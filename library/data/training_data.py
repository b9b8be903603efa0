"""The images of a training's folders as batches; see ``samples`` for what is drawn of them."""

import hashlib
import itertools
import multiprocessing
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property
from typing import Any

import torch

from library.data.batch_order import BatchSampler
from library.data.batches import Batch
from library.data.buckets import Size
from library.data.concept import Concept
from library.data.config import DatasetConfig
from library.data.image_entry import ImageEntry
from library.data.image_sets import ImageSet
from library.data.image_table import ImageTable, load_tables
from library.data.latent_cache import LatentCache
from library.data.latent_entry import LatentEntry
from library.data.latent_files import content_hash
from library.data.loader import BatchLoader, make_loader
from library.data.preflight import Report, check
from library.data.samples import SampleSource, deterministic_caption
from library.embedding.tokenizer import PromptTokenizer
from library.support.errors import UserError
from library.support.processes import usable_cores


class TrainingData:
    """Everything a training reads from image folders, found and checked without any model."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        prompts: PromptTokenizer,
        *,
        templates: Sequence[str] | None = None,
        seed: int = 0,
        sets: Sequence[list[ImageSet]] | None = None,
    ) -> None:
        """Find all images and captions, unless ``sets`` holds them by dataset. Raises UserError for what is amiss."""
        self.configs = tuple(configs)
        self.prompts = prompts
        self.templates = templates
        self.seed = seed
        self.inpainting = any(config.train_inpainting for config in configs)
        table, validation_table = load_tables(configs, seed, sets)
        # Before anything is looked for in a caption: the word, tags, wildcards.
        self.table = table.with_rewritten_captions(prompts.repaired)
        self.validation_table = validation_table and validation_table.with_rewritten_captions(prompts.repaired)
        self.order = self.table.order(seed)
        self.cache: LatentCache | None = None

    @property
    def resolution(self) -> Size:
        """(width, height) of the dataset with the most pixels."""
        return max((config.buckets.resolution for config in self.configs), key=lambda size: size[0] * size[1])

    @property
    def sizes(self) -> Collection[Size]:
        """(width, height) of the images in the batches that are trained on."""
        return {each.bucket.size for each in self.table.in_buckets() if each.samples}

    @cached_property
    def fingerprint(self) -> str:
        """Another one for other captions, repeats, sizes or rules; names and folders do not matter."""
        return self.table.fingerprint()

    @cached_property
    def contents(self) -> str:
        """Another one for other latents and masks, or where nothing is cached for other image files.

        Without a cache it reads every file.
        """
        files = [entry.mask_path for entry in self.table if entry.mask_path]
        cached = ""
        if self.cache is None:
            files += [entry.path for entry in self.table]
        else:
            cached = self.cache.digest(entry.latent_entry for entry in self.table)
        with ThreadPoolExecutor(usable_cores()) as readers:
            try:
                hashes = dict(zip(files, readers.map(content_hash, files), strict=True))
            except OSError as error:
                raise UserError(f"The image {error.filename} cannot be read: {error.strerror or error}.") from error
        return hashlib.sha256("/".join([cached, *(hashes[path] for path in files)]).encode()).hexdigest()

    def of_largest_batch(self) -> "TrainingData":
        """The same data with the images of one batch alone, of as many pixels as any has, and nothing held out."""
        alone = copy(self)
        alone.table, alone.validation_table = self.table.of_largest_batch(), None
        alone.order = alone.table.order(self.seed)
        return alone

    def check(self) -> Report:
        """Look through captions, sizes and files; see ``preflight.check``. Raises UserError for a pointless run."""
        return check(self.table, self.prompts, validation=self.validation_table, templates=self.templates)

    def latent_entries(self) -> list[LatentEntry]:
        """What the latent cache must hold: every image once per way it is framed, validation included."""
        return list(dict.fromkeys(entry.latent_entry for entry in self._entries()))

    def loader(self, *, max_steps: int = 0, workers: int = 0, persistent: bool = False, **details: Any) -> BatchLoader:
        """See ``BatchedData.loader``. Worker processes are started only for what takes time: files to be read.

        They live through all epochs (starting them takes seconds), which changes nothing: no draw depends on a process.
        """
        in_memory = self.cache is not None and not self.cache.to_disk
        # Workers that are not forked would be sent every tensor as an open file, of which few are allowed.
        if in_memory and (not self.table.has_masks or multiprocessing.get_start_method() != "fork"):
            workers = 0
        source = self.source(max_steps)
        return make_loader(self.order, source, workers=workers, persistent=persistent or workers > 0, **details)

    def use_cache(self, cache: LatentCache) -> None:
        """Take latents from ``cache`` (filled) instead of pixels, in loaders made from now on."""
        self.cache = cache

    def first_prompts(self) -> Iterator[list[torch.Tensor]]:
        """Ids of one draw of every caption, int64 [1, chunks, 77] per tokenizer: all there are where nothing is random.

        Where captions are dropped at times, the empty prompt comes too.
        """
        texts: dict[str, None] = {}
        for entry in self._entries():
            rules = entry.subset.captions
            texts[deterministic_caption(entry, self.prompts, self.templates)] = None
            if rules.dropout_rate or rules.dropout_every_n_epochs:
                texts[""] = None
        for text in texts:
            yield [ids.unsqueeze(0) for ids in self.prompts.encode(text)]

    def validation_loader(self, *, process_index: int = 0, num_processes: int = 1) -> BatchLoader | None:
        """The held-out images, the same in every pass: order, framing, captions and noise seeds; None without any.

        The batches count as one optimizer step, so the weighted sum of their mean losses, averaged over the processes,
        is the mean over all held-out images.
        """
        table = self.validation_table
        if table is None:
            return None
        order = table.order(self.seed)
        sampler = BatchSampler(
            order,
            process_index=process_index,
            num_processes=num_processes,
            accumulation=max(1, order.num_batches),
            shuffle=False,
        )
        sampler.set_epoch(0, 0)
        return BatchLoader(self._source(table, 0), sampler)

    def source(self, max_steps: int) -> SampleSource:
        """Draws the images to train on."""
        return self._source(self.table, max_steps)

    def fixed_batches(self, samples: int, *, held_out: bool) -> Iterator[Batch]:
        """See ``Concept.fixed_batches``."""
        return self.concept().fixed_batches(samples, held_out=held_out)

    def concept(self) -> Concept:
        """The images that teach the word, with the latents that are used by now."""
        return Concept(self.table, self.validation_table, self.prompts, self.templates, self.seed, self.cache)

    def _entries(self) -> Iterator[ImageEntry]:
        """All images, those that are held out last."""
        return itertools.chain(self.table, self.validation_table or ())

    def _source(self, table: ImageTable, max_steps: int) -> SampleSource:
        return SampleSource(
            table, self.prompts, templates=self.templates, seed=self.seed, max_steps=max_steps, cache=self.cache
        )
