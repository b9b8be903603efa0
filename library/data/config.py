"""What the user wants of the data: a dataset file or folder flags become ``DatasetConfig`` objects.

A value comes from the subset, else its dataset, else ``[general]``, else the command line. Nothing is looked for on
the disk but the file itself and the sub-folders of ``--train_data_dir`` and ``--reg_data_dir``.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from library.data.buckets import BucketRules, Size, adjusted_limits
from library.data.captions import CaptionRules
from library.data.latent_entry import PIXELS_PER_LATENT
from library.data.schema import (
    DATASET,
    DATASET_KEYS,
    DREAMBOOTH,
    FINETUNING,
    MASK,
    OPTION_NAMES,
    SUBSET,
    SUBSET_KEYS,
    check_table,
    check_value,
    shown,
)
from library.data.sources import Source, Table, find_source
from library.options.checks import CACHED_INPAINTING
from library.options.data import DatasetOptions
from library.support.errors import UserError
from library.support.shipped_files import shipped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubsetConfig:
    """One folder or metadata file of images, everything inherited filled in.

    ``kind`` is "dreambooth" (a folder), "finetuning" (a metadata file) or "mask" (a folder with masks).
    ``caption_extension`` None means ``.caption``, then (without ``class_tokens``) ``.txt``. ``place`` says for messages
    where it was asked for. A folder that was only ``found`` in a folder flag's may be empty. In one that is
    ``read_only`` no notes are left.
    """

    kind: str
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str | None = None
    cache_info: bool = False
    allow_outside_images: bool = False
    alpha_mask: bool = False
    captions: CaptionRules = field(default_factory=CaptionRules)
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    custom_attributes: dict[str, Any] | None = None
    place: str = ""
    found: bool = field(default=False, repr=False)
    read_only: bool = field(default=False, repr=False)

    @property
    def source(self) -> str:
        """The file or folder that lists the images."""
        return self.metadata_file or self.image_dir or ""


@dataclass(frozen=True)
class DatasetConfig:
    """Images that are trained at one resolution and batch size.

    Those whose area is at most that of ``skip_image_resolution`` (width, height) are left out. With
    ``train_inpainting``, which all datasets of a run share, random masks hide parts of them.
    """

    kind: str
    batch_size: int
    buckets: BucketRules
    subsets: tuple[SubsetConfig, ...]
    validation_split: float = 0.0
    validation_seed: int | None = None
    network_multiplier: float = 1.0
    prior_loss_weight: float = 1.0
    resize_interpolation: str | None = None
    skip_image_resolution: Size | None = None
    train_inpainting: bool = False
    place: str = ""


@dataclass(frozen=True)
class _Chain:
    """Looks a value up in tables, the innermost first, then among the options."""

    tables: tuple[dict[str, Any], ...]
    options: DatasetOptions

    def get(self, name: str, default: Any = None) -> Any:
        for table in self.tables:
            if name in table:
                return table[name]
        return getattr(self.options, OPTION_NAMES.get(name, name), default)

    def gives(self, name: str) -> bool:
        """Whether the user has chosen a value, so that it may be at fault."""
        option = OPTION_NAMES.get(name, name)
        in_file = any(name in table for table in self.tables)
        return in_file or getattr(self.options, option) != getattr(DatasetOptions(), option)


def load_dataset_configs(options: DatasetOptions, *, bucket_step: int) -> tuple[DatasetConfig, ...]:
    """Return the datasets that a file (``--dataset_config``) or folder flags describe.

    ``bucket_step`` is the number of pixels that bucket sides must be multiples of: 64 for SD, 32 for SDXL. Raises
    UserError, naming file, place, key, value and what is permitted, for whatever cannot be meant.
    """
    for name in ("resolution", "skip_image_resolution"):
        if (size := getattr(options, name)) is not None:
            check_value(DATASET_KEYS[name], name, list(size), "The command line")
    source = find_source(options)
    datasets = tuple(_dataset(table, source, options, bucket_step) for table in source.datasets)
    _check_masks(datasets, options)
    _check_inpainting(datasets, options)
    _tell_idle_keys(datasets, in_file=options.dataset_config is not None)
    return datasets


def check_caching(datasets: Sequence[DatasetConfig], *, caching: bool) -> None:
    """Refuse colour changes, random crops and masks where latents are cached; raises UserError naming the place.

    sd-scripts refuses these two and passes over face crops, which are told here.
    """
    if not caching:
        return
    if masked := next((dataset for dataset in datasets if dataset.train_inpainting), None):
        raise UserError(f"{masked.place}: {CACHED_INPAINTING}")
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        refused = [name for name in ("color_aug", "random_crop") if getattr(subset, name)]
        if refused:
            raise UserError(
                f"{subset.place}: {' and '.join(refused)} cannot vary an image whose latents are cached, that is made "
                "once. Switch off either this or --cache_latents (and --cache_latents_to_disk). flip_aug works."
            )
        if subset.face_crop_aug_range:
            logger.info("%s: face_crop_aug_range does nothing with --cache_latents.", subset.place)


def _dataset(table: Table, source: Source, options: DatasetOptions, bucket_step: int) -> DatasetConfig:
    if not table.subsets:
        raise UserError(f'{table.place}: there is no [[datasets.subsets]] in it. Add one with image_dir = "path/to/…".')
    kinds = _kinds(table, options)
    shared_kind = kinds[0] if len(set(kinds)) == 1 else DREAMBOOTH
    check_table(table.values, DATASET, shared_kind, table.place)
    for subset, kind in zip(table.subsets, kinds, strict=True):
        check_table(subset.values, SUBSET, kind, subset.place)
    chain = _Chain((table.values, source.general), options)
    subsets = _usable([_subset(*pair, chain) for pair in zip(table.subsets, kinds, strict=True)], table.place)
    return DatasetConfig(
        kind=MASK if any(subset.kind == MASK for subset in subsets) else shared_kind,
        batch_size=chain.get("batch_size"),
        buckets=_buckets(chain, table.place, bucket_step),
        subsets=subsets,
        validation_split=chain.get("validation_split", 0.0),
        validation_seed=chain.get("validation_seed"),
        network_multiplier=chain.get("network_multiplier", 1.0),
        prior_loss_weight=options.prior_loss_weight,
        resize_interpolation=chain.get("resize_interpolation"),
        skip_image_resolution=_as_size(chain.get("skip_image_resolution")),
        train_inpainting=chain.get("train_inpainting"),
        place=table.place,
    )


def _as_size(value: int | Sequence[int] | None) -> Size | None:
    """(width, height) of a size as a file has it: one side of a square, or both sides."""
    if not value:
        return None
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _kinds(table: Table, options: DatasetOptions) -> list[str]:
    """The kind of each subset of a dataset, told by the keys it has."""
    with_masks = ["conditioning_data_dir" in subset.values for subset in table.subsets]
    if options.masked_loss and (all(with_masks) or (any(with_masks) and options.conditioning_data_dir)):
        return [MASK if has_masks else DREAMBOOTH for has_masks in with_masks]
    listed = ["metadata_file" in subset.values for subset in table.subsets]
    if any(listed) and not all(listed):
        raise UserError(
            f"{table.place}: subset number {listed.index(True) + 1} has a metadata_file, but number "
            f"{listed.index(False) + 1} has none. Put the two kinds into [[datasets]] of their own."
        )
    return [FINETUNING if any(listed) else DREAMBOOTH] * len(listed)


def _subset(table: Table, kind: str, above: _Chain) -> SubsetConfig:
    own, options = table.values, above.options
    chain = replace(above, tables=(own, *above.tables))
    masks = own.get("conditioning_data_dir")
    if options.masked_loss and not masks and not own.get("is_reg", False):
        masks = options.conditioning_data_dir
    in_folder = kind != FINETUNING
    handed_down = {name: chain.get(name) for name in SUBSET_KEYS.keys() & SubsetConfig.__dataclass_fields__}
    face_range = handed_down["face_crop_aug_range"]
    return SubsetConfig(
        kind=MASK if masks and in_folder else kind,
        image_dir=own.get("image_dir") and shipped(own["image_dir"]),
        metadata_file=own.get("metadata_file"),
        conditioning_data_dir=masks,
        is_reg=own.get("is_reg", False),
        class_tokens=chain.get("class_tokens") if kind == DREAMBOOTH else None,
        caption_extension=chain.get("caption_extension") if in_folder else None,
        cache_info=chain.get("cache_info") if in_folder else False,
        allow_outside_images=options.allow_outside_images,
        alpha_mask=own.get("alpha_mask", options.alpha_mask) if kind != MASK else False,
        captions=_caption_rules(chain),
        place=table.place,
        found=table.found,
        read_only=options.dry_run,
        **handed_down | {"face_crop_aug_range": face_range and (face_range[0], face_range[1])},
    )


def _caption_rules(chain: _Chain) -> CaptionRules:
    return CaptionRules(
        prefix=chain.get("caption_prefix"),
        suffix=chain.get("caption_suffix"),
        separator=chain.get("caption_separator") or ",",
        keep_tokens=chain.get("keep_tokens"),
        keep_tokens_separator=chain.get("keep_tokens_separator") or "",
        secondary_separator=chain.get("secondary_separator"),
        shuffle=chain.get("shuffle_caption"),
        wildcard=chain.get("enable_wildcard"),
        dropout_rate=chain.get("caption_dropout_rate"),
        dropout_every_n_epochs=chain.get("caption_dropout_every_n_epochs"),
        tag_dropout_rate=chain.get("caption_tag_dropout_rate"),
        warmup_min=chain.get("token_warmup_min"),
        warmup_step=chain.get("token_warmup_step"),
    )


def _usable(subsets: list[SubsetConfig], place: str) -> tuple[SubsetConfig, ...]:
    """The subsets that count: repeated at least once, and not the same images as an earlier one's."""
    kept: dict[str, SubsetConfig] = {}
    for subset in subsets:
        if subset.num_repeats < 1:
            logger.warning("%s is left out: its num_repeats is %d.", subset.place, subset.num_repeats)
        elif kept.setdefault(os.path.realpath(subset.source), subset) is not subset:
            logger.warning(
                '%s is left out: "%s" is in an earlier subset of the same dataset.', subset.place, subset.source
            )
    if not kept:
        raise UserError(f"{place}: num_repeats is below 1 in every subset, so there is nothing to train on.")
    return tuple(kept.values())


