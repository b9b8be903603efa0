"""The VAE when memory runs out while it draws."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL
from photos import make_photos
from tiny_models import build_vae

from library.data.images import read_image, to_tensor
from library.model.vae import FrozenVae

MINIATURE = Path(__file__).parents[2] / "configs" / "quickstart" / "sd" / "vae"


@torch.no_grad()
def tiles_of_diffusers(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What diffusers' own tiling makes of it, with tiles of half the image."""
    twin = AutoencoderKL.from_pretrained(MINIATURE)
    twin.load_state_dict(vae.state_dict())
    twin.tile_latent_min_size, twin.tile_sample_min_size = 8, 64
    twin.enable_tiling()
    return twin.decode(latents).sample


def test_a_image_that_memory_is_too_small_for_is_drawn_in_tiles(tmp_path, caplog):
    """Each of a batch that needs it, and nothing else."""
    vae = FrozenVae(AutoencoderKL.from_pretrained(MINIATURE), "cpu", torch.float32)
    files = make_photos(tmp_path, count=2, size=(96, 128))
    images = torch.stack([to_tensor(read_image(file)) for file in files])
    latents, decoder = vae.encode(images, [torch.Generator().manual_seed(seed) for seed in (1, 2)]), vae.vae.decoder
    whole = vae.decode(latents)
    shapes = []

    def with_little_memory(given, *more):
        shapes.append(tuple(given.shape))
        if given.shape[-2] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return type(decoder).forward(decoder, given, *more)

    with patch.object(decoder, "forward", with_little_memory):
        tiled = vae.decode(latents)
    assert shapes.count((1, 4, 16, 12)) == 2
    assert {shape[-2:] for shape in shapes} >= {(16, 12), (8, 8)}
    assert tiled.shape == whole.shape == (2, 3, 128, 96)
    assert torch.equal(tiled, torch.cat([tiles_of_diffusers(vae.vae, one) for one in latents.split(1)]))
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.7
    assert caplog.text.count("it is drawn in tiles") == 2
    assert not vae.vae.use_tiling
    assert torch.equal(vae.decode(latents), whole)


def test_memory_too_small_for_tiles_is_an_error():
    vae = FrozenVae(build_vae(0.18215), "cpu", torch.float32)
    full = torch.OutOfMemoryError("CUDA out of memory.")
    with patch.object(vae.vae.decoder, "forward", side_effect=full), pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.randn(1, 4, 16, 16))
    assert not vae.vae.use_tiling
