"""Opening, naming and loading base models from files, folders and the hub's cache."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_data import golden_cases
from held_memory import HeldMemory
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    build_pipeline,
    build_unet,
    ldm_vae,
    save_folder,
    save_single_file,
    single_file_tensors,
)

from library.model import base_model, frozen_layers
from library.model.base_model import BaseModel
from library.model.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from library.model.frozen_layers import FrozenLayer, quantize
from library.support import stored_tensors
from library.support.errors import UserError

COMPONENTS = {"sd1": ["text_encoder"], "sd2": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
FAMILY = {"sd1": STABLE_DIFFUSION, "sd2": STABLE_DIFFUSION, "sdxl": STABLE_DIFFUSION_XL}


def options(path, family: str = "sd1", **changes) -> SimpleNamespace:
    """The model options of a correct command for a model of this family."""
    v2 = family == "sd2"
    values = {
        "pretrained_model_name_or_path": str(path),
        "v2": v2,
        "v_parameterization": v2,
        "vae": None,
        "tokenizer_cache_dir": None,
        "disable_mmap_load_safetensors": False,
    }
    return SimpleNamespace(**{**values, **changes})


def open_model(path, family: str = "sd1", **changes) -> BaseModel:
    return BaseModel.open(options(path, family, **changes), FAMILY[family])


@pytest.fixture(scope="module")
def pipelines():
    """The models that the folders below and the files of conftest.py hold."""
    return {family: build_pipeline(family) for family in FAMILIES}


@pytest.fixture
def tiny_sd1(folder_of_file) -> Path:
    """The model of ``tiny_sd1_file`` as a diffusers folder, and so the others."""
    return folder_of_file("sd1")


@pytest.fixture
def tiny_sd2(folder_of_file) -> Path:
    return folder_of_file("sd2")


@pytest.fixture
def tiny_sdxl(folder_of_file) -> Path:
    return folder_of_file("sdxl")


def folder_of(family, request) -> Path:
    return request.getfixturevalue(f"tiny_{family}")


def file_of(family, request) -> Path:
    return request.getfixturevalue(f"tiny_{family}_file")


def assert_same_weights(got, wanted):
    got, wanted = got.state_dict(), wanted.state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def assert_loads(model: BaseModel, pipeline, family: str):
    """Every weight of every component is the pipeline's, and nothing can train."""
    encoders = dict(zip(COMPONENTS[family], model.text_encoders(torch.float32), strict=True))
    parts = {"unet": model.unet(torch.float32), "vae": model.vae(torch.float32), **encoders}
    for name, part in parts.items():
        assert_same_weights(part, getattr(pipeline, name))
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_holds_the_model(family, request, pipelines):
    assert_loads(open_model(folder_of(family, request), family), pipelines[family], family)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_holds_the_model(family, request, pipelines):
    assert_loads(open_model(file_of(family, request), family), pipelines[family], family)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_reading_without_mapping_gives_the_same(source, request, pipelines):
    path = (folder_of if source == "folder" else file_of)("sdxl", request)
    assert_loads(open_model(path, "sdxl", disable_mmap_load_safetensors=True), pipelines["sdxl"], "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_and_folder_compute_the_same(family, request):
    """Attention heads, activations and norms are no tensors: only the outputs tell that they are right."""
    by_file, by_folder = open_model(file_of(family, request), family), open_model(folder_of(family, request), family)
    ids = torch.tensor([[[49406, 320, 1125, *[49407] * 74]]])
    torch.manual_seed(1)
    noisy, time, sizes = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([[64, 64, 0, 0, 64, 64]])
    images = torch.randn(1, 3, 32, 32)
    outputs = []
    with torch.no_grad():
        for model in (by_file, by_folder):
            encoders = model.text_encoders(torch.float32)
            conditioning = FAMILY[family].encode_prompts(encoders, [ids] * len(encoders))
            noise = FAMILY[family].predict_noise(model.unet(torch.float32), noisy, time, conditioning, sizes)
            latents = model.vae(torch.float32).encode(images).latent_dist.mean
            outputs.append((conditioning.context, noise, latents))
    for file_output, folder_output in zip(*outputs, strict=True):
        # Not equal: where a tensor lies in memory decides on some processors in which order sums are made.
        torch.testing.assert_close(file_output, folder_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_single_file_without_the_text_model_prefix(family, tmp_path, pipelines):
    file = save_single_file(family, tmp_path / "model.safetensors", prefix=False)
    assert_loads(open_model(file, family), pipelines[family], family)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("prefix", [True, False])
def test_folder_with_and_without_the_text_model_prefix(family, prefix, tmp_path, pipelines):
    folder = save_folder(family, tmp_path / "model")
    for component in COMPONENTS[family]:
        file = folder / component / "model.safetensors"
        names = {n: n.removeprefix("text_model.") for n in load_file(file)}
        prefixed = {
            n: bare if not prefix or "projection" in bare[:16] else f"text_model.{bare}" for n, bare in names.items()
        }
        tensors = {prefixed[n]: t for n, t in load_file(file).items()}
        old = {"text_model.embeddings.position_ids": torch.arange(77)[None]} if prefix else {}
        save_file(tensors | old, file)
    assert_loads(open_model(folder, family), pipelines[family], family)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "global_step": 3}])
