"""What the network is asked and how its answer is judged: noise schedule, noise, timesteps, targets, losses, weights.

Pure float32 tensor functions. In half precision the noise coefficients of the first timesteps round to zero, so
everything here is computed in float32 whatever dtype the networks have.

Shapes: B samples, C = 4 latent channels, h and w the latent size (an image's size / 8), H and W a mask's size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from library.options.training import LossOptions, NoiseOptions
from library.support.transfers import sent

NUM_TIMESTEPS = 1000
# Stable Diffusion's schedule, as diffusers' schedulers take it.
BETAS = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process: how much of the image (ᾱ) is left at each of the 1000 timesteps.

    ``alphas_cumprod`` is float32 [1000] and lives on the device of the latents.
    """

    alphas_cumprod: Tensor

    @classmethod
    def create(cls, *, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """Stable Diffusion's schedule, with its last step rescaled to pure noise if ``zero_terminal_snr``.

        Source of the rescaling: "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891).
        """
        scheduler = DDPMScheduler(**BETAS, clip_sample=False, rescale_betas_zero_snr=zero_terminal_snr)
        return cls(scheduler.alphas_cumprod)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on ``device``."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    @cached_property
    def all_snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ) of every timestep, float32 [1000]; 0 where only noise is left."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def _divisor_snr(self) -> Tensor:
        """:attr:`all_snr` for divisions: a step of pure noise counts like the noisiest step that has any signal."""
        return self.all_snr.clamp(min=self.all_snr[self.all_snr > 0].min())

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio at ``timesteps`` [B]; may be 0."""
        return self.all_snr[timesteps]

    def positive_snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio at ``timesteps`` [B] that can be divided by."""
        return self._divisor_snr[timesteps]

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) at ``timesteps``, each [B,1,1,1]."""
        alphas = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ · latents + √(1 − ᾱ) · noise; all [B,C,h,w], ``timesteps`` [B]; float32."""
        signal, spread = self._coefficients(timesteps)
        return signal * latents.float() + spread * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ · noise − √(1 − ᾱ) · latents: the target of v-prediction (arXiv 2202.00512); shapes as in add_noise."""
        signal, spread = self._coefficients(timesteps)
        return signal * noise.float() - spread * latents.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor, *, v_prediction: bool) -> Tensor:
        """What the network should answer: the velocity, or the noise itself; [B,C,h,w] float32."""
        return self.velocity(latents, noise, timesteps) if v_prediction else noise.float()


@dataclass(frozen=True)
class NoiseDraw:
    """All that chance decides about a batch: the target noise, the noise that is added, the timesteps.

    ``noise`` and ``input_noise`` are float32 [B,C,h,w], ``timesteps`` int64 [B]. The two noises are one tensor unless
    ``ip_noise_gamma`` perturbs the network's input.
    """

    noise: Tensor
    input_noise: Tensor
    timesteps: Tensor


def offset_noise(
    noise: Tensor,
    latents: Tensor,
    strength: float | Tensor,
    adaptive_scale: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Add one random number per sample and channel to ``noise`` [B,C,h,w], scaled by ``strength``.

    With ``adaptive_scale`` the strength grows (or shrinks, never below 0) with the latents' mean brightness.
    Source: https://www.crosslabs.org/blog/diffusion-with-offset-noise
    """
    if adaptive_scale is not None:
        brightness = latents.mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + adaptive_scale * brightness).clamp(min=0)
    return noise + strength * torch.randn((*latents.shape[:2], 1, 1), generator=generator)


def pyramid_noise(
    noise: Tensor, iterations: int, discount: float, generator: torch.Generator, rng: random.Random
) -> Tensor:
    """Add coarser and coarser noise, enlarged, to ``noise`` [B,C,h,w], and bring the sum back to a spread of 1.

    Source: https://wandb.ai/johnowhitaker/multires_noise; the first round adds full-size noise with weight 1.
    """
    height, width = noise.shape[2:]
    for i in range(iterations):
        ratio = 2 + 2 * rng.random()
        h, w = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
        coarse = torch.randn((*noise.shape[:2], h, w), generator=generator)
        noise = noise + F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**i
        if h == 1 or w == 1:
            break
    return noise / noise.std()


def draw_timesteps(count: int, low: int | None, high: int | None, generator: torch.Generator) -> Tensor:
    """``count`` uniform timesteps in [low, high), by default all 1000; int64 [count]. An empty range gives ``high``."""
    low = 0 if low is None else low
    high = NUM_TIMESTEPS if high is None else high
    if low >= high:
        return torch.full((count,), high, dtype=torch.int64)
    return torch.randint(low, high, (count,), generator=generator)


def sample_noise(latents: Tensor, options: NoiseOptions, generator: torch.Generator, rng: random.Random) -> NoiseDraw:
    """Draw noise and timesteps for ``latents`` [B,C,h,w], which are on the CPU, as the draws are.

    Only ``adaptive_noise_scale`` looks at the latents' values. The order of the draws is fixed (noise, offset, pyramid,
    timesteps, input perturbation); ``rng`` gives the pyramid's ratios, ``generator`` everything else.
    """

    def strength(value: float, at_random: bool) -> float | Tensor:
        return torch.rand(1, generator=generator) * value if at_random else value

    noise = torch.randn(latents.shape, generator=generator)
    if options.noise_offset:
        offset = strength(options.noise_offset, options.noise_offset_random_strength)
        noise = offset_noise(noise, latents, offset, options.adaptive_noise_scale, generator)
    if options.multires_noise_iterations:
        iterations, discount = options.multires_noise_iterations, options.multires_noise_discount
        noise = pyramid_noise(noise, iterations, discount, generator, rng)
    timesteps = draw_timesteps(len(latents), options.min_timestep, options.max_timestep, generator)
    input_noise = noise
    if options.ip_noise_gamma:
        gamma = strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength)
        input_noise = noise + gamma * torch.randn(latents.shape, generator=generator)
    return NoiseDraw(noise, input_noise, timesteps)


