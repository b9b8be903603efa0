"""Models that were distilled to draw in a few steps (LCM, Turbo, Lightning, Hyper, DMD2), as far as they say so."""

import re
from collections.abc import Iterator

from library.model.diffusers_folder import ModelFolder
from library.model.identity import read_config, read_object
from library.model.single_file import SingleFile

# In a name: the word between other signs, or with a capital where words are written together (v21TurboDPMSDE).
_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?P<a>lcm|turbo|lightning|dmd2)|(?P<b>LCM|T(?:urbo|URBO)|L(?:ightning|IGHTNING)|DMD2))(?![a-z])"
)
# "Hyper" is also what is hyperrealistic.
_HYPER = re.compile(r"(?:(?<![a-z])hyper|Hyper|HYPER)[-_ ]?(?:(?i:sd|xl|vae|lora|step)|v?\d|$)")
_TELLING = ("modelspec.title", "modelspec.merged_from", "sd_merge_recipe", "sd_merge_models", "ss_output_name")
_SPELLING = {"lcm": "an LCM", "turbo": "a Turbo", "lightning": "a Lightning", "dmd2": "a DMD2"}
_LCM_TENSOR = "model.diffusion_model.time_embed.cond_proj.weight"  # takes in the strength of the guidance


def distillation_warning(source: SingleFile | ModelFolder, name: str) -> str | None:
    """A sentence for a base model that says it was distilled for few steps; ``name`` is what the user called it."""
    for what, text in _texts(source, name):
        if kind := _kind(text):
            return (
                f"{name} seems to be {kind} model, distilled to draw in a few steps: {what} says so. An embedding is "
                "better trained on the base model that it was made from; it works with both."
            )
    return None


def _kind(text: str) -> str | None:
    if found := _WORD.search(text):
        return _SPELLING[found[0].lower()]
    return "a Hyper" if _HYPER.search(text) else None


def _texts(source: SingleFile | ModelFolder, name: str) -> Iterator[tuple[str, str]]:
    """What is known of the model in words, with what says it."""
    yield "its name", re.sub(r"\.(safetensors|ckpt)$", "", name.rpartition("/")[2])
    if isinstance(source, SingleFile):
        for key in _TELLING:
            yield f"{key} in its metadata", source.weights.metadata.get(key, "")
        yield "a tensor of LCM models", "LCM" if _LCM_TENSOR in source.weights.shapes else ""
        return
    unet = read_config(source.path / "unet" / "config.json") or {}
    scheduler = read_config(source.path / "scheduler" / "scheduler_config.json") or {}
    yield "its U-Net's configuration", "LCM" if unet.get("time_cond_proj_dim") else ""
    yield "its scheduler", "LCM" if scheduler.get("_class_name") == "LCMScheduler" else ""
    for content in (read_object(source.path / "model_index.json") or {}, unet):
        yield "_name_or_path in its configuration", re.split(r"[/\\]", str(content.get("_name_or_path", "")))[-1]
