"""Images to latents: the VAE, and the cache that spares it, in memory or on disk.

Latents are unscaled everywhere here; the model family's factor is applied in training. They are one draw of the VAE's
posterior, made with a generator of the image's own that depends on its content and the seed, so neither the number of
processes nor where the image lies changes them. The size of a batch does, by a rounding: the VAE's sums are then made
in another order. So ``--vae_batch_size`` is 1 by default, and latents made again after an interruption are the same
bits.
"""

import hashlib
import itertools
import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from library.data.buckets import Size
from library.data.images import Picture, frame_image, to_tensor
from library.data.latent_entry import LatentEntry
from library.data.latent_files import (
    Origin,
    Slot,
    Source,
    Wanted,
    cache_path,
    find_slot,
    read_slot,
    refuse_foreign,
    refuse_shared_names,
    refuse_unwritable,
    write_slot,
)
from library.model.vae import FrozenVae
from library.support.atomic_files import sweep_replacements
from library.support.errors import UserError
from library.support.npz_files import ArchiveError, sum_of
from library.support.processes import usable_cores
from library.support.progress_bar import progress_bar

logger = logging.getLogger(__name__)

_MOST_READERS = 16  # threads; each may hold a large photo, see ``images.MOST_PIXELS``


@dataclass(frozen=True, slots=True)
class CachedLatents:
    """``latents`` and ``flipped`` [4, h, w]; ``alpha_mask`` float32 [H, W] in [0, 1]; None where not asked for."""

    latents: torch.Tensor
    flipped: torch.Tensor | None = None
    alpha_mask: torch.Tensor | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is, by the keys of the cache files, float32."""
        found = {"latents": self.latents, "latents_flipped": self.flipped, "alpha_mask": self.alpha_mask}
        return {key: tensor.float().numpy() for key, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class CacheReport:
    """How many images one process found cached and how many it encoded, the latter by reason.

    ``unrecorded`` of those found do not say what they were made from: other trainers made them.
    """

    reused: int
    encoded: int
    reasons: dict[str, int]
    unrecorded: int = 0

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        text = f"Latents: {self.reused} reused, {self.encoded} encoded" + (f" ({causes})." if causes else ".")
        if not self.unrecorded:
            return text
        return f"{text} {self.unrecorded} of those reused do not record image, VAE and precision, and are trusted."


@dataclass(frozen=True, slots=True)
class _Task:
    """An image, and why it must be encoded ("" if it need not be)."""

    entry: LatentEntry
    reason: str


class LatentCache:
    """The latents of all images, kept in memory, or ``to_disk`` beside the images.

    Fill it once (every process its share), then load as often as wanted, from any worker. What is loaded from disk is
    what was found or made then, or an error.
    """

    def __init__(
        self,
        *,
        suffix: str,
        to_disk: bool,
        seed: int,
        skip_check: bool = False,
        highvram: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        """Caches on disk that made in a coarser ``precision`` (None: the VAE's) are made anew; finer ones will do."""
        self.precision = precision
        self.suffix, self.to_disk, self.seed = suffix, to_disk, seed
        self.skip_check, self.highvram = skip_check, highvram
        self.memory: dict[LatentEntry, CachedLatents] = {}
        self.slots: dict[tuple[Path, Size], Slot] = {}  # by image and bucket

    def fill(
        self,
        entries: Iterable[LatentEntry],
        encoder: FrozenVae,
        *,
        batch_size: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        wait: Callable[[], None] | None = None,
    ) -> CacheReport:
        """Encode what is not cached yet, ``batch_size`` images of one bucket at a time.

        On disk, file i of the list is process i mod n's business, and after having had a ``wait`` for all each looks at
        what the others have made; in memory each process encodes everything. Raises UserError for images that cannot be
        read or cannot share a cache file, and for folders that cannot be written.
        """
        # Stable, so that shares and batches do not depend on where an interrupted run stopped.
        entries = sorted(dict.fromkeys(entries), key=_bucket_order)
        if self.to_disk:
            tasks = self._disk_tasks(entries, encoder, process_index, num_processes)
        else:
            tasks = [_Task(entry, "" if entry in self.memory else "new") for entry in entries]
        unrecorded = sum(not slot.recorded for slot in self.slots.values())
        pending = [task for task in tasks if task.reason]
        for path in (task.entry.path for task in pending if task.reason == "unreadable"):
            logger.warning(f"The latent cache of {path} cannot be read; it is made anew.")
        silent = not pending or process_index > 0
        with progress_bar("Caching latents", len(pending), "image", silent=silent) as progress:
            for batch, read in _read_ahead(_batches(pending, batch_size)):
                self._encode(batch, read, encoder)
                progress.update(len(batch))
        reasons = dict(Counter(task.reason for task in pending))
        report = CacheReport(len(tasks) - len(pending), len(pending), reasons, unrecorded)
        logger.info(str(report))
        if wait:
            wait()
            self._confirm(entries, encoder)
        return report

    def _confirm(self, entries: list[LatentEntry], encoder: FrozenVae) -> None:
        """Look at what other processes have cached on disk, after all have filled their share. Raises UserError."""
        if not self.to_disk:
            return
        for entry in self._one_per_slot(entries):
            if _place(entry) not in self.slots:
                slot, reason = find_slot(self.file(entry), self._wanted(entry, encoder), self.skip_check)
                if slot is None:
                    reason = "missing" if reason == "new" else reason
                    raise UserError(
                        f"The latent cache {self.file(entry)}, which another process has made, is {reason}. All "
                        "machines must see the same image folders, or leave out --cache_latents_to_disk."
                    )
                self.slots[_place(entry)] = slot

    def load(self, entry: LatentEntry) -> CachedLatents:
        """The latents of one image, float32, on the CPU. Raises UserError if its cache file is not what it was."""
        if not self.to_disk:
            kept = self.memory[entry]
            flipped = None if kept.flipped is None else kept.flipped.float()
            return CachedLatents(kept.latents.float(), flipped, kept.alpha_mask)
        slot = self.slots[_place(entry)]
        try:
            arrays = read_slot(slot, entry.shapes)
        except (OSError, ArchiveError) as error:
            raise UserError(
                f"The latent cache {slot.path} of the image {entry.path} was lost, damaged or replaced by another "
                f"program after this run began ({error}). Do not let two runs with other settings cache the same "
                "images at once; then start again: what does not fit is made anew."
            ) from error
        found = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return CachedLatents(found["latents"], found.get("latents_flipped"), found.get("alpha_mask"))

    def digest(self, entries: Iterable[LatentEntry]) -> str:
        """Another text for other latents or masks, in memory or on disk; names and folders do not matter."""
        digest = hashlib.sha256()
        for entry in entries:
            if self.to_disk:
                sums = self.slots[_place(entry)].sums
            else:
                sums = {key: sum_of(array) for key, array in self.memory[entry].arrays().items()}
            digest.update(repr([sums[key] for key in entry.shapes]).encode())
        return digest.hexdigest()

    def file(self, entry: LatentEntry) -> Path:
        """The cache file of an image."""
        return cache_path(entry.path, entry.image_size, self.suffix)

    def _disk_tasks(
        self, entries: list[LatentEntry], encoder: FrozenVae, process_index: int, num_processes: int
    ) -> list[_Task]:
        """This process's share; all that goes into one file is one process's."""
        refuse_shared_names(entry.path for entry in entries)
        entries = self._one_per_slot(entries)
        files = {entry: self.file(entry) for entry in entries}
        mine = set(list(dict.fromkeys(files.values()))[process_index::num_processes])
        sweep_replacements(mine)
        tasks = []
        for entry in (entry for entry in entries if files[entry] in mine):
            slot, reason = find_slot(files[entry], self._wanted(entry, encoder), self.skip_check)
            if slot:
                self.slots[_place(entry)] = slot
            tasks.append(_Task(entry, reason))
        refuse_foreign(self.file(task.entry) for task in tasks if task.reason == "unreadable")
        refuse_unwritable(self.file(task.entry) for task in tasks if task.reason)
        return tasks

    def _one_per_slot(self, entries: Iterable[LatentEntry]) -> list[LatentEntry]:
        """Join entries for the same image and bucket; one that wants the mirrored variant too serves both."""
        slots: dict[tuple[Path, Size], LatentEntry] = {}
        for entry in entries:
            first = slots.setdefault(_place(entry), entry)
            if (_framing(first), first.alpha_mask) != (_framing(entry), entry.alpha_mask):
                raise UserError(
                    f"The image {entry.path} is used twice in the bucket {entry.framing.bucket}, with different "
                    "alpha_mask or resize_interpolation. One file cannot cache both; make these settings equal, or "
                    "leave out --cache_latents_to_disk."
                )
            slots[_place(entry)] = replace(first, flip=first.flip or entry.flip)
        return list(slots.values())

    def _wanted(self, entry: LatentEntry, encoder: FrozenVae) -> Wanted:
        return Wanted(
            image=entry.path,
            latent_size=entry.latent_size,
            mask_size=entry.mask_size,
            image_size=entry.image_size,
            flip=entry.flip,
            alpha_mask=entry.alpha_mask,
            framing=_framing(entry),
            precision=_name(self.precision or encoder.dtype),
            fingerprint=encoder.fingerprint,
        )

    def _encode(self, batch: list[_Task], read: list["_Read"], encoder: FrozenVae) -> None:
        images = torch.stack([to_tensor(one.picture.pixels) for one in read])
        names = [task.entry.path for task in batch]
        latents = encoder.encode(images, [self._generator(one.source) for one in read], names).cpu()
        flipped: list[torch.Tensor | None] = [None] * len(batch)
        chosen = [index for index, task in enumerate(batch) if task.entry.flip]
        if chosen:
            generators = [self._generator(read[index].source, "flipped") for index in chosen]
            mirrored = encoder.encode(images[chosen].flip(-1), generators, [names[index] for index in chosen]).cpu()
            for index, one in zip(chosen, mirrored, strict=True):
                flipped[index] = one.clone()
        for index, (task, one) in enumerate(zip(batch, read, strict=True)):
            # Cloned, lest one kept image hold its whole batch.
            made = CachedLatents(latents[index].clone(), flipped[index], _mask(one.picture))
            if self.to_disk:
                self._write(task, made, one.source, encoder)
            else:
                self.memory[task.entry] = made
        if encoder.device.type == "cuda" and not self.highvram:
            torch.cuda.empty_cache()

    def _write(self, task: _Task, made: CachedLatents, source: Source, encoder: FrozenVae) -> None:
        entry = task.entry
        hidden_colours = made.alpha_mask is not None and bool(made.alpha_mask.min() < 1)
        origin = Origin(source, _framing(entry), _name(made.latents.dtype), hidden_colours)
        arrays = {
            **made.arrays(),
            "original_size": np.array(entry.image_size, dtype=np.int64),
            "crop_ltrb": np.array(entry.crop_ltrb, dtype=np.float64),
            "vae_fingerprint": encoder.fingerprint,
            "made_from": np.array(origin.text()),
        }
        slot = write_slot(self.file(entry), self._wanted(entry, encoder), arrays)
        self.slots[_place(entry)] = slot

    def _generator(self, source: Source, variant: str = "") -> torch.Generator:
        """The image's own generator; its content counts, not its name or place."""
        digest = hashlib.sha256(f"{self.seed}/{source.sha256}/{variant}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _place(entry: LatentEntry) -> tuple[Path, Size]:
    return entry.path, entry.framing.bucket


def _bucket_order(entry: LatentEntry) -> tuple[int, Size]:
    width, height = entry.framing.bucket
    return width * height, (width, height)


def _framing(entry: LatentEntry) -> str:
    """How the file is resized before it is cropped to the bucket."""
    width, height = entry.framing.resized
    return f"{width}x{height} {entry.framing.interpolation or 'default'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mask(picture: Picture) -> torch.Tensor | None:
    return None if picture.alpha is None else torch.from_numpy(picture.alpha.copy())


def _batches(tasks: list[_Task], batch_size: int) -> Iterator[list[_Task]]:
    """Up to ``batch_size`` tasks of one bucket each; the tasks come sorted by bucket."""
    for _, group in itertools.groupby(tasks, key=lambda task: task.entry.framing.bucket):
        while batch := list(itertools.islice(group, batch_size)):
            yield batch


@dataclass(frozen=True, slots=True)
class _Read:
    """An image as it is encoded, and what its file was."""

    picture: Picture
    source: Source


def _read(entry: LatentEntry) -> _Read:
    try:
        source = Source.of(entry.path)
    except OSError as error:
        raise UserError(f"The image {entry.path} cannot be read: {error.strerror or error}.") from error
    return _Read(frame_image(entry.path, entry.framing, alpha=entry.alpha_mask, size=entry.image_size), source)


def _read_ahead(batches: Iterable[list[_Task]]) -> Iterator[tuple[list[_Task], list[_Read]]]:
    """Read the images of the next batches, one in each thread, while the VAE is busy with this one."""
    readers = min(usable_cores(), _MOST_READERS)
    # Each reader sets warnings aside and puts back what it found, which may be another's: the last word is had here.
    with warnings.catch_warnings(), ThreadPoolExecutor(readers) as pool:
        waiting: deque[tuple[list[_Task], list[Future[_Read]]]] = deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(_read, task.entry) for task in batch]))
            # Enough for every thread; more would only fill the memory.
            if sum(len(tasks) for tasks, _ in waiting) > max(readers, len(waiting[0][0])):
                ready, read = waiting.popleft()
                yield ready, [one.result() for one in read]
        for ready, read in waiting:
            yield ready, [one.result() for one in read]
