"""Checkpoints in one file: the original layouts (LDM, SGM, OpenCLIP) turned into diffusers' and transformers' names.

A file does not say how its model is built. The bundled configurations do, and the sizes in them are corrected by the
shapes of the tensors, so that unusual widths load as well.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from library.model.architectures import Architecture, TextEncoderLayout
from library.model.identity import Config, read_config, size_of
from library.model.weight_files import Weights
from library.support.errors import UserError, first_line
from library.support.stored_tensors import Unread, UnreadTensors

HEAD_WIDTH = 64  # of every attention in OpenCLIP, SD 2 and SDXL, and in CLIP-L
_MOST_LAYERS = 100  # of one text encoder or transformer; real ones have up to 32
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_Conversion = Callable[[UnreadTensors, Config], dict[str, Unread | None]]  # diffusers' own


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint file of a known architecture; each method reads one component: its configuration and tensors."""

    path: Path
    weights: Weights
    architecture: Architecture
    config_folder: Path

    def config(self, component: str) -> Config:
        return read_config(self.config_folder / component / "config.json") or {}

    def unet(self) -> tuple[Config, UnreadTensors]:
        names = [name for name in self.weights.shapes if name.startswith("model.diffusion_model.")]
        config = self.config("unet")
        tensors = _converted(convert_ldm_unet_checkpoint, self.weights.unread(names), config, self.path)
        pooled = size_of(self.weights.shapes, f"{self.architecture.text_encoders[-1].slot}.model.text_projection", 1)
        return unet_sizes(config, tensors, pooled), tensors

    def vae(self) -> tuple[Config, UnreadTensors]:
        return vae_component(self.path, self.weights, self.config("vae"))

    def text_encoder(self, layout: TextEncoderLayout) -> tuple[Config, UnreadTensors]:
        config = self.config(layout.component)
        clip, open_clip = f"{layout.slot}.transformer.", f"{layout.slot}.model."
        if names := [name for name in self.weights.shapes if name.startswith(open_clip)]:
            with _conversion(self.path):
                tensors = _from_open_clip(self.weights.unread(names), open_clip)
            config = text_sizes(config, tensors, spare_layers=0 if layout.with_projection else 1)
            return config, without_spare_layers(tensors, config["num_hidden_layers"])
        names = [name for name in self.weights.shapes if name.startswith(clip)]
        tensors = {
            name.removeprefix(clip).removeprefix("text_model."): t for name, t in self.weights.unread(names).items()
        }
        return text_sizes(config, tensors), tensors

    def vocabulary_size(self, layout: TextEncoderLayout) -> int:
        """How many tokens the text encoder knows, from the header alone."""
        start, end = f"{layout.slot}.", "token_embedding.weight"
        names = (name for name in self.weights.shapes if name.startswith(start) and name.endswith(end))
        size = size_of(self.weights.shapes, next(names, ""), 0)
        if not size:
            raise UserError(f"{self.path} is incomplete: the text encoder's token table is missing.")
        return size

    def check(self, with_vae: bool) -> None:
        """Raise UserError if the VAE is missing; the other parts made the file known."""
        if with_vae:
            _vae_prefix(self.path, self.weights)


def vae_component(path: Path, weights: Weights, config: Config) -> tuple[Config, UnreadTensors]:
    """A VAE from a checkpoint or a file of its own: original layout with or without prefix, or diffusers' layout."""
    prefix = _vae_prefix(path, weights)
    parts = tuple(prefix + part for part in _VAE_PARTS)
    tensors = weights.unread(name for name in weights.shapes if name.startswith(parts))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        tensors = modern_vae_names(tensors)
    else:
        tensors = _converted(convert_ldm_vae_checkpoint, tensors, config, path)
    return vae_sizes(config, tensors), tensors


def _vae_prefix(path: Path, weights: Weights) -> str:
    prefix = next((p for p in _VAE_PREFIXES if any(name.startswith(f"{p}encoder.") for name in weights.shapes)), None)
    if prefix is None:
        raise UserError(f"{path} holds no VAE. Give one with --vae.")
    return prefix


def modern_vae_names(tensors: UnreadTensors) -> UnreadTensors:
    """Rename the attention layers of VAEs that diffusers saved before version 0.17."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    result = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for old, new in names.items():
                name = name.replace(old, new)
        result[name] = tensor
    return result


def _converted(convert: _Conversion, tensors: UnreadTensors, config: Config, path: Path) -> UnreadTensors:
    """Call one of diffusers' conversions, which stop at some missing tensors and put None for others."""
    with _conversion(path):
        converted = convert(tensors, config)
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


