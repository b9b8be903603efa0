"""A base model that was distilled for few steps is told by its name, metadata or configuration, and by nothing else."""

import json
import re
import shutil

import pytest
import torch
from option_effects import plan
from runs import arguments, write_dataset
from safetensors.torch import load_file, save_file
from test_base_model import open_model

from library.model.distillation import distillation_warning

NAMES = {
    "sd_xl_turbo_1.0_fp16.safetensors": "Turbo",
    "stabilityai/sdxl-turbo": "Turbo",
    "dreamshaperXL_v21TurboDPMSDE.safetensors": "Turbo",
    "sdxl_lightning_4step.safetensors": "Lightning",
    "ByteDance/SDXL-Lightning": "Lightning",
    "juggernautXL_juggXILightningByRD.safetensors": "Lightning",
    "SimianLuo/LCM_Dreamshaper_v7": "LCM",
    "lcm-sdxl": "LCM",
    "DreamShaper_8_LCM.ckpt": "LCM",
    "Hyper-SDXL-8steps.safetensors": "Hyper",
    "realisticVisionV60B1_v51HyperVAE.safetensors": "Hyper",
    "model_hyper_8step": "Hyper",
    "epicrealism_hyper": "Hyper",
    "dmd2_sdxl_4step": "DMD2",
    "hyperrealism_v3.safetensors": None,
    "hyperRealism_xl": None,
    "lightning-ai/photo": None,
    "lightningbolts_style": None,
    "turbochargedCars": None,
    "noobaiXLNAIXL_vPred10Version.safetensors": None,
    "ponyDiffusionV6XL_v6StartWithThisOne.safetensors": None,
    "v1-5-pruned-emaonly.safetensors": None,
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_names(name, kind, tiny_sd1_file):
    warning = distillation_warning(open_model(tiny_sd1_file).source, name)
    assert (warning is None) == (kind is None)
    if kind:
        assert re.match(rf"{re.escape(name)} seems to be an? {kind} model", warning)
        assert "its name says so" in warning


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"modelspec.title": "Photo Lightning"}, "Lightning model"),
        ({"modelspec.merged_from": "photo, lcm-lora-sdv1-5"}, "LCM model"),
        ({"sd_merge_recipe": '{"primary_model": "photo", "secondary_model": "sd-turbo"}'}, "Turbo model"),
        ({"modelspec.description": "no Turbo model"}, None),
    ],
)
def test_metadata_of_a_file(metadata, said, tmp_path, tiny_sd1_file):
    save_file(load_file(tiny_sd1_file), tmp_path / "photo.safetensors", metadata)
    warning = distillation_warning(open_model(tmp_path / "photo.safetensors").source, "photo.safetensors")
    assert (said or "None") in str(warning)


def test_a_tensor_of_lcm_models(tmp_path, tiny_sd1_file):
    extra = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(8, 8)}
    save_file(load_file(tiny_sd1_file) | extra, tmp_path / "photo.safetensors")
    assert "LCM" in distillation_warning(open_model(tmp_path / "photo.safetensors").source, "photo.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "unet/config.json",
            {"time_cond_proj_dim": 256},
            "an LCM model, distilled to draw in a few steps: its U-Net's",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "its scheduler says so"),
        ("model_index.json", {"_name_or_path": "/models/sdxl-turbo"}, "_name_or_path in its configuration says so"),
        (
            "model_index.json",
            {"_name_or_path": r"C:\models\sdxl-turbo"},
            "_name_or_path in its configuration says so",
        ),
        ("model_index.json", {"_name_or_path": r"D:\Turbo and Lightning\photo"}, None),
        ("model_index.json", {"_name_or_path": 5}, None),
        ("unet/config.json", {}, None),
    ],
)
def test_folders(file, change, said, tmp_path, tiny_sd1):
    folder = shutil.copytree(tiny_sd1, tmp_path / "photo")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    warning = distillation_warning(open_model(folder).source, "photo")
    assert (said or "None") in str(warning)


def test_a_run_says_it_once(tmp_path, tiny_sd1_file):
    model = shutil.copy(tiny_sd1_file, tmp_path / "photo_lightning.safetensors")
    argv = arguments("sd1", model, write_dataset(tmp_path, count=1), tmp_path / "out")
    sentence = "photo_lightning.safetensors seems to be a Lightning model"
    assert plan("sd1", argv).said.count(sentence) == 1
