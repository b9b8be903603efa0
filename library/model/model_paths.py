"""Whether a model's name is a path on this machine or a name on the Hugging Face hub, told without importing torch."""

import re
from pathlib import Path

from library.options.options import ModelOptions
from library.support.errors import UserError, looked_for
from library.support.shipped_files import shipped

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_path(name: str) -> Path | None:
    """The file or folder behind a path, links resolved; None if there is none."""
    path = Path(shipped(name)).expanduser()
    return path.resolve() if path.exists() else None


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no path on this machine can be one on the hub: ``owner/model``."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def hub_id(name: str, option: str) -> str:
    """The name, if it can be one on the hub. Raises UserError, which names ``option``, if nothing can be behind it."""
    if not looks_like_hub_id(name):
        raise UserError(f"{option} {name} does not exist{looked_for(name)}. Check the path.")
    return name


def check_paths(options: ModelOptions) -> None:
    """Raise UserError if the base model or the VAE of ``options`` is neither on this machine nor a name on the hub."""
    named = {"--pretrained_model_name_or_path": options.pretrained_model_name_or_path, "--vae": options.vae}
    for option, name in named.items():
        if name and local_path(name) is None:
            hub_id(name, option)
