"""Tiny random models of every family for tests, as diffusers folders and as single files in the original layouts.

They have the real structure (block types, token table, 8-quantize VAE) and small widths, so a whole training run takes
seconds. The single-file layouts are written by hand, key by key, and never by the code under test.
"""

import re
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VOCABULARY = Path(__file__).parents[1] / "configs" / "tokenizer"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FAMILIES = ("sd1", "sd2", "sdxl")

Tensors = dict[str, torch.Tensor]


def tokenizer(pad_token: str) -> CLIPTokenizer:
    """The CLIP vocabulary of 49,408 tokens with the given pad token."""
    return CLIPTokenizer(
        str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt"), pad_token=pad_token, model_max_length=77
    )


def text_config(width: int, heads: int, activation: str, layers: int = 3, **changes) -> CLIPTextConfig:
    """A CLIP text configuration with the real vocabulary and length."""
    values = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }
    return CLIPTextConfig(**{**values, **changes})


def build_vae(scaling_factor: float, layers: int = 2) -> AutoencoderKL:
    """A VAE that makes latents of 4 channels at an eighth of the size."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32] * 4,
        layers_per_block=layers,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def build_unet(family: str, **changes) -> UNet2DConditionModel:
    """A U-Net with the family's block types, conditioning and rule for attention heads, and the given changes."""
    v2 = family == "sd2"
    values = {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 64 if v2 else 32,
        "attention_head_dim": [4, 8, 8, 8] if v2 else 8,
        "use_linear_projection": v2,
    }
    if family == "sdxl":
        values |= {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [4, 4, 4],
            "cross_attention_dim": 96,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64 + 6 * 8,
        }
    return UNet2DConditionModel(**{**values, **changes})


