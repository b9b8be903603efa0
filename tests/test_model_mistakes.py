"""Mistakes that a model or PyTorch is needed to see, through the real scripts; the others are in test_mistakes.py."""

import errno
import json

import pytest
import torch
from runs import arguments, run, write_dataset
from safetensors.torch import save_file

from library.model.base_model import BaseModel


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_unet(monkeypatch):
    """The mistake must be found before the U-Net is loaded."""
    monkeypatch.setattr(BaseModel, "unet", lambda *_: pytest.fail("the U-Net was loaded"))


def fails(capsys, family, argv, *phrases):
    """Run, expect an exit code of 1 (2 from argparse), and every phrase in what was said."""
    try:
        code = run(family, argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code not in (0, None), said
    assert "Traceback" not in said
    for phrase in phrases:
        assert phrase in said
    return said


MISTAKES = {
    "token that exists": (["--token_string=cat"], ["--token_string", '"cat"', "for example"]),
    "token that exists as a whole word": (["--token_string=their"], ["--token_string", '"their"']),
    "init word of two tokens": (["--init_word=mychar"], ["--init_word", "2 tokens", "one token"]),
    "empty init word": (["--init_word= "], ["--init_word"]),
    "init words and vectors that do not match": (
        ["--init_word=cat dog", "--num_vectors_per_token=3"],
        ["--init_word", "2 tokens", "exactly 3"],
    ),
    "more vectors than a prompt holds": (["--num_vectors_per_token=90"], ["90", "75"]),
    "unknown optimizer": (["--optimizer_type=AdamV"], ["--optimizer_type", "AdamV", "Did you mean"]),
    "unknown schedule": (["--lr_scheduler=cosin"], ["--lr_scheduler", "cosin", "cosine"]),
    "optimizer argument it does not take": (["--optimizer_args", "colour=1"], ["--optimizer_args", "colour"]),
    "clip_skip beyond the layers": (["--clip_skip=40"], ["--clip_skip"]),
    "a negative flag that is neither true nor false": (
        ["--metadata_is_negative_embedding=perhaps"],
        ["--metadata_is_negative_embedding", "perhaps"],
    ),
    "xformers": (["--xformers"], ["xformers"]),
}


@pytest.mark.usefixtures("no_unet")
@pytest.mark.parametrize("name", MISTAKES)
def test_options(name, dataset, tmp_path, tiny_sd1, capsys):
    more, phrases = MISTAKES[name]
    fails(capsys, "sd1", arguments("sd1", tiny_sd1, dataset, tmp_path / "out", *more), *phrases)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("no_unet")
@pytest.mark.parametrize(
    ("shape", "phrases"), [((2, 32), ["2", "1"]), ((1, 1024), ["2.x", "1024"]), ((1, 7), ["7", "32"])]
)
def test_weights_that_do_not_fit(shape, phrases, dataset, tmp_path, tiny_sd1, capsys):
    save_file({"emb_params": torch.zeros(shape)}, tmp_path / "w.safetensors")
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--weights={tmp_path / 'w.safetensors'}")
    fails(capsys, "sd1", argv, "w.safetensors", *phrases)


@pytest.mark.usefixtures("no_unet")
@pytest.mark.parametrize(
    ("family", "flags", "model", "phrases"),
    [
        ("sd1", [], "tiny_sdxl_file", ["sdxl_train_textual_inversion.py"]),
        ("sd1", [], "tiny_sdxl", ["sdxl_train_textual_inversion.py"]),
        ("sdxl", [], "tiny_sd1_file", ["train_textual_inversion.py"]),
        ("sdxl", ["--v2"], "tiny_sdxl", ["--v2"]),
        ("sd1", [], "tiny_sd2_file", ["--v2"]),
        ("sd1", ["--v2"], "tiny_sd1_file", ["--v2"]),
    ],
)
def test_models_of_another_family(family, flags, model, phrases, dataset, tmp_path, request, capsys):
    argv = arguments(family, request.getfixturevalue(model), dataset, tmp_path / "out", *flags)
    fails(capsys, family, argv, *phrases)


@pytest.mark.parametrize(
    ("keys", "phrase"),
    [
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "3"),
        (["lora_unet_mid_block.lora_down.weight"], "LoRA"),
        (["emb_params"], "embedding"),
    ],
)
def test_files_that_are_no_checkpoint(keys, phrase, dataset, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, file)
    fails(capsys, "sd1", arguments("sd1", file, dataset, tmp_path / "out"), str(file), phrase)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_truncated_checkpoint(name, dataset, tmp_path, tiny_sd1_file, capsys):
    file = tmp_path / name
    file.write_bytes(tiny_sd1_file.read_bytes()[:5000] if name.endswith("safetensors") else b"PK\x03\x04 broken")
    fails(capsys, "sd1", arguments("sd1", file, dataset, tmp_path / "out"), name)


def test_a_diffusers_index_without_parts(dataset, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    fails(capsys, "sd1", arguments("sd1", tmp_path / "model", dataset, tmp_path / "out"), "FLUX")


def test_what_the_system_refuses_is_a_sentence(dataset, tiny_sd1, tmp_path, monkeypatch, capsys):
    """Wherever it happens: no permission, a disk that fails, a network drive that is gone."""

    def refuses(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/shared/model")

    monkeypatch.setattr(BaseModel, "open", refuses)
    said = "error: /shared/model cannot be used: Permission denied."
    fails(capsys, "sd1", arguments("sd1", tiny_sd1, dataset, tmp_path / "out"), said)
