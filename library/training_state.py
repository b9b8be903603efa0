"""States: all that ``--resume`` needs to go on with a training as if it had never stopped."""

import io
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.atomic_files import write_atomically
from library.dataset import BatchedData
from library.errors import UserError, first_line
from library.options import Options, as_dict
from library.output_options import HubOptions, LoggingOptions, MetadataOptions, SampleOptions, SaveOptions
from library.state_fields import malformed_field
from library.torch_files import load_torch
from library.torch_pickle import DamagedError, RefusedError
from library.training_options import OptimizerOptions, ScheduleOptions

logger = logging.getLogger(__name__)

FILE = "state.pt"
_FORMAT = 1
_NOTE = """This folder holds the state of a Textual Inversion training, not an embedding.

Give it to --resume, with the command of the first run, to go on exactly where it was saved.
The embedding of the same moment is the file beside it.
"""

# A different optimizer or schedule could make nothing of what was saved, and the word is what the rows are of. What
# the rows began with needs not be said again, but it is what it was.
_MUST_AGREE = (
    {"token_string", "num_vectors_per_token", "init_word", "weights"}
    | set(OptimizerOptions.__dataclass_fields__)
    | set(ScheduleOptions.__dataclass_fields__)
) - {"max_grad_norm"}
_START = ("init_word", "weights")
# These change nothing in the vectors; the length is spoken of where it matters.
_MAY_CHANGE = {
    name
    for group in (SaveOptions, MetadataOptions, HubOptions, SampleOptions, LoggingOptions)
    for name in group.__dataclass_fields__
} | {
    "max_train_steps",
    "max_train_epochs",
    "config_file",
    "output_config",
    "dataset_config",  # what is in it counts
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "cache_latents_to_disk",
    "skip_cache_check",
    "vae_batch_size",
    "highvram",
    "lowram",
    "console_log_file",
    "console_log_level",
    "console_log_simple",
    "ddp_timeout",
    "ddp_gradient_as_bucket_view",
    "ddp_static_graph",
    "seed",  # what a run without one has drawn is in the state
}


@dataclass(frozen=True)
class TrainingState:
    """A training after ``step`` optimizer steps.

    ``total_steps`` were those of the whole run, ``data`` the fingerprint of its captions and settings, ``contents``
    that of its latents, or of its images where none were cached. ``epoch_closed`` tells whether all that is due at the
    end of an epoch was done, if the step ends one. ``starts`` [N, D] per text encoder are the rows that the training
    began with, ``learner`` is what ``Learner.state_dict`` gives, ``epoch_losses`` are the losses of the epoch so far,
    ``random_states`` those of each process (see :func:`random_states`).
    """

    step: int
    total_steps: int
    epoch_closed: bool
    seed: int
    data: str
    contents: str
    options: dict[str, Any]
    starts: list[Tensor]
    learner: dict[str, Any]
    epoch_losses: list[float]
    random_states: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write the folder; an older state in it is replaced at once or not at all. Raises UserError."""
        content = {"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        write_atomically(folder / FILE, packed(content))
        write_atomically(folder / "README.txt", _NOTE.encode())

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """Read what :meth:`write` wrote. Raises UserError for anything else."""
        file = folder / FILE
        if not file.is_file():
            raise UserError(_no_state(folder))
        try:
            with file.open("rb") as opened:
                content = load_torch(opened)
        except (DamagedError, RefusedError) as error:
            raise UserError(
                f"--resume: {file} is damaged, or holds objects that cannot be read safely. "
                "Use an older state, or start from an embedding file with --weights."
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT or content.keys() != _FIELDS:
            raise UserError(f"--resume: {file} was written by another version. Start from a file with --weights.")
        if (field := malformed_field(content)) is not None:
            raise UserError(
                f'--resume: {file} is damaged: its field "{field}" is not what a training writes. '
                "Use an older state, or start from an embedding file with --weights."
            )
        return cls(**content)

    def check(self, options: Options) -> None:
        """Raise UserError where a run with these options could not go on from here."""
        now = recorded(options)
        for name in sorted(_MUST_AGREE & self.options.keys()):
            then = self.options[name]
            if _alike(name, then, now[name]) or (name in _START and now[name] is None):
                continue
            raise UserError(
                f"--{name} was {_shown(then)} when the state of --resume was saved, and is {_shown(now[name])}. Give "
                "the same as then, or begin a new training from an embedding file with --weights."
            )

    def changes(self, options: Options, total_steps: int, data: str, processes: int) -> list[str]:
        """What makes a run that goes on from here another one than it would have been, in words."""
        now, then = recorded(options), self.options
        found = [
            f"--{name} was {_shown(then[name])} and is {_shown(now[name])}"
            for name in now.keys() & then.keys() - _MAY_CHANGE - _MUST_AGREE
            if now[name] != then[name]
        ]
        if options.training.seed not in (None, self.seed):
            found.append(f"--seed was {self.seed} and is {options.training.seed}")
        if data != self.data:
            found.append("the pictures, their captions or their settings are not the same")
        if processes != len(self.random_states):
            found.append(f"there were {len(self.random_states)} processes and are {processes}")
        if total_steps != self.total_steps and _depends_on_length(options.schedule):
            found.append(f"the schedule was over {self.total_steps} steps and is over {total_steps}")
        return sorted(found)

    def begun_alike(self, options: Options) -> Options:
        """The options with what the vectors really began with."""
        return replace(options, token=replace(options.token, **{name: self.options[name] for name in _START}))

    def starts_for(self, tables: Sequence[nn.Embedding]) -> list[Tensor]:
        """The rows that the training began with. Raises UserError where they are no rows of these tables."""
        widths = [start.shape[1] for start in self.starts]
        if widths != [table.embedding_dim for table in tables]:
            raise UserError(
                f"--resume: the vectors of the state have {' and '.join(map(str, widths))} numbers each, those of this "
                f"model {' and '.join(str(table.embedding_dim) for table in tables)}. Give the model of the first run."
            )
        return [start.to(table.weight.device) for start, table in zip(self.starts, tables, strict=True)]


_FIELDS = set(TrainingState.__dataclass_fields__)


def packed(content: dict[str, Any]) -> bytes:
    """The bytes of a state file. Raises UserError for what could not be read again."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        load_torch(file)
    except Exception as error:  # whatever an optimizer or a schedule of the user's own may hold
        raise UserError(
            f"The optimizer or the schedule keeps something that a state cannot hold ({first_line(error)}). Leave out "
            "--save_state and --save_state_on_train_end, or use another --optimizer_type or --lr_scheduler_type."
        ) from error
    return file.getvalue()


