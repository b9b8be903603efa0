"""What the supported models look like on disk, and how to tell them from everything else. Plain data, no torch."""

from dataclasses import dataclass
from pathlib import Path

from library.support.shipped_files import CONFIGS

VOCABULARY = CONFIGS / "tokenizer"
BUCKET_STEPS = {"sd": 64, "sdxl": 32}  # bucket sides are multiples of it, in pixels; by family


@dataclass(frozen=True)
class TextEncoderLayout:
    """One text encoder of a model.

    ``component`` and ``tokenizer`` are folders of a diffusers model, ``slot`` is where single files keep the encoder's
    tensors. ``tokenizer_id`` is the hub id under which sd-scripts caches the tokenizer.
    """

    component: str
    tokenizer: str
    slot: str
    with_projection: bool
    pad_token: str
    tokenizer_id: str


@dataclass(frozen=True)
class Architecture:
    """One supported kind of model; ``name`` is also its folder of component configurations in ``configs/``."""

    name: str
    title: str
    script: str
    text_encoders: tuple[TextEncoderLayout, ...]

    @property
    def config_folder(self) -> Path:
        return CONFIGS / self.name


_CLIP_L, _CLIP_H = "openai/clip-vit-large-patch14", "stabilityai/stable-diffusion-2"
_CLIP_G = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_END = "<|endoftext|>"

SD1 = Architecture(
    "sd1",
    "Stable Diffusion 1.x",
    "train_textual_inversion.py",
    (TextEncoderLayout("text_encoder", "tokenizer", "cond_stage_model", False, _END, _CLIP_L),),
)
SD2 = Architecture(
    "sd2",
    "Stable Diffusion 2.x",
    "train_textual_inversion.py",
    (TextEncoderLayout("text_encoder", "tokenizer", "cond_stage_model", False, "!", _CLIP_H),),
)
SDXL = Architecture(
    "sdxl",
    "Stable Diffusion XL",
    "sdxl_train_textual_inversion.py",
    (
        TextEncoderLayout("text_encoder", "tokenizer", "conditioner.embedders.0", False, _END, _CLIP_L),
        TextEncoderLayout("text_encoder_2", "tokenizer_2", "conditioner.embedders.1", True, "!", _CLIP_G),
    ),
)
