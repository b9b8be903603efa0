"""The VAE of the miniature models, and its training on pictures of the small world."""

import logging
import random
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

logger = logging.getLogger(__name__)


def draw_pictures(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the world as uint8 [count, 3, 128, 128], with their captions."""
    rng = random.Random(seed)
    scenes = [world.any_scene(rng) for _ in range(count)]
    pictures = np.stack([world.draw(scene) for scene, _ in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), [caption for _, caption in scenes]


def to_signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def new_vae() -> AutoencoderKL:
    """128 × 128 pixels to 16 × 16 latents of 4 channels. Few normalisation groups: many of them erase flat colour."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(12, 24, 48, 64),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def begin_nearly_linear(vae: AutoencoderKL) -> None:
    """Start where colour already passes through, which saves most of the training.

    Residual branches begin at zero, resampling at (nearly) the identity, and the first layers' biases at ±1: such
    constants keep the group normalisations from erasing the level of flat colours. Latents begin almost without noise.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            if module.conv_shortcut is not None:
                torch.nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Downsample2D | Upsample2D):
            module.conv.weight *= 0.3
            identity = torch.eye(module.conv.out_channels)
            if isinstance(module, Downsample2D):
                module.conv.weight[:, :, :2, :2] += identity[:, :, None, None] / 4
            else:
                module.conv.weight[:, :, 1, 1] += identity
    for first in (vae.encoder.conv_in, vae.decoder.conv_in):
        first.bias.copy_(torch.tensor([1.0, -1.0]).repeat(first.out_channels // 2))
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -6


def random_crops(pictures: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """So many squares of ``side`` pixels from anywhere in the pictures (uint8 [n, 3, h, w])."""
    crops = []
    for picture in pictures[torch.randint(len(pictures), (count,))]:
        top, left = (int(torch.randint(length - side + 1, ())) for length in picture.shape[1:])
        crops.append(picture[:, top : top + side, left : left + side])
    return torch.stack(crops)


def fit_vae(vae: AutoencoderKL, pictures: torch.Tensor, side: int, steps: int, rate: float) -> None:
    """Reconstruct squares of pictures (uint8 [n, 3, h, w]), by squared error alone, later by absolute error as well."""
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    squares = []
    for step in range(steps):
        batch = to_signed(random_crops(pictures, 8, side)).to(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        divergence = posterior.kl().mean() / posterior.mean[0, 0].numel()
        loss = error.square().mean() + (0.5 * error.abs().mean() if step > steps / 2 else 0) + 1e-6 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        squares.append(error.square().mean().item())
        if (step + 1) % 100 == 0:
            logger.info("vae step %d: error %.1f of 255", step + 1, 127.5 * np.mean(squares[-100:]) ** 0.5)


def train_vae(work: Path, seed: int) -> None:
    """Learn to reconstruct quarters of pictures (a quarter of the work), then decode whole ones, into ``work/vae``."""
    pictures, _ = draw_pictures(4096, seed)
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    begin_nearly_linear(vae)
    fit_vae(vae, pictures, world.SIZE // 2, 5000, 6e-4)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    torch.manual_seed(seed + 1)
    fit_vae(vae, pictures, world.SIZE, 600, 4e-4)
    vae.eval().save_pretrained(work / "vae")
