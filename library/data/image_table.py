"""All pictures of a training in one table: how often each comes, its bucket, and what its file is made into.

One row per picture and dataset. The columns are arrays, and objects for a picture are made when they are asked for, so
a hundred thousand pictures stay small.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from library.data.buckets import BucketChooser, size_conditioning_crop
from library.data.captions import CaptionRules
from library.data.config import DatasetConfig, SubsetConfig
from library.data.image_sets import ImageSet, balanced_repeats, held_out, load_image_sets, select
from library.data.images import Framing, check_resized
from library.data.latent_cache import LatentEntry
from library.support.errors import UserError, counted

logger = logging.getLogger(__name__)

Size = tuple[int, int]
MOST_SAMPLES = 2_000_000  # an epoch; putting so many in order takes seconds already


@dataclass(frozen=True)
class Bucket:
    """The pictures of one size in one dataset; batches are made within it."""

    dataset: int
    size: Size
    batch_size: int


@dataclass
class ImageTable:
    """Pictures with all that is known of them before a pixel is read.

    Row i is picture ``row_of[i]`` of ``sets[set_of[i]]``, comes ``repeats[i]`` times an epoch in bucket
    ``buckets[bucket_of[i]]``, and its file is resized to ``resized[i]`` before it is cropped to the bucket.
    """

    configs: tuple[DatasetConfig, ...]
    sets: list[ImageSet]
    dataset_of: list[int]  # by set
    buckets: list[Bucket]
    set_of: np.ndarray  # int32 [n]
    row_of: np.ndarray  # int32 [n]
    repeats: np.ndarray  # int32 [n]
    bucket_of: np.ndarray  # int32 [n]
    resized: np.ndarray  # int32 [n, 2]

    def __len__(self) -> int:
        return len(self.row_of)

    def path(self, index: int) -> str:
        """The picture's file."""
        return self.sets[self.set_of[index]].paths[self.row_of[index]]

    def caption(self, index: int) -> str:
        """The picture's caption as it was found, perhaps in several lines."""
        return self.sets[self.set_of[index]].captions[self.row_of[index]]

    @property
    def has_masks(self) -> bool:
        """Whether any picture has a mask file."""
        return any(found.masks for found in self.sets)

    def mask_path(self, index: int) -> str | None:
        """The picture's mask file, if its subset has masks."""
        masks = self.sets[self.set_of[index]].masks
        return masks[self.row_of[index]] if masks else None

    def image_size(self, index: int) -> Size:
        """(width, height) of the file as shown."""
        width, height = self.sets[self.set_of[index]].sizes[self.row_of[index]]
        return int(width), int(height)

    def subset(self, index: int) -> SubsetConfig:
        """The subset that the picture comes from."""
        return self.sets[self.set_of[index]].subset

    def config(self, index: int) -> DatasetConfig:
        """The dataset that the picture comes from."""
        return self.configs[self.dataset_of[self.set_of[index]]]

    def bucket(self, index: int) -> Size:
        """(width, height) of what the model sees."""
        return self.buckets[self.bucket_of[index]].size

    def framing(self, index: int) -> Framing:
        """How the file becomes the model's picture."""
        subset, config = self.subset(index), self.config(index)
        width, height = self.resized[index]
        return Framing(
            resized=(int(width), int(height)),
            bucket=self.bucket(index),
            interpolation=subset.resize_interpolation or config.resize_interpolation,
            random_crop=subset.random_crop,
            # Face detectors' numbers choose the crop; a bucket has its own rule.
            face_crop_range=None if config.buckets.enabled else subset.face_crop_aug_range,
        )

    def latent_entry(self, index: int) -> LatentEntry:
        """What the latent cache must know of the picture."""
        subset, size = self.subset(index), self.image_size(index)
        return LatentEntry(
            path=Path(self.path(index)),
            image_size=size,
            framing=self.framing(index),
            crop_ltrb=size_conditioning_crop(self.bucket(index), size),
            flip=subset.flip_aug,
            alpha_mask=subset.alpha_mask,
        )

    def image_sizes(self) -> np.ndarray:
        """(width, height) of every picture's file, int32 [n, 2]."""
        starts = np.cumsum([0, *(len(found) for found in self.sets)])[:-1]
        return np.concatenate([found.sizes for found in self.sets])[starts[self.set_of] + self.row_of]

    def with_calm_captions(self) -> "ImageTable":
        """The same table, with captions in which nothing is shuffled, dropped or held back."""
        return self._with_captions(calm_rules, lambda caption: caption)

    def with_rewritten_captions(self, rewrite: Callable[[str], str]) -> "ImageTable":
        """The same table, ``rewrite`` applied to its captions and to all texts that are added or looked for in them."""
        return self._with_captions(lambda rules: rules.rewritten(rewrite), rewrite)

    def _with_captions(
        self, change: Callable[[CaptionRules], CaptionRules], rewrite: Callable[[str], str]
    ) -> "ImageTable":
        sets = []
        for found in self.sets:
            subset = replace(found.subset, captions=change(found.subset.captions))
            sets.append(replace(found, subset=subset, captions=list(map(rewrite, found.captions))))
        return replace(self, sets=sets)

    @property
    def batch_sizes(self) -> np.ndarray:
        """int64 [buckets]."""
        return np.array([bucket.batch_size for bucket in self.buckets], dtype=np.int64)

    def samples_in_buckets(self) -> np.ndarray:
        """Samples an epoch in each bucket, int64 [buckets]."""
        return np.bincount(self.bucket_of, weights=self.repeats, minlength=len(self.buckets)).astype(np.int64)


