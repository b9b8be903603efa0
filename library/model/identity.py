"""Says what a checkpoint or a model folder is, from its tensors' names and shapes or its configuration files.

Only Stable Diffusion 1.x, 2.x and XL are trained. Everything else is named, with what to do about it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.model.architectures import SD1, SD2, SDXL, Architecture
from library.support.errors import UserError
from library.support.text_files import parse_json, read_text

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]  # the content of a JSON file

_OTHER_FAMILY = "Textual Inversion is not supported for it; use LoRA or fine-tuning instead."
_PLAIN_MODEL = "Give the complete base model instead."


@dataclass(frozen=True)
class Identity:
    """``what`` a file or folder is, as in "is a FLUX model". Without ``architecture``, ``advice`` says what to do.

    ``inpainting``: its U-Net takes nine channels.
    """

    what: str
    architecture: Architecture | None = None
    advice: str = ""
    inpainting: bool = False


def size_of(shapes: Shapes, name: str, axis: int) -> int:
    """The length of one axis of a tensor, or 0 where there is no such tensor or axis."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else 0


# Parts of tensor names that give a kind of file away, the most telling first.
_MARKS = (
    (("lora_down", "lora_up", "lora_A.", "lora_B.", "lora.up.", "hada_w1", "lokr_w"), "a LoRA file", _PLAIN_MODEL),
    (("control_model.", "controlnet_cond_embedding."), "a ControlNet", _PLAIN_MODEL),
    (("double_blocks.", "single_transformer_blocks."), "a FLUX model", _OTHER_FAMILY),
    (("joint_blocks.", "norm1_context."), "a Stable Diffusion 3 model", _OTHER_FAMILY),
    (("cap_embedder.", "time_caption_embed."), "a Lumina model", _OTHER_FAMILY),
)
# Beginnings of tensor names of files that hold one part of a model only.
_PARTS = (
    (("first_stage_model.", "encoder.down", "decoder.up"), "only a VAE", "Give it as --vae, and a base model besides."),
    (("down_blocks.", "input_blocks."), "only a U-Net", "Give the whole diffusers folder, or a complete checkpoint."),
    (
        ("text_model.", "cond_stage_model.", "conditioner.", "transformer.resblocks."),
        "only a text encoder",
        _PLAIN_MODEL,
    ),
    (("model.diffusion_model.",), "a model of another family", _OTHER_FAMILY),
)
_UNET_START = "model.diffusion_model.input_blocks.0.0.weight"
_EMBEDDING_NAMES = ("emb_params", "emp_params", "clip_g", "clip_l", "string_to_param.*")
_FAMILY_TITLES = {
    "Flux": "a FLUX model",
    "StableDiffusion3": "a Stable Diffusion 3 model",
    "SD3": "a Stable Diffusion 3 model",
    "Lumina": "a Lumina model",
}
# Of configurations: far beyond any model there is.
_MOST_LAYERS, _LARGEST_SIZE, _LONGEST_LIST = 200, 1_000_000, 2_000
_EDM = ("edm_vpred.sigma_max", "edm_mean", "edm_std")
_EDM_ADVICE = (
    "It was trained with another noise schedule and objective, so an embedding trained here would be wrong for it. "
    "Give an ordinary base model of the same kind."
)
# Ends of the names of what other programs keep beside weights that must be multiplied out.
_QUANTIZED = (".scale_weight", ".weight_scale", "scaled_fp8", ".comfy_quant", ".absmax", ".quant_map")
INPAINTING_CHANNELS = 9
_UNCLIP = Identity("an unCLIP model, which is told images and not only prompts", advice=_PLAIN_MODEL)


