"""Every kind of file or folder is named, with what to do about it."""

import json

import pytest

from library.model.architectures import SD1, SD2, SDXL
from library.model.identity import identify_file, identify_folder, read_config
from library.support.errors import UserError

UNET = "model.diffusion_model."
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CLIP = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
CLIP_BARE = "cond_stage_model.transformer.embeddings.token_embedding.weight"
OPEN_CLIP = "cond_stage_model.model.token_embedding.weight"
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"


def checkpoint(*names: str, channels: int = 4, context: int = 768) -> dict:
    shapes = {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3), TO_K: (320, context)}
    return shapes | dict.fromkeys(names, (49408, context))


@pytest.mark.parametrize(
    ("shapes", "architecture"),
    [
        (checkpoint(CLIP), SD1),
        (checkpoint(CLIP_BARE), SD1),
        (checkpoint(CLIP, context=32), SD1),
        (checkpoint(OPEN_CLIP, context=1024), SD2),
        (checkpoint(OPEN_CLIP, context=64), SD2),
        (checkpoint(CLIP, context=1024), SD2),
        (checkpoint(XL_CLIP, XL_OPEN_CLIP, context=2048), SDXL),
    ],
)
def test_supported_checkpoints(shapes, architecture):
    assert identify_file(shapes).architecture is architecture


@pytest.mark.parametrize(
    ("shapes", "architecture", "what"),
    [
        (checkpoint(CLIP, channels=9), SD1, "a Stable Diffusion 1.x inpainting checkpoint"),
        (checkpoint(OPEN_CLIP, channels=9, context=1024), SD2, "a Stable Diffusion 2.x inpainting checkpoint"),
        (checkpoint(XL_CLIP, XL_OPEN_CLIP, channels=9), SDXL, "a Stable Diffusion XL inpainting checkpoint"),
    ],
)
def test_inpainting_checkpoints(shapes, architecture, what):
    identity = identify_file(shapes)
    assert (identity.architecture, identity.what, identity.inpainting) == (architecture, what, True)
    ordinary = identify_file(checkpoint(CLIP))
    assert (ordinary.what, ordinary.inpainting) == ("a Stable Diffusion 1.x checkpoint", False)


def names(*some: str, shape=(2, 2)) -> dict:
    return dict.fromkeys(some, shape)


