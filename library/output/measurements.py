"""What a run measures while it goes: measured once, and told to all who note or show it (files, pages, trackers)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from torch import Tensor

from library.embedding.start_words import RankedWord
from library.model.device_report import peak_memory
from library.output.metrics_file import Line
from library.output.vector_meter import VectorMeter, VectorState
from library.support.errors import Attempts
from library.training.callbacks import Callback, StepResult
from library.training.loss_bands import LossBands
from library.training.optimizer_step import Learner
from library.training.progress import Progress
from library.training.save_schedule import Action
from library.training.state import TrainingState


class Measurements(Callback):
    """Measures every so many steps and at every save; each of the ``readers`` is told a line of the metrics file.

    Only the main process has them. ``bands`` are None where nobody reads them. ``clock`` tells the time and the speed.
    """

    def __init__(
        self,
        learner: Learner,
        meter: VectorMeter,
        bands: LossBands | None,
        *,
        every: int,
        result: str,
        ranking: Sequence[RankedWord] = (),
    ) -> None:
        """``every`` is --log_every_n_steps, ``result`` the name of the embedding file in the end.

        ``ranking`` are the words that were tried as a start, best first.
        """
        self.learner, self.meter, self.bands = learner, meter, bands
        self.every, self.result, self.ranking = every, result, ranking
        self.readers: list[Callable[[Line], None]] = []
        self.clock, self._pending = StepClock(), _Pending()
        self._attempts = Attempts("Measuring the run failed; the training goes on.")

    def tell(self, line: Line) -> None:
        """Tell the readers; each sees to it that nothing goes wrong with it."""
        for reader in self.readers:
            reader(line)

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Tell which words a new run's vectors start from."""
        if self.ranking:
            words = [[one.word, round(one.loss, 5)] for one in self.ranking]
            self.tell({"step": progress.step, "start_words": words})
        if state is None:
            self._tell_nearest({"step": progress.step}, self.meter.starts)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Take note, and tell every so many steps."""
        self.clock.step_done(result.seconds)
        if result.loss is not None:
            self._pending.losses.append(result.loss)
        self._pending.rates, self._pending.step = result.rates, progress.step
        if progress.step % self.every == 0:
            self.flush()

    def after_validation(self, progress: Progress, loss: float) -> None:
        """Tell the loss on held-out images."""
        self.tell({"step": progress.step, "loss/validation": loss})

    def after_fixed_loss(self, progress: Progress, loss: float) -> None:
        """Tell the loss with fixed noise."""
        self.tell({"step": progress.step, "loss/fixed": loss})

    def after_save(self, progress: Progress, action: Action) -> None:
        """Tell which words the saved vectors are near to."""
        self.flush()
        if action.kind == "save":
            line: Line = {"step": progress.step, "result" if action.name == self.result else "saved": action.name}
            if self.learner.result is not None:
                line |= {"result_step": self.learner.result.step, "chosen": self.learner.result.chosen}
            with self.learner.averaged_rows() as rows:
                self._tell_nearest(line, rows)

    def flush(self) -> None:
        """Tell what the steps since the last time have measured, and warn of vectors that went too far."""
        pending, self._pending = self._pending, _Pending()
        if not pending.losses:
            return
        line = None
        with self._attempts.survived():
            states = self.meter.states(self.learner.values())
            self.meter.warn_if_far(states, pending.step)
            line = self._measured(pending, states)
        if line:
            self.tell(line)

    def _measured(self, pending: "_Pending", states: Sequence[VectorState]) -> Line:
        """The line of a logged step."""
        line: Line = {"step": pending.step, "loss": sum(pending.losses) / len(pending.losses)}
        line |= self.bands.take() if self.bands else {}
        line |= {**pending.rates, "gradient_norm": self.learner.gradient_norm}
        for state in states:
            label, moved = state.label, state.moved
            line |= {f"moved/{label}": moved.percent, f"cosine/{label}": moved.cosine, f"norm/{label}": moved.norm}
        memory = peak_memory(self.learner.accelerator.device)
        return {
            **line,
            "seconds": self.clock.seconds,
            "steps_per_second": self.clock.steps_per_second,
            "memory_gib": memory,
        }

    def _tell_nearest(self, line: Line, rows: Sequence[Tensor]) -> None:
        """Tell the line, and the words nearest to each of the vectors with their cosines."""
        found: dict[str, Any] = {}
        with self._attempts.survived():
            if self.readers:
                nearest = self.meter.nearest(rows)
                found = {label: [[one.word, round(one.cosine, 4)] for one in words] for label, words in nearest.items()}
        self.tell({**line, "nearest": found})


@dataclass
class _Pending:
    """What was heard since the readers were told last."""

    losses: list[float] = field(default_factory=list)
    rates: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


class StepClock:
    """Time since the training began, pauses included, and how fast the steps were, pauses left out."""

    def __init__(self, before: float = 0.0) -> None:
        """``before``: seconds that the run took before it was resumed."""
        self.began, self.before = monotonic(), before
        self.steps, self.stepping = 0, 0.0

    @property
    def seconds(self) -> float:
        """Of the whole run so far."""
        return self.before + monotonic() - self.began

    @property
    def steps_per_second(self) -> float | None:
        """None before the first step."""
        return self.steps / self.stepping if self.stepping else None

    def step_done(self, seconds: float) -> None:
        """A step took so long."""
        self.steps, self.stepping = self.steps + 1, self.stepping + seconds
