"""The configuration file of the kohya_ss GUI's Textual Inversion tab, version 26 (July 2026), runs as it is.

The tab has 128 fields; those that belong to training become the 113 keys below, under sd-scripts' names. Keys that are
empty, false or 0 are left out of the file, the rest is sorted by name.
"""

from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from option_effects import train
from runs import write_dataset

from library.options.options import declared_options
from library.options.parser import build_parser, parse

# What the tab shows when it is opened, as it hands it on; empty fields stand at the end.
DEFAULTS: dict[str, Any] = {
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "caption_extension": ".txt",
    "clip_skip": 1,
    "dynamo_backend": "no",
    "enable_bucket": True,
    "epoch": 1,
    "gradient_accumulation_steps": 1,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "init_word": "*",
    "learning_rate": 0.0001,
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": [],
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "lr_warmup_steps": 0.1,
    "max_bucket_reso": 2048,
    "max_timestep": 1000,
    "max_token_length": 75,
    "max_train_steps": 1600,
    "min_bucket_reso": 256,
    "mixed_precision": "fp16",
    "multires_noise_discount": 0.3,
    "noise_offset_type": "Original",
    "num_vectors_per_token": 1,
    "optimizer_args": [],
    "optimizer_type": "AdamW8bit",
    "output_dir": "output",
    "output_name": "last",
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
    "prior_loss_weight": 1.0,
    "resolution": "512,512",
    "sample_prompts": "output/sample/prompt.txt",
    "sample_sampler": "euler_a",
    "save_every_n_epochs": 1,
    "save_model_as": "safetensors",
    "save_precision": "fp16",
    "token_string": "mychar",
    "train_batch_size": 1,
    "train_data_dir": "images",
    "wandb_run_name": "last",
    "xformers": True,
}
# What the other fields become when they are filled in.
FILLED: dict[str, Any] = {
    "adaptive_noise_scale": 0.01,
    "async_upload": True,
    "cache_latents_to_disk": True,
    "caption_dropout_every_n_epochs": 2,
    "color_aug": True,
    "dataset_config": "dataset.toml",
    "disable_mmap_load_safetensors": True,
    "flip_aug": True,
    "full_fp16": True,
    "gradient_checkpointing": True,
    "huggingface_path_in_repo": "words",
    "huggingface_repo_id": "someone/words",
    "huggingface_repo_type": "model",
    "huggingface_repo_visibility": "private",
    "huggingface_token": "secret",
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
    "keep_tokens": 1,
    "log_config": True,
    "log_tracker_config": "tracker.toml",
    "log_tracker_name": "words",
    "log_with": "tensorboard",
    "logging_dir": "logs",
    "lr_scheduler_type": "CosineAnnealingLR",
    "max_train_epochs": 3,
    "mem_eff_attn": True,
    "metadata_author": "Someone",
    "metadata_description": "What it is",
    "metadata_license": "CC0",
    "metadata_tags": "one,two",
    "metadata_title": "A title",
    "min_snr_gamma": 5,
    "min_timestep": 10,
    "multires_noise_iterations": 6,
    "no_half_vae": True,
    "no_token_padding": True,
    "noise_offset": 0.05,
    "noise_offset_random_strength": True,
    "persistent_data_loader_workers": 1,
    "random_crop": True,
    "reg_data_dir": "reg",
    "resume": "output/last-state",
    "resume_from_huggingface": "true",
    "sample_every_n_epochs": 1,
    "sample_every_n_steps": 100,
    "save_every_n_steps": 100,
    "save_last_n_epochs": 2,
    "save_last_n_epochs_state": 2,
    "save_last_n_steps": 200,
    "save_last_n_steps_state": 200,
    "save_state": True,
    "save_state_on_train_end": True,
    "save_state_to_huggingface": True,
    "scale_v_pred_loss_like_noise_pred": True,
    "sdpa": True,
    "seed": 1234,
    "shuffle_caption": True,
    "skip_cache_check": True,
    "use_object_template": True,
    "use_style_template": True,
    "v2": True,
    "v_parameterization": True,
    "v_pred_like_loss": 0.5,
    "vae": "vae.safetensors",
    "vae_batch_size": 4,
    "wandb_api_key": "secret",
    "weights": "earlier.safetensors",
}
ONLY_THE_GUI_KNOWS = {"epoch", "no_token_padding", "noise_offset_type"}


def gui_file(folder: Path, **changes: Any) -> Path:
    """The file that the tab writes with these fields changed."""
    values = DEFAULTS | changes
    written = {name: value for name, value in values.items() if value not in ["", False, None]}
    written.setdefault("max_data_loader_n_workers", 0)
    file = folder / "config_textual_inversion-20260710-120000.toml"
    file.write_text(toml.dumps(dict(sorted(written.items()))), encoding="utf-8")
    return file


def test_the_keys_are_all_there_and_known():
    names = {*DEFAULTS, *FILLED}
    assert len(names) == 113 == len(DEFAULTS) + len(FILLED)
    assert names - dict(declared_options()).keys() == ONLY_THE_GUI_KNOWS
    assert "max_data_loader_n_workers" in dict(declared_options())


def parsed(folder: Path, caplog, **changes: Any):
    options = parse(build_parser("Train.", "sd"), [f"--config_file={gui_file(folder, **changes)}"])
    warnings = [record.getMessage() for record in caplog.records if "unknown keys" in record.getMessage()]
    return options, warnings


