"""What an inpainting U-Net sees besides the noisy latents: which part to paint anew, and what is around it.

Its nine channels are the noisy latents (4), the hole (1 where the image is hidden, 0 where it is seen), and the latents
of the image with the hole filled with mid-grey (4): the order of RunwayML's models, of diffusers and of sd-scripts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from library.model.vae import FrozenVae


def surroundings(
    vae: FrozenVae,
    scale_factor: float,
    images: Tensor,
    holes: Tensor,
    generators: Sequence[torch.Generator],
    names: Sequence[object] = (),
    *,
    check: bool = True,
) -> Tensor:
    """The channels that follow the noisy latents, float32 [B, 5, h, w] on the VAE's device.

    ``images`` [B, 3, H, W] in [-1, 1]; ``holes`` [B, 1, H, W]; of ``generators``, ``names`` and
    ``check`` see ``FrozenVae.encode``; ``scale_factor`` brings latents to the U-Net's scale.
    """
    latents = vae.encode(images * (holes < 0.5), generators, names, check=check).float() * scale_factor
    hole = F.interpolate(holes.to(latents), size=latents.shape[2:], mode="nearest")
    return torch.cat([hole, latents], dim=1)