def build_pipeline(
    family: str, seed: int = 0, channels: int = 4, layers: int = 2
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A float32 pipeline with random weights; the same seed gives the same weights.

    ``channels`` are its U-Net's. ``layers`` are the residual ones of a level; with one, a training takes a third less
    time, but no single file can hold the model (see ``identity``: it is taken for a distilled one).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _build_sdxl(layers) if family == "sdxl" else _build_sd(family == "sd2", layers)
        if channels != 4:
            pipeline.register_modules(unet=build_unet(family, in_channels=channels, layers_per_block=layers))
        return pipeline


def _build_sd(v2: bool, layers: int) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=build_vae(0.18215, layers),
        text_encoder=_lively(CLIPTextModel(text_config(64, 1, "gelu") if v2 else text_config(32, 4, "quick_gelu"))),
        tokenizer=tokenizer("!" if v2 else "<|endoftext|>"),
        unet=build_unet("sd2" if v2 else "sd1", layers_per_block=layers),
        scheduler=DDIMScheduler(
            **BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if v2 else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl(layers: int) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=build_vae(0.13025, layers),
        text_encoder=_lively(CLIPTextModel(text_config(32, 4, "quick_gelu"))),
        text_encoder_2=_lively(CLIPTextModelWithProjection(text_config(64, 1, "gelu"))),
        tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"),
        unet=build_unet("sdxl", layers_per_block=layers),
        scheduler=EulerDiscreteScheduler(**BETAS),
        force_zeros_for_empty_prompt=True,
    )


def _lively(encoder):
    """Give norms and biases random values, so that a test sees when one of them is left out or taken twice."""
    for name, parameter in encoder.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def save_folder(family: str, folder: Path, seed: int = 0, channels: int = 4, layers: int = 2) -> Path:
    """Write a diffusers folder with float32 weights and return it."""
    build_pipeline(family, seed, channels, layers).save_pretrained(folder)
    for file in folder.glob("tokenizer*/tokenizer.json"):
        # The repositories of Stable Diffusion hold these two instead, and they are read in less than half the time.
        file.unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(VOCABULARY / name, file.with_name(name))
    return folder


def save_single_file(family: str, file: Path, seed: int = 0, prefix: bool = True, channels: int = 4) -> Path:
    """Write the same model as :func:`save_folder` in the original single-file layout and return the file.

    ``prefix=False`` leaves the ``text_model.`` out of the CLIP keys, as some converters do.
    """
    save_file(single_file_tensors(build_pipeline(family, seed, channels), family, prefix), file)
    return file


def single_file_tensors(pipeline, family: str, prefix: bool = True) -> Tensors:
    """The pipeline's tensors under the names of LDM (SD 1, SD 2) or SGM (SDXL) checkpoints."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in ldm_unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in ldm_vae(pipeline.vae).items()}
    text_model = "text_model." if prefix else ""
    if family == "sd2":
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(pipeline.text_encoder, spare_layer=True)}
    elif family == "sd1":
        tensors |= {f"cond_stage_model.transformer.{text_model}{k}": v for k, v in clip(pipeline.text_encoder)}
    else:
        tensors |= {f"conditioner.embedders.0.transformer.{text_model}{k}": v for k, v in clip(pipeline.text_encoder)}
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipeline.text_encoder_2)}
    tensors["alphas_cumprod"] = torch.ones(1000)
    return {k: v.detach().contiguous() for k, v in tensors.items()}


def clip(encoder: CLIPTextModel) -> list[tuple[str, torch.Tensor]]:
    """A CLIP encoder's tensors without prefix, with the ``position_ids`` that old files carry."""
    tensors = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    return [*tensors.items(), ("embeddings.position_ids", torch.arange(77)[None])]


def open_clip(encoder, spare_layer: bool = False) -> list[tuple[str, torch.Tensor]]:
    """A CLIP encoder's tensors in OpenCLIP's layout: q, k and v in one matrix, the projection transposed.

    ``spare_layer`` adds the last layer that SD 2 files hold and the model does not use.
    """
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    width = encoder.config.hidden_size
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state.get("text_projection.weight", torch.eye(width)).T,
        "logit_scale": torch.tensor(4.6),
    }
    layers = encoder.config.num_hidden_layers
    for target in range(layers + spare_layer):
        source = f"encoder.layers.{min(target, layers - 1)}"
        block = f"transformer.resblocks.{target}"
        for kind in ("weight", "bias"):
            parts = [state[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            result[f"{block}.attn.out_proj.{kind}"] = state[f"{source}.self_attn.out_proj.{kind}"].clone()
            result[f"{block}.ln_1.{kind}"] = state[f"{source}.layer_norm1.{kind}"].clone()
            result[f"{block}.ln_2.{kind}"] = state[f"{source}.layer_norm2.{kind}"].clone()
            result[f"{block}.mlp.c_fc.{kind}"] = state[f"{source}.mlp.fc1.{kind}"].clone()
            result[f"{block}.mlp.c_proj.{kind}"] = state[f"{source}.mlp.fc2.{kind}"].clone()
    return list(result.items())


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}


def ldm_unet(unet: UNet2DConditionModel) -> Tensors:
    """The U-Net's tensors under LDM names, without ``model.diffusion_model.``."""
    per_block = unet.config.layers_per_block + 1
    with_attention = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    return {_ldm_unet_name(key, per_block, with_attention): v for key, v in unet.state_dict().items()}


def _ldm_unet_name(key: str, per_block: int, with_attention: list[bool]) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return key.replace(ours, theirs, 1)
    if match := re.match(r"mid_block\.(\w+\.\d)\.(.+)", key):
        return f"middle_block.{MIDDLE[match[1]]}.{_ldm_resnet_name(match[1], match[2])}"
    side, block, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key).groups()
    block, layer = int(block), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(block + 1) * per_block - 1}.{2 if with_attention[block] else 1}.{rest}"
    number = (
        f"input_blocks.{1 + block * per_block + layer}"
        if side == "down"
        else f"output_blocks.{block * per_block + layer}"
    )
    return f"{number}.{0 if kind == 'resnets' else 1}.{_ldm_resnet_name(kind, rest)}"


def _ldm_resnet_name(kind: str, rest: str) -> str:
    if not kind.startswith("resnets"):
        return rest
    layer, parameter = rest.rsplit(".", 1)
    return f"{RESNET[layer]}.{parameter}"


VAE_NAMES = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def ldm_vae(vae: AutoencoderKL) -> Tensors:
    """The VAE's tensors under LDM names, without ``first_stage_model.``; attention weights are 1x1 convolutions."""
    last = len(vae.config.up_block_types) - 1
    result = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", key)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        for ours, theirs in VAE_NAMES:
            name = re.sub(ours, theirs, name)
        is_attention_weight = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        result[name] = value[:, :, None, None] if is_attention_weight else value
    return result
