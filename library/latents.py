"""Pictures to latents: the VAE, and the cache that spares it, in memory or on disk.

Latents are unscaled everywhere here; the model family's factor is applied in training. They are one draw of the VAE's
posterior, made with a generator of the image's own, so neither batch size nor number of processes changes them.
"""

import hashlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from library.buckets import Size
from library.errors import UserError
from library.images import Framing, Picture, frame_image, to_tensor
from library.latent_files import (
    UNREADABLE,
    Wanted,
    cache_path,
    read_slot,
    refuse_shared_names,
    why_unusable,
    write_slot,
)

logger = logging.getLogger(__name__)

PIXELS_PER_LATENT = 8  # along each side, in every family
# Noted with latents that were made from a picture with transparent places, not laid on white.
_HIDDEN_COLOURS = " with hidden colours"


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """One image to cache. ``crop_ltrb`` is what SDXL is told of its crop; ``flip`` asks for a mirrored variant too."""

    path: Path
    image_size: Size
    framing: Framing
    crop_ltrb: tuple[float, float, float, float]
    flip: bool = False
    alpha_mask: bool = False

    @property
    def latent_size(self) -> Size:
        """(height, width) of the latents."""
        return self.framing.bucket[1] // PIXELS_PER_LATENT, self.framing.bucket[0] // PIXELS_PER_LATENT


@dataclass(frozen=True, slots=True)
class CachedLatents:
    """``latents`` and ``flipped`` [4, h, w]; ``alpha_mask`` float32 [H, W] in [0, 1]; None where not asked for."""

    latents: torch.Tensor
    flipped: torch.Tensor | None = None
    alpha_mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CacheReport:
    """How many images one process found cached and how many it encoded, the latter by reason."""

    reused: int
    encoded: int
    reasons: dict[str, int]

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"Latents: {self.reused} reused, {self.encoded} encoded" + (f" ({causes})." if causes else ".")


