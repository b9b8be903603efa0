"""States: all that ``--resume`` needs to go on with a training as if it had never stopped."""

import io
import json
import logging
import random
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.data.batched_data import BatchedData
from library.options.checks import chosen_optimizer
from library.options.console import silenced
from library.options.declaration import OnResume
from library.options.options import Options, as_dict, options_with
from library.options.training import OptimizerOptions, ScheduleOptions
from library.support.atomic_files import write_atomically, write_folder
from library.support.errors import UserError, first_line
from library.support.torch_files import load_torch
from library.support.torch_pickle import DamagedError, RefusedError
from library.training.optimizers import build_optimizer, known_optimizer, trusted_modules
from library.training.save_schedule import CheckpointNames
from library.training.state_fields import malformed_field

logger = logging.getLogger(__name__)

FILE = "state.pt"
_FORMAT = 1
_NOTE = """This folder holds the state of a Textual Inversion training, not an embedding.

Give it to --resume, with the command of the first run, to resume exactly where it was saved.
The embedding of the same moment is the file beside it.
"""

# Options by what becomes of another value than the state's.
_MUST_AGREE = options_with(OnResume.REFUSED)
_START = options_with(OnResume.STATE_COUNTS)
_OPTIMIZER = set(options_with(OnResume.OPTIMIZER))
_RATES = set(options_with(OnResume.RECORDED))
_SAID = _RATES.union(options_with(OnResume.SAID))


