"""States: all that ``--resume`` needs to go on with a training as if it had never stopped."""

import io
import json
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.atomic_files import write_atomically
from library.errors import UserError
from library.options import Options, as_dict, option_groups
from library.output_options import HubOptions, LoggingOptions, MetadataOptions, SampleOptions, SaveOptions

FILE = "state.pt"
_FORMAT = 1
_NOTE = """This folder holds the state of a Textual Inversion training, not an embedding.

Give it to --resume, with the command of the first run, to go on exactly where it was saved.
The embedding of the same moment is the file beside it.
"""

# A different optimizer or schedule could not make anything of what was saved.
_MUST_AGREE = ("optimizer", "schedule")
_WORD = ("token_string", "num_vectors_per_token")
# Where the run's files go and how fast it is may change; so may its length.
_MAY_CHANGE = {
    name
    for group in (SaveOptions, MetadataOptions, HubOptions, SampleOptions, LoggingOptions)
    for name in group.__dataclass_fields__
} | {
    "max_train_steps",
    "max_train_epochs",
    "init_word",
    "weights",
    "max_grad_norm",
    "config_file",
    "output_config",
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "cache_latents_to_disk",
    "skip_cache_check",
    "vae_batch_size",
    "console_log_file",
    "console_log_level",
    "console_log_simple",
    "ddp_timeout",
    "seed",  # what a run without one has drawn is in the state
}


@dataclass(frozen=True)
class TrainingState:
    """A training after ``step`` optimizer steps.

    ``epoch_closed`` tells whether all that is due at the end of an epoch was done, if the step ends one. ``starts``
    [N, D] per text encoder are the rows that the training began with, ``learner`` is what ``Learner.state_dict`` gives,
    ``epoch_losses`` are the losses of the epoch so far, ``random_states`` those of each process (see
    :func:`random_states`).
    """

    step: int
    epoch_closed: bool
    seed: int
    options: dict[str, Any]
    starts: list[Tensor]
    learner: dict[str, Any]
    epoch_losses: list[float]
    random_states: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write the folder; an older state in it is replaced at once or not at all. Raises UserError."""
        content = io.BytesIO()
        torch.save({"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}, content)
        write_atomically(folder / FILE, content.getvalue())
        write_atomically(folder / "README.txt", _NOTE.encode())

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """Read what :meth:`write` wrote. Raises UserError for anything else."""
        file = folder / FILE
        if not file.is_file():
            raise UserError(_no_state(folder))
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"--resume: {file} is damaged, or holds objects that cannot be read safely. "
                "Use an older state, or start from an embedding file with --weights."
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise UserError(f"--resume: {file} was written by another version. Start from a file with --weights.")
        return cls(**content)

    def check(self, options: Options) -> list[str]:
        """Compare with the options of a run that is to go on from here.

        Returns what differs in a way that makes the run another one. Raises UserError where it could not go on at all.
        """
        then, now = self.options, recorded(options)

        def shown(value: Any) -> Any:
            return "not given" if value in (None, "", []) else value

        groups = option_groups()
        needed = {*_WORD, *(name for group in _MUST_AGREE for name in groups[group].__dataclass_fields__)} - _MAY_CHANGE
        different = [name for name in now if name in then and now[name] != then[name]]
        for name in different:
            if name in needed:
                raise UserError(
                    f"--{name} was {shown(then[name])} when the state of --resume was saved, and is "
                    f"{shown(now[name])}. Give the same as then, or begin a new training from an embedding file "
                    "with --weights."
                )
        found = [name for name in different if name not in _MAY_CHANGE]
        changes = [f"--{name} was {shown(then[name])} and is {shown(now[name])}" for name in found]
        if options.training.seed not in (None, self.seed):
            changes.append(f"--seed was {self.seed} and is {options.training.seed}")
        return changes

    def starts_for(self, tables: Sequence[nn.Embedding]) -> list[Tensor]:
        """The rows that the training began with. Raises UserError where they are no rows of these tables."""
        widths = [start.shape[1] for start in self.starts]
        if widths != [table.embedding_dim for table in tables]:
            raise UserError(
                f"--resume: the vectors of the state have {' and '.join(map(str, widths))} numbers each, those of this "
                f"model {' and '.join(str(table.embedding_dim) for table in tables)}. Give the model of the first run."
            )
        return [start.to(table.weight.device) for start, table in zip(self.starts, tables, strict=True)]


def recorded(options: Options) -> dict[str, Any]:
    """The options as they are kept in a state: no secrets, and only what JSON knows."""
    return json.loads(json.dumps(as_dict(options), default=str))


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