def draw_noise(latents: Tensor, options: NoiseOptions, seeds: Sequence[int]) -> NoiseDraw:
    """Draw for each of the B samples from its own seed, so that a sample's draw does not depend on its batch.

    ``latents`` [B,C,h,w]; the result is on the latents' device. ``adaptive_noise_scale`` reads the latents, and so
    waits for their device; nothing else here does.
    """
    seen = torch.empty(latents.shape, device="meta")
    if options.noise_offset and options.adaptive_noise_scale is not None:
        seen = latents.detach().to("cpu", torch.float32)
    draws = [
        sample_noise(seen[i : i + 1], options, torch.Generator().manual_seed(seed), random.Random(seed))
        for i, seed in enumerate(seeds)
    ]
    device = latents.device
    noise = input_noise = sent(torch.cat([draw.noise for draw in draws]), device)
    if options.ip_noise_gamma:
        input_noise = sent(torch.cat([draw.input_noise for draw in draws]), device)
    return NoiseDraw(noise, input_noise, sent(torch.cat([draw.timesteps for draw in draws]), device))


def huber_threshold(timesteps: Tensor, schedule: NoiseSchedule, options: LossOptions) -> Tensor:
    """The error at which a Huber loss turns from quadratic to linear, per sample; float32 [B].

    ``constant``; ``exponential``: from 1 at t = 0 down to ``huber_c``; ``snr``: likewise, by the noise level
    σ = 1/√SNR. ``huber_scale`` multiplies each. Source: arXiv 2403.16728.
    """
    c = options.huber_c
    if options.huber_schedule == "constant":
        threshold = torch.full_like(timesteps, c, dtype=torch.float32)
    elif options.huber_schedule == "exponential":
        threshold = c ** (timesteps.float() / NUM_TIMESTEPS)
    else:
        sigma = schedule.positive_snr(timesteps).rsqrt()
        threshold = (1 - c) / (1 + sigma) ** 2 + c
    return threshold * options.huber_scale


def elementwise_loss(
    prediction: Tensor, target: Tensor, timesteps: Tensor, schedule: NoiseSchedule, options: LossOptions
) -> Tensor:
    """The chosen distance between ``prediction`` and ``target`` [B,C,h,w], element by element; float32 [B,C,h,w].

    ``smooth_l1`` is the Huber distance divided by its threshold c: both approach a slope of 2 (times c for Huber).
    """
    difference = prediction.float() - target.float()
    if options.loss_type == "l2":
        return difference**2
    if options.loss_type == "l1":
        return difference.abs()
    c = huber_threshold(timesteps, schedule, options).reshape(-1, 1, 1, 1)
    distance = 2 * ((difference**2 + c**2).sqrt() - c)
    return distance * c if options.loss_type == "huber" else distance


def apply_mask(loss: Tensor, mask: Tensor) -> Tensor:
    """Multiply ``loss`` [B,C,h,w] by ``mask`` [B,1,H,W] in [0,1], averaged down to the latent size.

    The mean over the result is over all elements, so a small mask also makes a small loss.
    """
    return loss * F.interpolate(mask.to(loss), size=loss.shape[2:], mode="area")


def weight_loss(
    loss: Tensor, timesteps: Tensor, schedule: NoiseSchedule, options: LossOptions, *, v_prediction: bool
) -> Tensor:
    """Weigh the samples' ``loss`` [B] by the signal-to-noise ratio s of their ``timesteps``, as the options ask.

    min-SNR-γ (arXiv 2303.09556), then v-prediction scaled like noise prediction, then the reverse added on top of noise
    prediction, then debiased estimation (arXiv 2310.08442).
    """
    snr, divisor = schedule.snr(timesteps), schedule.positive_snr(timesteps)
    if options.min_snr_gamma:
        clipped = snr.clamp(max=options.min_snr_gamma)
        # min(s, γ)/s, written so that it is 1 at s = 0
        loss = loss * (clipped / (snr + 1) if v_prediction else (options.min_snr_gamma / divisor).clamp(max=1))
    if options.scale_v_pred_loss_like_noise_pred:
        limited = snr.clamp(max=1000)
        loss = loss * limited / (limited + 1)
    if options.v_pred_like_loss:
        limited = divisor.clamp(max=1000)
        loss = loss + options.v_pred_like_loss * loss * (limited + 1) / limited
    if options.debiased_estimation_loss:
        limited = divisor.clamp(max=1000)
        loss = loss * (1 / (snr.clamp(max=1000) + 1) if v_prediction else limited.rsqrt())
    return loss


def per_sample_loss(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    options: LossOptions,
    *,
    v_prediction: bool,
    mask: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """The loss of each sample, float32 [B]: distance, mask, mean, the sample's own weight, SNR weights.

    ``prediction`` and ``target`` [B,C,h,w], ``timesteps`` [B], ``mask`` [B,1,H,W] in [0,1], ``loss_weights`` [B] (the
    prior-loss weight of regularisation images).
    """
    loss = elementwise_loss(prediction, target, timesteps, schedule, options)
    if mask is not None:
        loss = apply_mask(loss, mask)
    loss = loss.mean(dim=(1, 2, 3))
    if loss_weights is not None:
        loss = loss * loss_weights.to(loss)
    return weight_loss(loss, timesteps, schedule, options, v_prediction=v_prediction)
