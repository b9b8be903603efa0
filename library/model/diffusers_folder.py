"""Models as diffusers folders, on disk or from the Hugging Face hub through diffusers' own cache."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.models import AutoencoderKL
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError

from library.model.architectures import Architecture, TextEncoderLayout
from library.model.identity import Config, read_config, read_object, whole_number
from library.model.single_file import modern_vae_names
from library.model.weight_files import Weights, join_weights, open_weights
from library.support.errors import UserError
from library.support.stored_tensors import Unread, UnreadTensors

logger = logging.getLogger(__name__)

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# Full precision first: casting it gives the half-precision variant, but not the other way round.
_VARIANTS = ("", ".fp16", ".bf16", ".non_ema", ".ema")


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder of a known architecture; each method reads one component: its configuration and tensors."""

    path: Path
    architecture: Architecture
    mmap: bool

    def unet(self) -> tuple[Config, UnreadTensors]:
        return self._component("unet")

    def vae(self) -> tuple[Config, UnreadTensors]:
        self._check_vae()
        config, tensors = self._component("vae")
        return config, modern_vae_names(tensors)

    def text_encoder(self, layout: TextEncoderLayout) -> tuple[Config, UnreadTensors]:
        config, tensors = self._component(layout.component)
        return config, {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}

    def vocabulary_size(self, layout: TextEncoderLayout) -> int:
        """How many tokens the text encoder knows, from the configuration alone."""
        file = self.path / layout.component / "config.json"
        return whole_number(self._config(layout.component), "vocab_size", 49408, file)

    def check(self, with_vae: bool) -> None:
        """Raise UserError if a component is missing or cut off; reads headers (and ``.bin`` files) only."""
        components = ["unet", *(layout.component for layout in self.architecture.text_encoders)]
        if with_vae:
            self._check_vae()
            components.append("vae")
        for component in components:
            self._config(component)
            find_weights(self.path / component, mmap=self.mmap)

    def _check_vae(self) -> None:
        if not (self.path / "vae" / "config.json").is_file():
            raise UserError(f"{self.path} holds no VAE. Give one with --vae.")

    def _component(self, name: str) -> tuple[Config, UnreadTensors]:
        return self._config(name), find_weights(self.path / name, mmap=self.mmap).unread_all()

    def _config(self, component: str) -> Config:
        config = read_config(self.path / component / "config.json")
        if config is None:
            raise UserError(f"{self.path} is incomplete: {component}/config.json is missing.")
        return config


def find_weights(folder: Path, *, mmap: bool) -> Weights:
    """Open a component's weights: one file or shards, safetensors or torch's, plain or a variant such as fp16."""
    for suffix in (".safetensors", ".bin"):
        for variant in _VARIANTS:
            for stem in _STEMS:
                if (file := folder / f"{stem}{variant}{suffix}").is_file():
                    return open_weights(file, mmap=mmap)
                # Both spellings exist: model.safetensors.index.fp16.json and model.fp16.safetensors.index.json.
                for index in (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"):
                    if (shards := _shards(folder / index)) is not None:
                        return join_weights(shards, mmap=mmap)
    raise UserError(
        f"{folder} holds no weights (no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors). The model folder is "
        "incomplete; download or copy it again."
    )


def _shards(index: Path) -> list[Path] | None:
    """The files, beside it, that an index names, or None if there is no index. Raises UserError if it is damaged."""
    if (content := read_object(index)) is None:
        return None
    places = content.get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    # A shard lies beside its index; a path would lead elsewhere.
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise UserError(
            f'{index} is damaged: its "weight_map" does not name files of this folder. Download or copy it again.'
        )
    return [index.with_name(name) for name in sorted(set(names))]


def fetch_from_hub(name: str, *, half: bool = False) -> Path:
    """The local copy of a whole model on the hub, downloaded unless diffusers' cache has it. Raises UserError.

    Of weights in several variants the plain ones are taken, or fp16 if there are no others; for a run in ``half``
    precision fp16 if it is there, at half the download, unless the plain ones are in the cache already.
    """
    fp16_first = half and not _in_cache(name)
    errors: dict[str | None, Exception] = {}
    for variant in ("fp16", None) if fp16_first else (None, "fp16"):
        try:
            folder = Path(DiffusionPipeline.download(name, variant=variant, local_files_only=HF_HUB_OFFLINE))
        except Exception as error:  # the libraries underneath raise their own; all mean that there is no model
            errors[variant] = error
            continue
        if _has_weights(folder):
            if variant:
                logger.info("%s: the fp16 variant of its weights is used.", name)
            return folder
    if None in errors:
        raise _not_fetched(name, errors[None]) from errors[None]
    raise UserError(
        f"{name} on the Hugging Face hub is incomplete: a part of it has no weights, neither plain nor in the variant "
        "fp16. Give another repository, or a path."
    )


def _in_cache(name: str) -> bool:
    """Whether the plain weights of a model on the hub are in diffusers' cache."""
    try:
        return _has_weights(Path(DiffusionPipeline.download(name, local_files_only=True)), plain=True)
    except Exception:  # as above; here it only means that they are not
        return False


def _has_weights(folder: Path, *, plain: bool = False) -> bool:
    """Whether no part has a configuration alone, which is all that diffusers downloads where a variant is missing.

    With ``plain``, variants do not count; their names have a dot more.
    """
    parts = [folder / name for name in _PARTS if (folder / name / "config.json").is_file()]
    kinds = (".safetensors", ".bin")
    return all(any(f.suffix in kinds and not (plain and "." in f.stem) for f in part.iterdir()) for part in parts)


def fetch_vae(name: str) -> tuple[Config, UnreadTensors]:
    """A VAE on the hub, at the root of its repository or in the folder ``vae``. Raises UserError."""
    failures = []
    for variant, folder in itertools.product((None, "fp16"), (None, "vae")):
        where = {"variant": variant, "subfolder": folder, "local_files_only": HF_HUB_OFFLINE}
        try:
            vae = AutoencoderKL.from_pretrained(name, **where)
        except Exception as error:  # OSError where it is not there; damaged files raise others
            failures.append(error)
        else:
            return dict(vae.config), {name: Unread.held(tensor) for name, tensor in vae.state_dict().items()}
    raise _not_fetched(name, failures[1]) from failures[1]  # of a whole model's VAE, which most names are


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised for or after."""
    yield error
    for other in (error.__cause__, error.__context__):
        if other is not None:
            yield from _behind(other)


def _not_fetched(name: str, error: Exception) -> UserError:
    if HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set and there is no copy in the cache"
    elif any(isinstance(each, LocalEntryNotFoundError) for each in _behind(error)):
        reason = "it cannot be reached from here, and there is no copy in the cache"
    else:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
    return UserError(
        f"{name} is no file or folder here, and it could not be fetched from the Hugging Face hub: {reason}. "
        "Check the spelling, or give a path."
    )
