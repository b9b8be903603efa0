"""The files of the latent cache: names, keys, what makes one usable, and writing them whole or not at all.

Names and keys are those of sd-scripts, so caches made there are found here and the other way round. One file holds the
latents of one image in *slots*, one for each size that it is used in: keys that end in ``_<height>x<width>`` of the
latents. sd-scripts up to February 2026 (0.10.1) wrote plain keys; such a slot is read where there is no other.
"""

import hashlib
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from library.data.buckets import Size
from library.support.atomic_files import replacement
from library.support.errors import UserError
from library.support.npz_files import Archive, ArchiveError, open_archive, sum_of

# Of the keys of a slot, sd-scripts knows the first five; the last two record what the latents were made from.
_SLOT_KEYS = (
    "latents",
    "latents_flipped",
    "alpha_mask",
    "original_size",
    "crop_ltrb",
    "vae_fingerprint",
    "made_from",
)
_VARIANTS = _SLOT_KEYS[:3]
_LATENTS_OF_A_SIZE = re.compile(r"latents_\d+x\d+")
# What latents can be made in, the coarsest first.
_PRECISIONS = ("bfloat16", "float16", "float32")
_SIZE_IN_NAME = re.compile(r"_\d{4,}x\d{4,}_[a-z]+$")  # what other names of caches end in
# Some file systems count time in steps of two seconds: within them a file may change again unseen.
_CLOCK_STEP = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Source:
    """An image file when it was read: its bytes, when they last changed (ns; 0 where that says little), and SHA-256."""

    length: int
    modified: int
    sha256: str

    @classmethod
    def of(cls, image: Path) -> "Source":
        """Read the file. Raises OSError."""
        status = image.stat()  # before the content: a change in between is then noticed, not missed
        settled = time.time_ns() - status.st_mtime_ns > _CLOCK_STEP
        return cls(status.st_size, status.st_mtime_ns if settled else 0, content_hash(image))

    def is_still(self, image: Path) -> bool:
        """Whether the file holds the same content; it is read only where length and time leave that open."""
        status = image.stat()
        if status.st_size != self.length:
            return False
        return status.st_mtime_ns == self.modified or content_hash(image) == self.sha256


def content_hash(file: Path | str) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. Raises OSError."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Origin:
    """What latents were made from besides the VAE: the image, how it was framed, and in what precision.

    ``hidden_colours`` tells that transparent places were encoded in their own colours, not laid on white.
    """

    source: Source
    framing: str
    precision: str
    hidden_colours: bool

    def text(self) -> str:
        """The record as it stands in the file."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Origin | None":
        """Read what :meth:`text` wrote; None for anything else."""
        try:
            values = json.loads(text)
            found = cls(**values | {"source": Source(**values["source"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        kinds = [(found.source.length, int), (found.source.modified, int), (found.source.sha256, str)]
        kinds += [(found.framing, str), (found.precision, str), (found.hidden_colours, bool)]
        return found if all(type(value) is kind for value, kind in kinds) else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs a slot to hold.

    ``latent_size`` and ``mask_size`` are (height, width); ``framing`` describes how ``image`` is resized; latents made
    in a coarser ``precision`` will not do; ``fingerprint`` is that of the VAE, float32 [n].
    """

    image: Path
    latent_size: Size
    mask_size: Size
    image_size: Size
    flip: bool
    alpha_mask: bool
    framing: str
    precision: str
    fingerprint: np.ndarray

    @property
    def own_ending(self) -> str:
        """The key ending of the slot for latents of this size only."""
        return f"_{self.latent_size[0]}x{self.latent_size[1]}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys that must be there, with the shapes that they must have."""
        return slot_shapes(self.latent_size, self.mask_size, self.flip, self.alpha_mask)


def slot_shapes(latent_size: Size, mask_size: Size, flip: bool, alpha_mask: bool) -> dict[str, tuple[int, ...]]:
    """The keys of what a run trains on, with their shapes; sizes are (height, width)."""
    shapes: dict[str, tuple[int, ...]] = {"latents": (4, *latent_size)}
    if flip:
        shapes["latents_flipped"] = (4, *latent_size)
    if alpha_mask:
        shapes["alpha_mask"] = mask_size
    return shapes


