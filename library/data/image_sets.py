"""The images of each subset: found, sized, with their captions and masks, before any model is loaded."""

# Paths are plain strings here: of very many, Path objects take several times the room and time.
# ruff: noqa: PTH113, PTH116, PTH117, PTH118, PTH119, PTH120, PTH122

import logging
import os
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from library.data.caption_files import DEFAULT_EXTENSIONS, caption_extensions, caption_name, read_caption
from library.data.config import DatasetConfig, SubsetConfig
from library.data.images import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, check_mask_size, image_size
from library.data.metadata_files import NO_FILE, FolderCache, read_metadata
from library.support.errors import NAMES_SHOWN, UserError, counted, first_names, looked_for

logger = logging.getLogger(__name__)


@dataclass
class ImageSet:
    """The images of one subset, in columns: a hundred bytes or so per image beside its caption.

    ``captions`` may hold several lines, of which the first that is not blank counts if the subset uses no wildcards.
    ``uncaptioned`` lists the images that have neither a caption nor the folder's class tokens. ``masks`` are the mask
    files by image, where there are masks. ``whole`` are images that were decoded once and have not changed since.
    """

    subset: SubsetConfig
    paths: list[str]
    captions: list[str]
    sizes: np.ndarray  # int32 [n, 2]: width, height as shown (EXIF orientation applied)
    uncaptioned: list[str] = field(default_factory=list)
    masks: list[str] | None = None
    whole: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.paths)


def list_images(folder: str, option: str = "image_dir") -> list[str]:
    """Names of the images directly in a folder, sorted; extensions in any letter case, hidden files left out.

    Raises UserError, naming the ``option`` that gave the folder, when it does not exist or cannot be listed.
    """
    return sorted(name for name in _file_names(folder, option) if _is_image(name))


def _is_image(name: str) -> bool:
    return _ends_in(name, IMAGE_EXTENSIONS)


