"""Logs for TensorBoard and Weights & Biases, through accelerate's trackers: what is logged, and where."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from library.options.declaration import required
from library.options.options import Options, as_dict, declared_options
from library.options.output import LoggingOptions
from library.output.metrics_file import Line
from library.support.errors import UserError, first_line, survived
from library.support.text_files import parse_toml, read_text
from library.training.callbacks import Callback, StepResult
from library.training.progress import Progress
from library.training.state import TrainingState, random_states_kept

PROJECT = "textual_inversion"
_TRACKERS = ("tensorboard", "wandb")  # and the packages they need


def check_trackers(options: LoggingOptions) -> None:
    """Raise UserError, before any model is loaded, for what would keep a run from logging."""
    for name in options.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"Logging to {name} needs its package: pip install {name}. Or leave it out.")
    if "tensorboard" in options.trackers and options.logging_dir is None:
        raise UserError(f"--log_with {options.log_with} needs --logging_dir, the folder for TensorBoard's files.")
    if options.trackers:
        _settings(options)


def _settings(options: LoggingOptions) -> dict[str, dict[str, Any]]:
    """Arguments of each tracker, by its name: those of --log_tracker_config alone, if there is such a file."""
    file = options.log_tracker_config
    if file is None:
        return {"wandb": {"name": options.wandb_run_name}} if options.wandb_run_name else {}
    what = f"--log_tracker_config {file}"
    settings = parse_toml(read_text(file, what), what)
    strange = [name for name, values in settings.items() if name not in _TRACKERS or not isinstance(values, dict)]
    if strange:
        raise UserError(f"{what} holds {', '.join(strange)}; it may hold the tables [tensorboard] and [wandb].")
    return settings


# In a line of the metrics, what the log has under names of its own, or by its own clock.
_LOGGED_ELSEWHERE = {"step", "seconds", "loss", "loss/validation", "lr", "lr/d*lr"}
_OF_A_VECTOR = ("moved/", "cosine/", "norm/")


class RunLog(Callback):
    """What one run tells its trackers. All steps are optimizer steps; only the main process writes.

    Losses and learning rates have the names that sd-scripts gives them; :func:`measured` names what comes besides.
    """

    def __init__(self, trackers: Sequence[GeneralTracker], options: LoggingOptions) -> None:
        self.trackers, self.every = list(trackers), options.log_every_n_steps
        self.epoch_losses: list[float] = []
        self._unlogged: list[float] = []

    @classmethod
    def start(cls, options: Options) -> "RunLog":
        """Open the logs; ``--log_config`` writes the options into them. The Accelerator must exist."""
        logs, trackers = options.logging, []
        project, settings = logs.log_tracker_name or PROJECT, _settings(logs) if logs.trackers else {}
        # accelerate leaves it to its callers that only one process opens a run at Weights & Biases.
        for name in logs.trackers if PartialState().is_main_process else ():
            given = settings.get(name, {})
            if name == "tensorboard":
                trackers.append(TensorBoardTracker(project, _log_folder(logs), **given))
            else:
                _prepare_wandb(logs)
                trackers.append(WandBTracker(project, **given))
        for tracker in trackers:
            with _begun(tracker.name):
                tracker.start()
                if logs.log_config:
                    tracker.store_init_configuration(loggable(options))
        return cls(trackers, logs)

    def values(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers and texts by name, as they are after ``step`` optimizer steps."""
        self._tell(lambda tracker: tracker.log(dict(values), step=step))

    def told(self, line: Line) -> None:
        """Log what was measured, as one of the readers of the measurements."""
        if found := measured(line):
            self.values(found, line["step"])

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log an image."""
        self._show({name: np.asarray(picture.convert("RGB"))}, step)

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Take over the losses of an epoch that was begun before."""
        if state:
            self.epoch_losses = list(state.epoch_losses)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Log the learning rates of a step by name, and the mean loss since the last step that was logged."""
        if result.loss is not None:
            self.epoch_losses.append(result.loss)
            self._unlogged.append(result.loss)
            if progress.step % self.every == 0:
                self.values({"loss": float(np.mean(self._unlogged)), **result.rates}, progress.step)
                self.values({"loss/smoothed": result.smoothed}, progress.step)
                self._unlogged = []

    def after_epoch(self, progress: Progress) -> None:
        """Log the mean loss of the epoch's steps."""
        if self.epoch_losses:
            self.values({"loss/epoch": float(np.mean(self.epoch_losses))}, progress.step)
        self.epoch_losses = []

    def after_validation(self, progress: Progress, loss: float) -> None:
        """Log the loss on held-out images."""
        self.values({"loss/validation": loss}, progress.step)

    def after_samples(self, progress: Progress, images: Mapping[int, np.ndarray]) -> None:
        """Log the sample images."""
        self._show({f"sample_{number}": image for number, image in images.items()}, progress.step)

    def _show(self, images: Mapping[str, np.ndarray], step: int) -> None:
        def tell(tracker: GeneralTracker) -> None:
            shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for name, image in images.items():
                tracker.log_images({name: image[None]}, step=step, **shape)

        self._tell(tell)

    def close(self) -> None:
        """Close the logs."""
        self._tell(lambda tracker: tracker.finish())
        self.trackers = []

    def _tell(self, tell: Callable[[GeneralTracker], None]) -> None:
        """Tell every tracker; one that fails (a full disk, a lost connection) is told nothing more."""
        told = []
        for tracker in self.trackers:
            with survived(f"The log of {tracker.name} ends here; the training goes on."):
                tell(tracker)
                told.append(tracker)
        self.trackers = told


