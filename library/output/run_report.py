"""What a run notes while it goes: metrics, and the page that is drawn from them. None of it may ever end a training."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from library.model.device_report import peak_memory
from library.output import html_report, metrics_file
from library.output.closing_block import closing_block
from library.output.html_report import HtmlReport, Standing
from library.output.learning_report import LearningReport, LearningReporting
from library.output.metrics_file import Line, MetricsFile, sample_files
from library.output.results import USAGE_ENDING, Results, make_room
from library.output.run_facts import RunFacts
from library.output.sample_grid import GRID_ENDING, PREVIEW_ENDING, run_of_image, sample_grid, write_for_run
from library.output.sample_images import SampleImages
from library.output.vector_meter import VectorMeter, VectorState
from library.output.verdict import Verdict, judge
from library.support.atomic_files import write_atomically
from library.support.errors import UserError, survived
from library.training.callbacks import Callback, StepResult
from library.training.loss_bands import LossBands
from library.training.optimizer_step import Learner
from library.training.progress import Progress
from library.training.save_schedule import Action
from library.training.state import TrainingState

logger = logging.getLogger(__name__)

_METHOD = Callable[..., None]
# Between saves the page is drawn when that costs no more than this share of the time, and not more often than anyone
# looks.
_SHARE, _SECONDS_BETWEEN = 1 / 300, 15


@dataclass(frozen=True)
class Watched:
    """What a report looks at. ``file`` is where the result will be; the report's files begin with its name.

    ``bands`` are None where nothing is written (``--no_report``), ``learning`` where nothing will be measured.
    """

    results: Results
    file: Path
    total_steps: int
    learner: Learner
    meter: VectorMeter
    album: SampleImages
    bands: LossBands | None
    learning: LearningReporting | None


def _shown(method: _METHOD) -> _METHOD:
    """A method that does nothing where there is no page, never fails, and takes no time that counts as training."""

    @wraps(method)
    def tried(self: "RunReport", *args: Any, **details: Any) -> None:
        if self.page is not None:
            with self._surviving():
                method(self, *args, **details)
        self.clock.pause_done()

    return tried


class RunReport(Callback):
    """The metrics file and the page of one run, and its verdict; only the main process has one.

    What cannot be written is said once, and tried again the next time. Without a page (``--no_report``) nothing is
    written, and vectors that go astray and the verdict are still said.
    """

    def __init__(self, watched: Watched, gather: Callable[[], RunFacts]) -> None:
        """``gather`` collects what the page tells besides measurements."""
        self.watched, self.gather = watched, gather
        self.learner, self.meter = watched.learner, watched.meter
        options = watched.results.options.logging
        self.every, self.written = options.log_every_n_steps, not options.no_report
        self.clock, self.pending = _Clock(), _Pending()
        self.metrics = MetricsFile(_beside(watched.file, metrics_file.ENDING), watched.results.run)
        self.page_path = _beside(watched.file, html_report.ENDING)
        self.page: HtmlReport | None = None
        self.standing = Standing(0, 0.0)
        self.failed, self.due = False, 0.0
        self.listed: set[str] = set()

    # ---- what it hears of

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Write the first page; a run that goes on from a ``state`` takes over the lines that lead there."""
        self.clock = _Clock()
        if not self.written:
            return
        with self._surviving():
            typical = {one.label: one.typical_norm for one in self.meter.states(self.meter.starts)}
            self.page = HtmlReport(self.gather(), typical, self.watched.album.folder)
            earlier = self._earlier(state) if state else []
            self._make_room()
            self.metrics = MetricsFile.begin(self.metrics.path, self.metrics.run, earlier)
            self.listed = {name for line in earlier for name in line.get("samples", {}).values()}
            self.clock = _Clock(before=max((line.get("seconds", 0.0) for line in earlier), default=0.0))
            self.standing = Standing(progress.step, self.clock.seconds)
            if not earlier:
                self._note({"step": progress.step, "nearest": self._nearest(self.meter.starts)})
            self._draw()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Note what was measured, every so many steps, and draw the page now and then."""
        self.clock.step_done()
        if result.loss is not None:
            self.pending.losses.append(result.loss)
        self.pending.rates, self.pending.step = result.rates, progress.step
        if progress.step % self.every == 0:
            with self._surviving():
                self._flush()
                if time.monotonic() >= self.due:
                    self._draw()

    @_shown
    def after_validation(self, progress: Progress, loss: float) -> None:
        """Note the loss on held-out images."""
        self._note({"step": progress.step, "loss/validation": loss})

    @_shown
    def after_save(self, progress: Progress, action: Action) -> None:
        """Note which words the saved vectors are near to, and draw."""
        self._flush()
        if action.kind == "save":
            kind = "result" if action.name == self.watched.file.name else "saved"
            with self.learner.averaged_rows() as rows:
                self._note({"step": progress.step, kind: action.name, "nearest": self._nearest(rows)})
            self._draw()

    @_shown
    def after_samples(self, progress: Progress, images: Mapping[int, np.ndarray]) -> None:
        """Note which files hold the sample images, and draw."""
        newest = self.watched.album.newest()
        found = {str(number): name for number, name in newest.items() if name not in self.listed}
        self.listed.update(found.values())
        if found:
            self._note({"step": progress.step, "samples": found})
            self._draw_grid()
        self._draw()

    def _draw_grid(self) -> None:
        """Write the grid of the sample images anew, and the newest one as the embedding's preview."""
        album, lines = self.watched.album, self.metrics.lines()
        grid = sample_grid(album.folder, lines, [prompt.prompt if prompt else "" for prompt in album.prompts])
        if grid is not None:
            write_for_run(album.folder / f"{album.output_name}{GRID_ENDING}", grid, self.metrics.run)
        newest = list(sample_files(lines).values())[-1]
        with Image.open(album.folder / newest[min(newest)]) as image:
            write_for_run(_beside(self.watched.file, PREVIEW_ENDING), image.convert("RGB"), self.metrics.run)

    @_shown
    def close(self) -> None:
        """The last step is done, or the run ends before it."""
        self._flush()
        self.standing = replace(self.standing, running=self.learner.progress.step >= self.watched.total_steps)
        self._draw()

    def after_training(self, path: Path) -> None:
        """Judge the run by its result's vectors and what was measured; write it everywhere, and say the last words."""
        with self._surviving():
            self._judge(path)

    def _judge(self, path: Path) -> None:
        learned = self.watched.learning.report if self.watched.learning else None
        samples = bool(self.watched.album.newest())
        with self.learner.averaged_rows() as rows:
            verdict = judge(self.meter.states(rows), learned.distances if learned else None, samples=samples)
        sheet = None
        if learned:
            with survived("The learning report could not be written."):
                sheet = learned.write(path.with_suffix(""), self.metrics.run, verdict)
        self._conclude(verdict, learned, sheet)
        print(f"\n{closing_block(verdict, self._places(path, sheet, samples))}")

    @_shown
    def _conclude(self, verdict: Verdict, learned: LearningReport | None, sheet: Path | None) -> None:
        self._note({"step": self.standing.step, **asdict(verdict)})
        self.standing = replace(self.standing, running=False, verdict=verdict, learned=learned, sheet=sheet)
        self._draw()

    def _places(self, path: Path, sheet: Path | None, samples: bool) -> dict[str, str | None]:
        """What there is to look at and to go on with, by its label."""
        usage, state = _beside(path, USAGE_ENDING), _beside(path, "-state")
        speed = self.clock.steps_per_second
        pace = f", {speed:.3g} steps a second" if speed else ""
        return {
            "file": str(path),
            "steps": f"{self.learner.progress.step:,}",
            "time": f"{html_report.duration(self.clock.seconds)}{pace}",
            "report": str(self.page_path) if self.page else None,
            "samples": str(self.watched.album.folder) if samples else None,
            "sheet": str(sheet) if sheet else None,
            "how to use it": str(usage) if self.page and usage.exists() else None,
            "to go on": f"--resume={state}" if state.is_dir() else None,
        }

    # ---- how it is written

    def _flush(self) -> None:
        """Note what the steps since the last note have measured, and warn of vectors that went too far."""
        pending, self.pending = self.pending, _Pending()
        if not pending.step:
            return
        speed = self.clock.steps_per_second
        left = (self.watched.total_steps - pending.step) / speed if speed else None
        self.standing = replace(self.standing, step=pending.step, seconds_left=left)
        if pending.losses:
            states = self.meter.states(self.learner.values())
            self.meter.warn_if_far(states, pending.step)
            self._note(self._measured(pending, states))

    def _measured(self, pending: "_Pending", states: Sequence[VectorState]) -> Line:
        """The line of a logged step."""
        line: Line = {"step": pending.step, "loss": sum(pending.losses) / len(pending.losses)}
        line |= self.watched.bands.take() if self.watched.bands else {}
        line |= {**pending.rates, "gradient_norm": self.learner.gradient_norm}
        for state in states:
            label, moved = state.label, state.moved
            line |= {f"moved/{label}": moved.percent, f"cosine/{label}": moved.cosine, f"norm/{label}": moved.norm}
        memory = peak_memory(self.learner.accelerator.device)
        speed = self.clock.steps_per_second
        return {**line, "seconds": self.clock.seconds, "steps_per_second": speed, "memory_gib": memory}

    def _note(self, line: Line) -> None:
        if self.page:
            self.metrics.append(line)

    def _draw(self) -> None:
        if self.page is None:
            return
        begun = time.monotonic()
        self.standing = replace(self.standing, seconds=self.clock.seconds)
        content = self.page.page(self.metrics.lines(), self.standing)
        write_atomically(self.page_path, content.encode("utf-8", errors="backslashreplace"))
        now = time.monotonic()
        self.due = now + max(_SECONDS_BETWEEN, (now - begun) / _SHARE)

    def _nearest(self, rows: Sequence[Tensor]) -> dict[str, list[list[Any]]]:
        found = self.meter.nearest(rows)
        return {label: [[one.word, round(one.cosine, 4)] for one in words] for label, words in found.items()}

    def _earlier(self, state: TrainingState) -> list[Line]:
        """The lines of the run that is resumed: from where this one writes its own, or from beside the state."""
        beside = Path(self.watched.results.options.save.resume or "").parent / self.metrics.path.name
        for path in (self.metrics.path, beside):
            if metrics_file.run_of_metrics(path) == state.run:
                return metrics_file.lines_until(path, state.step, epoch_closed=state.epoch_closed)
        return []

    def _make_room(self) -> None:
        """Give the report of an earlier run the next free number, as its embedding gets when the result is written."""
        runs = {
            self.metrics.path: metrics_file.run_of_metrics(self.metrics.path),
            self.page_path: html_report.run_of_report(self.page_path),
        }
        if self.watched.album.prompts:
            preview = _beside(self.watched.file, PREVIEW_ENDING)
            runs[preview] = run_of_image(preview)
        make_room(self.watched.file, [path for path, run in runs.items() if run != self.metrics.run])

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Within a ``with``: nothing that goes wrong ends the run; the first time it is said."""
        try:
            yield
        except Exception as error:
            level = logging.DEBUG if self.failed else logging.ERROR
            reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            logger.log(level, "The report of the run cannot be written; the training goes on. %s", reason)
            logger.debug("Where it happened:", exc_info=True)
            self.failed = True


@dataclass
class _Pending:
    """What was told since the last note."""

    losses: list[float] = field(default_factory=list)
    rates: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


class _Clock:
    """Time since the training began, pauses included, and how fast the steps were, pauses left out."""

    def __init__(self, before: float = 0.0) -> None:
        """``before``: seconds that the run took before it was resumed."""
        self.began = self.mark = time.monotonic()
        self.before, self.steps, self.stepping = before, 0, 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    @property
    def steps_per_second(self) -> float | None:
        return self.steps / self.stepping if self.stepping else None

    def step_done(self) -> None:
        now = time.monotonic()
        self.steps, self.stepping, self.mark = self.steps + 1, self.stepping + now - self.mark, now

    def pause_done(self) -> None:
        self.mark = time.monotonic()


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.stem + ending)
