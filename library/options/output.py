"""Options about what comes out: embedding files, metadata, uploads, sample images, logs.

Each is declared once, here, with the help a user sees.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from library.options import declaration
from library.options.declaration import OnResume
from library.options.option_types import text_or_boolean, whole_number
from library.support.errors import did_you_mean

SAMPLERS: tuple[str, ...] = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver")
SAMPLERS += ("dpmsolver++", "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a")
REPO_TYPES = ("model", "dataset", "space")
VISIBILITIES = ("public", "private")
# File systems take names of 255 bytes; "-step00001600-state" and the marks of an unfinished file come on top.
LONGEST_NAME = 200

# What a run leaves changes nothing in its vectors.
option = partial(declaration.option, on_resume=OnResume.FREE)
flag = partial(declaration.flag, on_resume=OnResume.FREE)


def _file_name(name: str) -> str | None:
    """What is wrong with the name of the embedding files."""
    if re.search(r"[/\\\x00-\x1f]", name):
        return f'"{name}" is no file name. The folder belongs in --output_dir.'
    if (length := len(os.fsencode(name))) > LONGEST_NAME:
        return (
            f'"{name[:20]}…" is too long for a file name: {length} bytes. At most {LONGEST_NAME} leave room for the '
            "step and the ending."
        )
    return None


def _repository(name: str) -> str | None:
    """What is wrong with the name of a repository."""
    return None if re.fullmatch(r"[^/\s]+/[^/\s]+", name) else f'is "{name}"; it must be user/name.'


def _one_of(known: tuple[str, ...]) -> Callable[[str], str | None]:
    """A check for a few words that sd-scripts takes as any text."""

    def check(value: str) -> str | None:
        right = value in known
        return None if right else f'is "{value}"; it must be one of {", ".join(known)}.{did_you_mean(value, known)}'

    return check


def _count(help: str, **details: Any) -> Any:
    """A number of epochs, steps or files; unset, or 0, switches off what it counts."""
    return option(None, help, read=whole_number, zero_is_off=True, **details)


@dataclass(frozen=True)
class SaveOptions:
    """Saving"""

    output_dir: str | None = option(None, "Folder for the embedding files; made if missing.", metavar="DIR")
    output_name: str | None = option(
        None,
        "File name without ending. Most programs use it as the word to type in a prompt. Unset: the token string.",
        metavar="NAME",
        check=_file_name,
    )
    save_model_as: str = option(
        "safetensors",
        "File format. safetensors suits every current program; pt and ckpt are for old ones.",
        choices=("ckpt", "pt", "safetensors"),
    )
    save_precision: str | None = option(
        None,
        "Number format in the file. Unset: float (32 bits), the only one that stable-diffusion.cpp reads; the file has "
        "a few kilobytes either way.",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = _count("Also save after every n-th epoch.", yields_to=("save_n_epoch_ratio",))
    save_every_n_steps: int | None = _count(
        "Also save after every n-th step. Typical: 100 to 250; an embedding is often best before the end."
    )
    save_n_epoch_ratio: int | None = _count("Save about this many times, evenly; wins over --save_every_n_epochs.")
    save_last_n_epochs: int | None = _count(
        "Keep only the last n epoch files. Unset: all.",
        needs=(
            "save_every_n_epochs",
            "save_n_epoch_ratio",
        ),
    )
    save_last_n_steps: int | None = _count(
        "Keep only the step files of the last n steps (steps, not files). Unset: all.", needs=("save_every_n_steps",)
    )
    save_last_n_epochs_state: int | None = _count(
        "The same for states. Unset: as --save_last_n_epochs.", needs=("save_state",)
    )
    save_last_n_steps_state: int | None = _count(
        "The same for states. Unset: as --save_last_n_steps.", needs=("save_state",)
    )
    save_state: bool = flag("With each saved file, also save what --resume needs to resume exactly from there.")
    save_state_on_train_end: bool = flag("Save that state at the end only.")
    resume: str | None = option(
        None,
        "Folder of a saved state to go on from; latest: the newest one of --output_name in --output_dir. To start from "
        "an embedding file use --weights.",
        metavar="DIR",
    )


@dataclass(frozen=True)
class MetadataOptions:
    """Metadata of the file (safetensors only)"""

    metadata_title: str | None = option(None, "Title. Unset: the output name.")
    metadata_author: str | None = option(None, "Author.")
    metadata_description: str | None = option(None, "Description.")
    metadata_license: str | None = option(None, "Licence.")
    metadata_tags: str | None = option(None, "Tags, separated by commas.")
    metadata_usage_hint: str | None = option(None, "How to use the embedding.")
    metadata_thumbnail: str | None = option(None, "Small image: a file, or a data:image/… URL.", metavar="FILE")
    metadata_merged_from: str | None = option(None, "What the embedding was merged from.")
    metadata_trigger_phrase: str | None = option(None, "Word to type in a prompt. Unset: the file's name.")
    metadata_preprocessor: str | None = option(None, "Preprocessor.")
    metadata_is_negative_embedding: str | None = option(
        None, "true for an embedding meant for the negative prompt.", read=text_or_boolean, metavar="true|false"
    )
    training_comment: str | None = option(None, "Any text; model managers show it.")
    no_metadata: bool = flag(
        "Leave out how the file was trained: the base model's name and hash, images, tags of the captions, settings. "
        "What clients need stays, and so do the fields above."
    )


@dataclass(frozen=True)
class HubOptions:
    """Upload to the Hugging Face hub"""

    huggingface_repo_id: str | None = option(
        None, "Repository for the saved files, user/name; made if missing.", metavar="USER/NAME", check=_repository
    )
    huggingface_repo_type: str | None = option(
        None,
        "Kind of repository: model, dataset or space. Unset: model.",
        check=_one_of(REPO_TYPES),
        needs=("huggingface_repo_id",),
    )
    huggingface_path_in_repo: str | None = option(
        None, "Folder inside the repository. Unset: its top.", metavar="DIR", needs=("huggingface_repo_id",)
    )
    huggingface_token: str | None = option(
        None,
        "Access token. Better kept in the environment variable HF_TOKEN: a command line is visible to others.",
        secret="HF_TOKEN",
        needs=(
            "huggingface_repo_id",
            "resume_from_huggingface",
        ),
    )
    huggingface_repo_visibility: str | None = option(
        None,
        "public, or private (also when unset). Only for a repository that is made anew.",
        check=_one_of(VISIBILITIES),
        needs=("huggingface_repo_id",),
    )
    save_state_to_huggingface: bool = flag(
        "Upload states too.",
        needs=(
            "save_state",
            "save_state_on_train_end",
        ),
    )
    resume_from_huggingface: bool = flag("--resume names a state on the hub: user/name/path[:revision[:type]].")
    async_upload: bool = flag("Upload in the background; the last file is waited for.", needs=("huggingface_repo_id",))


@dataclass(frozen=True)
class SampleOptions:
    """Sample images during training"""

    sample_prompts: str | None = option(
        None,
        "File of prompts (.txt, .toml or .json) that are drawn during training.",
        metavar="FILE",
        needs=(
            "sample_every_n_steps",
            "sample_every_n_epochs",
            "sample_at_first",
        ),
    )
    sample_every_n_steps: int | None = _count(
        "Draw them after every n-th step. Typical: 100 to 250.", yields_to=("sample_every_n_epochs",)
    )
    sample_every_n_epochs: int | None = _count("Draw them after every n-th epoch; wins over --sample_every_n_steps.")
    sample_at_first: bool = flag("Draw them before training too, to compare with.")
    sample_sampler: str = option(
        "ddim",
        "Sampler for the images, where a prompt names none.",
        choices=SAMPLERS,
        needs=(
            "sample_every_n_steps",
            "sample_every_n_epochs",
            "sample_at_first",
            "learning_report",
        ),
    )
    learning_report: bool = flag(
        "At the end, measure what the token learned: loss, and distance of images to the training's, with --init_word "
        "and with the token, and write the images of both side by side. Takes as long as drawing 32 images."
    )

    @property
    def draws_during_training(self) -> bool:
        """Whether --sample_prompts are drawn at any time."""
        return bool(self.sample_at_first or self.sample_every_n_steps or self.sample_every_n_epochs)

    @property
    def draws_images(self) -> bool:
        """Whether the run needs a decoder at all."""
        return self.learning_report or self.draws_during_training


@dataclass(frozen=True)
class LoggingOptions:
    """Report, and logging to TensorBoard or Weights & Biases"""

    no_report: bool = flag(
        "Leave out the report: <output_name>.html, which shows the run in a browser while it trains and afterwards, "
        "the metrics file that it is drawn from, and the text file on how to use the embedding (which is printed then)."
    )
    log_every_n_steps: int = option(
        1,
        "Log every n-th step, with the mean loss of the steps since the last one logged. For the report and the "
        "metrics file as for TensorBoard and Weights & Biases.",
        read=whole_number,
        at_least=1,
    )

    logging_dir: str | None = option(None, "Folder for TensorBoard logs; giving it switches logging on.", metavar="DIR")
    log_with: str | None = option(
        None,
        "Where to log. Unset: tensorboard if --logging_dir is given.",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(
        None,
        "Start of the log folder's name, before the time.",
        needs=(
            "logging_dir",
            "log_with",
        ),
    )
    log_tracker_name: str | None = option(
        None,
        "Project name in the logs. Unset: textual_inversion.",
        needs=(
            "logging_dir",
            "log_with",
        ),
    )
    log_tracker_config: str | None = option(
        None,
        "TOML file with further settings for the tracker.",
        metavar="FILE",
        needs=(
            "logging_dir",
            "log_with",
        ),
    )
    log_config: bool = flag(
        "Write all options into the log (never secrets or paths).",
        needs=(
            "logging_dir",
            "log_with",
        ),
    )
    wandb_run_name: str | None = option(
        None,
        "Name of the run in Weights & Biases.",
        needs=(
            "log_with wandb",
            "log_with all",
        ),
        yields_to=("log_tracker_config",),
    )
    wandb_api_key: str | None = option(
        None,
        "Key for Weights & Biases. Better kept in the environment variable WANDB_API_KEY: a command line is visible "
        "to others.",
        secret="WANDB_API_KEY",
        needs=(
            "log_with wandb",
            "log_with all",
        ),
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where a run logs to: "tensorboard", "wandb", both, or nowhere."""
        if self.log_with is None:
            return ("tensorboard",) if self.logging_dir is not None else ()
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)
