"""The frozen VAE: images to latents and back, in the precision asked for as far as that carries."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from library.model.device_settings import fastest_format
from library.support.errors import UserError
from library.support.transfers import sent

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

logger = logging.getLogger(__name__)

_TILE = 64  # latents along a side: 512 pixels


class FrozenVae:
    """The frozen VAE on its device. Works in ``dtype``, and from the first overflow on in float32.

    Encoding and decoding widen apart from each other: what is drawn must not change what is trained on.
    ``fingerprint`` tells VAEs apart, whatever precision they are held in.
    """

    def __init__(
        self,
        vae: "AutoencoderKL",
        device: torch.device | str,
        dtype: torch.dtype,
        load: "Callable[[torch.dtype], AutoencoderKL] | None" = None,
    ) -> None:
        """``load`` reads the VAE anew: weights that were rounded do not come back by widening them."""
        self.device, self.dtype, self.decoding_dtype = torch.device(device), dtype, dtype
        self.load = load
        self.fingerprint = vae_fingerprint(vae)
        self.vae = _moved(vae, self.device, dtype).eval().requires_grad_(False)

    def encode(
        self,
        images: torch.Tensor,
        generators: Sequence[torch.Generator],
        names: Sequence[object] = (),
        *,
        check: bool = True,
    ) -> torch.Tensor:
        """Draw from the posterior of ``images`` [B, 3, H, W] in [-1, 1]: unscaled latents [B, 4, H/8, W/8].

        ``generators`` are on the CPU, one per image. ``names`` say in an error which image it was. The result is in the
        VAE's dtype, on its device. Without ``check`` nobody waits for the device, and an overflow goes unnoticed.
        Raises UserError where latents are NaN or infinite even in float32.
        """
        mean, spread = self._checked_posterior(images, names) if check else self._posterior(images)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return (mean + spread * sent(noise, self.device)).to(self.dtype)

    def _checked_posterior(self, images: torch.Tensor, names: Sequence[object]) -> tuple[torch.Tensor, torch.Tensor]:
        mean, spread = self._posterior(images)
        if self.dtype != torch.float32 and not _finite(mean, spread).all():
            logger.warning(f"The VAE overflows in {self.dtype}; it works in float32 from here on.")
            self._widen()
            self.dtype = self.decoding_dtype = torch.float32
            mean, spread = self._posterior(images)
        finite = _finite(mean, spread).tolist()
        if not all(finite):
            bad = [str(name) for name, fine in zip(names, finite, strict=False) if not fine]
            raise UserError(
                f"The VAE makes NaN or infinite values from {', '.join(bad) or 'an image'}, even in float32. "
                "Look at the image, and check the model file or give another VAE with --vae."
            )
        return mean, spread

    @torch.no_grad()
    def _posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, float32 [B, 4, h, w]."""
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [B, 3, 8h, 8w], about [-1, 1], of finite unscaled ``latents`` [B, 4, h, w].

        One image at a time, which bounds the memory whatever B is.
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
            return torch.cat([self._decoded(one).float() for one in given.split(1)])

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of one image's ``latents`` [1, 4, h, w]; in tiles where the memory does not suffice for the whole.

        Tiles overlap and fade into each other, but may differ a little in shade.
        """
        try:
            whole: torch.Tensor = self.vae.decode(latents).sample
            return whole
        except torch.OutOfMemoryError:
            logger.warning("The device's memory is too full to draw an image in one piece; it is drawn in tiles.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        side = min(_TILE, max(latents.shape[-2:]) // 2)
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = side, 8 * side
        self.vae.enable_tiling()
        try:
            tiled: torch.Tensor = self.vae.decode(latents).sample
            return tiled
        finally:
            self.vae.disable_tiling()

    def _widen(self) -> None:
        """Hold the weights in float32, as they are in the file."""
        if self.load:
            whole = self.load(torch.float32).state_dict()
            self.vae.load_state_dict(whole, assign=True)  # the same module: its attention is set already
            self.vae.requires_grad_(False)
        _moved(self.vae, self.device, torch.float32)

    @contextmanager
    def _holding(self, dtype: torch.dtype) -> Iterator[None]:
        """Within a ``with``: the weights in ``dtype``, the usual one or float32, as they are in the file."""
        if dtype == self.dtype:
            yield
            return
        try:
            self._widen()  # weight by weight: memory may run out in the middle
            yield
        finally:
            _moved(self.vae, self.device, self.dtype)

    @contextmanager
    def left_as_it_is(self) -> Iterator[None]:
        """Within a ``with``: what widens the encoder, for images that are not trained on, widens it until then."""
        dtype = self.dtype
        try:
            yield
        finally:
            if self.dtype != dtype:
                self.dtype = dtype
                _moved(self.vae, self.device, dtype)

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


def _moved(vae: "AutoencoderKL", device: torch.device, dtype: torch.dtype) -> "AutoencoderKL":
    # Not vae.to(): diffusers' own version warns at every change of dtype, whether it concerns this model or not.
    torch.nn.Module.to(  # type: ignore[call-overload]  # torch's forms leave memory_format out
        vae, device, dtype, memory_format=fastest_format(device, dtype)
    )
    return vae


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
