"""The one place for what differs between Stable Diffusion (1.x, 2.x) and Stable Diffusion XL in training.

Everything else loops over lists of one or two text encoders and asks the family. What the models look like on disk is
in ``architectures.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from library.model import architectures
from library.model.architectures import BUCKET_STEPS, Architecture
from library.options.options import ModelOptions
from library.support.errors import UserError

START_OF_TEXT, END_OF_TEXT = 49406, 49407  # CLIP's BOS and EOS


class _Encoded(Protocol):
    """What a text encoder gives, each [B * n, 77, D]."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]


class _Denoised(Protocol):
    """What a U-Net gives, [B, 4, h, w]."""

    sample: torch.Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told about B prompts: ``context`` [B, 75n + 2, C], and for SDXL ``pooled`` [B, D]."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class ModelFamily(ABC):
    """The models that one script trains.

    ``bucket_step``: bucket sides are multiples of it, in pixels. ``embedding_keys``: tensor names in ``.safetensors``
    files, one per text encoder. ``cache_suffix`` ends the names of latent caches. ``vae_scale_factor`` is what latents
    are multiplied by when the model does not say. ``resolution`` is the side in pixels the models were made for.
    ``script`` is what trains them.
    """

    name: str
    title: str
    architectures: tuple[Architecture, ...]
    bucket_step: int
    embedding_keys: tuple[str, ...]
    cache_suffix: str
    vae_scale_factor: float
    resolution: int
    script: str

    @abstractmethod
    def encode_prompts(
        self,
        text_encoders: Sequence[nn.Module],
        input_ids: Sequence[torch.Tensor],
        clip_skip: int | None = None,
        end_of_text: int = END_OF_TEXT,
    ) -> Conditioning:
        """Conditioning of B prompts, in the encoders' dtype, with gradients into their input embeddings.

        ``input_ids`` holds int64 [B, n, 77] per text encoder (n windows of 77 ids); ``clip_skip`` k takes the k-th
        hidden state from the end; ``end_of_text`` is the id at which the pooled vector is read.
        """

    @abstractmethod
    def predict_noise(
        self,
        unet: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        size_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The U-Net's prediction (noise or velocity) for ``noisy`` [B, 4, h, w] at ``timesteps`` [B]; float32.

        For an inpainting U-Net ``noisy`` has nine channels.

        ``size_conditioning`` [B, 6] holds, in pixels, original height and width, crop top and left, target height and
        width; only SDXL reads it.
        """

    @abstractmethod
    def modelspec_architecture(self, options: ModelOptions) -> str:
        """ModelSpec's name of the base model, without ``/textual-inversion``."""

    @abstractmethod
    def base_model_version(self, options: ModelOptions) -> str:
        """sd-scripts' name of the base model (its ``ss_base_model_version``)."""


class StableDiffusion(ModelFamily):
    """SD 1.x and 2.x: one text encoder; its hidden state, after the final norm, is the whole conditioning."""

    def encode_prompts(
        self,
        text_encoders: Sequence[nn.Module],
        input_ids: Sequence[torch.Tensor],
        clip_skip: int | None = None,
        end_of_text: int = END_OF_TEXT,
    ) -> Conditioning:
        (encoder,), (ids,) = text_encoders, input_ids
        output = _run(encoder, ids, all_states=clip_skip is not None)
        if clip_skip is None:
            states = output.last_hidden_state
        else:
            final_norm = _text_model(encoder).get_submodule("final_layer_norm")
            states = final_norm(_hidden_state(output, clip_skip))
        return Conditioning(_join_windows(states, ids))

    def predict_noise(
        self,
        unet: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        size_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dtype = _compute_dtype(unet)
        return _sample(unet(noisy.to(dtype), timesteps, conditioning.context.to(dtype)))

    def modelspec_architecture(self, options: ModelOptions) -> str:
        if not options.v2:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if options.v_parameterization else "stable-diffusion-v2-512"

    def base_model_version(self, options: ModelOptions) -> str:
        return ("sd_v2" if options.v2 else "sd_v1") + ("_v" if options.v_parameterization else "")


class StableDiffusionXL(ModelFamily):
    """SDXL: hidden states of two encoders side by side, without final norm, and a pooled vector of the second."""

    def encode_prompts(
        self,
        text_encoders: Sequence[nn.Module],
        input_ids: Sequence[torch.Tensor],
        clip_skip: int | None = None,
        end_of_text: int = END_OF_TEXT,
    ) -> Conditioning:
        outputs = [_run(encoder, ids, all_states=True) for encoder, ids in zip(text_encoders, input_ids, strict=True)]
        contexts = [
            _join_windows(_hidden_state(output, clip_skip or 2), ids)
            for output, ids in zip(outputs, input_ids, strict=True)
        ]
        pooled = _pooled(text_encoders[-1], outputs[-1].last_hidden_state, input_ids[-1], end_of_text)
        return Conditioning(torch.cat(contexts, dim=-1), pooled)

    def predict_noise(
        self,
        unet: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        size_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if conditioning.pooled is None or size_conditioning is None:
            raise ValueError("SDXL's U-Net wants a pooled vector and sizes")
        dtype = _compute_dtype(unet)
        # The six sizes stay float32: bfloat16 cannot tell 1016 from 1020, and the U-Net casts their sinusoids itself.
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": size_conditioning.float()}
        context = conditioning.context.to(dtype)
        return _sample(unet(noisy.to(dtype), timesteps, context, added_cond_kwargs=added))

    def modelspec_architecture(self, options: ModelOptions) -> str:
        return "stable-diffusion-xl-v1-base"

    def base_model_version(self, options: ModelOptions) -> str:
        return "sdxl_base_v1-0"


def _run(encoder: nn.Module, ids: torch.Tensor, all_states: bool) -> _Encoded:
    """Encode [B, n, 77] ids as B * n sequences of their own."""
    output: _Encoded = encoder(input_ids=ids.flatten(0, 1), output_hidden_states=all_states)
    return output


def _text_model(encoder: nn.Module) -> nn.Module:
    """The encoder without projection: transformers nests it in the class with projection only."""
    inner: nn.Module = getattr(encoder, "text_model", encoder)
    return inner


def _hidden_state(output: _Encoded, clip_skip: int) -> torch.Tensor:
    """The ``clip_skip``-th hidden state from the end, [B * n, 77, D]: 1 is the last layer's, before the final norm."""
    if not 1 <= clip_skip < len(output.hidden_states):
        layers = len(output.hidden_states) - 1
        raise UserError(
            f"--clip_skip {clip_skip} is out of range: the text encoder has {layers} layers (1 is the last)."
        )
    return output.hidden_states[-clip_skip]


def _join_windows(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Make one context [B, 75n + 2, D] of the n windows' states [B * n, 77, D].

    The first BOS, the 75 body states of each window, and the last state of the last window remain.
    """
    windows: torch.Tensor = states.unflatten(0, ids.shape[:2])
    return torch.cat([windows[:, 0, :1], windows[:, :, 1:-1].flatten(1, 2), windows[:, -1, -1:]], dim=1)


def _pooled(encoder: nn.Module, last_states: torch.Tensor, ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Project the first window's state at its FIRST end of text, [B, D].

    The encoder's own pooled output may look for the largest id instead, which is a token's.
    """
    first_window = last_states.unflatten(0, ids.shape[:2])[:, 0]
    position = (ids[:, 0] == end_of_text).int().argmax(dim=-1)
    batch = torch.arange(len(ids), device=position.device)
    pooled: torch.Tensor = encoder.get_submodule("text_projection")(first_window[batch, position])
    return pooled


def _compute_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype the U-Net computes in; its norms always hold it, also when other weights are stored in float8."""
    return unet.get_parameter("conv_norm_out.weight").dtype


def _sample(output: _Denoised) -> torch.Tensor:
    return output.sample.float()


STABLE_DIFFUSION = StableDiffusion(
    name="sd",
    title="Stable Diffusion 1.x or 2.x",
    architectures=(architectures.SD1, architectures.SD2),
    bucket_step=BUCKET_STEPS["sd"],
    embedding_keys=("emb_params",),
    cache_suffix="_sd.npz",
    vae_scale_factor=0.18215,
    resolution=512,
    script="train_textual_inversion.py",
)

STABLE_DIFFUSION_XL = StableDiffusionXL(
    name="sdxl",
    title="Stable Diffusion XL",
    architectures=(architectures.SDXL,),
    bucket_step=BUCKET_STEPS["sdxl"],
    embedding_keys=("clip_l", "clip_g"),
    cache_suffix="_sdxl.npz",
    vae_scale_factor=0.13025,
    resolution=1024,
    script="sdxl_train_textual_inversion.py",
)

FAMILIES = {family.name: family for family in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)}


def family_of(architecture: Architecture) -> ModelFamily:
    """The family that a model's architecture belongs to."""
    return next(family for family in FAMILIES.values() if architecture in family.architectures)
