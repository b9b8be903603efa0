"""Models on the hub, against a stand-in of its server: which variant of the weights is fetched, and what is said."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from hub_stand_in import Hub, running
from huggingface_hub import constants, hf_api
from huggingface_hub.errors import LocalEntryNotFoundError
from option_effects import plan
from runs import arguments, write_dataset
from test_base_model import assert_same_weights, open_model, options
from tiny_models import build_pipeline

from library.model.base_model import BaseModel
from library.model.family import STABLE_DIFFUSION_XL
from library.support.errors import UserError

REPO = "someone/tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as server:
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + files)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("library.model.diffusers_folder.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline("sdxl")


def publish(hub: Hub, folder: Path, *, plain: bool, fp16: bool, pipeline) -> None:
    """Put the pipeline on the stand-in with its plain weights, those of the variant fp16, or both."""
    for wanted, more in ((plain, {}), (fp16, {"variant": "fp16"})):
        if wanted:
            shutil.rmtree(folder, ignore_errors=True)
            pipeline.save_pretrained(folder, **more)
            files = [file for file in folder.rglob("*") if file.is_file()]
            hub.files |= {(REPO, file.relative_to(folder).as_posix()): file.read_bytes() for file in files}


def weights(hub: Hub) -> set[str]:
    """The variants of the weights that were fetched: "", ".fp16"."""
    names = [Path(path).name for path in hub.downloads if path.endswith(".safetensors")]
    return {name.removesuffix(".safetensors").partition(".")[2] for name in names}


def opened(*, half: bool) -> BaseModel:
    return BaseModel.open(options(REPO, "sdxl"), STABLE_DIFFUSION_XL, half=half)


@pytest.mark.parametrize(
    ("plain", "fp16", "half", "fetched"),
    [
        (True, False, False, {""}),
        (True, False, True, {""}),
        (False, True, False, {"fp16"}),
        (False, True, True, {"fp16"}),
        (True, True, False, {""}),
        (True, True, True, {"fp16"}),
    ],
)
def test_variants(plain, fp16, half, fetched, hub, tmp_path, pipeline, caplog):
    caplog.set_level("INFO")
    publish(hub, tmp_path / "model", plain=plain, fp16=fp16, pipeline=pipeline)
    model = opened(half=half)
    model.check_parts()
    assert weights(hub) == fetched
    assert ("the fp16 variant of its weights is used" in caplog.text) == (fetched == {"fp16"})
    assert_same_weights(model.unet(torch.float32), pipeline.unet)


def test_plain_weights_in_the_cache_are_not_fetched_again_as_fp16(hub, tmp_path, pipeline):
    publish(hub, tmp_path / "model", plain=True, fp16=True, pipeline=pipeline)
    opened(half=False)
    hub.downloads.clear()
    opened(half=True).check_parts()
    assert weights(hub) == set()


def test_without_a_connection_the_cache_serves_whichever_variant_it_holds(hub, tmp_path, pipeline, monkeypatch):
    publish(hub, tmp_path / "model", plain=False, fp16=True, pipeline=pipeline)
    opened(half=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("library.model.diffusers_folder.HF_HUB_OFFLINE", True)
    for half in (True, False):
        assert_same_weights(opened(half=half).unet(torch.float32), pipeline.unet)


def test_a_model_without_weights_is_said(hub, tmp_path, pipeline):
    publish(hub, tmp_path / "model", plain=True, fp16=False, pipeline=pipeline)
    hub.files = {place: content for place, content in hub.files.items() if not place[1].startswith("unet/diffusion")}
    with pytest.raises(UserError, match=f"{REPO} on the Hugging Face hub is incomplete: a part of it has no weights"):
        opened(half=False)


@pytest.mark.parametrize("half", [True, False])
def test_a_model_that_is_not_there(half, hub):
    with pytest.raises(UserError, match=f"{REPO} is no file or folder here, and it could not be fetched"):
        opened(half=half)


@pytest.mark.parametrize("part", ["model", "vae"])
def test_without_a_connection_a_name_is_one_sentence(part, hub, tiny_sdxl_file, monkeypatch):
    """As the libraries say it; really trying takes them half a minute."""

    def unreachable(*_, **__):
        try:
            raise LocalEntryNotFoundError("cannot find an appropriate cached snapshot folder")
        except LocalEntryNotFoundError:
            raise OSError("Cannot load model: it is not fully cached locally (see above") from ConnectionError()

    monkeypatch.setattr(DiffusionPipeline, "download", unreachable)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    with pytest.raises(UserError) as caught:
        opened(half=False) if part == "model" else open_model(tiny_sdxl_file, "sdxl", vae=REPO).vae(torch.float32)
    assert str(caught.value) == (
        f"{REPO} is no file or folder here, and it could not be fetched from the Hugging Face hub: it cannot be "
        "reached from here, and there is no copy in the cache. Check the spelling, or give a path."
    )


def test_a_vae_that_is_there_as_fp16_only(hub, tmp_path, pipeline, tiny_sdxl_file):
    publish(hub, tmp_path / "model", plain=False, fp16=True, pipeline=pipeline)
    model = open_model(tiny_sdxl_file, "sdxl", vae=REPO)
    assert_same_weights(model.vae(torch.float32), pipeline.vae)


def test_a_run_in_half_precision_asks_for_fp16(hub, tmp_path, pipeline):
    """Through the real script, up to the trainer."""
    publish(hub, tmp_path / "model", plain=True, fp16=True, pipeline=pipeline)
    argv = arguments("sdxl", REPO, write_dataset(tmp_path, count=1), tmp_path / "out")
    plan("sdxl", [*argv, "--mixed_precision=bf16"])
    assert weights(hub) == {"fp16"}