@contextmanager
def _conversion(path: Path) -> Iterator[None]:
    """Within a ``with``: what diffusers runs into when it renames the tensors of a damaged file is a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} is incomplete: the tensor {error} is missing.") from error
    except (IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged or of an unknown layout: its tensors cannot be converted ({first_line(error)}). "
            "Download or copy it again, or use another copy."
        ) from error


def _from_open_clip(tensors: UnreadTensors, prefix: str) -> UnreadTensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width = size_of(shapes, f"{prefix}token_embedding.weight", 1) or None
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    converted = convert_open_clip_checkpoint(model, tensors, prefix=prefix)
    return {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}


def unet_sizes(config: Config, tensors: UnreadTensors, pooled_width: int) -> Config:
    """The U-Net's configuration with the sizes of these tensors (diffusers' names).

    ``pooled_width`` is that of SDXL's pooled vector, which shares a layer with six sinusoids of equal width.
    """
    shape = _Shapes(tensors)
    levels = range(len(config["down_block_types"]))
    widths = [shape(f"down_blocks.{i}.resnets.0.conv1.weight", 0, config["block_out_channels"][i]) for i in levels]
    attention = next((name for name in tensors if name.endswith("attn2.to_k.weight")), "")
    projection = next((name for name in tensors if name.endswith("attentions.0.proj_in.weight")), None)
    sizes = {
        "block_out_channels": widths,
        "in_channels": shape("conv_in.weight", 1, config["in_channels"]),
        "cross_attention_dim": shape(attention, 1, config["cross_attention_dim"]),
    }
    if projection is not None:
        sizes["use_linear_projection"] = tensors[projection].ndim == 2
    if widths != config["block_out_channels"] and isinstance(config["attention_head_dim"], list):
        sizes["attention_head_dim"] = _unet_heads(widths, "addition_embed_type" in config)
    if isinstance(config["transformer_layers_per_block"], list):
        depths = [_count(tensors, f"down_blocks.{i}.attentions.0.transformer_blocks.") for i in levels]
        sizes["transformer_layers_per_block"] = [depth or 1 for depth in depths]
    if (total := shape("add_embedding.linear_1.weight", 1, 0)) > pooled_width:
        sizes["projection_class_embeddings_input_dim"] = total
        sizes["addition_time_embed_dim"] = (total - pooled_width) // 6
    return config | sizes


def _unet_heads(widths: list[int], is_xl: bool) -> list[int]:
    """Attention heads per level (diffusers' ``attention_head_dim``): they leave no trace in the shapes.

    Miniature models are for tests, and have by convention heads of width 8, or in SDXL four at every level.
    """
    width_of_head = head_width(widths)
    if is_xl and width_of_head != HEAD_WIDTH:
        return [4] * len(widths)
    return [width // width_of_head for width in widths]


def vae_sizes(config: Config, tensors: UnreadTensors) -> Config:
    """The VAE's configuration with the sizes of these tensors (diffusers' names)."""
    shape = _Shapes(tensors)
    levels = range(len(config["down_block_types"]))
    usual = config["block_out_channels"]
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0, usual[i]) for i in levels]
    channels = shape("decoder.conv_in.weight", 1, config["latent_channels"])
    return config | {"block_out_channels": widths, "latent_channels": channels}


def text_sizes(config: Config, tensors: UnreadTensors, spare_layers: int = 0) -> Config:
    """The text encoder's configuration with the sizes of these tensors (transformers' names without prefix).

    ``spare_layers`` is how many layers the file holds that the model does not use (SD 2 files: the last).
    """
    shape = _Shapes(tensors)
    width = shape("embeddings.token_embedding.weight", 1, config["hidden_size"])
    layers, usual = _count(tensors, "encoder.layers."), config["num_hidden_layers"]
    sizes = {
        "hidden_size": width,
        "vocab_size": shape("embeddings.token_embedding.weight", 0, config["vocab_size"]),
        "max_position_embeddings": shape("embeddings.position_embedding.weight", 0, config["max_position_embeddings"]),
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight", 0, config["intermediate_size"]),
        "projection_dim": shape("text_projection.weight", 0, config["projection_dim"]),
        # Some converters leave the unused layers out.
        "num_hidden_layers": usual if usual <= layers <= usual + spare_layers else max(1, layers - spare_layers),
    }
    if width != config["hidden_size"]:
        sizes["num_attention_heads"] = width // head_width([width])
    return config | sizes


def without_spare_layers(tensors: UnreadTensors, layers: int) -> UnreadTensors:
    unused = tuple(f"encoder.layers.{i}." for i in range(layers, layers + 2))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}


def head_width(widths: Iterable[int]) -> int:
    """Width of one attention head: 64, or 8 in miniature models, where 64 does not divide every width."""
    return HEAD_WIDTH if all(width % HEAD_WIDTH == 0 for width in widths) else 8


class _Shapes:
    """Sizes of tensors by name, with a fallback: what is missing is reported once all names are compared."""

    def __init__(self, tensors: UnreadTensors) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def __call__(self, name: str, axis: int, fallback: int) -> int:
        return size_of(self.shapes, name, axis) or fallback


def _count(tensors: UnreadTensors, prefix: str) -> int:
    """How many layers there are under a name; what has more than any model is found when all names are compared."""
    return min(
        _MOST_LAYERS, len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    )
