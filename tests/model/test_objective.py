"""A model says what it was trained for: unset options follow it, given ones insist, contradictions are one warning."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_base_model import file_of, folder_of, open_model

from library.model.objective import Objective, followed, objective_of
from library.model.single_file import SingleFile
from library.options.options import Options
from library.support.errors import UserError

V = Objective("v_prediction", zero_terminal_snr=True)
NOISE = Objective("epsilon")
SILENT = Objective(None)
TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def given(v=None, zero=None, **loss) -> Options:
    options = Options()
    return replace(
        options,
        model=replace(options.model, v_parameterization=v),
        noise=replace(options.noise, zero_terminal_snr=zero),
        loss=replace(options.loss, **loss),
    )


@pytest.mark.parametrize(
    ("said", "v", "zero", "wanted", "sentence"),
    [
        (SILENT, None, None, (False, False), ""),
        (SILENT, True, True, (True, True), ""),
        (NOISE, None, None, (False, False), ""),
        (NOISE, False, None, (False, False), ""),
        (NOISE, True, None, (True, False), "unless you leave --v_parameterization out"),
        (
            V,
            None,
            None,
            (True, True),
            "it is: --v_parameterization --zero_terminal_snr. With",
        ),
        (V, True, None, (True, True), "it is: --zero_terminal_snr. With --zero_terminal_snr=false"),
        (V, True, True, (True, True), ""),
        (V, False, None, (False, False), "with zero terminal SNR, but the options say otherwise"),
        (V, True, False, (True, False), "unless you add --v_parameterization --zero_terminal_snr"),
        (V, False, False, (False, False), "unless you add --v_parameterization --zero_terminal_snr"),
        (Objective("v_prediction"), None, None, (True, False), "it is: --v_parameterization."),
        (Objective("v_prediction"), None, True, (True, True), "it is: --v_parameterization."),
        (Objective("v_prediction"), False, None, (False, False), "unless you add --v_parameterization."),
        (SILENT, None, True, (False, True), "learns nothing from pure noise"),
    ],
)
def test_what_follows(said, v, zero, wanted, sentence, caplog):
    caplog.set_level(logging.INFO)
    options = followed(given(v, zero), said, "model.safetensors")
    assert (options.model.v_parameterization, options.noise.zero_terminal_snr) == wanted
    assert sentence in caplog.text
    assert len(caplog.records) == bool(sentence)


def test_an_option_that_the_model_rules_out():
    with pytest.raises(UserError, match="--v_pred_like_loss is for models that predict noise, and m predicts v"):
        followed(given(v_pred_like_loss=0.1), V, "m")


@pytest.mark.parametrize(
    ("added", "metadata", "wanted"),
    [
        ([], {}, SILENT),
        (["v_pred"], {}, Objective("v_prediction")),
        (["v_pred", "ztsnr"], {}, V),
        (["ztsnr"], {"modelspec.prediction_type": "v"}, V),
        ([], {"modelspec.prediction_type": "epsilon"}, NOISE),
        ([], {"modelspec.prediction_type": "flow"}, SILENT),
    ],
)
def test_markers_and_metadata_of_a_file(added, metadata, wanted, tmp_path, tiny_sdxl_file):
    file = tmp_path / "model.safetensors"
    save_file(load_file(tiny_sdxl_file) | {name: torch.zeros(0) for name in added}, file, metadata)
    assert open_model(file, "sdxl").objective == wanted


@pytest.mark.parametrize(("spread", "wanted"), [(0.0, None), (0.05, "epsilon"), (0.2, "v_prediction")])
def test_the_spread_tells_in_sd_2(spread, wanted, tmp_path, tiny_sd2_file):
    tensors = load_file(tiny_sd2_file)
    size = tensors[TELLING].numel()
    tensors[TELLING] = torch.tensor([-spread, spread]).repeat(size // 2)
    save_file(tensors, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors", "sd2")
    assert isinstance(model.source, SingleFile)
    assert objective_of(model.source) == Objective(wanted)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_folders_say_it_in_their_scheduler(family, tmp_path, request):
    folder = shutil.copytree(folder_of(family, request), tmp_path / "model")
    assert open_model(folder, family).objective == Objective("v_prediction" if family == "sd2" else "epsilon")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    assert open_model(folder, family).objective == V
    file.write_text(json.dumps({"prediction_type": 5, "_class_name": "EDMEulerScheduler"}))
    with pytest.raises(UserError, match="an EDM model"):
        open_model(folder, family)


KINDS = {
    "EDM with v": (lambda t: t | {"edm_vpred.sigma_max": torch.zeros(1)}, "is an EDM model"),
    "EDM": (lambda t: t | {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "is an EDM model"),
    "no middle": (lambda t: {n: v for n, v in t.items() if "middle_block.1." not in n}, "a distilled U-Net"),
    "fewer blocks": (lambda t: {n: v for n, v in t.items() if ".output_blocks.1." not in n}, "a distilled U-Net"),
    "scaled": (lambda t: t | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, "quantized weights"),
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind, family, tmp_path, request):
    change, said = KINDS[kind]
    save_file(change(load_file(file_of(family, request))), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        open_model(tmp_path / "model.safetensors", family)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_people_leave_in_their_files(family, tmp_path, request):
    """EMA weights, the remains of a LoRA and of a training: read over, and the same model comes out."""
    tensors = load_file(file_of(family, request))
    extra = {"model_ema.diffusion_modelout2weight": torch.zeros(3), "lora_unet_x.lora_down.weight": torch.zeros(2, 2)}
    extra |= {"model_ema.num_updates": torch.tensor(3), "optimizer.x": torch.zeros(1), "betas": torch.zeros(1000)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    plain, full = open_model(file_of(family, request), family), open_model(tmp_path / "model.safetensors", family)
    full.check_parts()
    for name, wanted in plain.unet(torch.float32).state_dict().items():
        assert torch.equal(full.unet(torch.float32).state_dict()[name], wanted)
        break
    assert len(full.text_encoders(torch.float32)) == len(plain.text_encoders(torch.float32))


@pytest.mark.parametrize("dtypes", [[torch.float8_e4m3fn], [torch.bfloat16], [torch.float16, torch.float32]])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_types_of_weights(family, dtypes, tmp_path, request):
    tensors = load_file(file_of(family, request))
    small = {
        n: t.to(dtypes[i % len(dtypes)]) if t.is_floating_point() else t for i, (n, t) in enumerate(tensors.items())
    }
    save_file(small, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors", family)
    for part in (model.unet(torch.float32), model.vae(torch.float32), *model.text_encoders(torch.float32)):
        assert all(parameter.dtype == torch.float32 for parameter in part.parameters())
        assert all(parameter.isfinite().all() for parameter in part.parameters())
    weight = model.unet(torch.float32).conv_in.weight
    assert torch.equal(weight, small["model.diffusion_model.input_blocks.0.0.weight"].float())


def test_a_file_without_vae_names_the_option(tmp_path, tiny_sd1_file):
    tensors = {n: t for n, t in load_file(tiny_sd1_file).items() if not n.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no VAE\. Give one with --vae"):
        open_model(tmp_path / "model.safetensors").check_parts()
