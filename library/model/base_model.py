"""The base model: opened by its headers, named or refused, then loaded component by component, frozen.

Nothing is read before it is needed and nothing twice: tensors come from the mapped file and are cast, or moved to the
device, one at a time.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from library.model.architectures import SD2, VOCABULARY, Architecture, TextEncoderLayout
from library.model.diffusers_folder import ModelFolder, fetch_from_hub, fetch_vae, find_weights
from library.model.family import END_OF_TEXT, START_OF_TEXT, ModelFamily
from library.model.frozen_layers import freeze_layers
from library.model.identity import (
    INPAINTING_CHANNELS,
    Config,
    Identity,
    identify_file,
    identify_folder,
    positive_number,
    read_config,
)
from library.model.model_paths import check_paths, hub_id, local_path
from library.model.objective import objective_of
from library.model.single_file import SingleFile, modern_vae_names, vae_component
from library.model.weight_files import open_weights
from library.options.declaration import required
from library.options.options import ModelOptions
from library.support.errors import UserError, first_line
from library.support.file_hash import FileHash, legacy_hash
from library.support.main_memory import give_back, return_large_blocks
from library.support.shipped_files import CONFIGS
from library.support.stored_tensors import UnreadTensors

logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)
_LARGE_MODEL = 10**7  # weights: below it, looking for what is free costs more than it is worth

# Tensors in text-encoder files that these models have no use for.
_UNUSED = ("embeddings.position_ids", "logit_scale", "text_projection.weight")


class BaseModel:
    """The frozen model that an embedding is trained for; made by :meth:`open`.

    ``name`` is what the user called it, without folders. ``objective`` is what it says about its training. The U-Net
    of an ``inpainting`` model takes nine channels.
    """

    def __init__(
        self, source: SingleFile | ModelFolder, options: ModelOptions, name: str, inpainting: bool = False
    ) -> None:
        self.source = source
        self.options = options
        self.name = name
        self.inpainting = inpainting
        self.architecture = source.architecture
        self.objective = objective_of(source)
        self._hash = FileHash(source.path) if isinstance(source, SingleFile) else None

    @classmethod
    def open(
        cls, options: ModelOptions, family: ModelFamily | None, configs: Path = CONFIGS, *, half: bool = False
    ) -> "BaseModel":
        """Find the model and tell what it is, reading headers only.

        ``configs`` holds the component configurations that single files lack; ``half`` is whether the weights will be
        cast to 16 bits. Raises UserError, in a sentence that says what to do, for whatever ``family`` cannot train;
        without a family any that can be trained here is taken for what it is.
        """
        name = required(options.pretrained_model_name_or_path, "pretrained_model_name_or_path")
        path = local_path(name)
        short_name = name if path is None else _own_name(Path(name), path)
        if path is None:
            path = fetch_from_hub(hub_id(name, "--pretrained_model_name_or_path"), half=half)
        mmap = not options.disable_mmap_load_safetensors
        if path.is_dir():
            identity = identify_folder(path)
            source: SingleFile | ModelFolder = ModelFolder(path, _architecture(name, identity, family), mmap)
        else:
            weights = open_weights(path, mmap=mmap)
            identity = identify_file(weights.shapes)
            architecture = _architecture(name, identity, family)
            source = SingleFile(path, weights, architecture, configs / architecture.name)
        model = cls(source, options, short_name, identity.inpainting)
        if family:
            model._check_flags(name)
        return model

    def _check_flags(self, name: str) -> None:
        """Compare --v2 with what the model is."""
        is_v2 = self.architecture is SD2
        if self.options.v2 != is_v2:
            flag = "add --v2" if is_v2 else "leave --v2 out"
            message = f"{name} is a {self.architecture.title} model: {flag}"
            if isinstance(self.source, SingleFile):
                hint = " (and --v_parameterization for the 768-pixel models)" if is_v2 else ""
                raise UserError(f"{message}{hint}.")
            logger.warning("%s. It is trained as what it is.", message)

    def check_inpainting(self, wanted: bool) -> None:
        """Raise UserError for an inpainting model that is not trained as one; warn where another one is to be."""
        if self.inpainting and not wanted:
            raise UserError(
                f"{self.name} is an inpainting model (its U-Net takes {INPAINTING_CHANNELS} channels, not 4). Add "
                "--train_inpainting to train on it as such, or give the ordinary base model."
            )
        if wanted and not self.inpainting:
            logger.warning(
                "--train_inpainting: %s is no inpainting model. Its U-Net is widened to %d channels with weights of "
                "zero, and since only the vectors are trained they stay zero: the masks change nothing. Give an "
                "inpainting model of the same kind, or leave --train_inpainting out.",
                self.name, INPAINTING_CHANNELS,
            )  # fmt: skip

    def check_parts(self) -> None:
        """Raise UserError if a part that a training needs is missing or cut off, before any of them is loaded."""
        check_paths(self.options)
        self.source.check(with_vae=not self.options.vae)

    @cached_property
    def vae_scale_factor(self) -> float:
        """What latents are multiplied by; the base model's, also with another VAE."""
        source = self.source
        if isinstance(source, SingleFile):
            return float(source.config("vae")["scaling_factor"])
        usual = self._usual_vae()["scaling_factor"]
        file = source.path / "vae" / "config.json"
        return positive_number(read_config(file) or {}, "scaling_factor", usual, file)

    def _usual_vae(self) -> Config:
        return read_config(CONFIGS / self.architecture.name / "vae" / "config.json") or {}

    def begin_hash(self) -> None:
        """Begin to compute what :meth:`hash` gives, beside whatever follows."""
        if self._hash:
            self._hash.begin()

    def hash(self, *, wait: bool = True) -> str | None:
        """SHA-256 of a checkpoint file, by which model sites find it; None for a folder.

        It takes reading the whole file; without ``wait`` it is None while that is not done.
        """
        return self._hash.get(wait=wait) if self._hash else None

    def legacy_hash(self) -> str | None:
        """The short hash by which older web UIs know a checkpoint file; None for a folder."""
        if not isinstance(self.source, SingleFile):
            return None
        with self.source.path.open("rb") as file:
            return legacy_hash(file)

    def tokenizers(self) -> list[CLIPTokenizer]:
        """One tokenizer per text encoder: of --tokenizer_cache_dir, of the model folder, or the bundled one."""
        return [self._tokenizer(layout) for layout in self.architecture.text_encoders]

    def _tokenizer(self, layout: TextEncoderLayout) -> CLIPTokenizer:
        folders = []
        if self.options.tokenizer_cache_dir:
            folders.append(Path(self.options.tokenizer_cache_dir) / layout.tokenizer_id.replace("/", "_"))
            if not folders[0].is_dir():
                logger.info("--tokenizer_cache_dir holds no %s; another copy of it is used.", folders[0].name)
        if isinstance(self.source, ModelFolder):
            folders.append(self.source.path / layout.tokenizer)
        folder = next((f for f in folders if any((f / n).is_file() for n in ("tokenizer.json", "vocab.json"))), None)
        if folder is not None:
            tokenizer = _read_tokenizer(folder)
        else:
            files = (str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt"))
            tokenizer = CLIPTokenizer(*files, model_max_length=77)
        if len(tokenizer) > (known := self.source.vocabulary_size(layout)):
            raise UserError(
                f"{folder or VOCABULARY} knows {len(tokenizer)} tokens, but the {layout.component} of {self.name} only "
                f"{known}. Use the tokenizer that belongs to the model."
            )
        if folder is None or layout.with_projection:
            # Set afterwards: given to the constructor, "!" in a text would be read as padding.
            tokenizer.pad_token = layout.pad_token
        return tokenizer

    def token_tables(self) -> list[torch.Tensor]:
        """The embedding of each text encoder's vocabulary, [V, D], as it is stored; nothing else is read."""
        return [self._token_table(layout) for layout in self.architecture.text_encoders]

    def _token_table(self, layout: TextEncoderLayout) -> torch.Tensor:
        table = self.source.text_encoder(layout)[1].get("embeddings.token_embedding.weight")
        if table is None or table.ndim != 2:
            raise UserError(f"{self.source.path} is incomplete: the {layout.component}'s token table is missing.")
        return table.read()

    def text_encoders(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[PreTrainedModel]:
        """The text encoders, frozen."""
        return [self._text_encoder(layout, dtype, device) for layout in self.architecture.text_encoders]

    def _text_encoder(
        self, layout: TextEncoderLayout, dtype: torch.dtype, device: torch.device | str
    ) -> PreTrainedModel:
        config, tensors = self.source.text_encoder(layout)
        model_class = CLIPTextModelWithProjection if layout.with_projection else CLIPTextModel
        where = f"{self.source.path} ({layout.component})"
        model: PreTrainedModel = _empty(lambda: model_class(CLIPTextConfig.from_dict(config)), where)
        # transformers nests the encoder in the class with projection only.
        names = {name.removeprefix("text_model."): name for name in model.state_dict()}
        unused = [name for name in _UNUSED if name not in names]
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items() if name not in unused}
        return _fill(model, tensors, dtype, device, where)

    def unet(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        float8: bool = False,
        inpainting: bool = False,
    ) -> UNet2DConditionModel:
        """The U-Net of frozen layers, see ``frozen_layers``; with ``float8`` its weights are never whole at once.

        For ``inpainting`` an ordinary one is widened to take nine channels.
        """
        config, tensors = self.source.unet()
        if inpainting and not self.inpainting:
            config, tensors = _widened(config, tensors)
        where = f"{self.source.path} (U-Net)"
        if float8 and torch.device(device).type == "cpu":
            # Weights are dequantized one after the other at every step. The empty model comes after it: every weight
            # of it is asked for and let go, which would leave a heap of gigabytes for all others to be strewn in.
            return_large_blocks()
        model: UNet2DConditionModel = _empty(lambda: UNet2DConditionModel.from_config(config), where)
        _check_fit(model, tensors, where)
        freeze_layers(model, float8=float8, fill=_filler(tensors, dtype, device))
        return _finished(model, device)

    def vae(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> AutoencoderKL:
        """The model's VAE or that of --vae, frozen; its ``scaling_factor`` is the base model's."""
        origin = f"--vae {self.options.vae}" if self.options.vae else str(self.source.path)
        config, tensors = self._other_vae(self.options.vae) if self.options.vae else self.source.vae()
        if (channels := config.get("latent_channels", 4)) != 4:
            raise UserError(f"{origin} makes latents of {channels} channels; Stable Diffusion needs a VAE with 4.")
        model: AutoencoderKL = _empty(lambda: AutoencoderKL.from_config(config), f"{origin} (VAE)")
        model.register_to_config(scaling_factor=self.vae_scale_factor)
        return _fill(model, tensors, dtype, device, f"{origin} (VAE)")

    def _other_vae(self, name: str) -> tuple[Config, UnreadTensors]:
        mmap = not self.options.disable_mmap_load_safetensors
        path = local_path(name)
        if path is None:
            return fetch_vae(hub_id(name, "--vae"))
        if path.is_file():
            return vae_component(path, open_weights(path, mmap=mmap), self._usual_vae())
        folder = next((f for f in (path, path / "vae") if (f / "config.json").is_file()), None)
        if folder is None:
            raise UserError(f"--vae {name} is a folder without config.json, so it holds no VAE in diffusers' layout.")
        config = read_config(folder / "config.json") or {}
        if "latent_channels" not in config:
            raise UserError(f"--vae {name} is a {config.get('_class_name', 'model')}, not a VAE of Stable Diffusion.")
        return config, modern_vae_names(find_weights(folder, mmap=mmap).unread_all())


def _own_name(given: Path, resolved: Path) -> str:
    """The last part of a path, as it was given (a link has a name of its own) unless that says nothing."""
    return resolved.name if given.name in ("", "..") else given.name


def _architecture(name: str, identity: Identity, family: ModelFamily | None) -> Architecture:
    """What the model is. Raises UserError for one that ``family`` (None: any) does not train."""
    if identity.architecture is None:
        advice = identity.advice if family else "Give a base model of Stable Diffusion 1.x, 2.x or XL."
        raise UserError(f"{name} is {identity.what}. {advice}")
    if family and identity.architecture not in family.architectures:
        raise UserError(
            f"{name} is {identity.what}, but this script trains {family.title}. Use {identity.architecture.script} "
            "with the same options."
        )
    return identity.architecture


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        # The "!" that SD 2 and SDXL fill up with is a character of the text too, and not id 0 there.
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, model_max_length=77, split_special_tokens=True
        )
        ids = tokenizer("a photo").input_ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a damaged file leads to; panics of the Rust beneath are no Exception
        raise UserError(f"{folder} holds a tokenizer that cannot be read ({first_line(error)}).") from error
    if len(ids) < 3 or (ids[0], ids[-1]) != (START_OF_TEXT, END_OF_TEXT):
        raise UserError(f"{folder} does not hold a tokenizer of CLIP. Use the tokenizer that belongs to the model.")
    return tokenizer


def _widened(config: Config, tensors: UnreadTensors) -> tuple[Config, UnreadTensors]:
    """A U-Net of 4 channels as one that takes more, and heeds them as little as if they were not there."""
    first = tensors.get("conv_in.weight")
    if first is not None and first.ndim == 4:  # if not, what compares the shapes says so
        more = (0, 0, 0, 0, 0, INPAINTING_CHANNELS - first.shape[1])
        tensors["conv_in.weight"] = first.then(lambda weight: nn.functional.pad(weight, more))
    return config | {"in_channels": INPAINTING_CHANNELS}, tensors


def _empty(make: Callable[[], _Model], where: str) -> _Model:
    """A model without weights, made from its configuration. Raises UserError where that is impossible."""
    try:
        # Every weight is read afterwards. Initializing what holds no memory takes as long again as making the modules.
        with init_empty_weights(), no_init_weights():
            return make()
    except Exception as error:  # the libraries check little, so that a wrong value fails anywhere
        raise UserError(
            f"{where}: no model can be made from its config.json ({type(error).__name__}: {error}). Download the model "
            "again, or use another copy."
        ) from error


def _fill(model: _Model, tensors: UnreadTensors, dtype: torch.dtype, device: torch.device | str, where: str) -> _Model:
    """Read ``tensors`` into an empty model and freeze it. Raises UserError unless all fit."""
    _check_fit(model, tensors, where)
    fill = _filler(tensors, dtype, device)
    for name, module in model.named_modules():
        fill(module, f"{name}." if name else "")
    return _finished(model, device)


def _check_fit(model: nn.Module, tensors: UnreadTensors, where: str) -> None:
    """Compare names and shapes, before anything is read. Raises UserError unless all fit."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    misfits = [n for n, empty in wanted.items() if n in tensors and tensors[n].shape != empty.shape]
    for names, problem in ((missing, "is incomplete"), (unknown, "does not fit"), (misfits, "does not fit")):
        if names:
            what = "missing" if names is missing else "unknown to it" if names is unknown else "of another shape"
            raise UserError(
                f"{where} {problem}: {len(names)} of the model's tensors are {what}, for example {names[0]}. "
                "Download the model again, or use another copy."
            )


def _filler(tensors: UnreadTensors, dtype: torch.dtype, device: torch.device | str) -> Callable[[nn.Module, str], None]:
    """What reads a layer's own tensors, whose names begin with its path, and casts and moves them one at a time.

    ``tensors`` are taken out as they are read, so that nothing keeps what they were read from.
    """

    def fill(layer: nn.Module, path: str) -> None:
        for name in [name for name, _ in layer.named_parameters(recurse=False)]:
            tensor = tensors.pop(path + name).read().to(device=device, dtype=dtype).contiguous()
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    return fill


def _finished(model: _Model, device: torch.device | str) -> _Model:
    weights = chain(model.parameters(), model.buffers())  # those of 8 bits are buffers
    if sum(weight.numel() for weight in weights) >= _LARGE_MODEL:
        give_back()  # what was read and cast
    if torch.device(device).type != "cpu":
        model.to(device)  # what is not read from a file
    return model.requires_grad_(False).eval()