def identify_file(shapes: Shapes) -> Identity:
    """Name a single-file checkpoint by its tensors."""
    is_checkpoint = _UNET_START in shapes  # with the remains of a LoRA in it, perhaps
    for parts, what, advice in _MARKS:
        if not (is_checkpoint and what == "a LoRA file") and any(part in name for name in shapes for part in parts):
            return Identity(what, advice=advice)
    if is_checkpoint:
        return _identify_unet_file(shapes)
    if shapes and (any(name in shapes for name in _EMBEDDING_NAMES) or _looks_like_embedding(shapes)):
        return Identity("an embedding", advice="To train it further, give it as --weights, and its base model here.")
    for beginnings, what, advice in _PARTS:
        if any(name.startswith(beginnings) for name in shapes):
            return Identity(what, advice=advice)
    first = next(iter(shapes), None)
    content = f'its first tensor is "{first}"' if first else "it holds no tensors"
    return Identity(f"not a Stable Diffusion checkpoint ({content})", advice=_PLAIN_MODEL)


def _looks_like_embedding(shapes: Shapes) -> bool:
    return len(shapes) <= 2 and all(shape[-1:] in ((768,), (1024,), (1280,)) for shape in shapes.values())


def _identify_unet_file(shapes: Shapes) -> Identity:
    channels = size_of(shapes, _UNET_START, 1)
    slots = {slot for slot in ("cond_stage_model", "conditioner.embedders.0", "conditioner.embedders.1")
             if any(name.startswith(f"{slot}.") for name in shapes)}  # fmt: skip
    if channels not in (4, INPAINTING_CHANNELS):
        return _special_unet(channels)
    if edm := [name for name in _EDM if name in shapes]:
        return Identity(f"an EDM model ({edm[0]}; CosXL and Playground 2.5 are such models)", advice=_EDM_ADVICE)
    if quantized := next((name for name in shapes if name.endswith(_QUANTIZED)), None):
        return Identity(
            f"a checkpoint with quantized weights ({quantized})",
            advice="Give a copy in float16, bfloat16 or float32, or in plain float8.",
        )
    if slots == {"conditioner.embedders.0"}:
        return Identity("the SDXL refiner", advice="An embedding is trained on the SDXL base model; give that instead.")
    if slots and _is_distilled(shapes, levels=3 if "conditioner.embedders.1" in slots else 4):
        return Identity(
            "a model with a distilled U-Net, which lacks blocks (such as SSD-1B, Segmind-Vega, small-SD, tiny-SD)",
            advice="Give its diffusers folder, or train on the base model that it was distilled from.",
        )
    if "conditioner.embedders.1" in slots:
        return _supported(SDXL, channels, "checkpoint")
    if not slots:
        return Identity("only a U-Net, without text encoder", advice=_PLAIN_MODEL)
    if any(name.startswith("model.diffusion_model.label_emb.") for name in shapes):
        return _UNCLIP
    # SD 2 has OpenCLIP's encoder, whose tensors are named otherwise; converted files tell by the width.
    width = size_of(shapes, "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 1)
    is_sd2 = width == 1024 or any(name.startswith("cond_stage_model.model.") for name in shapes)
    return _supported(SD2 if is_sd2 else SD1, channels, "checkpoint")


def _supported(architecture: Architecture, channels: int, form: str) -> Identity:
    inpainting = channels == INPAINTING_CHANNELS
    return Identity(f"a {architecture.title} {'inpainting ' * inpainting}{form}", architecture, inpainting=inpainting)


def _is_distilled(shapes: Shapes, levels: int) -> bool:
    """Whether whole blocks are missing that every ordinary U-Net with so many levels has."""
    unet = "model.diffusion_model."
    blocks = {tuple(name.removeprefix(unet).split(".")[:2]) for name in shapes if name.startswith(unet)}
    found = [{block for block in blocks if block[0] == side} for side in ("input_blocks", "output_blocks")]
    middle = any(name.startswith(f"{unet}middle_block.1.transformer_blocks.") for name in shapes)
    complete = f"{unet}out.2.weight" in shapes
    return complete and (not middle or any(len(side) < 3 * levels for side in found))


def _special_unet(channels: int) -> Identity:
    kind = {8: "an InstructPix2Pix model", 7: "an upscaler or depth model"}
    what = kind.get(channels, "a model for another purpose")
    return Identity(
        f"{what} (its U-Net takes {channels} channels, not 4)", advice="Give the ordinary base model instead."
    )


def identify_folder(folder: Path) -> Identity:
    """Name a folder in diffusers' layout by its configuration files. Raises UserError if one of them is broken."""
    pipeline = read_config(folder / "model_index.json")
    unet = read_config(folder / "unet" / "config.json")
    if unet is None:
        return _identify_other_folder(folder, pipeline)
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json") or {}
    if str(scheduler.get("_class_name")).startswith("EDM"):
        return Identity(
            f"an EDM model ({scheduler['_class_name']}, as in CosXL and Playground 2.5)", advice=_EDM_ADVICE
        )
    channels = whole_number(unet, "in_channels", 4, folder / "unet" / "config.json")
    if channels not in (4, INPAINTING_CHANNELS):
        return _special_unet(channels)
    encoder = read_config(folder / "text_encoder" / "config.json")
    is_xl = unet.get("addition_embed_type") == "text_time"
    if encoder is None:
        refiner = is_xl and (folder / "text_encoder_2").is_dir()
        what = "the SDXL refiner" if refiner else "incomplete: it has no text_encoder folder with a config.json"
        return Identity(what, advice=_PLAIN_MODEL)
    if encoder.get("model_type", "clip_text_model") != "clip_text_model":
        kind = f"{encoder['model_type']!s:.40}"
        return Identity(f"a model with a {kind} text encoder, not CLIP", advice=_PLAIN_MODEL)
    if is_xl:
        return _supported(SDXL, channels, "model")
    if unet.get("class_embed_type"):
        return _UNCLIP
    width = encoder.get("hidden_size")
    is_sd2 = width == 1024 or (width != 768 and bool(unet.get("use_linear_projection")))
    return _supported(SD2 if is_sd2 else SD1, channels, "model")


def _identify_other_folder(folder: Path, pipeline: Config | None) -> Identity:
    if pipeline is None:
        files = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".ckpt"))
        if files:
            return Identity(
                "a folder of checkpoint files", advice=f"Name one of them, for example {folder / files[0]}."
            )
        return Identity(
            "not a diffusers model folder (it has no model_index.json)",
            advice="Give a folder with model_index.json, unet, vae and text_encoder, or a checkpoint file.",
        )
    kind = f"{pipeline.get('_class_name')!s:.80}"
    title = next(
        (title for name, title in _FAMILY_TITLES.items() if name in kind), f"a model of another family ({kind})"
    )
    return Identity(title, advice=_OTHER_FAMILY)