def test_ckpt_file(wrap, tmp_path, pipelines):
    torch.save(wrap(single_file_tensors(pipelines["sd1"], "sd1")), tmp_path / "model.ckpt")
    assert_loads(open_model(tmp_path / "model.ckpt"), pipelines["sd1"], "sd1")


def test_links_are_followed(tmp_path, tiny_sd1_file, tiny_sd1, pipelines):
    (tmp_path / "model.safetensors").symlink_to(tiny_sd1_file)
    (tmp_path / "folder").symlink_to(tiny_sd1)
    assert open_model(tmp_path / "model.safetensors").name == "model.safetensors"
    assert open_model(tmp_path / "folder").name == "folder"
    assert_loads(open_model(tmp_path / "model.safetensors"), pipelines["sd1"], "sd1")


def test_folder_of_fp16_variants(tmp_path, pipelines):
    for part in ("unet", "vae", "text_encoder"):
        weights = {n: t.half() for n, t in getattr(pipelines["sd1"], part).state_dict().items()}
        getattr(pipelines["sd1"], part).save_config(tmp_path / part) if part != "text_encoder" else None
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (tmp_path / part).mkdir(exist_ok=True)
        save_file(weights, tmp_path / part / f"{stem}.fp16.safetensors")
    pipelines["sd1"].text_encoder.config.save_pretrained(tmp_path / "text_encoder")
    unet = open_model(tmp_path).unet(torch.float16)
    assert torch.equal(unet.conv_in.weight, pipelines["sd1"].unet.conv_in.weight.half())
    assert open_model(tmp_path).text_encoders(torch.bfloat16)[0].dtype == torch.bfloat16


def test_folder_of_shards_and_of_bin_files(tmp_path, pipelines):
    pipelines["sd1"].unet.save_pretrained(tmp_path / "unet", max_shard_size="2MB")
    pipelines["sd1"].vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    pipelines["sd1"].text_encoder.save_pretrained(tmp_path / "text_encoder")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert_loads(open_model(tmp_path), pipelines["sd1"], "sd1")


@pytest.mark.parametrize("source", ["folder", "file"])
def test_weights_are_cast(source, request):
    model = open_model((folder_of if source == "folder" else file_of)("sdxl", request), "sdxl")
    for part in (model.unet(torch.bfloat16), model.vae(torch.bfloat16), *model.text_encoders(torch.bfloat16)):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert {p.device.type for p in part.parameters()} | {b.device.type for b in part.buffers()} == {"cpu"}


# --- memory -------------------------------------------------------------------------------------------------------


def saved_in(form: str, folder: Path, dtype: torch.dtype) -> Path:
    """A tiny SDXL model in one of the forms that models have on disk."""
    pipeline = build_pipeline("sdxl").to(dtype)
    if form == "folder":
        pipeline.save_pretrained(folder)
        return folder
    tensors = single_file_tensors(pipeline, "sdxl")
    if form == "safetensors":
        save_file(tensors, file := folder / "model.safetensors")
    else:
        file = folder / "model.ckpt"
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=form == "ckpt")
    return file


