"""Original layouts: the sizes read from shapes are the real models' own, and every name is converted."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_models import build_pipeline, ldm_unet, ldm_vae, single_file_tensors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.model.architectures import SD1, SD2, SDXL
from library.model.single_file import SingleFile, head_width, text_sizes, unet_sizes, vae_component, vae_sizes
from library.model.weight_files import Weights
from library.support.errors import UserError
from library.support.stored_tensors import Unread

ARCHITECTURES = [SD1, SD2, SDXL]


def in_memory(tensors: dict) -> Weights:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, lambda names: {name: Unread.held(tensors[name]) for name in names})


def full_size(architecture) -> dict:
    """The real model without any numbers (meta tensors), from the bundled configurations."""
    file = SingleFile(Path("model"), in_memory({}), architecture, architecture.config_folder)
    with init_empty_weights():
        model = {
            "unet": UNet2DConditionModel.from_config(file.config("unet")),
            "vae": AutoencoderKL.from_config(file.config("vae")),
        }
        for layout in architecture.text_encoders:
            encoder_class = CLIPTextModelWithProjection if layout.with_projection else CLIPTextModel
            model[layout.component] = encoder_class(CLIPTextConfig.from_dict(file.config(layout.component)))
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: a.name)
def full(request):
    return request.param, full_size(request.param)


def test_bundled_configurations_are_the_real_models(full):
    """Parameter counts of the published models."""
    architecture, model = full
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.items()}
    published = {
        "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480},
        "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840},
        "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    }
    assert counts == {"vae": 83_653_863, **published[architecture.name]}


def test_sizes_read_from_a_real_model_are_its_configuration(full):
    architecture, model = full
    file = SingleFile(Path("model"), in_memory({}), architecture, architecture.config_folder)
    config = file.config("unet")
    assert unet_sizes(config, model["unet"].state_dict(), pooled_width=1280) == config
    config = file.config("vae")
    assert vae_sizes(config, model["vae"].state_dict()) == config
    for layout in architecture.text_encoders:
        config = file.config(layout.component)
        tensors = {n.removeprefix("text_model."): t for n, t in model[layout.component].state_dict().items()}
        assert text_sizes(config, tensors) == config


def test_every_name_of_a_real_single_file_is_converted(full):
    architecture, model = full
    tensors = {f"model.diffusion_model.{n}": t for n, t in ldm_unet(model["unet"]).items()}
    tensors |= {f"first_stage_model.{n}": t for n, t in ldm_vae(model["vae"]).items()}
    last = architecture.text_encoders[-1]
    tensors[f"{last.slot}.model.text_projection"] = torch.empty(1280, 1280, device="meta")
    file = SingleFile(Path("model"), in_memory(tensors), architecture, architecture.config_folder)
    for component in ("unet", "vae"):
        config, converted = getattr(file, component)()
        assert config == file.config(component)
        wanted = {name: tensor.shape for name, tensor in model[component].state_dict().items()}
        assert {name: tensor.shape for name, tensor in converted.items()} == wanted


@pytest.mark.parametrize(("layers", "wanted"), [(24, 23), (23, 23), (4, 3)])
def test_sd2_leaves_the_last_layer_out(layers, wanted):
    tensors = {f"encoder.layers.{i}.mlp.fc1.weight": torch.empty(1, 1, device="meta") for i in range(layers)}
    config = SingleFile(Path("model"), in_memory({}), SD2, SD2.config_folder).config("text_encoder")
    assert text_sizes(config, tensors, spare_layers=1)["num_hidden_layers"] == wanted


@pytest.mark.parametrize(
    ("widths", "wanted"), [([320, 640, 1280], 64), ([768], 64), ([32, 64, 64], 8), ([32], 8), ([64], 64)]
)
def test_head_width(widths, wanted):
    assert head_width(widths) == wanted


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", ["original", "diffusers", "old diffusers"])
def test_vae_layouts(prefix, layout):
    vae = build_pipeline("sd1").vae
    wanted = vae.state_dict()
    tensors = ldm_vae(vae) if layout == "original" else dict(wanted)
    if layout == "old diffusers":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new_part, old_part in old.items():
            tensors = {name.replace(f".{new_part}.", f".{old_part}."): t for name, t in tensors.items()}
    stored = {prefix + name: tensor for name, tensor in tensors.items()} | {"loss.logvar": torch.zeros(1)}
    config = SingleFile(Path("model"), in_memory({}), SD1, SD1.config_folder).config("vae")
    sizes, got = vae_component(Path("vae.safetensors"), in_memory(stored), config)
    assert sizes["block_out_channels"] == [32, 32, 32, 32]
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name].read(), wanted[name]) for name in wanted)


def test_a_file_without_vae():
    with pytest.raises(UserError, match="holds no VAE"):
        vae_component(Path("unet.safetensors"), in_memory({"down_blocks.0.x": torch.zeros(1)}), {})


def test_open_clip_is_split_and_transposed():
    pipeline = build_pipeline("sdxl")
    tensors = single_file_tensors(pipeline, "sdxl")
    file = SingleFile(Path("model"), in_memory(tensors), SDXL, SDXL.config_folder)
    config, got = file.text_encoder(SDXL.text_encoders[1])
    assert (config["hidden_size"], config["num_hidden_layers"], config["projection_dim"]) == (64, 3, 64)
    wanted = {n.removeprefix("text_model."): t for n, t in pipeline.text_encoder_2.state_dict().items()}
    assert all(torch.equal(got[name].read(), wanted[name]) for name in wanted)