def _buckets(chain: _Chain, place: str, bucket_step: int) -> BucketRules:
    """The dataset's bucket rules, the limits adjusted to the steps where buckets are on."""
    size = _as_size(chain.get("resolution"))
    if size is None:
        raise UserError(
            f"{place}: there is no resolution. Write resolution = 512 (1024 for SDXL) in [general] or [[datasets]], or "
            "give --resolution."
        )
    rules = BucketRules(
        resolution=size,
        enabled=chain.get("enable_bucket"),
        min_reso=chain.get("min_bucket_reso"),
        max_reso=chain.get("max_bucket_reso"),
        steps=chain.get("bucket_reso_steps"),
        no_upscale=chain.get("bucket_no_upscale"),
    )
    if rules.enabled:
        return _with_fitting_limits(rules, chain, place, bucket_step)
    _tell_of_latents(rules.resolution, place)
    return rules


def _tell_of_latents(resolution: Size, place: str) -> None:
    """Say what a resolution becomes that the VAE cannot make whole latents of; bucket sides are multiples anyway."""
    width, height = (side // PIXELS_PER_LATENT * PIXELS_PER_LATENT for side in resolution)
    if (width, height) != resolution:
        logger.warning(
            "%s: the resolution %dx%d is no multiple of %d, as the VAE needs: it becomes %dx%d.",
            *(place, *resolution, PIXELS_PER_LATENT, width, height),
        )


def _with_fitting_limits(rules: BucketRules, chain: _Chain, place: str, bucket_step: int) -> BucketRules:
    if rules.steps % bucket_step:
        raise UserError(
            f'{place}: "bucket_reso_steps" must be a multiple of {bucket_step} for this model, but it is {rules.steps}.'
        )
    low, high = adjusted_limits(rules)
    sides = f"{rules.resolution[0]}x{rules.resolution[1]}"
    if low < rules.steps:
        problem = "min_bucket_reso", rules.min_reso, f"at least bucket_reso_steps ({rules.steps})"
    elif low > min(rules.resolution):
        problem = "min_bucket_reso", rules.min_reso, f"at most the shorter side of the resolution {sides}"
    elif high < max(rules.resolution):
        problem = "max_bucket_reso", rules.max_reso, f"at least the longer side of the resolution {sides}"
    else:
        if (low, high) != (rules.min_reso, rules.max_reso):
            logger.warning(
                "%s: bucket sides are multiples of %d, so they go from %d to %d instead of from %d to %d.",
                *(place, rules.steps, low, high, rules.min_reso, rules.max_reso),
            )
        return replace(rules, min_reso=low, max_reso=high)
    name, value, permitted = problem
    if chain.gives(name):
        raise UserError(f'{place}: "{name}" must be {permitted}, but it is {shown(value)}.')
    raise UserError(f'{place}: "{name}" is needed here. It must be {permitted}, and left out it is {shown(value)}.')


def _check_masks(datasets: tuple[DatasetConfig, ...], options: DatasetOptions) -> None:
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if options.masked_loss and not any(subset.conditioning_data_dir or subset.alpha_mask for subset in subsets):
        raise UserError(
            "--masked_loss has no masks: give the subsets conditioning_data_dir (or --conditioning_data_dir for all "
            "of them), or alpha_mask = true where the images' own transparency is the mask."
        )
    if options.conditioning_data_dir and not options.masked_loss:
        logger.warning("--conditioning_data_dir does nothing without --masked_loss.")


def _check_inpainting(datasets: tuple[DatasetConfig, ...], options: DatasetOptions) -> None:
    """Refuse datasets of which only some have masks: they train one U-Net."""
    without = next((dataset for dataset in datasets if not dataset.train_inpainting), None)
    if without and (options.train_inpainting or any(dataset.train_inpainting for dataset in datasets)):
        raise UserError(
            f"{without.place}: train_inpainting is off here, but it is on elsewhere, and all datasets train one U-Net. "
            "Give --train_inpainting, or write the key once into [general], and leave it out elsewhere."
        )


def _tell_idle_keys(datasets: tuple[DatasetConfig, ...], *, in_file: bool) -> None:
    """Say once of each key that is given and changes nothing where it was first met.

    Of options without a dataset file most is said with the other options, see ``notices``.
    """
    told = set()
    for dataset in datasets:
        for place, sentence in itertools.chain(_idle_bucket_keys(dataset) if in_file else (), _idle_keys(dataset)):
            if sentence not in told:
                logger.info("%s: %s", place, sentence)
                told.add(sentence)


def _idle_bucket_keys(dataset: DatasetConfig) -> Iterator[tuple[str, str]]:
    rules, usual = dataset.buckets, DatasetOptions()
    given = {"min_bucket_reso": rules.min_reso, "max_bucket_reso": rules.max_reso, "bucket_reso_steps": rules.steps}
    for key, value in given.items():
        if value != getattr(usual, key) and not rules.enabled:
            yield dataset.place, f"{key} does nothing without enable_bucket."


def _idle_keys(dataset: DatasetConfig) -> Iterator[tuple[str, str]]:
    if dataset.network_multiplier != 1.0:
        yield dataset.place, "network_multiplier does nothing here, there is no network to weaken."
    if dataset.buckets.no_upscale and not dataset.buckets.enabled:
        yield dataset.place, "bucket_no_upscale does nothing without enable_bucket."
    usual = CaptionRules()
    for subset in dataset.subsets:
        rules = subset.captions
        if subset.custom_attributes:
            yield subset.place, "custom_attributes do nothing here, no part of the training reads them."
        if subset.face_crop_aug_range and dataset.buckets.enabled:
            yield subset.place, "face_crop_aug_range does nothing with enable_bucket."
        if rules.warmup_min != usual.warmup_min and not rules.warmup_step:
            yield subset.place, "token_warmup_min does nothing without token_warmup_step."
        if rules.rearranges:
            continue
        for key in ("keep_tokens", "keep_tokens_separator"):
            if getattr(rules, key) != getattr(usual, key):
                yield subset.place, f"{key} does nothing while captions are not shuffled, warmed up or thinned out."