@pytest.mark.parametrize(
    ("form", "mmap"),
    [("folder", True), ("safetensors", True), ("safetensors", False), ("ckpt", True), ("old ckpt", True)],
)
def test_no_part_is_ever_held_twice(form, mmap, tmp_path):
    """Casting takes no more than what is loaded and a few tensors; 8-bit weights never need the whole ones."""
    model = open_model(saved_in(form, tmp_path, torch.float16), "sdxl", disable_mmap_load_safetensors=not mmap)
    other = tmp_path / "other_vae"
    vae = build_pipeline("sdxl").vae.half()
    if form == "folder":
        vae.save_pretrained(other)
    else:
        torch.save({"state_dict": {name: tensor.contiguous() for name, tensor in ldm_vae(vae).items()}}, other)
    loads = {
        "unet": lambda: model.unet(torch.bfloat16),
        "float8 unet": lambda: model.unet(torch.bfloat16, float8=True),
        "text encoders": lambda: model.text_encoders(torch.bfloat16),
        "vae": lambda: model.vae(torch.float32),
        "--vae": lambda: open_model(model.source.path, "sdxl", vae=str(other)).vae(torch.float32),
    }
    for name, load in loads.items():
        with HeldMemory() as memory:
            loaded = load()
        parts = loaded if isinstance(loaded, list) else [loaded]
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        largest = 4 * max(tensor.numel() for tensor in tensors)
        assert memory.most <= sum(tensor.nbytes for tensor in tensors) + 4 * largest, name


LOAD = """
import sys, torch
from library.model.base_model import BaseModel
from library.options.options import ModelOptions

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

model = BaseModel.open(ModelOptions(pretrained_model_name_or_path=sys.argv[1]), None)
before = held()
unet = model.unet(torch.bfloat16, float8=True)
after = held()
print(after - before, sum(t.nbytes for tensors in (unet.parameters(), unet.buffers()) for t in tensors))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_a_loaded_float8_unet_takes_its_weights_and_little_more(tiny_sdxl, tmp_path):
    """Making the empty model once left a heap of free memory, in which the weights were strewn and which stayed."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    # Layers as large as those of real models, which the C library treats otherwise than small ones.
    with torch.device("meta"):
        unet = build_unet("sdxl", block_out_channels=(32, 64, 640))
    unet = unet.half().to_empty(device="cpu")
    for weight in unet.parameters():
        torch.nn.init.constant_(weight, 0.02)
    unet.save_pretrained(folder / "unet")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 5 * 10**7
    assert grown < 1.15 * weights + 10**7


def test_weights_are_quantized_on_the_device_one_layer_at_a_time(tiny_sdxl, monkeypatch):
    """Quantized before they are sent, every weight would wait for the CPU; all at once, they would fill the device."""
    seen = []

    def quantizing(weight):
        seen.append((weight.device.type, weight.dtype))
        return quantize(weight)

    monkeypatch.setattr(frozen_layers, "quantize", quantizing)
    monkeypatch.setattr(base_model, "give_back", lambda: None)
    unet = open_model(tiny_sdxl, "sdxl").unet(torch.bfloat16, "meta", float8=True)
    layers = [layer for layer in unet.modules() if isinstance(layer, FrozenLayer)]
    assert seen == [("meta", torch.bfloat16)] * len(layers)


def test_float8_weights_are_those_of_the_cast_ones(tiny_sdxl, pipelines):
    quantized = open_model(tiny_sdxl, "sdxl").unet(torch.bfloat16, float8=True)
    whole = pipelines["sdxl"].unet
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, FrozenLayer)}
    assert len(layers) == sum(isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) for layer in whole.modules())
    for name, layer in layers.items():
        weight, scale = quantize(whole.get_submodule(name).weight.to(torch.bfloat16))
        assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(layer.scale, scale)
    for name, norm in quantized.named_modules():
        if isinstance(norm, torch.nn.GroupNorm | torch.nn.LayerNorm):
            assert torch.equal(norm.weight, whole.get_submodule(name).weight.to(torch.bfloat16))


def test_name_hash_and_scale(tiny_sd1, tiny_sd1_file, tiny_sdxl_file):
    model = open_model(tiny_sd1_file)
    assert model.name == "tiny_sd1.safetensors"
    assert model.hash() == hashlib.sha256(tiny_sd1_file.read_bytes()).hexdigest()
    assert model.vae_scale_factor == 0.18215
    assert open_model(tiny_sd1).hash() is None
    xl = open_model(tiny_sdxl_file, "sdxl")
    assert xl.vae_scale_factor == 0.13025


