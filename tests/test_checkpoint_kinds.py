"""Checkpoints as people have them: a table of what becomes of each, through the real scripts on tiny models.

Each row makes a file or a folder out of a whole tiny model and says what the run must say; ``code`` 0 is a run that
trains and writes an embedding, 1 a refusal. What a run must not say is in ``silent``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from option_effects import train
from runs import TOKEN, arguments, write_dataset
from safetensors.torch import load_file, save_file
from tiny_models import build_pipeline, build_unet

Tensors = dict[str, torch.Tensor]
SCRIPT_OF = {"sd1": "train_textual_inversion.py", "sdxl": "sdxl_train_textual_inversion.py"}
SPREAD = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class Row:
    """``make`` writes the model, given the whole one's tensors and an empty folder, and returns its path."""

    family: str
    make: Callable[[Tensors, Path], Path]
    said: str
    code: int = 0
    more: tuple[str, ...] = ()
    silent: str = "Traceback"
    script: str = ""


def file(
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors, name: str = "photo.safetensors", **metadata: str
) -> Callable[[Tensors, Path], Path]:
    """A safetensors file with changed tensors; metadata keys have ``__`` for a dot."""

    def make(tensors: Tensors, folder: Path) -> Path:
        said = {key.replace("__", "."): value for key, value in metadata.items()}
        save_file({name: t.contiguous() for name, t in change(tensors).items()}, folder / name, said)
        return folder / name

    return make


def marked(*names: str) -> Callable[[Tensors], Tensors]:
    """Empty tensors by which a model marks itself."""
    return lambda tensors: tensors | {name: torch.zeros(0) for name in names}


def without(part: str) -> Callable[[Tensors], Tensors]:
    """All tensors whose name lacks ``part``."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def cast(*dtypes: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Every tensor of numbers in another format, the formats taking turns."""

    def change(tensors: Tensors) -> Tensors:
        numbered = enumerate(tensors.items())
        return {n: t.to(dtypes[i % len(dtypes)]) if t.is_floating_point() else t for i, (n, t) in numbered}

    return change


