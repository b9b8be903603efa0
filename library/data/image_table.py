"""All images of a training in one table: how often each comes, its bucket, and what its file is made into.

One row per image and dataset. The columns are arrays that nobody else indexes, and the entry of an image is made when
it is asked for, so a hundred thousand images stay small.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from library.data.batch_order import EpochOrder
from library.data.buckets import BucketChooser, Size
from library.data.captions import CaptionRules, deterministic_rules
from library.data.config import DatasetConfig
from library.data.image_entry import ImageEntry
from library.data.image_sets import ImageSet, balanced_repeats, held_out, load_image_sets, select
from library.data.images import check_resized
from library.support.errors import UserError, counted

logger = logging.getLogger(__name__)

MOST_SAMPLES = 2_000_000  # an epoch; putting so many in order takes seconds already


@dataclass(frozen=True)
class Bucket:
    """The images of one size in one dataset; batches are made within it."""

    dataset: int
    size: Size
    batch_size: int


@dataclass(frozen=True)
class BucketImages:
    """What a bucket holds: so many images, which come as so many samples an epoch."""

    bucket: Bucket
    images: int
    samples: int

    @property
    def batches(self) -> int:
        """Of an epoch; the last may be smaller."""
        return -(-self.samples // self.bucket.batch_size)


@dataclass(frozen=True)
class SubsetImages:
    """What one subset of a dataset (``dataset`` is its number, from 0) gives to a table.

    ``found`` is all of it, ``drawn`` what comes, as ``samples`` samples an epoch.
    """

    dataset: int
    found: ImageSet
    drawn: ImageSet
    samples: int


@dataclass(frozen=True)
class _Columns:
    """Row i is image ``row[i]`` of set ``set[i]``; it comes ``repeats[i]`` times an epoch in bucket ``bucket[i]``."""

    set: np.ndarray  # int32 [n]
    row: np.ndarray  # int32 [n]
    repeats: np.ndarray  # int32 [n]
    bucket: np.ndarray  # int32 [n]
    resized: np.ndarray  # int32 [n, 2]

    def __getitem__(self, chosen: np.ndarray) -> "_Columns":
        return _Columns(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ImageTable:
    """The images of a training, one row each: ``table[i]`` is an :class:`ImageEntry`, methods give whole columns."""

    configs: tuple[DatasetConfig, ...]
    sets: tuple[ImageSet, ...]
    buckets: tuple[Bucket, ...]
    _dataset_of: tuple[int, ...]  # by set
    _columns: _Columns

    def __len__(self) -> int:
        return len(self._columns.row)

    def __getitem__(self, index: int) -> ImageEntry:
        columns = self._columns
        number, row = columns.set[index], columns.row[index]
        found = self.sets[number]
        width, height = found.sizes[row].tolist()
        resized_width, resized_height = columns.resized[index].tolist()
        return ImageEntry(
            path=found.paths[row],
            caption=found.captions[row],
            mask_path=found.masks[row] if found.masks else None,
            image_size=(width, height),
            subset=found.subset,
            config=self.configs[self._dataset_of[number]],
            bucket=self.buckets[columns.bucket[index]].size,
            resized=(resized_width, resized_height),
            repeats=int(columns.repeats[index]),
        )

    def __iter__(self) -> Iterator[ImageEntry]:
        return map(self.__getitem__, range(len(self)))

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask file."""
        return any(found.masks for found in self.sets)

    def subsets(self) -> Iterator[SubsetImages]:
        """What each subset gives, in order."""
        columns = self._columns
        for number, (dataset, found) in enumerate(zip(self._dataset_of, self.sets, strict=True)):
            here = columns.set == number
            rows = columns.row[here].tolist()
            drawn = found if len(rows) == len(found) else select(found, rows)
            yield SubsetImages(dataset, found, drawn, int(columns.repeats[here].sum()))

    def repeats(self) -> np.ndarray:
        """How often each image comes in an epoch, int32 [n]."""
        return self._columns.repeats

    def resized(self) -> np.ndarray:
        """(width, height) that each file is resized to before it is cropped, int32 [n, 2]."""
        return self._columns.resized

    def image_sizes(self) -> np.ndarray:
        """(width, height) of each file as shown, int32 [n, 2]."""
        starts = np.cumsum([0, *(len(found) for found in self.sets)])[:-1]
        rows = starts[self._columns.set] + self._columns.row
        sizes: np.ndarray = np.concatenate([found.sizes for found in self.sets])[rows]
        return sizes

    def bucket_sizes(self) -> np.ndarray:
        """(width, height) of what the model sees of each image, int64 [n, 2]."""
        sizes: np.ndarray = np.array([bucket.size for bucket in self.buckets])[self._columns.bucket]
        return sizes

    def dataset_numbers(self) -> np.ndarray:
        """The number of each image's dataset, from 0, int64 [n]."""
        numbers: np.ndarray = np.array(self._dataset_of)[self._columns.set]
        return numbers

    def in_buckets(self) -> list[BucketImages]:
        """What each bucket holds, in the order of ``buckets``."""
        images = np.bincount(self._columns.bucket, minlength=len(self.buckets))
        samples = np.bincount(self._columns.bucket, weights=self._columns.repeats, minlength=len(self.buckets))
        counts = zip(self.buckets, images.tolist(), samples.astype(np.int64).tolist(), strict=True)
        return [BucketImages(*each) for each in counts]

    def order(self, seed: int) -> EpochOrder:
        """The order in which an epoch trains on the images, for any integer ``seed``."""
        return EpochOrder(self._columns.bucket, self._columns.repeats, self._batch_sizes(), seed)

    def fingerprint(self) -> str:
        """Another one for other captions, repeats, sizes or rules; names and folders do not matter."""
        digest = hashlib.sha256()
        for found in self.sets:
            rules = replace(found.subset, image_dir=None, metadata_file=None, conditioning_data_dir=None, place="")
            digest.update(repr((rules, list(found.captions), found.sizes.tolist())).encode())
        for column in (self._columns.repeats, self._columns.bucket, self._columns.resized, self._batch_sizes()):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def _batch_sizes(self) -> np.ndarray:
        """Int64 [buckets]."""
        return np.array([bucket.batch_size for bucket in self.buckets], dtype=np.int64)

    def only(self, indices: Sequence[int]) -> "ImageTable":
        """The same table, in which these images come once an epoch and the others never."""
        repeats = np.zeros_like(self._columns.repeats)
        repeats[list(indices)] = 1
        return replace(self, _columns=replace(self._columns, repeats=repeats))

    def of_largest_batch(self) -> "ImageTable":
        """A table with the images of one batch alone, of as many pixels as any has."""
        buckets = self.in_buckets()

        def pixels(number: int) -> int:
            (width, height), most = buckets[number].bucket.size, buckets[number].bucket.batch_size
            return width * height * min(buckets[number].samples, most)

        largest = max(range(len(buckets)), key=pixels)
        rows = np.flatnonzero(self._columns.bucket == largest)[: buckets[largest].bucket.batch_size]
        return replace(self, _columns=self._columns[rows])

    def with_deterministic_captions(self) -> "ImageTable":
        """The same table, with captions in which nothing is shuffled, dropped or held back."""
        return self._with_captions(deterministic_rules, lambda caption: caption)

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
        return replace(self, sets=tuple(sets))


