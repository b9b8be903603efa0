"""Images drawn with the rows as they are: prompts through the same encoders as in training, samplers, VAE."""

import inspect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from library.data.latent_entry import PIXELS_PER_LATENT
from library.embedding.prompt_encoder import PromptEncoder
from library.embedding.tokenizer import PromptTokenizer
from library.model.family import Conditioning, ModelFamily
from library.model.inpainting import surroundings
from library.model.vae import FrozenVae
from library.output.sample_prompts import SamplePrompt
from library.output.sample_scene import scene
from library.output.samplers import Sampler, make_sampler, most_steps
from library.support.errors import UserError
from library.support.progress_bar import progress_bar

_LATENT_CHANNELS = 4
_SCENE = 1 << 63  # makes another seed, for the posterior of what a sample prompt shows


@dataclass(frozen=True)
class SamplingPipeline:
    """Turns prompts into images with the frozen networks and whatever the trained rows hold at the moment.

    ``vae`` may rest in the main memory; it comes to the U-Net's ``device`` while images are drawn.
    ``vae_scale_factor`` is what training multiplies latents by. Nothing here touches the global random generators, so
    drawing images does not change a training.
    """

    family: ModelFamily
    unet: UNet2DConditionModel
    prompt_encoder: PromptEncoder
    prompts: PromptTokenizer
    vae: FrozenVae
    vae_scale_factor: float
    device: torch.device
    sampler: str = "ddim"
    v_prediction: bool = False
    zero_terminal_snr: bool = False

    @torch.no_grad()
    def draw(self, wanted: Sequence[SamplePrompt], *, batch_size: int = 1, title: str = "") -> list[np.ndarray]:
        """One image, uint8 [height, width, 3], for each prompt.

        Neighbours that differ in text and seed only are drawn together, up to ``batch_size`` at a time. A prompt
        without a seed gets a random one. With a ``title`` a progress bar is shown. Raises UserError for an image
        that comes out with NaN or infinite values.
        """
        pictures = []
        bar = progress_bar(title, len(wanted), "image", silent=not title)
        with bar, self.vae.on(self.device):
            for batch in _batches(wanted, batch_size):
                latents = self._denoise(batch)
                _require_finite(latents, batch)
                pixels = self.vae.decode(latents / self.vae_scale_factor)
                _require_finite(pixels, batch)
                pictures += _to_images(pixels)
                bar.update(len(batch))
        return pictures

    def _denoise(self, batch: Sequence[SamplePrompt]) -> Tensor:
        """Latents [B, 4, h, w], float32, at the U-Net's scale."""
        first = batch[0]
        sampler = make_sampler(
            first.sampler or self.sampler, v_prediction=self.v_prediction, zero_terminal_snr=self.zero_terminal_snr
        )
        sampler.set_timesteps(min(first.steps, most_steps(sampler)), device=self.device)
        generators = [torch.Generator().manual_seed(_seed(prompt)) for prompt in batch]
        shape = (_LATENT_CHANNELS, first.height // PIXELS_PER_LATENT, first.width // PIXELS_PER_LATENT)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = noise.to(self.device) * sampler.init_noise_sigma
        shown = self._surroundings(batch)
        guided = first.scale > 1
        conditioning = self._conditioning(batch, guided)
        sizes = torch.tensor([[first.height, first.width, 0, 0, first.height, first.width]], device=self.device)
        extra = {"generator": generators} if _takes_generator(sampler) else {}
        for timestep in sampler.timesteps:
            noisy = torch.cat([sampler.scale_model_input(latents, timestep), *shown], dim=1)
            noisy = torch.cat([noisy, noisy]) if guided else noisy
            count = len(noisy)
            prediction = self.family.predict_noise(
                self.unet, noisy, timestep.expand(count), conditioning, sizes.expand(count, -1)
            )
            if guided:
                without, towards = prediction.chunk(2)
                prediction = without + first.scale * (towards - without)
            latents = sampler.step(prediction, timestep, latents, **extra).prev_sample
        return latents

    def _surroundings(self, batch: Sequence[SamplePrompt]) -> list[Tensor]:
        """For an inpainting U-Net, in a list, what it sees besides the noisy latents: [B, 5, h, w]."""
        if self.unet.config["in_channels"] == _LATENT_CHANNELS:
            return []
        images, holes = (torch.stack(each).to(self.device) for each in zip(*map(scene, batch), strict=True))
        generators = [torch.Generator().manual_seed(_seed(prompt) ^ _SCENE) for prompt in batch]
        names = [f'the image of "{prompt.prompt:.60}"' for prompt in batch]
        with self.vae.left_as_it_is():
            return [surroundings(self.vae, self.vae_scale_factor, images, holes, generators, names)]

    def _conditioning(self, batch: Sequence[SamplePrompt], guided: bool) -> Conditioning:
        """What the U-Net is told: of the negative prompts, if there is guidance, and then of the prompts."""
        texts = [(prompt.prompt, prompt.weighted) for prompt in batch]
        if guided:
            texts = [(prompt.negative_prompt, prompt.weighted) for prompt in batch] + texts
        encoded = [self.prompts.encode_weighted(text, weighted=weighted) for text, weighted in texts]
        ids = [torch.stack(each) for each in zip(*(ids for ids, _ in encoded), strict=True)]
        weights = torch.stack([weights[0] for _, weights in encoded])
        conditioning = self.prompt_encoder.encode(ids)
        if (weights == 1).all():
            return conditioning
        return Conditioning(_weighted(conditioning.context, weights), conditioning.pooled)


def _batches(wanted: Sequence[SamplePrompt], size: int) -> Iterator[list[SamplePrompt]]:
    def alike(prompt: SamplePrompt) -> tuple[object, ...]:
        return prompt.width, prompt.height, prompt.steps, prompt.scale, prompt.sampler

    for _, group in itertools.groupby(wanted, key=alike):
        while batch := list(itertools.islice(group, size)):
            yield batch


def _seed(prompt: SamplePrompt) -> int:
    return random.SystemRandom().getrandbits(32) if prompt.seed is None else prompt.seed


def _takes_generator(sampler: Sampler) -> bool:
    """Whether a sampler adds noise of its own, which must come from the image's generator."""
    return "generator" in inspect.signature(sampler.step).parameters


def _weighted(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states [B, 75n + 2, C] by their tokens' weights [B, n, 77], and keep each prompt's mean.

    The mean is kept as AUTOMATIC1111 does it, so that weights shift attention and not the strength of the whole prompt.
    """
    joined = torch.cat([weights[:, 0, :1], weights[:, :, 1:-1].flatten(1), weights[:, -1, -1:]], dim=1)
    states = context.float()
    scaled = states * joined.to(states.device).unsqueeze(-1)
    kept = scaled * (states.mean(dim=(1, 2), keepdim=True) / scaled.mean(dim=(1, 2), keepdim=True))
    return kept.to(context.dtype)


def _require_finite(values: Tensor, batch: Sequence[SamplePrompt]) -> None:
    """Raise UserError for the first of the batch's images that is spoiled; it would look merely dark."""
    for one, prompt in zip(values, batch, strict=True):
        if not torch.isfinite(one).all():
            raise UserError(
                f'The image of "{prompt.prompt:.60}" comes out with NaN or infinite values. Try another sampler, '
                "fewer steps, or --mixed_precision=bf16 or no in place of fp16."
            )


def _to_images(pixels: Tensor) -> list[np.ndarray]:
    """uint8 [H, W, 3] of pixels [B, 3, H, W] in [-1, 1]."""
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
    return list(values.permute(0, 2, 3, 1).cpu().numpy())