@dataclass(frozen=True)
class TrainingState:
    """A training after ``step`` optimizer steps.

    ``total_steps`` were those of the whole run, ``data`` the fingerprint of its captions and settings, ``contents``
    that of its latents, or of its images where none were cached. ``epoch_closed`` tells whether all that is due at the
    end of an epoch was done, if the step ends one. ``starts`` [N, D] per text encoder are the rows that the training
    began with, ``learner`` is what ``Learner.state_dict`` gives, ``epoch_losses`` are the losses of the epoch so far,
    ``random_states`` those of each process (see :func:`random_states`). ``run`` is what all files of the run hold ("",
    as in ``contents``: not known), ``base`` the checkpoint's hash if it has one; ``resumed`` tells what ``--resume``
    has changed so far. ``stopping`` is what ``EarlyStopping.state_dict`` gives, ``averaging``
    what ``TailAverage.state_dict`` does.
    """

    step: int
    total_steps: int
    epoch_closed: bool
    seed: int
    data: str
    options: dict[str, Any]
    starts: list[Tensor]
    learner: dict[str, Any]
    epoch_losses: list[float]
    random_states: list[dict[str, Any]]
    run: str = ""
    base: str | None = None
    resumed: str | None = None
    contents: str = ""
    stopping: dict[str, Any] | None = None
    averaging: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path | None:
        """Make the folder, or replace an older state of the same run in it, at once or not at all. Raises UserError.

        What else stands in the place moves to the next free number; its new path is returned.
        """
        content = packed({"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}})
        if run_of_state(folder) == self.run:
            write_atomically(folder / FILE, content)
            return None
        return write_folder(folder, {"README.txt": _NOTE.encode(), FILE: content})

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """Read what :meth:`write` wrote. Raises UserError for anything else."""
        file = folder / FILE
        try:
            if not file.is_file():
                raise UserError(_no_state(folder))
            with file.open("rb") as opened:
                content = load_torch(opened)
        except OSError as error:
            raise UserError(f"--resume: {file} cannot be read: {error.strerror or error}.") from error
        except (DamagedError, RefusedError) as error:
            raise UserError(
                f"--resume: {file} is damaged, or holds objects that cannot be read safely. "
                "Use an older state, or start from an embedding file with --weights."
            ) from error
        number = content.pop("format", None) if isinstance(content, dict) else None
        known = isinstance(number, int) and number == _FORMAT
        if not known or not _NEEDED <= content.keys() <= _FIELDS:
            raise UserError(f"--resume: {file} was written by another version. Start from a file with --weights.")
        if (field := malformed_field(content)) is not None:
            raise UserError(
                f'--resume: {file} is damaged: its field "{field}" is not what a training writes. '
                "Use an older state, or start from an embedding file with --weights."
            )
        return cls(**content)

    @classmethod
    def latest(cls, folder: Path, names: CheckpointNames) -> Path:
        """The folder of the state that was saved last under these names in ``folder``.

        What is damaged is said and passed over. Raises UserError if none is whole.
        """
        try:
            paths = [path for path in folder.iterdir() if names.is_state(path.name)]
        except FileNotFoundError:
            paths = []
        except OSError as error:
            raise UserError(f"--resume=latest: {folder} cannot be read: {error.strerror or error}.") from error
        found = [(_modified(path / FILE), path) for path in paths]
        for _, path in sorted(((when, path) for when, path in found if when is not None), reverse=True):
            try:
                cls.read(path)
            except UserError as error:
                logger.warning("--resume=latest passes over a state: %s", error)
            else:
                return path
        raise UserError(
            f"--resume=latest: {folder} holds no state of {names.last()} that can be used. States are made by "
            "--save_state; to begin a new training leave --resume out."
        )

    def check(self, options: Options) -> None:
        """Raise UserError where a run with these options could not go on from here."""
        now = recorded(options)
        for name in _MUST_AGREE:
            if name in self.options and self.options[name] != now[name]:
                raise UserError(_not_as_then(f"--{name}", self.options[name], now[name]))
        if _OPTIMIZER & self.options.keys():
            then, given = self._optimizer(options.optimizer), _described(options.optimizer)
            if then != given:
                raise UserError(_not_as_then("The optimizer", then, given))
        for name in _START:
            chosen = name == "init_word" and options.token.chooses_start  # the state holds the word that was
            if now[name] not in (None, self.options.get(name, now[name])) and not chosen:
                logger.warning(
                    "--%s has no effect on a resumed run: the vectors are those of the state, which began with %s.",
                    name,
                    " and ".join(str(self.options[each]) for each in _START if self.options[each]) or "neither",
                )

    def check_base(self, base: str | None) -> None:
        """Raise UserError where the checkpoint of this hash is another one than the state's."""
        if None not in (base, self.base) and base != self.base:
            raise UserError(
                "--pretrained_model_name_or_path is another model than the one of the saved state: their SHA-256 are "
                f"{base} and {self.base}. Use the model of the first run, or begin a new training from an embedding "
                "file with --weights."
            )

    def _optimizer(self, given: OptimizerOptions) -> str:
        """The optimizer of the state with its arguments.

        A state may come from anybody: a module that it alone names is not imported, for that would run its code.
        """
        then = OptimizerOptions(**{name: self.options[name] for name in _OPTIMIZER & self.options.keys()})
        try:
            if known_optimizer(chosen_optimizer(then)).module in trusted_modules(given):
                return _described(then)
        except (UserError, TypeError, AttributeError):  # a package that is gone, or values of other types
            pass
        return f"{then.optimizer_type or 'AdamW'} {then.optimizer_args or ''}".strip()

    def changes(
        self, options: Options, total_steps: int, data: str, processes: int, base: str | None = None
    ) -> list[str]:
        """What makes a run that goes on from here another one than it would have been, in words."""
        now, then = recorded(options), self.options
        if base is not None and base == self.base:  # the same checkpoint, wherever it is now
            then = {name: value for name, value in then.items() if name != "pretrained_model_name_or_path"}
        found = _differences(then, now, _SAID)
        if options.training.seed not in (None, self.seed):
            found.append(f"--seed was {self.seed} and is {options.training.seed}")
        if data != self.data:
            found.append("the images, their captions or their settings are not the same")
        if processes != (was := len(self.random_states)):
            found.append(f"the state was saved with {was} {'process' if was == 1 else 'processes'}, now {processes}")
        if total_steps != self.total_steps and _depends_on_length(options.schedule):
            found.append(f"the schedule was over {self.total_steps} steps and is over {total_steps}")
        return sorted(found)

    def differs_from(self, contents: str) -> bool:
        """Whether the images or latents were others; where that is not known they count as the same."""
        return self.contents not in ("", contents)

    def other_rates(self, options: Options) -> list[str]:
        """How the learning rate and its schedule differ from what they were, in words."""
        return _differences(self.options, recorded(options), _RATES)

    def begun_alike(self, options: Options) -> Options:
        """The options with what the vectors really began with."""
        return replace(options, token=replace(options.token, **{name: self.options[name] for name in _START}))

    def set_random_states(self, process: int) -> None:
        """Set the global random generators of this process as they were, if it was there."""
        if process < len(self.random_states):
            set_random_states(self.random_states[process])

    def resumed_with(self, options: Options, total_steps: int) -> str | None:
        """What resuming has changed so far in rates and length, for the record of an embedding file (and no paths)."""
        new = self.other_rates(options)
        if total_steps != self.total_steps:
            new.append(f"{total_steps} steps instead of {self.total_steps}")
        now = [f"after step {self.step}: {'; '.join(new)}"] if new else []
        return " | ".join([*([self.resumed] if self.resumed else []), *now]) or None

    def starts_for(self, tables: Sequence[nn.Embedding]) -> list[Tensor]:
        """The rows that the training began with. Raises UserError where they are no rows of these tables."""
        widths = [start.shape[1] for start in self.starts]
        if widths != [table.embedding_dim for table in tables]:
            raise UserError(
                f"--resume: the vectors of the state have {' and '.join(map(str, widths))} dimensions, those of this "
                f"model {' and '.join(str(table.embedding_dim) for table in tables)}. Give the model of the first run."
            )
        return [start.to(table.weight.device) for start, table in zip(self.starts, tables, strict=True)]


def _modified(file: Path) -> int | None:
    """When it last changed (ns); None where there is no file, 0 where that is not to be learned."""
    try:
        return file.stat().st_mtime_ns if file.is_file() else None
    except OSError:
        return 0


_FIELDS = set(TrainingState.__dataclass_fields__)
# Those that came later have a default.
_NEEDED = {field.name for field in fields(TrainingState) if field.default is MISSING}


def run_of_state(folder: Path) -> str | None:
    """The run that saved the state in ``folder``; None where that is not known, or it is not a state."""
    try:
        return TrainingState.read(folder).run or None
    except UserError:
        return None


def packed(content: dict[str, Any]) -> bytes:
    """The bytes of a state file. Raises UserError for what could not be read again."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        load_torch(file)
    except Exception as error:  # whatever an optimizer or a schedule of the user's own may hold
        raise UserError(
            f"The optimizer or the schedule has state that cannot be saved ({first_line(error)}). Leave out "
            "--save_state and --save_state_on_train_end, or use another --optimizer_type or --lr_scheduler_type."
        ) from error
    return file.getvalue()


def _described(options: OptimizerOptions) -> str:
    """An optimizer as a record names it, however it was asked for."""
    with silenced():  # what there is to say is said when the real one is built
        return build_optimizer(replace(options, learning_rate=None), [nn.Parameter(torch.zeros(1, 1))]).description


def _not_as_then(what: str, then: Any, now: Any) -> str:
    return (
        f"{what} was {_shown(then)} when the state of --resume was saved, and is {_shown(now)}. Give the same as then, "
        "or begin a new training from an embedding file with --weights."
    )


def _differences(then: dict[str, Any], now: dict[str, Any], names: Set[str]) -> list[str]:
    return sorted(
        f"--{name} was {_shown(then[name])} in the saved state and is now {_shown(now[name])}"
        for name in names & then.keys()
        if now[name] != then[name]
    )


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
    content: dict[str, Any] = json.loads(json.dumps(as_dict(options), default=str))
    return content


def note_contents(data: BatchedData, options: Options, state: TrainingState | None) -> str:
    """What states say of images and latents, if any are saved; a warning where that of ``--resume`` says otherwise.

    It may take reading every file, so one process does.
    """
    if not (state or options.save.save_state or options.save.save_state_on_train_end):
        return ""
    if state and state.differs_from(data.contents):
        what = "cached latents or masks" if options.cache.cache_latents else "images or masks"
        logger.warning("The run will not reproduce the original run exactly: the %s are not the same.", what)
    return data.contents


def _no_state(folder: Path) -> str:
    if folder.is_file():
        return f"--resume: {folder} is a file, but a state is a folder. To start from an embedding file use --weights."
    return (
        f"--resume: {folder} holds no {FILE}, so it was not saved by this trainer; "
        "start from an embedding file with --weights."
    )


def random_states() -> dict[str, Any]:
    """This process's global random generators, which only datasets and optimizers of the user's own draw from."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
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


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Within a ``with``: whatever draws from the global generators, the training goes on with them as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