def _ends_in(name: str, extensions: Collection[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions


def _file_names(folder: str, option: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            # A link to nothing is listed too: what reads it names it, where leaving it out would say nothing.
            return {entry.name for entry in entries if not _is_folder(entry)}
    except FileNotFoundError as error:
        raise UserError(f'The folder "{folder}" does not exist{looked_for(folder)}. Check {option}.') from error
    except NotADirectoryError as error:
        raise UserError(f'"{folder}" is a file, but {option} must be a folder of images.') from error
    except OSError as error:
        raise UserError(f'The folder "{folder}" ({option}) cannot be read: {error.strerror or error}.') from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.is_file() and entry.is_dir()
    except OSError:  # a link to itself
        return False


def load_image_sets(config: DatasetConfig) -> list[ImageSet]:
    """The image sets of one dataset. Raises UserError naming the folder or file that is missing, empty or broken.

    An image that several subsets name counts once, in the last of them, as in sd-scripts; that is a warning. So is an
    empty sub-folder of a folder flag, as long as another one is not empty.
    """
    loaded = [load_image_set(subset) for subset in config.subsets]
    sets = [found for found in loaded if len(found)]
    for subset in (found.subset for found in loaded if not len(found)):
        if not (sets and subset.found):
            raise UserError(_empty_message(subset))
        logger.warning("%s It is skipped.", _empty_message(subset))
    sets = _without_repeated_paths(sets)
    _match_masks(sets)
    return _without_small_images(sets, config)


def _without_small_images(sets: list[ImageSet], config: DatasetConfig) -> list[ImageSet]:
    if config.skip_image_resolution is None:
        return sets
    width, height = config.skip_image_resolution
    kept, skipped = [], []
    for found in sets:
        large = found.sizes.prod(axis=1, dtype=np.int64) > width * height
        skipped += [path for path, stays in zip(found.paths, large, strict=True) if not stays]
        kept.append(select(found, np.flatnonzero(large).tolist()))
    if skipped:
        logger.warning(
            "%s: skip_image_resolution leaves out %d of %d images, whose area is at most %dx%d: %s.",
            *(config.place, len(skipped), sum(map(len, sets)), width, height, first_names(skipped)),
        )
    if not any(map(len, kept)):
        raise UserError(
            f"{config.place}: skip_image_resolution leaves out every image, so there is nothing to train on. Lower it."
        )
    return [found for found in kept if len(found)]


def _empty_message(subset: SubsetConfig) -> str:
    if subset.metadata_file:
        return f'The metadata file "{subset.metadata_file}" lists no images.'
    extensions = ", ".join(sorted(IMAGE_EXTENSIONS))
    message = f'The image folder "{subset.image_dir}" holds no images ({extensions}).'
    with os.scandir(subset.source) as entries:
        folders = sorted(entry.name for entry in entries if _is_folder(entry))[:NAMES_SHOWN]
    if folders:
        message += f" It has folders ({', '.join(folders)}), but folders inside it are not searched."
    return message


def load_image_set(subset: SubsetConfig) -> ImageSet:
    """The images of one subset, possibly none; masks are not looked for here."""
    return _load_metadata(subset) if subset.metadata_file else _load_folder(subset)


def _load_folder(subset: SubsetConfig) -> ImageSet:
    folder, all_lines = subset.source, subset.captions.wildcard
    present = _file_names(folder, "image_dir")
    names = sorted(name for name in present if _is_image(name))
    _tell_of_unread_images(folder, present)
    extensions = caption_extensions(subset.caption_extension, subset.class_tokens)
    caption_names = [caption_name(name, extensions, present) for name in names]
    paths = [os.path.join(folder, name) for name in names]
    caption_paths = [name and os.path.join(folder, name) for name in caption_names]
    whole: frozenset[str] = frozenset()
    if subset.cache_info:
        captions, sizes, whole = _read_through_cache(subset, paths, caption_paths)
    else:
        captions = [read_caption(path, all_lines=all_lines) if path else "" for path in caption_paths]
        sizes = [image_size(path) for path in paths]
    if subset.class_tokens is not None:
        _tell_of_unread_captions(subset, names, present, extensions)
        captions = [caption or subset.class_tokens for caption in captions]
        return ImageSet(subset, paths, captions, _size_array(sizes), whole=whole)
    return ImageSet(subset, paths, captions, _size_array(sizes), _without_caption(paths, captions), whole=whole)


def _tell_of_unread_images(folder: str, present: set[str]) -> None:
    """Say which files are images of formats that are not read."""
    others = sorted(name for name in present if _ends_in(name, UNREAD_EXTENSIONS))
    if others:
        logger.warning(
            'The folder "%s" has %s in formats that are not read, which %s left out: %s. Save as PNG, JPEG or WebP.',
            *(folder, counted(len(others), "image"), "is" if len(others) == 1 else "are", first_names(others)),
        )


def _tell_of_unread_captions(
    subset: SubsetConfig, names: Sequence[str], present: set[str], extensions: Sequence[str]
) -> None:
    """Say which files would be captions if ``caption_extension`` were given."""
    others = [extension for extension in DEFAULT_EXTENSIONS if extension not in extensions]
    if subset.caption_extension or not others:
        return
    unread = [found for name in names if (found := caption_name(name, others, present))]
    if unread:
        logger.warning(
            '"%s": the class tokens "%s" are the caption, and %d %s beside the images %s not read: %s. To read them, '
            'set caption_extension = "%s" (or --caption_extension).',
            *(subset.image_dir, subset.class_tokens, len(unread), "file" if len(unread) == 1 else "files"),
            *("is" if len(unread) == 1 else "are", first_names(unread), others[0]),
        )


def _read_through_cache(
    subset: SubsetConfig, paths: list[str], caption_paths: list[str | None]
) -> tuple[list[str], list[tuple[int, int]], frozenset[str]]:
    """Captions and sizes of a folder with ``cache_info``: from its cache where the files have not changed since.

    The last are the images that the cache knows to be whole.
    """
    cache, all_lines = FolderCache(subset.source, read_only=subset.read_only), subset.captions.wildcard
    captions, sizes, whole = [], [], set()
    entries: dict[str, dict[str, Any]] = {}
    for path, caption_path in zip(paths, caption_paths, strict=True):
        lines = "all" if all_lines else "first"
        stamp = [_file_stamp(path), f"{_file_stamp(caption_path)} {lines}" if caption_path else NO_FILE]
        noted = cache.fresh(path, stamp)
        if noted is None:
            caption = read_caption(caption_path, all_lines=all_lines) if caption_path else cache.noted_caption(path)
            noted = caption, image_size(path)
        elif cache.noted_whole(path):
            whole.add(path)
        entries[path] = {"caption": noted[0], "resolution": list(noted[1]), "stamp": stamp}
        entries[path] |= {"whole": True} if path in whole else {}
        captions.append(noted[0])
        sizes.append(noted[1])
    cache.save(entries)
    return captions, sizes, frozenset(whole)


def _file_stamp(path: str) -> str:
    """A file's name, bytes and time of change; what tells that it is still the same file."""
    status = os.stat(path)
    return f"{os.path.basename(path)}:{status.st_size}:{status.st_mtime_ns}"


def _load_metadata(subset: SubsetConfig) -> ImageSet:
    rules = subset.captions
    entries = read_metadata(subset.source, separator=rules.separator, all_lines=rules.wildcard)
    paths = [_image_path(entry.key, subset) for entry in entries]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f'The metadata file "{subset.metadata_file}" lists {len(missing)} of {len(paths)} images that do not '
            f"exist: {first_names(missing)}. Check its keys and image_dir."
        )
    _refuse_outside(paths, subset)
    sizes = [image_size(path) for path in paths]
    stale = [e.key for e, size in zip(entries, sizes, strict=True) if e.image_size not in (None, size, size[::-1])]
    if stale:
        logger.warning(
            'The metadata file "%s" lists a wrong size for %s; the actual size is used: %s.',
            *(subset.metadata_file, counted(len(stale), "image"), first_names(stale)),
        )
    captions = [entry.caption for entry in entries]
    return ImageSet(subset, paths, captions, _size_array(sizes), _without_caption(paths, captions))


def _without_caption(paths: list[str], captions: list[str]) -> list[str]:
    return [path for path, caption in zip(paths, captions, strict=True) if not caption]


def _image_path(key: str, subset: SubsetConfig) -> str:
    """The file of a metadata key: an absolute path, or a path in ``image_dir``, whose extension may be left out.

    A relative path may also be one from the folder that this run was started in, as sd-scripts' tools write it with
    ``--full_path``.
    """
    if not _can_be_a_path(key):
        raise UserError(f'The metadata file "{subset.metadata_file}" lists {key!a:.80}, which cannot be a path.')
    path = os.path.join(subset.image_dir or "", key)
    candidates = [path, *(path + extension for extension in sorted(IMAGE_EXTENSIONS)), key]
    found = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if not (found or os.path.isabs(key) or subset.image_dir):
        raise UserError(
            f'The metadata file "{subset.metadata_file}" lists "{key}", which is not found from here. Say in which '
            "folder it is: add image_dir (--train_data_dir with --in_json)."
        )
    return found or path


def _can_be_a_path(key: str) -> bool:
    try:
        return b"\0" not in os.fsencode(key)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _refuse_outside(paths: Sequence[str], subset: SubsetConfig) -> None:
    """Raise UserError where a metadata file names files outside its ``image_dir``, unless the user allows that.

    It may come from anybody, and caches are written beside the images. Links to folders are followed, since what is
    written would follow them; absolute paths without an ``image_dir`` are outside of nothing.
    """
    if subset.allow_outside_images or not subset.image_dir:
        return
    home = os.path.realpath(subset.image_dir)
    inside = {
        folder: Path(os.path.realpath(folder)).is_relative_to(home) for folder in {os.path.dirname(p) for p in paths}
    }
    if outside := [path for path in paths if not inside[os.path.dirname(path)]]:
        raise UserError(
            f'The metadata file "{subset.metadata_file}" lists {len(outside)} of {len(paths)} images outside its image '
            f'folder "{subset.image_dir}": {first_names(outside)}. Give the folder that holds them all as image_dir '
            "(--train_data_dir with --in_json), or, if you trust the file, add --allow_outside_images."
        )


def _size_array(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(sizes, dtype=np.int32).reshape(-1, 2)


def select(found: ImageSet, rows: Sequence[int]) -> ImageSet:
    """The images at ``rows`` of a set, as a set of its own."""
    paths = [found.paths[row] for row in rows]
    kept = set(paths)
    return ImageSet(
        found.subset,
        paths,
        [found.captions[row] for row in rows],
        found.sizes[list(rows)],
        [path for path in found.uncaptioned if path in kept],
        found.masks and [found.masks[row] for row in rows],
        found.whole,
    )


def _without_repeated_paths(sets: list[ImageSet]) -> list[ImageSet]:
    last = {path: number for number, found in enumerate(sets) for path in found.paths}
    if len(last) == sum(map(len, sets)):
        return sets
    kept = []
    for number, found in enumerate(sets):
        # Within one set a later entry of the same path wins as well.
        rows = {path: row for row, path in enumerate(found.paths) if last[path] == number}
        if len(rows) < len(found):
            logger.warning(
                '%s of "%s" listed again later in the same dataset; only the last entry of each counts.',
                *(counted(len(found) - len(rows), "image"), found.subset.source),
            )
            found = select(found, list(rows.values()))
        kept.append(found)
    return [found for found in kept if len(found)]


def _match_masks(sets: Iterable[ImageSet]) -> None:
    """Give every image of a subset with a mask folder its mask file: the one image of the same name there.

    Subsets may share a mask folder. Raises UserError when a mask is missing, stands for no image, occurs twice or has
    another size than its image.
    """
    by_folder: dict[str, list[ImageSet]] = defaultdict(list)
    for found in sets:
        if found.subset.conditioning_data_dir:
            by_folder[found.subset.conditioning_data_dir].append(found)
    for folder, sharing in by_folder.items():
        masks = _masks_by_stem(folder)
        paths = [path for found in sharing for path in found.paths]
        if missing := [path for path in paths if _stem(path) not in masks]:
            raise UserError(f'The mask folder "{folder}" has no mask of the same name for {first_names(missing)}.')
        if extra := sorted(masks.keys() - set(map(_stem, paths))):
            raise UserError(
                f'The mask folder "{folder}" holds masks that belong to no image: '
                f"{first_names([masks[stem] for stem in extra])}. Remove them or add the images."
            )
        for found in sharing:
            found.masks = [os.path.join(folder, masks[_stem(path)]) for path in found.paths]
            _check_mask_sizes(found, found.masks)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _masks_by_stem(folder: str) -> dict[str, str]:
    masks: dict[str, str] = {}
    for name in list_images(folder, "conditioning_data_dir"):
        if (other := masks.setdefault(_stem(name), name)) != name:
            raise UserError(f'The mask folder "{folder}" holds two masks of one name: {other} and {name}. Keep one.')
    return masks


def _check_mask_sizes(found: ImageSet, masks: Sequence[str]) -> None:
    for path, mask, (width, height) in zip(found.paths, masks, found.sizes.tolist(), strict=True):
        check_mask_size(image_size(mask), mask, (width, height), path)


def balanced_repeats(train_total: int, counts: Sequence[int]) -> list[int]:
    """How often each regularisation image comes, for as many samples of them as of the others.

    ``counts`` is the ``num_repeats`` of every regularisation image in order. They are taken in turn until there are
    at least ``train_total`` samples: in the first pass each as often as its ``num_repeats``, then once in every pass.
    Images that the first pass does not reach get 0.
    """
    repeats, total = [0] * len(counts), 0
    for index, count in enumerate(counts):
        repeats[index] = count
        total += count
        if total >= train_total:
            return repeats
    if counts:
        passes, rest = divmod(train_total - total, len(counts))
        repeats = [count + passes + (index < rest) for index, count in enumerate(repeats)]
    return repeats


def held_out(count: int, share: float, seed: int) -> list[int]:
    """Rows of ``count`` images that are kept for validation: ``round(count x share)`` of them, sorted.

    The choice is sd-scripts' for the same ``validation_seed`` (the end of a list shuffled by Python's generator), but
    no image is ever on both sides.
    """
    rows = list(range(count))
    # A generator of its own: the choice neither depends on other draws nor disturbs them.
    random.Random(seed).shuffle(rows)
    return sorted(rows[count - round(count * share) :])