def _alike(name: str, then: Any, now: Any) -> bool:
    if name == "optimizer_type":  # case does not matter, and AdamW is what none means
        then, now = ((value or "AdamW").lower() for value in (then, now))
    return then == now


def _shown(value: Any) -> Any:
    return "not given" if value in (None, "", []) else value


def _depends_on_length(schedule: ScheduleOptions) -> bool:
    """Whether the rates depend on how many steps the run has; a class of the user's choice may."""
    if schedule.lr_scheduler_type:
        return True
    if any(isinstance(steps, float) for steps in (schedule.lr_warmup_steps, schedule.lr_decay_steps)):
        return True
    return schedule.lr_scheduler not in ("constant", "constant_with_warmup", "piecewise_constant", "inverse_sqrt")


def recorded(options: Options) -> dict[str, Any]:
    """The options as they are kept in a state: no secrets, and only what JSON knows."""
    return json.loads(json.dumps(as_dict(options), default=str))


def note_contents(data: BatchedData, options: Options, state: TrainingState | None) -> str:
    """What states say of images and latents, if any are saved; a warning where that of ``--resume`` says otherwise.

    It may take reading every file, so one process does.
    """
    if not (state or options.save.save_state or options.save.save_state_on_train_end):
        return ""
    if state and data.contents != state.contents:
        what = "cached latents or masks" if options.cache.cache_latents else "images or masks"
        logger.warning("The run will not reproduce the original run exactly: the %s are not the same.", what)
    return data.contents


def _no_state(folder: Path) -> str:
    if folder.is_file():
        return f"--resume: {folder} is a file, but a state is a folder. To start from an embedding file use --weights."
    if not folder.is_dir():
        return f"--resume: there is no folder {folder}. States are made by --save_state, in --output_dir."
    return (
        f"--resume: {folder} holds no {FILE}, so it is no state of this trainer, and others cannot be used; "
        "start from an embedding file with --weights."
    )


def random_states() -> dict[str, Any]:
    """This process's global random generators, which only datasets and optimizers of the user's own draw from."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set what :func:`random_states` gave."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
