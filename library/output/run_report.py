"""The page of a run, its metrics file and its verdict. None of it may ever end a training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic

import numpy as np
from PIL import Image

from library.options.console import say
from library.output import html_report, metrics_file
from library.output.closing_block import closing_block
from library.output.html_report import HtmlReport, Standing
from library.output.learning_report import LearningReporting
from library.output.measurements import Measurements, StepClock
from library.output.metrics_file import Line, MetricsFile, sample_files
from library.output.results import USAGE_ENDING, Results, make_room
from library.output.run_facts import RunFacts
from library.output.sample_grid import GRID_ENDING, PREVIEW_ENDING, run_of_image, sample_grid, write_for_run
from library.output.sample_images import SampleImages
from library.output.start_block import start_block
from library.output.verdict import judge
from library.support.atomic_files import write_atomically
from library.support.errors import Attempts, survived
from library.support.phase import duration
from library.training.callbacks import Callback
from library.training.progress import Progress
from library.training.state import TrainingState

logger = logging.getLogger(__name__)

# Between saves the page is drawn when that costs no more than this share of the time, and not more often than anyone
# looks.
_SHARE, _SECONDS_BETWEEN = 1 / 300, 15


@dataclass(frozen=True)
class Watched:
    """What a report looks at. ``file`` is where the result will be; the report's files begin with its name.

    ``learning`` is None where nothing will be measured in the end; ``show`` is told of the grid of sample images, with
    its name and step.
    """

    results: Results
    file: Path
    total_steps: int
    measurements: Measurements
    album: SampleImages
    learning: LearningReporting | None
    show: Callable[[str, Image.Image, int], None]


class RunReport(Callback):
    """The start of a run in words, its metrics file and page, and its verdict; only the main process has one.

    It is one of the readers of the measurements. What cannot be written is said once, and tried again the next time.
    Without a page (``--no_report``) nothing is written; the first and the last words are still said.
    """

    def __init__(self, watched: Watched, gather: Callable[[], RunFacts]) -> None:
        """``gather`` collects what the page tells besides measurements."""
        self.watched, self.gather, self.measurements = watched, gather, watched.measurements
        self.learner, self.meter = self.measurements.learner, self.measurements.meter
        self.written = not watched.results.options.logging.no_report
        self.metrics = MetricsFile(_beside(watched.file, metrics_file.ENDING), watched.results.run)
        self.page_path = _beside(watched.file, html_report.ENDING)
        self.page: HtmlReport | None = None
        self.standing = Standing(0, 0.0)
        self.due, self.listed = 0.0, set[str]()
        self.attempts = Attempts("The report of the run cannot be written; the training goes on.")
        self.last_words = ""

    # ---- what it hears of

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Say what begins, and write the first page; a resumed run takes over the lines that lead to its ``state``."""
        earlier: list[Line] = []
        with self.attempts.survived():
            facts = self.gather()
            earlier = self._earlier(state) if state and self.written else []
            self._say_start(facts, earlier)
            if self.written:
                self._begin(facts, earlier)
        before = max((line.get("seconds", 0.0) for line in earlier), default=0.0)
        self.measurements.clock = StepClock(before)

    def _begin(self, facts: RunFacts, earlier: Sequence[Line]) -> None:
        """The files of the report; those of another run make room."""
        self._make_room()
        self.metrics = MetricsFile.begin(self.metrics.path, self.metrics.run, earlier)
        self.listed = {name for line in earlier for name in line.get("samples", {}).values()}
        typical = {one.label: one.typical_norm for one in self.meter.states(self.meter.starts)}
        self.page = HtmlReport(facts, typical, self.watched.album.folder)
        self._draw()

    def _say_start(self, facts: RunFacts, earlier: Sequence[Line]) -> None:
        speeds = [speed for line in earlier if (speed := line.get("steps_per_second"))]
        steps_left = self.watched.total_steps - self.learner.progress.step
        places = {
            "Embedding": str(self.watched.file),
            "Report": f"{self.page_path}, a page to watch the run in" if self.written else None,
            "Sample images": str(self.watched.album.folder) if self.watched.album.prompts else None,
            "Time": f"about {duration(steps_left / speeds[-1])}, as fast as before" if speeds else None,
        }
        logger.info(start_block(facts.details, places))

    def told(self, line: Line) -> None:
        """Note what was measured, and draw the page after a save and now and then."""
        if self.page is None:
            return
        with self.attempts.survived():
            self.standing = replace(self.standing, saved=self.standing.saved or "result" in line)
            self.metrics.append(line)
            if {"saved", "result"} & line.keys() or monotonic() >= self.due:
                self._draw()

    def after_samples(self, progress: Progress, images: Mapping[int, np.ndarray]) -> None:
        """Note which files hold the sample images, and draw."""
        if self.page is None:
            return
        with self.attempts.survived():
            newest = self.watched.album.newest()
            found = {str(number): name for number, name in newest.items() if name not in self.listed}
            self.listed.update(found.values())
            if found:
                self.metrics.append({"step": progress.step, "samples": found})
            lines = self.metrics.lines()
            if found:
                self._draw_grid(lines)
            self._draw(lines)

    def _draw_grid(self, lines: Sequence[Line]) -> None:
        """Write the grid of the sample images anew, and the newest one as the embedding's preview."""
        album = self.watched.album
        grid = sample_grid(album.folder, lines, [prompt.prompt if prompt else "" for prompt in album.prompts])
        if grid is not None:
            write_for_run(album.folder / f"{album.output_name}{GRID_ENDING}", grid, self.metrics.run)
            self.watched.show("samples", grid, self.learner.progress.step)
        newest = list(sample_files(lines).values())[-1]
        with Image.open(album.folder / newest[min(newest)], formats=("PNG",)) as image:
            write_for_run(_beside(self.watched.file, PREVIEW_ENDING), image.convert("RGB"), self.metrics.run)

    def after_result(self, path: Path) -> None:
        """Judge the run by its result's vectors and what was measured, and write the verdict everywhere."""
        learned = self.watched.learning.report if self.watched.learning else None
        with self.attempts.survived():
            samples = bool(self.watched.album.newest())
            with self.learner.averaged_rows() as rows:
                verdict = judge(self.meter.states(rows), learned.distances if learned else None, samples=samples)
            sheet = None
            if learned:
                with survived("The learning report could not be written."):
                    sheet = learned.write(path.with_suffix(""), self.metrics.run, verdict)
            self.standing = replace(self.standing, running=False, verdict=verdict, learned=learned, sheet=sheet)
            self.last_words = closing_block(verdict, self._places(path, sheet, samples))
            self.measurements.tell({"step": self.learner.progress.step, **asdict(verdict)})
            self._draw()

    def close(self) -> None:
        """The run is over; where it was not judged, it ended early."""
        self.measurements.flush()
        if self.standing.running:
            self.standing = replace(self.standing, running=False)
            with self.attempts.survived():
                self._draw()

    def after_training(self, path: Path) -> None:
        """Say the last words."""
        if self.last_words:
            say(f"\n{self.last_words}")

    def _places(self, path: Path, sheet: Path | None, samples: bool) -> dict[str, str | None]:
        """What there is to look at and to go on with, by its label."""
        usage, state, clock = _beside(path, USAGE_ENDING), _beside(path, "-state"), self.measurements.clock
        pace = f", {clock.steps_per_second:.3g} steps a second" if clock.steps_per_second else ""
        progress, result = self.learner.progress, self.learner.result
        stopped = f" of {self.watched.total_steps:,}, then it was stopped" if progress.stopped else ""
        return {
            "file": str(path),
            "steps": f"{progress.step:,}{stopped}",
            "vectors": result.chosen if result else None,
            "time": f"{duration(clock.seconds)}{pace}",
            "report": str(self.page_path) if self.page else None,
            "samples": str(self.watched.album.folder) if samples else None,
            "sheet": str(sheet) if sheet else None,
            "how to use it": str(usage) if self.page and usage.exists() else None,
            "to go on": f"--resume={state}" if state.is_dir() else None,
        }

    # ---- how it is written

    def _draw(self, lines: Sequence[Line] | None = None) -> None:
        """Write the page anew, from the ``lines`` of the metrics file, which is read where they are not given."""
        if self.page is None:
            return
        begun, step, clock = monotonic(), self.learner.progress.step, self.measurements.clock
        speed = clock.steps_per_second
        ended = self.learner.progress.stopped
        left = (self.watched.total_steps - step) / speed if speed and not ended else None
        self.standing = replace(self.standing, step=step, seconds=clock.seconds, seconds_left=left)
        content = self.page.page(self.metrics.lines() if lines is None else lines, self.standing)
        write_atomically(self.page_path, content.encode("utf-8", errors="backslashreplace"))
        self.due = monotonic() + max(_SECONDS_BETWEEN, (monotonic() - begun) / _SHARE)

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


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.stem + ending)