@pytest.mark.parametrize(
    ("shapes", "what", "advice"),
    [
        (names("double_blocks.0.img_attn.norm.key_norm.scale"), "FLUX", "use LoRA or fine-tuning"),
        (names(f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"), "FLUX", "use LoRA or fine-tuning"),
        (names("single_transformer_blocks.0.attn.to_k.weight"), "FLUX", "use LoRA or fine-tuning"),
        (names(f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight"), "Stable Diffusion 3", "use LoRA or fine-tuning"),
        (names("cap_embedder.0.weight", "layers.0.x"), "Lumina", "use LoRA or fine-tuning"),
        (names(f"{UNET}blocks.0.attn.qkv_x.weight"), "another family", "use LoRA or fine-tuning"),
        (checkpoint("conditioner.embedders.0.model.x"), "refiner", "base model"),
        (checkpoint(OPEN_CLIP, f"{UNET}label_emb.0.0.weight"), "unCLIP", "complete base model"),
        (checkpoint(XL_CLIP, XL_OPEN_CLIP, channels=8), "InstructPix2Pix", "ordinary base model"),
        (checkpoint(CLIP, channels=5), "another purpose", "ordinary base model"),
        (checkpoint("first_stage_model.encoder.conv_in.weight"), "without text encoder", "complete base model"),
        (names("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"), "LoRA", "complete base model"),
        (names("unet.down_blocks.0.attentions.0.to_k.lora_A.weight"), "LoRA", "complete base model"),
        (names("control_model.input_blocks.0.0.weight"), "ControlNet", "complete base model"),
        (names("emb_params", shape=(4, 768)), "an embedding", "--weights"),
        (names("clip_l", "clip_g"), "an embedding", "--weights"),
        (names("string_to_param.*", shape=(4, 768)), "an embedding", "--weights"),
        (names("<mychar>", shape=(1024,)), "an embedding", "--weights"),
        (names("first_stage_model.encoder.conv_in.weight"), "only a VAE", "--vae"),
        (names("encoder.down_blocks.0.resnets.0.conv1.weight"), "only a VAE", "--vae"),
        (names("down_blocks.0.resnets.0.conv1.weight"), "only a U-Net", "whole diffusers folder"),
        (names("text_model.encoder.layers.0.mlp.fc1.weight"), "only a text encoder", "complete base model"),
        (names("layer.weight"), 'its first tensor is "layer.weight"', "complete base model"),
        ({}, "it holds no tensors", "complete base model"),
    ],
)
def test_everything_else_is_named(shapes, what, advice):
    identity = identify_file(shapes)
    assert identity.architecture is None
    assert what in identity.what
    assert advice in identity.advice


def write_folder(folder, **configs):
    for place, content in configs.items():
        file = folder / ("model_index.json" if place == "model_index" else f"{place}/config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


ENCODER = {"model_type": "clip_text_model", "hidden_size": 768}
XL_UNET = {"in_channels": 4, "addition_embed_type": "text_time"}


@pytest.mark.parametrize(
    ("unet", "encoder", "architecture"),
    [
        ({"in_channels": 4}, ENCODER, SD1),
        ({"in_channels": 4, "use_linear_projection": True}, ENCODER, SD1),
        ({"in_channels": 4, "use_linear_projection": True}, ENCODER | {"hidden_size": 1024}, SD2),
        ({"in_channels": 4, "use_linear_projection": True}, ENCODER | {"hidden_size": 64}, SD2),
        ({"in_channels": 4}, ENCODER | {"hidden_size": 32}, SD1),
        (XL_UNET, ENCODER, SDXL),
    ],
)
def test_supported_folders(tmp_path, unet, encoder, architecture):
    folder = write_folder(tmp_path, model_index={"_class_name": "X"}, unet=unet, text_encoder=encoder)
    identity = identify_folder(folder)
    assert identity.architecture is architecture
    assert not identity.inpainting
    write_folder(folder, unet=unet | {"in_channels": 9})
    assert identify_folder(folder).inpainting
    assert identify_folder(folder).what == f"a {architecture.title} inpainting model"


@pytest.mark.parametrize(
    ("configs", "what", "advice"),
    [
        ({"model_index": {"_class_name": "FluxPipeline"}}, "FLUX", "use LoRA or fine-tuning"),
        ({"model_index": {"_class_name": "StableDiffusion3Pipeline"}}, "Stable Diffusion 3", "use LoRA"),
        ({"model_index": {"_class_name": "Lumina2Pipeline"}}, "Lumina", "use LoRA or fine-tuning"),
        ({"model_index": {"_class_name": "SanaPipeline"}}, "another family (SanaPipeline)", "use LoRA"),
        ({"unet": {"class_embed_type": "projection"}, "text_encoder": ENCODER}, "unCLIP", "complete base model"),
        ({"unet": XL_UNET, "text_encoder_2": ENCODER}, "refiner", "complete base model"),
        ({"unet": {"in_channels": 4}}, "incomplete: it has no text_encoder", "complete base model"),
        ({"unet": {}, "text_encoder": {"model_type": "roberta"}}, "roberta text encoder", "complete base model"),
        ({}, "not a diffusers model folder", "model_index.json"),
    ],
)
def test_other_folders_are_named(tmp_path, configs, what, advice):
    identity = identify_folder(write_folder(tmp_path, **configs))
    assert identity.architecture is None
    assert what in identity.what
    assert advice in identity.advice


def test_a_folder_of_checkpoints_names_one(tmp_path):
    (tmp_path / "b.safetensors").touch()
    (tmp_path / "a.ckpt").touch()
    identity = identify_folder(tmp_path)
    assert "folder of checkpoint files" in identity.what
    assert str(tmp_path / "a.ckpt") in identity.advice


@pytest.mark.parametrize("content", ["{broken", "[1, 2]"])
def test_a_broken_configuration_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=r"model_index\.json"):
        identify_folder(tmp_path)


NONSENSE = [{}, [], None, "x", True, -1, 0, 1e300, float("nan"), 10**12, [[[]]], {"a": {}}, [10**9] * 1000, "\ud800"]


@pytest.mark.parametrize("component", ["unet", "text_encoder", "model_index"])
@pytest.mark.parametrize("key", ["in_channels", "_class_name", "model_type", "hidden_size", "addition_embed_type"])
def test_nonsense_in_a_folder_is_named(tmp_path, component, key):
    """Whatever a value is, the folder is named, or the file that is broken is."""
    for nonsense in NONSENSE:
        configs = {"unet": {"in_channels": 4}, "text_encoder": dict(ENCODER), "model_index": {"_class_name": "X"}}
        if component == "model_index":
            del configs["unet"]
        configs[component][key] = nonsense
        folder = write_folder(tmp_path, **configs)
        try:
            assert len(identify_folder(folder).what) < 200
        except UserError as error:
            assert ".json has" in str(error) or "not valid Unicode" in str(error)  # noqa: PT017
        (tmp_path / "unet" / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"layers_per_block": [2, 10**9]},
        {"max_position_embeddings": 10**12},
        {"block_out_channels": [32] * 3000},
        {"layer_norm_eps": float("nan")},
    ],
)
def test_sizes_of_which_no_model_is_made(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json has {next(iter(config))}: .* no model can be made"):
        read_config(tmp_path / "config.json")
