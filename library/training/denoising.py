"""One batch through the frozen networks: from latents and prompts to a loss for every sample."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from library.data.batches import Batch
from library.data.images import normalized
from library.embedding.prompt_encoder import PromptEncoder
from library.model.family import ModelFamily
from library.model.inpainting import surroundings
from library.model.vae import FrozenVae
from library.options.training import LossOptions, NoiseOptions
from library.training.diffusion import NoiseSchedule, draw_noise, per_sample_loss
from library.training.loss_bands import LossBands

if TYPE_CHECKING:
    from diffusers.models import UNet2DConditionModel

_T = TypeVar("_T")


@dataclass(frozen=True)
class DenoisingTask:
    """What the U-Net is asked and how its answer is judged; all of it but the rows is frozen.

    ``vae`` serves batches that bring images instead of cached latents; ``vae_scale_factor`` brings latents to the
    U-Net's scale; ``schedule`` is on the U-Net's device; ``bands`` notes the losses by timestep.
    """

    family: ModelFamily
    unet: "UNet2DConditionModel"
    prompt_encoder: PromptEncoder
    schedule: NoiseSchedule
    noise: NoiseOptions
    loss: LossOptions
    v_prediction: bool
    vae_scale_factor: float
    vae: FrozenVae | None = None
    bands: LossBands | None = None

    def losses(self, batch: Batch, *, check: bool = True, shares: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of each of the batch's B samples, float32 [B]; ``batch`` is on the U-Net's device.

        Without ``check`` nobody waits for the device: the loss of an image at which the VAE overflows is NaN. With
        ``shares`` [B] each sample's gradient is normalized: see ``with_normalized_gradients``.
        """
        pixels = _pixels(batch)
        latents = self._latents(batch, pixels, check)
        draw = draw_noise(latents, self.noise, batch.seeds)
        noisy = self.schedule.add_noise(latents, draw.input_noise, draw.timesteps)
        if batch.holes is not None:
            noisy = torch.cat([noisy, self._surroundings(batch, pixels, check)], dim=1)
        conditioning = self.prompt_encoder.encode(batch.input_ids, shares)
        prediction = self.family.predict_noise(self.unet, noisy, draw.timesteps, conditioning, batch.size_conditioning)
        losses = per_sample_loss(
            prediction,
            self.schedule.target(latents, draw.noise, draw.timesteps, v_prediction=self.v_prediction),
            draw.timesteps,
            self.schedule,
            self.loss,
            v_prediction=self.v_prediction,
            mask=batch.masks,
            loss_weights=batch.loss_weights,
        )
        if self.bands is not None:
            self.bands.see(draw.timesteps, losses)
        return losses

    def encoded(self, batch: Batch) -> Batch:
        """The batch with the latents that :meth:`losses` makes of its images, for those who ask for many losses."""
        return replace(batch, latents=self._unscaled(batch, _pixels(batch), check=True))

    def _latents(self, batch: Batch, pixels: torch.Tensor | None, check: bool) -> torch.Tensor:
        return self._unscaled(batch, pixels, check).float() * self.vae_scale_factor

    def _unscaled(self, batch: Batch, pixels: torch.Tensor | None, check: bool) -> torch.Tensor:
        if batch.latents is not None:
            return batch.latents
        return _there(self.vae).encode(_there(pixels), _generators(batch, 1 << 62), batch.keys, check=check)

    def _surroundings(self, batch: Batch, pixels: torch.Tensor | None, check: bool) -> torch.Tensor:
        """The channels that an inpainting U-Net sees besides the noisy latents, float32 [B, 5, h, w]."""
        vae, images, holes = _there(self.vae), _there(pixels), _there(batch.holes)
        generators = _generators(batch, 1 << 61)
        return surroundings(vae, self.vae_scale_factor, images, holes, generators, batch.keys, check=check)


def _there(part: _T | None) -> _T:
    """What only batches of images bring, or the VAE that they need. Raises ValueError where it is missing."""
    if part is None:
        raise ValueError("images are encoded without a VAE, or there are none")
    return part


def _pixels(batch: Batch) -> torch.Tensor | None:
    """The batch's images in [-1, 1], [B, 3, H, W]; None where it brings latents."""
    images = batch.images
    return normalized(images) if images is not None and images.dtype == torch.uint8 else images


def _generators(batch: Batch, mark: int) -> list[torch.Generator]:
    """For the VAE's posterior: not those of the noise, since the draws must be independent of each other."""
    return [torch.Generator().manual_seed(seed ^ mark) for seed in batch.seeds]
