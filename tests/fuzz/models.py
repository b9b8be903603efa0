"""Targets that are models: folders whose configuration files and tokenizers are damaged, and whole checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import save_folder, save_single_file

from fuzz.mutations import edited, edits, encoded, json_text, spliced, splices
from fuzz.running import Target
from fuzz.tensors import safetensors_bytes
from library.model.base_model import BaseModel
from library.model.family import FAMILIES
from library.options.options import ModelOptions

# What is damaged, the small files first; "tokenizer" stands for what a tokenizer's folder holds.
_CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
)
_INDEX = {"metadata": {"total_size": 3}, "weight_map": {"conv_in.weight": "a.safetensors", "conv_in.bias": "../b"}}
_KEYS = (
    *("in_channels", "block_out_channels", "cross_attention_dim", "down_block_types", "vocab_size", "hidden_size"),
    *("attention_head_dim", "num_hidden_layers", "intermediate_size", "num_attention_heads", "projection_dim"),
    *("max_position_embeddings", "hidden_act", "latent_channels", "scaling_factor", "prediction_type", "_class_name"),
    *("class_embed_type", "addition_embed_type", "model_type", "layers_per_block", "norm_num_groups", "weight_map"),
    *("use_linear_projection", "transformer_layers_per_block", "pad_token", "model_max_length", "tokenizer_class"),
)


def _options(path: Path) -> ModelOptions:
    return ModelOptions(pretrained_model_name_or_path=str(path))


def _open(path: Path) -> BaseModel:
    """What a run does before it loads a model."""
    model = BaseModel.open(_options(path), FAMILIES["sd"])
    model.check_parts()
    return model


def _texts(folder: Path) -> dict[str, Any]:
    found = {}
    for name in _CONFIGS:
        file = folder / name
        found[name] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else _INDEX
    return found


def _damage(folder: Path, good: dict[str, Any], recipe) -> None:
    """Put one file's damaged content in place, all others as they were."""
    name, changes, pieces = recipe
    _restore(folder, good)
    content = encoded(changes if isinstance(changes, str) else spliced(json_text(edited(good[name], changes)), pieces))
    (folder / name).write_bytes(content)
    (folder.parent / "input.json").write_bytes(content)


def _restore(folder: Path, good: dict[str, Any]) -> None:
    for name, tree in good.items():
        file = folder / name
        if "index.json" in name and name.startswith("unet"):
            file.unlink(missing_ok=True)
            continue
        file.write_text(json.dumps(tree), encoding="utf-8")


def _folder(folder: Path):
    """Opening alone: thousands a minute."""
    model = save_folder("sd1", folder / "model")
    good = _texts(model)

    def act(recipe):
        os.chdir(folder)
        _damage(model, good, recipe)
        _hide_weights(model, recipe[0].endswith(".index.json"))
        opened = _open(model)
        assert opened.vae_scale_factor > 0
        assert opened.objective.prediction_type in (None, "epsilon", "v_prediction")

    return act


def _hide_weights(folder: Path, hidden: bool) -> None:
    """Take the U-Net's one file away where an index is to be read."""
    file, away = folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "away"
    if hidden and file.is_file():
        file.rename(away)
    elif not hidden and away.is_file():
        away.rename(file)


def _parts(folder: Path):
    """Loading the component whose configuration is damaged."""
    model = save_folder("sd1", folder / "model")
    good = _texts(model)

    def act(recipe):
        os.chdir(folder)
        _damage(model, good, recipe)
        opened = _open(model)
        component = recipe[0].split("/")[0]
        if component == "tokenizer":
            opened.tokenizers()
        elif component == "text_encoder":
            opened.text_encoders(torch.float32)
        elif component in ("vae", "unet"):
            getattr(opened, component)(torch.float32)

    return act


def _recipes(names) -> st.SearchStrategy:
    return st.tuples(st.sampled_from(names), edits(_KEYS, most=2), st.one_of(st.just([]), st.just([]), splices()))


def _whole_file(folder: Path):
    """A whole checkpoint whose header is damaged and whose data are where they were."""
    good = save_single_file("sd1", folder / "good.safetensors")
    file = folder / "model.safetensors"
    content = good.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header, size = json.loads(content[8:length]), len(content) - length
    with safe_open(good, "pt") as opened:
        names = sorted(opened.keys())

    def act(recipe):
        os.chdir(folder)
        entry, changes = recipe
        damaged = dict(header)
        name = names[entry % len(names)]
        changed = edited({name: header[name]}, changes)
        damaged.pop(name)
        damaged |= changed if isinstance(changed, dict) else {}
        head = safetensors_bytes(damaged, 0)
        with file.open("wb") as out:
            out.write(head)
            out.truncate(len(head) + size)
        opened = _open(file)
        opened.text_encoders(torch.float32)
        opened.vae(torch.float32)
        opened.unet(torch.float32)

    return act


_ODD = ("", "null", "[]", "3", '"a"', "[" * 10**6, '{"a":' * 10**5, '{"a":' + "9" * 5000 + "}", "\ud800", "{}", "NaN")
_CHANNELS = ({}, [], None, "4", 4.0, -1, 0, 10**9, 10**19, True, float("nan"))
_IN_CHANNELS = tuple(("unet/config.json", [("add", 0, 0, ("in_channels", value))], []) for value in _CHANNELS)
_FOLDER_SEEDS = (*((name, text, []) for name in _CONFIGS for text in _ODD), *_IN_CHANNELS)
_HUGE = (
    ("text_encoder/config.json", ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")),
    ("unet/config.json", ("layers_per_block", "cross_attention_dim", "norm_num_groups", "block_out_channels")),
    ("vae/config.json", ("layers_per_block", "latent_channels", "block_out_channels")),
)
_PART_SEEDS = tuple(
    (name, [("add", 0, 0, (key, value))], []) for name, keys in _HUGE for key in keys for value in (10**9, {})
)

TARGETS = (
    Target("model_folder", _folder, _recipes(_CONFIGS), (_CONFIGS[1], [], []), _FOLDER_SEEDS, 200),
    Target("model_parts", _parts, _recipes(_CONFIGS[1:6]), (_CONFIGS[1], [], []), _PART_SEEDS, 10),
    Target("model_file", _whole_file, st.tuples(st.integers(0, 999), edits(("dtype", "shape", "data_offsets"), most=2)),
           (0, []), (), 10),
)  # fmt: skip