@dataclass(frozen=True, slots=True)
class Slot:
    """Latents that were found usable, or were written: their file, keys' ending, and checksums by key.

    ``recorded`` tells whether the file says what they were made from.
    """

    path: Path
    ending: str
    sums: dict[str, int]
    recorded: bool = True


def cache_path(image: Path, image_size: Size, suffix: str) -> Path:
    """The cache file of an image: ``<name>.npz`` if there is one (sd-scripts' old style), else with size and suffix."""
    old_style = image.with_name(image.stem + ".npz")
    if old_style.is_file():
        return old_style
    return image.with_name(f"{image.stem}_{image_size[0]:04d}x{image_size[1]:04d}{suffix}")


def refuse_shared_names(images: Iterable[Path]) -> None:
    """Raise UserError, naming both, for two images that differ in the extension only: they would share a cache file.

    So they would on Windows and macOS where they also differ in upper and lower case.
    """
    owners: dict[str, Path] = {}
    for image in images:
        name = str(image.with_suffix(""))
        owner = owners.setdefault(name.casefold() if sys.platform in ("win32", "darwin") else name, image)
        if owner != image:
            raise UserError(
                f"The images {owner} and {image} would share one latent cache file on disk. Rename one of them, or "
                "leave out --cache_latents_to_disk."
            )


def refuse_unwritable(files: Iterable[Path]) -> None:
    """Raise UserError for the first file that could not be written: a link, or one in a folder that takes none."""
    folders = set()
    for file in files:
        if file.is_symlink():
            with _write_errors(file):
                raise OSError("it is a symbolic link, and no cache is written through one")
        if file.parent not in folders and not os.access(file.parent, os.W_OK):
            with _write_errors(file):
                raise OSError("the folder is not writable")
        folders.add(file.parent)


def refuse_foreign(files: Iterable[Path]) -> None:
    """Raise UserError for the first of these unreadable files that may be another program's.

    The old style's name says nothing of latents: poses and masks are also kept in ``<image>.npz``. An empty file is
    nothing that could be lost.
    """
    for file in files:
        if not _SIZE_IN_NAME.search(file.stem) and file.stat().st_size:
            raise UserError(
                f"{file} stands where the latents of the image beside it would be cached (sd-scripts' older name for "
                "them), but cannot be read as such a cache. Move it to another folder, or remove it if it is a damaged "
                "cache; or leave out --cache_latents_to_disk."
            )


def find_slot(path: Path, wanted: Wanted, skip_check: bool = False) -> tuple[Slot | None, str]:
    """Return the slot of ``path`` that holds what is wanted and ""; or None and why there is none, in a word or two.

    Shapes are always compared. ``skip_check`` takes finite values, the VAE and the source for granted.
    """
    try:
        with open_archive(path) as arrays:
            ending = _ending(arrays, wanted)
            reason = _wrong_shape(arrays, ending, wanted)
            if not reason and not skip_check:
                reason = _wrong_content(arrays, ending, wanted)
            if reason:
                return None, reason
            sums = {key: arrays.sum(key + ending) for key in _VARIANTS if key + ending in arrays}
            return Slot(path, ending, sums, f"made_from{ending}" in arrays), ""
    except FileNotFoundError:
        return None, "new"
    except ArchiveError:
        return None, "unreadable"


def _ending(arrays: Archive, wanted: Wanted) -> str:
    """The slot of its own size goes before the plain one, as soon as it is there."""
    return wanted.own_ending if f"latents{wanted.own_ending}" in arrays else ""


def _wrong_shape(arrays: Archive, ending: str, wanted: Wanted) -> str:
    for key, shape in wanted.shapes.items():
        if key + ending not in arrays:
            is_new_size = key == "latents" and any(map(_LATENTS_OF_A_SIZE.fullmatch, arrays))
            return "of another size" if is_new_size else "incomplete"
        if arrays.shape(key + ending) != shape:
            return "of another size"
    return ""