def test_what_the_tab_writes_when_only_the_folders_are_filled_in(tmp_path, caplog):
    options, warnings = parsed(tmp_path, caplog)
    (warning,) = warnings
    assert "unknown keys, which change nothing: epoch, noise_offset_type (" in warning
    assert options.token.max_token_length is None
    assert options.schedule.lr_warmup_steps == 0.1
    assert options.optimizer.optimizer_args is None
    assert options.dataset.max_data_loader_n_workers == 0
    assert options.dataset.resolution == (512, 512)


@pytest.mark.parametrize("name", FILLED)
def test_every_other_field_is_taken(name, tmp_path, caplog):
    needed = {
        "adaptive_noise_scale": {"noise_offset": 0.05},
        "resume_from_huggingface": {"resume": "someone/words/last-state"},
        "save_state_to_huggingface": {"huggingface_repo_id": "someone/words", "save_state": True},
        "v_parameterization": {"v2": True},
        "scale_v_pred_loss_like_noise_pred": {"v_parameterization": True},
        "persistent_data_loader_workers": {"max_data_loader_n_workers": 2},
        "color_aug": {"cache_latents": False},
        "random_crop": {"cache_latents": False},
        "sdpa": {"xformers": False},
        "mem_eff_attn": {"xformers": False},
    }
    options, warnings = parsed(tmp_path, caplog, **{name: FILLED[name]}, **needed.get(name, {}))
    if name in ONLY_THE_GUI_KNOWS:
        assert name in warnings[0]
        return
    taken = next(getattr(group, name) for group in vars(options).values() if hasattr(group, name))
    assert taken not in (None, False, "")


def test_a_tiny_run_with_most_fields_filled_in(tmp_path, tiny_sd1):
    """All but what needs a GPU, a server or an earlier run, and what rules others out."""
    write_dataset(tmp_path / "drawn", count=2, size=(96, 64))
    for name in ("images", "reg"):
        (tmp_path / name).mkdir()
    (tmp_path / "drawn" / "images").rename(tmp_path / "images" / "2_mychar girl")
    write_dataset(tmp_path / "others", count=1, size=(96, 64), caption="a girl")
    (tmp_path / "others" / "images").rename(tmp_path / "reg" / "1_girl")
    prompts = tmp_path / "output" / "sample" / "prompt.txt"  # which the tab writes even where it is empty
    prompts.parent.mkdir(parents=True)
    prompts.write_text("a photo of mychar --w 64 --h 64 --s 1", encoding="utf-8")
    (tmp_path / "tracker.toml").write_text("", encoding="utf-8")
    left_out = {
        *("full_fp16", "mem_eff_attn", "weights", "resume", "resume_from_huggingface", "v2", "wandb_api_key"),
        *("v_parameterization", "scale_v_pred_loss_like_noise_pred", "dataset_config", "vae", "color_aug"),
        *("random_crop", "use_object_template", "use_style_template", "max_train_epochs", "lr_scheduler_type"),
        *(name for name in FILLED if name.startswith("huggingface")),
        *("async_upload", "save_state_to_huggingface"),
    }
    changes = {name: value for name, value in FILLED.items() if name not in left_out}
    changes |= {"xformers": False, "mixed_precision": "bf16", "max_train_steps": 4, "lr_warmup_steps": 1}
    changes |= {"min_bucket_reso": 64, "resolution": "64,64", "pretrained_model_name_or_path": str(tiny_sd1)}
    changes |= {"sample_every_n_steps": 2, "sample_every_n_epochs": 0, "save_every_n_steps": 2, "init_word": "*"}
    for name in ("output_dir", "sample_prompts", "train_data_dir", "reg_data_dir", "log_tracker_config", "logging_dir"):
        changes[name] = f"{tmp_path.as_posix()}/{(DEFAULTS | FILLED)[name]}"
    done = train("sd1", [f"--config_file={gui_file(tmp_path, **changes)}"], tmp_path / "output")
    assert {"last.safetensors", "last-step00000004.safetensors", "last-state"} <= set(done.files)
    rows = done.tensors("last.safetensors")["emb_params"]
    assert (rows.shape, rows.dtype) == ((1, 32), torch.float16)
    assert done.metadata("last.safetensors")["modelspec.author"] == "Someone"
    assert len(list((tmp_path / "output" / "sample").glob("last_0*.png"))) == 2


def test_an_empty_prompt_file_is_no_mistake_where_no_samples_are_asked_for(tmp_path, tiny_sd1):
    """The tab writes it in any case."""
    write_dataset(tmp_path / "drawn", count=1)
    (tmp_path / "images").mkdir()
    (tmp_path / "drawn" / "images").rename(tmp_path / "images" / "1_mychar")
    (tmp_path / "output" / "sample").mkdir(parents=True)
    (tmp_path / "output" / "sample" / "prompt.txt").touch()
    places = {name: f"{tmp_path.as_posix()}/{DEFAULTS[name]}" for name in ("output_dir", "sample_prompts")}
    places |= {"train_data_dir": f"{tmp_path.as_posix()}/images", "pretrained_model_name_or_path": str(tiny_sd1)}
    small = {"xformers": False, "mixed_precision": "no", "max_train_steps": 1, "resolution": "64,64"}
    file = gui_file(tmp_path, **places, **small, min_bucket_reso=64)
    assert "last.safetensors" in train("sd1", [f"--config_file={file}"], tmp_path / "output").files
