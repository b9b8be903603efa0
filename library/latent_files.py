"""The files of the latent cache: names, keys, what makes one usable, and writing them whole or not at all.

Names and keys are those of sd-scripts, so caches made there are found here and the other way round. One file holds the
latents of one image in a *slot*: the plain keys, or keys that end in ``_<height>x<width>`` of the latents where one run
uses the image in buckets of several sizes.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.buckets import Size
from library.errors import UserError

# What reading a damaged file raises. TypeError: numpy takes a file that holds one bare array, but as no archive.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs a slot to hold.

    ``latent_size`` and ``mask_size`` are (height, width); ``made_from`` lists the descriptions that are good enough;
    ``fingerprint`` is that of the VAE, float32 [n], or None where any VAE will do.
    """

    latent_size: Size
    mask_size: Size
    image_size: Size
    flip: bool
    alpha_mask: bool
    made_from: tuple[str, ...]
    fingerprint: np.ndarray | None

    @property
    def own_ending(self) -> str:
        """The key ending of the slot for latents of this size only."""
        return f"_{self.latent_size[0]}x{self.latent_size[1]}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys that must be there, with the shapes that they must have."""
        shapes: dict[str, tuple[int, ...]] = {"latents": (4, *self.latent_size)}
        if self.flip:
            shapes["latents_flipped"] = (4, *self.latent_size)
        if self.alpha_mask:
            shapes["alpha_mask"] = self.mask_size
        return shapes


def cache_path(image: Path, image_size: Size, suffix: str) -> Path:
    """The cache file of an image: ``<name>.npz`` if there is one (sd-scripts' old style), else with size and suffix."""
    old_style = image.with_name(image.stem + ".npz")
    if old_style.is_file():
        return old_style
    return image.with_name(f"{image.stem}_{image_size[0]:04d}x{image_size[1]:04d}{suffix}")


def refuse_shared_names(images: Iterable[Path]) -> None:
    """Raise UserError, naming both, for two images that differ in the extension only: they would share a cache file."""
    owners: dict[Path, Path] = {}
    for image in images:
        owner = owners.setdefault(image.with_suffix(""), image)
        if owner != image:
            raise UserError(
                f"The images {owner} and {image} would share one latent cache file on disk. Rename one of them, or "
                "leave out --cache_latents_to_disk."
            )


def why_unusable(path: Path, wanted: Wanted, skip_check: bool = False) -> str:
    """Return "" where ``path`` holds what is wanted, else why it does not, in a word or two.

    Shapes are always compared. ``skip_check`` takes finite values, the VAE and the source for granted.
    """
    try:
        with np.load(path) as arrays:
            ending = _ending(arrays, wanted)
            return _wrong_shape(arrays, ending, wanted) or (
                "" if skip_check else _wrong_content(arrays, ending, wanted)
            )
    except FileNotFoundError:
        return "new"
    except UNREADABLE:
        return "unreadable"


def _ending(keys, wanted: Wanted) -> str:
    """The slot of its own size goes before the plain one, as soon as it is there."""
    return wanted.own_ending if f"latents{wanted.own_ending}" in keys else ""


def _wrong_shape(arrays, ending: str, wanted: Wanted) -> str:
    for key, shape in wanted.shapes.items():
        if key + ending not in arrays:
            return "incomplete"
        if _shape(arrays, key + ending) != shape:
            return "of another size"
    return ""


def _shape(arrays, key: str) -> tuple[int, ...]:
    """The shape of an array, from its header alone: alpha masks are large."""
    with arrays.zip.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read_header(member)[0]


def _wrong_content(arrays, ending: str, wanted: Wanted) -> str:
    if any(not np.isfinite(arrays[key + ending]).all() for key in wanted.shapes if key != "alpha_mask"):
        return "not finite"
    if f"original_size{ending}" in arrays and tuple(arrays[f"original_size{ending}"]) != tuple(wanted.image_size):
        return "of another picture"
    if f"made_from{ending}" in arrays and str(arrays[f"made_from{ending}"]) not in wanted.made_from:
        return "of another picture"
    recorded = arrays.get(f"vae_fingerprint{ending}")
    if recorded is not None and wanted.fingerprint is not None and not same_vae(recorded, wanted.fingerprint):
        return "of another VAE"
    return ""


def same_vae(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two fingerprints are of one VAE. Half precision moves a number by about 0.001, other weights by more."""
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0, atol=0.01))


def read_slot(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """Read the arrays of ``wanted.shapes``, as float32. The file must have been found usable before."""
    with np.load(path) as arrays:
        ending = _ending(arrays, wanted)
        return {key: arrays[key + ending].astype(np.float32, copy=False) for key in wanted.shapes}


def write_slot(path: Path, wanted: Wanted, arrays: dict[str, np.ndarray], shared: bool = False) -> None:
    """Write a slot anew, keeping all else that the file holds. The file appears whole or not at all.

    ``shared`` says that this run needs the image in several sizes; only then, or where there is one already, is the
    slot of its own size used. Raises UserError if the folder cannot be written to or the disk is full.
    """
    held = _all_arrays(path)
    ending = wanted.own_ending if shared else _ending(held, wanted)
    kept = {key: array for key, array in held.items() if key not in {name + ending for name in _SLOT_KEYS}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _write_errors(path.parent):
        try:
            with temporary.open("wb") as file:
                np.savez(file, **kept, **{key + ending: array for key, array in arrays.items()})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _all_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except UNREADABLE:
        return {}


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The latents of the images in {folder} cannot be written there: {error.strerror or error}. Make the "
            "folder writable and free some space, or leave out --cache_latents_to_disk and keep --cache_latents."
        ) from error