class FrozenVae:
    """The frozen VAE on its device. Works in ``dtype``, and from the first overflow on in float32.

    Encoding and decoding widen apart from each other: what is drawn must not change what is trained on.
    ``fingerprint`` tells VAEs apart, whatever precision they are held in.
    """

    def __init__(self, vae: torch.nn.Module, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype, self.decoding_dtype = torch.device(device), dtype, dtype
        self.fingerprint = vae_fingerprint(vae)
        self.vae = _moved(vae, self.device, dtype).eval().requires_grad_(False)

    def encode(
        self, images: torch.Tensor, generators: Sequence[torch.Generator], names: Sequence[object] = ()
    ) -> torch.Tensor:
        """Draw from the posterior of ``images`` [B, 3, H, W] in [-1, 1]: unscaled latents [B, 4, H/8, W/8].

        ``generators`` are on the CPU, one per image. ``names`` say in an error which image it was. The result is in the
        VAE's dtype, on its device. Raises UserError where latents are not finite even in float32.
        """
        mean, spread = self._posterior(images)
        if self.dtype != torch.float32 and not _finite(mean, spread).all():
            logger.warning(f"The VAE overflows in {self.dtype}; it works in float32 from here on.")
            self.dtype = self.decoding_dtype = torch.float32
            _moved(self.vae, self.device, self.dtype)
            mean, spread = self._posterior(images)
        finite = _finite(mean, spread).tolist()
        if not all(finite):
            bad = [str(name) for name, fine in zip(names, finite, strict=False) if not fine]
            raise UserError(
                f"The VAE makes values that are not finite from {', '.join(bad) or 'an image'}, even in float32. "
                "Look at the image, and check the model file or give another VAE with --vae."
            )
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return (mean + spread * noise.to(self.device)).to(self.dtype)

    @torch.no_grad()
    def _posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, float32 [B, 4, h, w]."""
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [B, 3, 8h, 8w], about [-1, 1], of finite unscaled ``latents`` [B, 4, h, w].

        One picture at a time, which bounds the memory whatever B is.
        """
        pixels = self._pixels(latents)
        if self.decoding_dtype != torch.float32 and not torch.isfinite(pixels).all():
            logger.warning(f"The VAE overflows in {self.decoding_dtype}; it draws in float32 from here on.")
            self.decoding_dtype = torch.float32
            pixels = self._pixels(latents)
        return pixels

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        with self._holding(self.decoding_dtype):
            given = latents.to(self.device, self.decoding_dtype)
            return torch.cat([self.vae.decode(one).sample.float() for one in given.split(1)])

    @contextmanager
    def _holding(self, dtype: torch.dtype) -> Iterator[None]:
        """Within a ``with``: the weights in ``dtype``, of at least the usual precision, so that none is rounded."""
        if dtype == self.dtype:
            yield
            return
        try:
            _moved(self.vae, self.device, dtype)  # weight by weight: memory may run out in the middle
            yield
        finally:
            _moved(self.vae, self.device, self.dtype)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Within a ``with``: work on ``device``; then go back to where the VAE was and give the memory back."""
        home = self.device
        if home == torch.device(device):
            yield
            return
        try:
            self.move(device)
            yield
        finally:
            self.move(home)

    def move(self, device: torch.device | str) -> None:
        """Go to another device, the main memory ("cpu") for instance, and leave nothing behind."""
        _moved(self.vae, torch.device(device), self.dtype)
        self.device = torch.device(device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _moved(vae: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    # Not vae.to(): diffusers' own version warns at every change of dtype, whether it concerns this model or not.
    return torch.nn.Module.to(vae, device, dtype)


def _finite(mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Which images of the batch have finite values only, bool [B]."""
    return torch.isfinite(mean + spread).flatten(1).all(1)


def vae_fingerprint(vae: torch.nn.Module) -> np.ndarray:
    """One number for each weight tensor of the encoder, float32 [n]: its start projected on fixed random signs.

    Numbers instead of a hash, because they can be compared with the tolerance that half precision needs.
    """
    signs = torch.randint(0, 2, (4096,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    numbers = []
    for name, parameter in vae.named_parameters():
        if name.startswith(("encoder.", "quant_conv.")) and parameter.ndim > 1:
            start = parameter.detach().flatten()[: len(signs)].float().cpu()
            numbers.append(float(start @ signs[: len(start)] / start.norm().clamp(min=1e-12)))
    return np.array(numbers, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Task:
    """An image, why it must be encoded ("" if it need not be), and whether its file serves several buckets."""

    entry: LatentEntry
    reason: str
    shared: bool = False


class LatentCache:
    """The latents of all images, kept in memory, or ``to_disk`` beside the images.

    Fill it once (every process its share), then load as often as wanted, from any worker.
    """

    def __init__(self, *, suffix: str, to_disk: bool, seed: int, skip_check: bool = False, highvram: bool = False):
        self.suffix, self.to_disk, self.seed = suffix, to_disk, seed
        self.skip_check, self.highvram = skip_check, highvram
        self.memory: dict[LatentEntry, CachedLatents] = {}
        self._fingerprint: np.ndarray | None = None

    def fill(
        self,
        entries: Iterable[LatentEntry],
        encoder: FrozenVae,
        *,
        batch_size: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> CacheReport:
        """Encode what is not cached yet, ``batch_size`` images of one bucket at a time.

        On disk, file i of the list is process i mod n's business; in memory each process encodes everything. Raises
        UserError for images that cannot be read or cannot share a cache file, and for folders that cannot be written.
        """
        self._fingerprint = encoder.fingerprint
        # Stable, so that shares and batches do not depend on where an interrupted run stopped.
        entries = sorted(dict.fromkeys(entries), key=_bucket_order)
        if self.to_disk:
            tasks = self._disk_tasks(entries, process_index, num_processes)
        else:
            tasks = [_Task(entry, "" if entry in self.memory else "new") for entry in entries]
        pending = [task for task in tasks if task.reason]
        for path in (task.entry.path for task in pending if task.reason == "unreadable"):
            logger.warning(f"The latent cache of {path} cannot be read; it is made anew.")
        silent = not pending or process_index > 0
        with tqdm(total=len(pending), desc="Caching latents", unit="image", disable=silent) as progress:
            for batch, pictures in _frame_ahead(_batches(pending, batch_size)):
                self._encode(batch, pictures, encoder)
                progress.update(len(batch))
        report = CacheReport(len(tasks) - len(pending), len(pending), dict(Counter(task.reason for task in pending)))
        logger.info(str(report))
        return report

    def load(self, entry: LatentEntry) -> CachedLatents:
        """The latents of one image, float32, on the CPU. Raises UserError if its cache file is gone or does not fit."""
        if not self.to_disk:
            kept = self.memory[entry]
            flipped = None if kept.flipped is None else kept.flipped.float()
            return CachedLatents(kept.latents.float(), flipped, kept.alpha_mask)
        try:
            arrays = read_slot(self.file(entry), self._wanted(entry))
        except UNREADABLE as error:
            raise UserError(
                f"The latent cache {self.file(entry)} of the image {entry.path} was lost or damaged after this run "
                f"began ({error}). Start the run again; it will be made anew."
            ) from error
        found = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return CachedLatents(found["latents"], found.get("latents_flipped"), found.get("alpha_mask"))

    def file(self, entry: LatentEntry) -> Path:
        """The cache file of an image."""
        return cache_path(entry.path, entry.image_size, self.suffix)

    def _disk_tasks(self, entries: list[LatentEntry], process_index: int, num_processes: int) -> list[_Task]:
        """This process's share; all that goes into one file is one process's."""
        refuse_shared_names(entry.path for entry in entries)
        entries = self._one_per_slot(entries)
        per_file = Counter(self.file(entry) for entry in entries)
        mine = set(list(per_file)[process_index::num_processes])
        return [
            _Task(entry, why_unusable(file, self._wanted(entry), self.skip_check), shared=per_file[file] > 1)
            for entry in entries
            if (file := self.file(entry)) in mine
        ]

    def _one_per_slot(self, entries: list[LatentEntry]) -> list[LatentEntry]:
        """Join entries for the same image and bucket; one that wants the mirrored variant too serves both."""
        slots: dict[tuple[Path, Size], LatentEntry] = {}
        for entry in entries:
            first = slots.setdefault((self.file(entry), entry.framing.bucket), entry)
            if (_made_from(first), first.alpha_mask) != (_made_from(entry), entry.alpha_mask):
                raise UserError(
                    f"The image {entry.path} is used twice in the bucket {entry.framing.bucket}, with different "
                    "alpha_mask or resize_interpolation. One file cannot cache both; make these settings equal, or "
                    "leave out --cache_latents_to_disk."
                )
            slots[self.file(entry), entry.framing.bucket] = replace(first, flip=first.flip or entry.flip)
        return list(slots.values())

    def _wanted(self, entry: LatentEntry) -> Wanted:
        made_from = _made_from(entry)
        width, height = entry.framing.bucket
        return Wanted(
            latent_size=entry.latent_size,
            mask_size=(height, width),
            image_size=entry.image_size,
            flip=entry.flip,
            alpha_mask=entry.alpha_mask,
            made_from=(made_from, made_from + _HIDDEN_COLOURS) if entry.alpha_mask else (made_from,),
            fingerprint=self._fingerprint,
        )

    def _encode(self, batch: list[_Task], pictures: list[Picture], encoder: FrozenVae) -> None:
        images = torch.stack([to_tensor(picture.pixels) for picture in pictures])
        names = [task.entry.path for task in batch]
        latents = encoder.encode(images, [self._generator(path) for path in names], names).cpu()
        flipped: list[torch.Tensor | None] = [None] * len(batch)
        chosen = [index for index, task in enumerate(batch) if task.entry.flip]
        if chosen:
            paths = [names[index] for index in chosen]
            generators = [self._generator(path, "flipped") for path in paths]
            mirrored = encoder.encode(images[chosen].flip(-1), generators, paths).cpu()
            for index, one in zip(chosen, mirrored, strict=True):
                flipped[index] = one.clone()
        for index, (task, picture) in enumerate(zip(batch, pictures, strict=True)):
            # Cloned, lest one kept image hold its whole batch.
            self._keep(task, CachedLatents(latents[index].clone(), flipped[index], _mask(picture)), encoder)
        if encoder.device.type == "cuda" and not self.highvram:
            torch.cuda.empty_cache()

    def _keep(self, task: _Task, made: CachedLatents, encoder: FrozenVae) -> None:
        entry = task.entry
        if not self.to_disk:
            self.memory[entry] = made
            return
        arrays = {
            "latents": made.latents.float().numpy(),
            "original_size": np.array(entry.image_size, dtype=np.int64),
            "crop_ltrb": np.array(entry.crop_ltrb, dtype=np.float64),
            "vae_fingerprint": encoder.fingerprint,
            "made_from": np.array(_made_from(entry)),
        }
        if made.flipped is not None:
            arrays["latents_flipped"] = made.flipped.float().numpy()
        if made.alpha_mask is not None:
            arrays["alpha_mask"] = made.alpha_mask.numpy()
            if made.alpha_mask.min() < 1:
                arrays["made_from"] = np.array(_made_from(entry) + _HIDDEN_COLOURS)
        write_slot(self.file(entry), self._wanted(entry), arrays, task.shared)

    def _generator(self, path: Path, variant: str = "") -> torch.Generator:
        """The image's own generator; its folder and name count, not where that folder is."""
        digest = hashlib.sha256(f"{self.seed}/{path.parent.name}/{path.name}/{variant}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _bucket_order(entry: LatentEntry) -> tuple[int, Size]:
    width, height = entry.framing.bucket
    return width * height, (width, height)


def _made_from(entry: LatentEntry) -> str:
    """What the latents depend on besides the VAE: how the file was resized, and the file (told by its length)."""
    width, height = entry.framing.resized
    length = entry.path.stat().st_size if entry.path.is_file() else 0
    return f"{width}x{height} {entry.framing.interpolation or 'default'} {length}"


def _mask(picture: Picture) -> torch.Tensor | None:
    return None if picture.alpha is None else torch.from_numpy(picture.alpha.copy())


def _batches(tasks: list[_Task], batch_size: int) -> Iterator[list[_Task]]:
    """Up to ``batch_size`` tasks of one bucket each; the tasks come sorted by bucket."""
    for _, group in itertools.groupby(tasks, key=lambda task: task.entry.framing.bucket):
        while batch := list(itertools.islice(group, batch_size)):
            yield batch


def _frame(entry: LatentEntry) -> Picture:
    return frame_image(entry.path, entry.framing, alpha=entry.alpha_mask)


def _frame_ahead(batches: Iterable[list[_Task]]) -> Iterator[tuple[list[_Task], list[Picture]]]:
    """Read the pictures of the next batch in a thread while the VAE is busy with this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting: deque[tuple[list[_Task], list[Future[Picture]]]] = deque()
        for batch in batches:
            waiting.append((batch, [reader.submit(_frame, task.entry) for task in batch]))
            if len(waiting) > 1:
                ready, pictures = waiting.popleft()
                yield ready, [picture.result() for picture in pictures]
        for ready, pictures in waiting:
            yield ready, [picture.result() for picture in pictures]
