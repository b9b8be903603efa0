"""Models of the real sizes with random weights, made on the spot: time and memory do not depend on what is in them."""

import shutil
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_models import save_folder

CONFIGS = Path(__file__).parents[2] / "configs"
_KINDS = {
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
}


def write_model(family: str, folder: Path, *, tiny: bool = False) -> Path:
    """Write a diffusers folder of ``family`` (sd1, sdxl), bfloat16 in the sizes of ``configs/``, and return it.

    ``tiny``: one of the tests' miniatures in its place, float32.
    """
    if tiny:
        return save_folder(family, folder)
    shutil.copytree(CONFIGS / family, folder)
    for component in sorted(path.name for path in folder.iterdir() if path.name in _KINDS):
        kind, stem = _KINDS[component]
        with init_empty_weights():
            model = _empty(kind, folder / component)
        save_file(_random_weights(model), folder / component / f"{stem}.safetensors")
    return folder


def _empty(kind: type, folder: Path) -> nn.Module:
    if kind in (CLIPTextModel, CLIPTextModelWithProjection):
        return kind(CLIPTextConfig.from_pretrained(folder))
    return kind.from_config(kind.load_config(folder))


def _random_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that keep activations of the size that they have; norms scale by 1, and biases are 0."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    weights = {}
    for name, empty in model.state_dict().items():
        if empty.ndim < 2:
            weights[name] = torch.full(empty.shape, float(name.endswith("weight")))
        else:
            inputs = empty[0].numel()
            repeated = (block * inputs**-0.5).bfloat16().repeat(-(-empty.numel() // len(block)))
            weights[name] = repeated[: empty.numel()].reshape(empty.shape)
        weights[name] = weights[name].to(torch.bfloat16).clone()
    return weights