@pytest.mark.parametrize("path", [".", "vae/..", "../{}"])
def test_a_folder_has_its_name_however_it_is_called(path, tiny_sd1, monkeypatch):
    """It goes into the metadata of the embedding, by which --weights knows the base again."""
    monkeypatch.chdir(tiny_sd1)
    assert open_model(path.format(tiny_sd1.name)).name == tiny_sd1.name


def test_opening_reads_no_tensor(tiny_sdxl_file, monkeypatch):
    for module, reading in ((stored_tensors, "read_place"), (torch, "frombuffer")):
        monkeypatch.setattr(module, reading, lambda *_, **__: pytest.fail("a tensor was read"))
    open_model(tiny_sdxl_file, "sdxl").check_parts()


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "removed", ["input_blocks.5.1", "first_stage_model.decoder.mid", "final_layer_norm", "conv_in"]
)
def test_a_missing_tensor_is_an_error(removed, tmp_path, tiny_sd1_file):
    tensors = load_file(tiny_sd1_file)
    name = next(n for n in tensors if removed in n)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="incomplete"):
        _ = (model.unet(torch.float32), model.vae(torch.float32), model.text_encoders(torch.float32))


@pytest.mark.parametrize(
    "component", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"]
)
@pytest.mark.parametrize("change", ["missing", "unknown", "of another shape"])
def test_a_folder_with_one_wrong_tensor_is_an_error(component, change, tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    file = folder / f"{component}.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(("conv1.bias", "fc1.bias")))
    if change == "unknown":
        tensors[f"{name}.extra"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(7)
        if change == "missing":
            del tensors[name]
    save_file(tensors, file)
    model = open_model(folder)
    with pytest.raises(UserError, match=change):
        _ = (model.unet(torch.float32), model.vae(torch.float32), model.text_encoders(torch.float32))


def test_an_sdxl_model_without_a_label_embedding_is_an_error(tmp_path, tiny_sdxl_file):
    tensors = {n: t for n, t in load_file(tiny_sdxl_file).items() if "label_emb.0.2" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"incomplete: the tensor 'label_emb\.0\.2\.weight' is missing"):
        open_model(tmp_path / "model.safetensors", "sdxl").unet(torch.float32)


@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize(
    ("given", "script", "said"),
    [
        ("sdxl", "sd1", "Use sdxl_train_textual_inversion.py"),
        ("sd1", "sdxl", "Use train_textual_inversion.py"),
        ("sd2", "sdxl", "Use train_textual_inversion.py"),
    ],
)
def test_a_model_of_the_other_script_names_that_script(source, given, script, said, request):
    path = (folder_of if source == "folder" else file_of)(given, request)
    with pytest.raises(UserError, match=said) as raised:
        open_model(path, script)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("given", "v2", "said"), [("sd2", False, "add --v2"), ("sd1", True, "leave --v2 out")])
def test_v2_must_fit_a_file(given, v2, said, request):
    with pytest.raises(UserError, match=said):
        open_model(file_of(given, request), given, v2=v2, v_parameterization=v2)


@pytest.mark.parametrize(("given", "v2", "said"), [("sd2", False, "add --v2"), ("sd1", True, "leave --v2 out")])
def test_v2_that_does_not_fit_a_folder_is_a_warning(given, v2, said, request, caplog):
    model = open_model(folder_of(given, request), given, v2=v2)
    assert said in caplog.text
    assert model.tokenizers()[0].pad_token_id == (0 if given == "sd2" else 49407)


@pytest.mark.parametrize("path", ["/nowhere/model.safetensors", "folder/model.ckpt", "model", "./a/b", "a/b/c"])
def test_a_path_that_does_not_exist(path):
    with pytest.raises(UserError, match="does not exist"):
        open_model(path)


def test_no_model_given():
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is missing"):
        BaseModel.open(options("", pretrained_model_name_or_path=None), STABLE_DIFFUSION)


def test_a_hub_name_without_a_copy_is_a_sentence():
    with pytest.raises(UserError, match="could not be fetched from the Hugging Face hub: HF_HUB_OFFLINE is set"):
        open_model("someone/nothing")


def test_other_kinds_of_files_are_named(tmp_path, tiny_sd1_file):
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "mychar.safetensors")
    with pytest.raises(UserError, match=r"mychar\.safetensors is an embedding\. .*--weights"):
        open_model(tmp_path / "mychar.safetensors")
    save_file({"double_blocks.0.img_attn.proj.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"is a FLUX model\. .*use LoRA or fine-tuning instead"):
        open_model(tmp_path / "flux.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tiny_sd1_file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cut off"):
        open_model(tmp_path / "cut.safetensors")


# --- the VAE ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_vae():
    return build_pipeline("sdxl", seed=5).vae


def vae_places(folder: Path, vae) -> dict:
    """Every way to give a VAE: folder, folder above it, and files of both layouts."""
    vae.save_pretrained(folder / "root")
    vae.save_pretrained(folder / "model" / "vae")
    plain, original = vae.state_dict(), ldm_vae(vae)
    save_file(plain, folder / "diffusers.safetensors")
    torch.save(plain, folder / "diffusers.bin")
    save_file(original, folder / "original.safetensors")
    save_file({f"first_stage_model.{n}": t for n, t in original.items()}, folder / "prefixed.safetensors")
    torch.save({"state_dict": original}, folder / "original.ckpt")
    return ["root", "model", *(file.name for file in folder.iterdir() if file.is_file())]


def test_other_vaes(tmp_path, other_vae, tiny_sd1_file):
    places = vae_places(tmp_path, other_vae)
    assert len(places) == 7
    for place in places:
        vae = open_model(tiny_sd1_file, vae=str(tmp_path / place)).vae(torch.float32)
        assert_same_weights(vae, other_vae)
        assert vae.config.scaling_factor == 0.18215  # the base model's, whatever the VAE says
        assert not any(p.requires_grad for p in vae.parameters())


def test_a_folder_keeps_its_own_scale_factor(tmp_path, tiny_sd1, other_vae):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    other_vae.save_pretrained(tmp_path / "vae")
    model = open_model(folder, vae=str(tmp_path / "vae"))
    assert model.vae_scale_factor == 0.5
    assert model.vae(torch.float32).config.scaling_factor == 0.5


def test_vae_mistakes(tmp_path, tiny_sd1_file, tiny_sd1):
    with pytest.raises(UserError, match=r"--vae .*nothing\.safetensors does not exist"):
        open_model(tiny_sd1_file, vae="/nowhere/nothing.safetensors").vae(torch.float32)
    with pytest.raises(UserError, match="holds no VAE"):
        open_model(tiny_sd1_file, vae=str(tmp_path)).vae(torch.float32)
    with pytest.raises(UserError, match="not a VAE"):
        open_model(tiny_sd1_file, vae=str(tiny_sd1 / "text_encoder")).vae(torch.float32)
    shapes = {"decoder.conv_in.weight": (32, 16, 3, 3), "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3)}
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "flux_vae.safetensors")
    with pytest.raises(UserError, match="latents of 16 channels"):
        open_model(tiny_sd1_file, vae=str(tmp_path / "flux_vae.safetensors")).vae(torch.float32)


@pytest.mark.parametrize(
    ("harm", "phrase"),
    [
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet holds no weights"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 8 + b"{"), "cut"),
        (lambda folder: (folder / "text_encoder_2" / "config.json").unlink(), "text_encoder_2/config.json is missing"),
        (lambda folder: shutil.rmtree(folder / "vae"), "Give one with --vae"),
    ],
)
def test_a_missing_part_is_found_before_anything_is_loaded(harm, phrase, tmp_path, tiny_sdxl):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    open_model(folder, "sdxl").check_parts()
    harm(folder)
    with pytest.raises(UserError, match=phrase):
        open_model(folder, "sdxl").check_parts()


def test_another_vae_is_looked_for_before_anything_is_loaded(tmp_path, tiny_sd1, tiny_sd1_file):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    open_model(folder, vae=str(tiny_sd1_file)).check_parts()
    with pytest.raises(UserError, match=r"--vae .*nothing\.safetensors does not exist"):
        open_model(folder, vae="/nowhere/nothing.safetensors").check_parts()


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_a_configuration_that_makes_no_model_is_named(component, tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    values = {
        "unet": {"down_block_types": ["X"]},
        "text_encoder": {"hidden_size": "wide"},
        "vae": {"layers_per_block": ""},
    }
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values[component]))
    model = open_model(folder)
    load = model.text_encoders if component == "text_encoder" else getattr(model, component)
    with pytest.raises(UserError, match=r"no model can be made from its config\.json"):
        load(torch.float32)


def test_a_checkpoint_without_vae_needs_one(tmp_path, tiny_sd1_file, other_vae, pipelines):
    tensors = {n: t for n, t in load_file(tiny_sd1_file).items() if "first_stage_model" not in n}
    save_file(tensors, tmp_path / "pruned.safetensors")
    with pytest.raises(UserError, match="Give one with --vae"):
        open_model(tmp_path / "pruned.safetensors").vae(torch.float32)
    vae = open_model(tmp_path / "pruned.safetensors", vae=str(tiny_sd1_file)).vae(torch.float32)
    assert_same_weights(vae, pipelines["sd1"].vae)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers(source, family, request):
    tokenizers = open_model((folder_of if source == "folder" else file_of)(family, request), family).tokenizers()
    pads = {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[family]
    assert [t.pad_token_id for t in tokenizers] == pads
    for tokenizer in tokenizers:
        assert len(tokenizer) == 49408
        assert tokenizer.model_max_length == 77
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)


def no_added_token(case: dict) -> bool:
    return not any(token in case["caption"].lower() for token in case["added_tokens"])


@pytest.fixture(scope="module")
def bundled_tokenizers(tiny_sd1_file, tiny_sd2_file, tiny_sdxl_file):
    files = {"sd1": tiny_sd1_file, "sd2": tiny_sd2_file, "sdxl": tiny_sdxl_file}
    return {family: open_model(file, family).tokenizers() for family, file in files.items()}


@pytest.mark.parametrize("case", golden_cases("tokenize", no_added_token))
def test_golden_bundled_vocabulary(case, bundled_tokenizers):
    """Body ids of captions without new tokens, from one window or joined from several."""
    for tokenizer, windows in zip(bundled_tokenizers[case["model"]], case["input_ids"], strict=True):
        wanted = [i for window in windows[0] for i in window[1:76]]
        body = tokenizer.encode(case["caption"], add_special_tokens=False)[: len(wanted)]
        assert wanted[: len(body)] == body
        assert set(wanted[len(body) :]) <= {tokenizer.eos_token_id, tokenizer.pad_token_id}


def with_padding_made_special(folder: Path) -> None:
    """Give a tokenizer the configuration of SDXL's second one: what fills up is a special token of its own."""
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {name: {"content": text, **token} for name, text in names.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}))
    added = {"0": {"content": "!", **token, "special": True}}
    told = {"tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": added, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": "!"} | told))


@pytest.mark.parametrize("source", ["folder", "with added tokens", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exclamation_mark_is_a_word_although_it_pads(source, family, request, tmp_path):
    """As open_clip, which the models were trained with, reads it; as a special token it would be id 0."""
    model = (file_of if source == "file" else folder_of)(family, request)
    if source == "with added tokens":
        model = shutil.copytree(model, tmp_path / "model")
        if family != "sd1":
            with_padding_made_special(model / ("tokenizer_2" if family == "sdxl" else "tokenizer"))
    opened = open_model(model, family).tokenizers()
    assert [t.pad_token_id for t in opened] == {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}[family]
    for tokenizer in opened:
        assert tokenizer.encode("wow! dog!!", add_special_tokens=False) == [2781, 256, 1929, 748]


def test_tokenizer_cache_dir_is_preferred(tmp_path, tiny_sdxl, tiny_sdxl_file, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = open_model(tiny_sdxl_file, "sdxl").tokenizers()[0]
    tokenizer.pad_token = "a"  # a mark to know it by
    tokenizer.save_pretrained(tmp_path / "openai_clip-vit-large-patch14")
    for source in (tiny_sdxl, tiny_sdxl_file):
        first, second = open_model(source, "sdxl", tokenizer_cache_dir=str(tmp_path)).tokenizers()
        assert first.pad_token == "a"
        assert second.pad_token_id == 0
    assert "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k" in caplog.text


def test_tokenizer_folders_of_older_releases(tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    bundled = Path(__file__).parents[2] / "configs" / "tokenizer"
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bundled / name, folder / "tokenizer")
    special = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"eos_token": special, "unk_token": special, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    (tokenizer,) = open_model(folder).tokenizers()
    assert tokenizer.encode("A Photo") == [49406, 320, 1125, 49407]
    assert tokenizer.model_max_length == 77


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path, tiny_sd1_file):
    tokenizer = open_model(tiny_sd1_file).tokenizers()[0]
    tokenizer.add_tokens(["mychar"])
    tokenizer.save_pretrained(tmp_path / "openai_clip-vit-large-patch14")
    with pytest.raises(
        UserError, match=r"knows 49409 tokens, but the text_encoder of tiny_sd1\.safetensors only 49408"
    ):
        open_model(tiny_sd1_file, tokenizer_cache_dir=str(tmp_path)).tokenizers()


def test_a_broken_tokenizer_is_named(tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer that cannot be read"):
        open_model(folder).tokenizers()


# --- the hub ------------------------------------------------------------------------------------------------------


def test_hub_models_come_from_the_cache(tmp_path, other_vae, tiny_sd1, pipelines, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = "a" * 40
    for name in ("tiny", "vae"):
        (tmp_path / f"models--someone--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--someone--{name}" / "refs" / "main").write_text(revision)
    shutil.copytree(tiny_sd1, tmp_path / "models--someone--tiny" / "snapshots" / revision)
    other_vae.save_pretrained(tmp_path / "models--someone--vae" / "snapshots" / revision)
    model = open_model("someone/tiny")
    assert model.name == "someone/tiny"
    assert_loads(model, pipelines["sd1"], "sd1")
    assert_same_weights(open_model("someone/tiny", vae="someone/vae").vae(torch.float32), other_vae)
    assert_same_weights(open_model("someone/tiny", vae="someone/tiny").vae(torch.float32), pipelines["sd1"].vae)
    with pytest.raises(UserError, match="someone/nothing is no file or folder here"):
        open_model("someone/tiny", vae="someone/nothing").vae(torch.float32)


def nonsense_folder(original: Path, folder: Path, file: str, content: str) -> Path:
    """A copy of a model folder in which one file holds something else; weights are linked."""
    shutil.copytree(original, folder, copy_function=os.link)
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(content)
    return folder


@pytest.mark.parametrize("value", [{}, [], "x", True, -1, 0, None, 1.5, 10**9, [[]]])
@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "in_channels"),
        ("unet", "block_out_channels"),
        ("unet", "down_block_types"),
        ("text_encoder", "vocab_size"),
        ("text_encoder", "hidden_size"),
        ("text_encoder", "num_hidden_layers"),
        ("vae", "latent_channels"),
        ("vae", "scaling_factor"),
        ("vae", "block_out_channels"),
        ("scheduler", "prediction_type"),
    ],
)
def test_nonsense_in_a_folder_is_a_sentence(tiny_sd1, tmp_path, component, key, value):
    name = f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"
    config = json.loads((tiny_sd1 / name).read_text()) | {key: value}
    folder = nonsense_folder(tiny_sd1, tmp_path / "model", name, json.dumps(config))
    try:
        model = open_model(folder)
        model.check_parts()
        model.tokenizers()
        model.text_encoders(torch.float32)
        model.unet(torch.float32)
        model.vae(torch.float32)
    except UserError as error:
        assert "model" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "1", "[" * 100_000, '{"model": {}}', '{"bos_token": {}}', '{"added_tokens": [[]]}']
)
def test_nonsense_for_a_tokenizer_is_a_sentence(tiny_sd1, tmp_path, name, content):
    folder = nonsense_folder(tiny_sd1, tmp_path / "model", f"tokenizer/{name}", content)
    try:
        (tokenizer,) = open_model(folder).tokenizers()
    except UserError as error:
        assert "tokenizer" in str(error)  # noqa: PT017
    else:
        ids = tokenizer("a photo").input_ids
        assert (ids[0], ids[-1]) == (49406, 49407)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "../x.safetensors"}},
    ],
)
def test_a_damaged_index_of_shards_is_a_sentence(tiny_sd1, tmp_path, index):
    name = "unet/diffusion_pytorch_model.safetensors"
    folder = nonsense_folder(tiny_sd1, tmp_path / "model", f"{name}.index.json", json.dumps(index))
    (folder / name).unlink()
    with pytest.raises(UserError, match=r'index\.json is damaged: its "weight_map" does not name files of this folder'):
        open_model(folder).check_parts()