def load_tables(
    configs: Sequence[DatasetConfig], seed: int, sets: Sequence[list[ImageSet]] | None = None
) -> tuple[ImageTable, ImageTable | None]:
    """Find every image of every dataset: the table to train on, and the one held out for validation, if any.

    ``sets`` are those of each dataset where they have been found already. ``seed`` chooses the validation images of a
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
        return "validation_split keeps every image for validation, so there is nothing to train on. Lower it."
    return "There are only regularisation images (is_reg), so there is nothing to train on."


def _split(config: DatasetConfig, sets: list[ImageSet], seed: int) -> tuple[list[ImageSet], list[ImageSet]]:
    """Each set's images to train on, and those kept for validation; regularisation images are never kept."""
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
    """Validation images without augmentation and caption dropout: the loss must be comparable between passes."""
    subset = found.subset
    still = replace(subset, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(found, subset=replace(still, captions=deterministic_rules(subset.captions)))


def _with_repeats(sets: list[ImageSet]) -> list[tuple[ImageSet, list[int]]]:
    """Every set of a dataset with how often each of its images comes."""
    total = sum(len(found) * found.subset.num_repeats for found in sets if not found.subset.is_reg)
    counts = [found.subset.num_repeats for found in sets if found.subset.is_reg for _ in range(len(found))]
    balanced = balanced_repeats(total, counts)
    if unused := balanced.count(0):
        logger.warning(
            "%d of %d regularisation images are not used: there are only %d samples of the others an epoch.",
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
    # Buckets are listed by dataset and size, whatever the order in which images opened them.
    order = sorted(numbers)
    rank = np.empty(len(order), dtype=np.int32)
    rank[[numbers[key] for key in order]] = np.arange(len(order), dtype=np.int32)
    lengths = [len(found) for _, found, _ in parts]
    columns = _Columns(
        set=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        row=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        repeats=np.array([count for _, _, repeats in parts for count in repeats], dtype=np.int32),
        bucket=rank[bucket_of],
        resized=np.array(resized, dtype=np.int32).reshape(-1, 2),
    )
    used = columns.repeats > 0  # all but regularisation images beyond the balance
    return ImageTable(
        configs=configs,
        sets=tuple(found for _, found, _ in parts),
        buckets=tuple(Bucket(dataset, size, configs[dataset].batch_size) for dataset, size in order),
        _dataset_of=tuple(dataset for dataset, _, _ in parts),
        _columns=columns if used.all() else columns[used],
    )