def read_config(file: Path) -> Config | None:
    """A component's configuration, or None if there is no such file.

    Raises UserError if it is no JSON object, or holds sizes of which no model can be made: some would be tried for
    hours, others fill the memory.
    """
    config = read_object(file)
    for name, value in (config or {}).items():
        values = value if isinstance(value, list) else [value]
        most = _MOST_LAYERS if "layer" in name else _LARGEST_SIZE
        numbers = [number for number in values if isinstance(number, int | float)]
        if len(values) > _LONGEST_LIST or not all(abs(number) <= most for number in numbers):  # NaN is not <= either
            raise _damaged(file, name, value)
    return config


def whole_number(config: Config, name: str, default: int, file: Path) -> int:
    """A whole number above 0 of a configuration. Raises UserError, naming the file, for anything else."""
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise _damaged(file, name, value)
    return value


def positive_number(config: Config, name: str, default: float, file: Path) -> float:
    """A number above 0 of a configuration. Raises UserError, naming the file, for anything else."""
    value = config.get(name, default)
    if type(value) not in (int, float) or value <= 0:
        raise _damaged(file, name, value)
    return float(value)


def _damaged(file: Path, name: str, value: Any) -> UserError:
    return UserError(
        f"{file} has {name}: {value!r:.80}, of which no model can be made. Download the model again, or use another "
        "copy."
    )


def read_object(file: Path) -> Config | None:
    """The content of a JSON file, or None if there is none. Raises UserError if it is no JSON object."""
    if not file.is_file():
        return None
    content = parse_json(read_text(file, str(file)), str(file))
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a configuration: it holds no JSON object.")
    return content