def measured(line: Line) -> dict[str, float | str]:
    """What a log shows of a line of the metrics, by its names there.

    What is of the vectors stands in a group of its own, the words nearest to each of them as text.
    """
    found: dict[str, float | str] = {}
    for name, value in line.items():
        if isinstance(value, float) and name not in _LOGGED_ELSEWHERE:
            found[f"vectors/{name}" if name.startswith(_OF_A_VECTOR) else name] = value
    for label, words in line.get("nearest", {}).items():
        found[f"vectors/nearest/{label}"] = ", ".join(f"{word} ({cosine:.2f})" for word, cosine in words)
    if "start_words" in line:
        found["start_words"] = ", ".join(f"{word} ({loss:.4f})" for word, loss in line["start_words"])
    if line.get("chosen"):
        found["chosen"] = line["chosen"]
    if "verdict" in line:
        found["verdict"] = f"{line['verdict']}: {line['reason']}"
    return found


@contextmanager
def _begun(name: str) -> Iterator[None]:
    """Within a ``with``: a tracker begins; what is random in the training stays as it is. Raises UserError."""
    try:
        with random_states_kept():
            yield
    except Exception as error:  # each tracker fails in its own way: no key, no server, a folder that cannot be written
        raise UserError(
            f"Logging to {name} cannot begin: {first_line(error)} Put that right, or leave --log_with out."
        ) from error


def _log_folder(options: LoggingOptions) -> Path:
    """A folder of this run's own in --logging_dir."""
    return (
        Path(required(options.logging_dir, "logging_dir")) / f"{options.log_prefix or ''}{datetime.now():%Y%m%d%H%M%S}"
    )


def _prepare_wandb(options: LoggingOptions) -> None:
    if options.logging_dir is not None:
        Path(options.logging_dir).mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_DIR"] = options.logging_dir
    if logging.getLogger("library").level > logging.INFO:  # --console_log_level rules what it prints, too
        os.environ.setdefault("WANDB_SILENT", "true")
    if options.wandb_api_key is not None:
        import wandb

        wandb.login(key=options.wandb_api_key)


def loggable(options: Options) -> dict[str, bool | int | float | str]:
    """The options that are given, as a log may show them: no secrets, no paths; lists and the like as text."""
    private = {name for name, option in declared_options() if option.secret or option.is_place}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in as_dict(options).items()
        if value is not None and name not in private
    }