def spread(width: float) -> Callable[[Tensors], Tensors]:
    """SD 2's telling tensor with this standard deviation."""
    return lambda tensors: tensors | {SPREAD: torch.tensor([-width, width]).repeat(tensors[SPREAD].numel() // 2)}


def channels(count: int) -> Callable[[Tensors], Tensors]:
    """A U-Net that takes so many channels."""
    return lambda tensors: tensors | {FIRST: torch.zeros(32, count, 3, 3)}


def only(**shapes: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """Another file altogether; names have ``__`` for a dot."""
    return lambda _: {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def refiner(tensors: Tensors) -> Tensors:
    kept = without("conditioner.embedders.0")(tensors)
    return {name.replace("conditioner.embedders.1", "conditioner.embedders.0"): t for name, t in kept.items()}


def not_a_number(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    return tensors | {name: torch.full_like(tensors[name], torch.nan)}


def pickled(content: Callable[[Tensors], object], keep: float = 1.0) -> Callable[[Tensors, Path], Path]:
    """A ``.ckpt`` of which a share is kept."""

    def make(tensors: Tensors, folder: Path) -> Path:
        path = folder / "photo.ckpt"
        torch.save(content(tensors), path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return path

    return make


class Unknown:
    """An object that only a run of its own code could bring back."""


def cut_off(tensors: Tensors, folder: Path) -> Path:
    path = file()(tensors, folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def bytes_(content: bytes) -> Callable[[Tensors, Path], Path]:
    """A file that holds just this."""

    def make(_: Tensors, folder: Path) -> Path:
        (folder / "photo.safetensors").write_bytes(content)
        return folder / "photo.safetensors"

    return make


def folder_with(family: str, **unet: object) -> Callable[[Tensors, Path], Path]:
    """A diffusers folder whose U-Net is built with these changes."""

    def make(_: Tensors, folder: Path) -> Path:
        pipeline = build_pipeline(family)
        pipeline.unet = build_unet(family, **unet)
        pipeline.save_pretrained(folder / "photo")
        return folder / "photo"

    return make


def edm_folder(_: Tensors, folder: Path) -> Path:
    path = folder_with("sdxl")(_, folder)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    return path


def lcm_folder(_: Tensors, folder: Path) -> Path:
    path = folder_with("sd1")(_, folder)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "LCMScheduler"}))
    return path


def flux_folder(_: Tensors, folder: Path) -> Path:
    (folder / "photo").mkdir()
    (folder / "photo" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder / "photo"


EXTRAS = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2), "optimizer.x": torch.zeros(1)}
EMA = {"model_ema.diffusion_modelout2weight": torch.zeros(3), "model_ema.num_updates": torch.tensor(3)}
V, ZERO, V2 = "--v_parameterization", "--zero_terminal_snr", "--v2"
OTHER_FAMILY = "Textual Inversion is not supported for it; use LoRA or fine-tuning instead"
WHOLE = "Give the complete base model instead"

TABLE = {
    # what the file says of its objective
    "v_pred": Row("sdxl", file(marked("v_pred")), f"so it is: {V}. With {V}=false it is not"),
    "v_pred and ztsnr": Row("sdxl", file(marked("v_pred", "ztsnr")), f"so it is: {V} {ZERO}. With"),
    "v_pred, denied": Row("sdxl", file(marked("v_pred")), f"unless you add {V}", more=(f"{V}=false",)),
    "modelspec v": Row("sd1", file(modelspec__prediction_type="v"), f"so it is: {V}. With"),
    "modelspec epsilon": Row("sd1", file(modelspec__prediction_type="epsilon"), f"unless you leave {V} out", more=(V,)),
    "SD 2, wide norm1": Row("sd2", file(spread(0.2)), f"so it is: {V}. With", more=(V2,)),
    "SD 2, narrow norm1": Row("sd2", file(spread(0.05)), "The embedding is in", more=(V2,), silent="so it is:"),
    "SD 2 without --v2": Row("sd2", file(), "is a Stable Diffusion 2.x model: add --v2", code=1),
    "CosXL": Row("sdxl", file(marked("edm_vpred.sigma_max")), "is an EDM model (edm_vpred.sigma_max", code=1),
    "Playground 2.5": Row("sdxl", file(marked("edm_mean", "edm_std")), "is an EDM model (edm_mean", code=1),
    "Playground 2.5, folder": Row("sdxl", edm_folder, "is an EDM model (EDMEulerScheduler", code=1),
    # distilled for few steps, or smaller
    "LCM by name": Row("sd1", file(name="DreamShaper_8_LCM.safetensors"), "seems to be an LCM model"),
    "Lightning by metadata": Row("sdxl", file(modelspec__title="XL-Lightning"), "modelspec.title in its metadata says"),
    "LCM folder": Row("sd1", lcm_folder, "seems to be an LCM model, distilled to draw in a few steps: its scheduler"),
    "tiny-SD": Row("sd1", file(without("middle_block.1.")), "a model with a distilled U-Net", code=1),
    "SSD-1B": Row("sdxl", file(without(".output_blocks.1.")), "a model with a distilled U-Net", code=1),
    "small-SD, folder": Row(
        "sd1", folder_with("sd1", layers_per_block=1, mid_block_type=None), "trained on photo", silent="WARNING"
    ),
    "Vega, folder": Row("sdxl", folder_with("sdxl", transformer_layers_per_block=[1, 1, 1]), "trained on photo"),
    # number formats
    "float8": Row("sd1", file(cast(torch.float8_e4m3fn)), "trained on photo.safetensors"),
    "bfloat16": Row("sdxl", file(cast(torch.bfloat16)), "trained on photo.safetensors"),
    "mixed": Row("sdxl", file(cast(torch.float16, torch.float32, torch.float8_e4m3fn)), "trained on photo.safetensors"),
    "scaled float8": Row(
        "sd1", file(marked(f"{FIRST[:-7]}.scale_weight")), "a checkpoint with quantized weights", code=1
    ),
    # what is left in files, or out of them
    "EMA": Row("sd1", file(lambda t: t | EMA), "trained on photo.safetensors"),
    "remains of a LoRA": Row("sdxl", file(lambda t: t | EXTRAS), "trained on photo.safetensors"),
    "no position_ids": Row("sd1", file(without("position_ids")), "trained on photo.safetensors"),
    "no VAE": Row("sd1", file(without("first_stage_model")), "holds no VAE. Give one with --vae", code=1),
    "no text encoder": Row("sd1", file(without("cond_stage_model")), "is only a U-Net, without text encoder", code=1),
    "a tensor is missing": Row("sd1", file(without("input_blocks.5.1.norm.weight")), "is incomplete", code=1),
    "not a number": Row("sd1", file(not_a_number), "The text encoder gives NaN or infinite values", code=1),
    # pickled
    "ckpt": Row("sd1", pickled(lambda t: {"state_dict": t, "global_step": 3}), "trained on photo.ckpt"),
    "ckpt with code": Row(
        "sd1", pickled(lambda t: {"state_dict": t, "x": Unknown()}), "Python objects besides tensors", code=1
    ),
    "ckpt, cut off": Row("sd1", pickled(lambda t: t, keep=0.9), "is cut off: the end of the file is missing", code=1),
    # damaged, or no model
    "cut off": Row("sd1", cut_off, "is cut off", code=1),
    "empty": Row("sd1", bytes_(b""), "it is empty", code=1),
    "a page": Row("sd1", bytes_(b"<!DOCTYPE html><html>" + b" " * 99), "web page", code=1),
    "an LFS pointer": Row("sd1", bytes_(b"version https://git-lfs.github.com/spec/v1\noid x\n"), "Git LFS", code=1),
    "GGUF": Row("sd1", bytes_(b"GGUF" + bytes(99)), "neither a safetensors nor a torch file", code=1),
    # of another kind
    "SDXL in the SD script": Row("sdxl", file(), f"Use {SCRIPT_OF['sdxl']} with the same", code=1, script="sd1"),
    "SD in the SDXL script": Row("sd1", file(), f"Use {SCRIPT_OF['sd1']} with the same", code=1, script="sdxl"),
    "inpainting": Row("sd1", file(channels(9)), "inpainting", code=1),
    "InstructPix2Pix": Row("sdxl", file(channels(8)), "an InstructPix2Pix model", code=1),
    "the refiner": Row("sdxl", file(refiner), "is the SDXL refiner. An embedding is trained on the SDXL base", code=1),
    "SD 3": Row("sd1", file(only(model__diffusion_model__joint_blocks__0__x=(2,))), OTHER_FAMILY, code=1),
    "FLUX": Row("sdxl", file(only(double_blocks__0__img_attn__proj__weight=(2,))), "is a FLUX model", code=1),
    "FLUX, folder": Row("sdxl", flux_folder, f"is a FLUX model. {OTHER_FAMILY}", code=1),
    "LoRA": Row("sdxl", file(only(lora_unet_x__lora_down__weight=(2, 2))), f"is a LoRA file. {WHOLE}", code=1),
    "ControlNet": Row("sd1", file(only(control_model__x=(2,))), f"is a ControlNet. {WHOLE}", code=1),
    "embedding": Row(
        "sd1", file(only(emb_params=(2, 768))), "is an embedding. To train it further, give it as", code=1
    ),
    "VAE": Row("sd1", file(only(encoder__down__0__x=(2,))), "is only a VAE. Give it as --vae", code=1),
}


@pytest.fixture(scope="module")
def whole(tiny_sd1_file, tiny_sd2_file, tiny_sdxl_file):
    files = {"sd1": tiny_sd1_file, "sd2": tiny_sd2_file, "sdxl": tiny_sdxl_file}
    return {family: load_file(path) for family, path in files.items()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), count=1)


@pytest.mark.parametrize("name", TABLE)
def test_table(name, whole, dataset, tmp_path):
    row = TABLE[name]
    model = row.make(whole[row.family], tmp_path)
    argv = [*arguments("sd1", model, dataset, tmp_path / "out"), "--max_train_steps=1", *row.more]
    outcome = train(row.script or row.family, argv, tmp_path / "out", code=row.code)
    assert row.said in outcome.said
    assert row.silent not in outcome.said
    if row.code:
        assert outcome.err.splitlines()[-1].startswith("error: ")
        assert outcome.files == []
        return
    rows = outcome.tensors()
    assert all(tensor.isfinite().all() for tensor in rows.values())
    assert outcome.metadata(f"{TOKEN}.safetensors")["ti.base_model"] == model.name


def test_the_table_is_long_enough():
    assert len(TABLE) >= 25