def _wrong_content(arrays: Archive, ending: str, wanted: Wanted) -> str:
    trained_on = [arrays.numbers(key + ending, shape) for key, shape in wanted.shapes.items()]
    # Not np.isfinite: they are read as float32, which has no place for the largest doubles.
    if not all(np.abs(array).max() <= np.finfo(np.float32).max for array in trained_on):
        return "NaN or infinite"
    size = f"original_size{ending}"
    if size in arrays and arrays.numbers(size, (2,)).tolist() != list(wanted.image_size):
        return "of another image"
    if f"made_from{ending}" in arrays and (reason := _wrong_origin(arrays.text(f"made_from{ending}"), wanted)):
        return reason
    fingerprint = f"vae_fingerprint{ending}"
    if fingerprint in arrays and not same_vae(arrays, fingerprint, wanted.fingerprint):
        return "of another VAE"
    return ""


def _wrong_origin(text: str, wanted: Wanted) -> str:
    origin = Origin.parse(text)
    if origin is None or origin.precision not in _PRECISIONS:
        return "of another version"
    if origin.framing != wanted.framing or (origin.hidden_colours and not wanted.alpha_mask):
        return "of another image"
    if _PRECISIONS.index(origin.precision) < _PRECISIONS.index(wanted.precision):
        return "in a coarser precision"
    return "" if origin.source.is_still(wanted.image) else "of another image"


def same_vae(arrays: Archive, key: str, fingerprint: np.ndarray) -> bool:
    """Whether the fingerprint kept under ``key`` is that of the VAE.

    Half precision moves a number by about 0.001, other weights by more.
    """
    if arrays.shape(key) != fingerprint.shape:
        return False
    return bool(np.allclose(arrays.numbers(key, fingerprint.shape), fingerprint, rtol=0, atol=0.01))


def read_slot(slot: Slot, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read arrays of a slot, as float32, by key.

    Raises FileNotFoundError, and ArchiveError unless they are what was found or written then.
    """
    with open_archive(slot.path) as arrays:
        for key in shapes:
            if key + slot.ending not in arrays or arrays.sum(key + slot.ending) != slot.sums[key]:
                raise ValueError("it was written anew")
        read = {key: arrays.numbers(key + slot.ending, shape) for key, shape in shapes.items()}
    return {key: np.array(array, dtype=np.float32, order="C") for key, array in read.items()}


def write_slot(path: Path, wanted: Wanted, arrays: dict[str, np.ndarray]) -> Slot:
    """Write the slot of the wanted size anew, keeping all else that the file holds but a plain slot of the same size.

    The file appears whole or not at all. Raises UserError if it is a symbolic link, the folder cannot be written to or
    the disk is full.
    """
    ending, kept = wanted.own_ending, _kept(path, wanted)
    with _write_errors(path), replacement(path) as file:
        np.savez(file, allow_pickle=False, **{key + ending: array for key, array in arrays.items()})
        with zipfile.ZipFile(file, "a") as archive:
            for key, content in kept.items():
                archive.writestr(f"{key}.npy", content)
    sums = {key: sum_of(arrays[key]) for key in wanted.shapes}
    return Slot(path, ending, sums)


def _kept(path: Path, wanted: Wanted) -> dict[str, bytes]:
    """What stays of the file when a slot is written: all but what the slot had, and a plain slot of the same size."""
    try:
        with open_archive(path) as held:
            written = {name + wanted.own_ending for name in _SLOT_KEYS}
            if "latents" in held and not _are_of_another_size(held.shape("latents"), wanted):
                written.update(_SLOT_KEYS)
            return {key: held.raw(key) for key in held if key not in written}
    except (FileNotFoundError, ArchiveError):
        return {}


def _are_of_another_size(shape: tuple[int, ...], wanted: Wanted) -> bool:
    """Whether a shape is that of latents, and other ones."""
    return len(shape) == 3 and shape[0] == 4 and shape[1:] != wanted.latent_size


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The latent cache {path} cannot be written: {error.strerror or error}. Make the folder writable and free "
            "some space, or leave out --cache_latents_to_disk and keep --cache_latents."
        ) from error