def load_tables(
    configs: Sequence[DatasetConfig], seed: int, sets: Sequence[list[ImageSet]] | None = None
) -> tuple[ImageTable, ImageTable | None]:
    """Find every picture of every dataset: the table to train on, and the one held out for validation, if any.

    ``sets`` are those of each dataset where they have been found already. ``seed`` chooses the validation pictures of a
    dataset that names no ``validation_seed``. Raises UserError for
    missing or broken files and where nothing is left to train on.
    """
    train: list[tuple[int, ImageSet, list[int]]] = []
    validation: list[tuple[int, ImageSet, list[int]]] = []
    for number, config in enumerate(configs):
        rest, held = _split(config, sets[number] if sets else load_image_sets(config), seed)
        train.extend((number, found, repeats) for found, repeats in _with_repeats(rest))
        validation.extend((number, found, [1] * len(found)) for found in held)
    if not any(not found.subset.is_reg for _, found, _ in train):
        raise UserError(_nothing_message(bool(validation)))
    samples = sum(sum(repeats) for _, _, repeats in train)
    if samples > MOST_SAMPLES:
        raise UserError(
            f"An epoch would have {samples:,} samples (images times num_repeats); at most {MOST_SAMPLES:,} are "
            "possible. Lower num_repeats: --max_train_steps decides how long a run is."
        )
    configs = tuple(configs)
    return _table(configs, train), _table(configs, validation) if validation else None


def _nothing_message(split: bool) -> str:
    if split:
        return "validation_split keeps every picture for validation, so there is nothing to train on. Lower it."
    return "There are only regularisation pictures (is_reg), so there is nothing to train on."


def _split(config: DatasetConfig, sets: list[ImageSet], seed: int) -> tuple[list[ImageSet], list[ImageSet]]:
    """Each set's pictures to train on, and those kept for validation; regularisation pictures are never kept."""
    share = config.validation_split
    if not 0 < share <= 1:
        if share:
            logger.warning("validation_split %s is not between 0 and 1; there is no validation.", share)
        return sets, []
    train, held = [], []
    for found in sets:
        if found.subset.is_reg:
            train.append(found)
            continue
        rows = held_out(len(found), share, seed if config.validation_seed is None else config.validation_seed)
        if not rows:
            logger.warning(
                "validation_split %s of %s is less than half an image: none is held out of %s.",
                *(share, counted(len(found), "image"), found.subset.source),
            )
        rest = sorted(set(range(len(found))) - set(rows))
        train.extend([select(found, rest)] if rest else [])
        held.extend([_at_rest(select(found, rows))] if rows else [])
    return train, held


def _at_rest(found: ImageSet) -> ImageSet:
    """Validation pictures without augmentation and caption dropout: the loss must be comparable between passes."""
    subset = found.subset
    still = replace(subset, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(found, subset=replace(still, captions=calm_rules(subset.captions)))


def calm_rules(rules: CaptionRules) -> CaptionRules:
    """The same rules with nothing shuffled, dropped or held back; only lines and wildcards are still drawn.

    Tags are joined as in the training: where it leaves no separator, there is none.
    """
    calm = replace(rules, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, rejoin=rules.rearranges)
    return replace(calm, shuffle=False, warmup_step=0)


def _with_repeats(sets: list[ImageSet]) -> list[tuple[ImageSet, list[int]]]:
    """Every set of a dataset with how often each of its pictures comes."""
    total = sum(len(found) * found.subset.num_repeats for found in sets if not found.subset.is_reg)
    counts = [found.subset.num_repeats for found in sets if found.subset.is_reg for _ in range(len(found))]
    balanced = balanced_repeats(total, counts)
    if unused := balanced.count(0):
        logger.warning(
            "%d of %d regularisation pictures are not used: there are only %d samples of the others an epoch.",
            *(unused, len(counts), total),
        )
    shares = iter(balanced)
    result = []
    for found in sets:
        if found.subset.is_reg:
            result.append((found, [next(shares) for _ in range(len(found))]))
        else:
            result.append((found, [found.subset.num_repeats] * len(found)))
    return result


def _table(configs: tuple[DatasetConfig, ...], parts: list[tuple[int, ImageSet, list[int]]]) -> ImageTable:
    choosers = [BucketChooser(config.buckets) for config in configs]
    numbers: dict[tuple[int, Size], int] = {}
    bucket_of: list[int] = []
    resized: list[Size] = []
    for dataset, found, _ in parts:
        for path, (width, height) in zip(found.paths, found.sizes.tolist(), strict=True):
            placement = choosers[dataset].place(width, height)
            check_resized(path, (width, height), placement.resized, placement.bucket)
            bucket_of.append(numbers.setdefault((dataset, placement.bucket), len(numbers)))
            resized.append(placement.resized)
    # Buckets are listed by dataset and size, whatever the order in which pictures opened them.
    order = sorted(numbers)
    rank = np.empty(len(order), dtype=np.int32)
    rank[[numbers[key] for key in order]] = np.arange(len(order), dtype=np.int32)
    lengths = [len(found) for _, found, _ in parts]
    table = ImageTable(
        configs=configs,
        sets=[found for _, found, _ in parts],
        dataset_of=[dataset for dataset, _, _ in parts],
        buckets=[Bucket(dataset, size, configs[dataset].batch_size) for dataset, size in order],
        set_of=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        row_of=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        repeats=np.array([count for _, _, repeats in parts for count in repeats], dtype=np.int32),
        bucket_of=rank[bucket_of],
        resized=np.array(resized, dtype=np.int32).reshape(-1, 2),
    )
    return _without_unused(table)


def _without_unused(table: ImageTable) -> ImageTable:
    """The table without rows that never come: regularisation pictures beyond the balance."""
    used = table.repeats > 0
    if used.all():
        return table
    for column in ("set_of", "row_of", "repeats", "bucket_of", "resized"):
        setattr(table, column, getattr(table, column)[used])
    return table
