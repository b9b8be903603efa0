"""``--learning_report``: did the token learn anything? Loss, distance and images before and after, all else equal."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from library.data.batches import Batch
from library.data.concept import Concept
from library.embedding.initialization import NewWord
from library.embedding.tokenizer import TrainableRows
from library.model.identity import read_object
from library.model.runtime import shared_out
from library.options.console import say
from library.output.concept_distance import concept_distance
from library.output.sample_prompts import SamplePrompt
from library.output.sampling import SamplingPipeline
from library.output.verdict import Distances, Verdict
from library.support.atomic_files import write_atomically, write_png
from library.support.errors import UserError, survived
from library.support.phase import phase
from library.support.processes import rank
from library.training.callbacks import Callback
from library.training.denoising import DenoisingTask

logger = logging.getLogger(__name__)

# Drawn with each word, from the same noise; seeds 0 to 15.
PICTURES = 16
_STEPS, _SCALE = 25, 5.0
_CONCEPT_PICTURES = 64  # at most, spread over all
# What the loss is averaged over, with the same noise and timesteps for both words.
_LOSS_SAMPLES = 128
_COLUMNS = 8
_SMALLEST_CELL, _LARGEST_CELL = 128, 256
_HEADING = 20


@dataclass(frozen=True)
class Measured:
    """What one word does: the mean loss, the concept distance of its images (see ``concept_distance``), and these."""

    label: str
    loss: float
    distance: float
    pictures: list[np.ndarray]


@dataclass(frozen=True)
class LearningReport:
    """The word after the training beside what it started from, with the images they should resemble.

    ``held_out`` tells whether the loss was measured on images that were not trained on.
    """

    before: Measured
    after: Measured
    concept: list[np.ndarray]
    held_out: bool

    @property
    def text(self) -> str:
        """A small table with a sentence on what it means."""
        before, after = self.before, self.after
        width = max(len(before.label), len(after.label))
        pictures = "held-out images" if self.held_out else "training images"
        lines = [f"What the token learned ({PICTURES} images each, drawn from the same noise):"]
        lines.append(f"{'':<{width}}  loss on {pictures}  distance to the training images")
        for one in (before, after):
            lines.append(f"{one.label:<{width}}  {one.loss:>{len(pictures) + 8}.5f}  {one.distance:>33.2f}")
        return "\n".join([*lines, self.sentence])

    @property
    def sentence(self) -> str:
        """What the distances say."""
        return (
            f"The distance is {self.distances.ratio:.2f} times what it was. It compares coarse colours with the "
            "nearest training image: 0 is a copy, and well below 1 means that the token learned."
        )

    @property
    def numbers(self) -> dict[str, object]:
        """The same for programs, as it goes into the JSON file."""
        measured = {
            name: {"prompt_word": one.label, "loss": one.loss, "distance": one.distance}
            for name, one in (("before", self.before), ("after", self.after))
        }
        return {**measured, "pictures": PICTURES, "loss_on_held_out_pictures": self.held_out}

    @property
    def distances(self) -> Distances:
        """What a verdict is made by."""
        return Distances(self.before.label, self.before.distance, self.after.distance)

    def write(self, stem: Path, run: str, verdict: Verdict) -> Path:
        """Write ``<stem>_report.png`` and ``<stem>_report.json``; return the image's path. Raises UserError.

        A report of another run than ``run`` is kept: see ``write_atomically``.
        """
        picture, numbers = (stem.with_name(f"{stem.name}_report{ending}") for ending in (".png", ".json"))
        content = json.dumps({**self.numbers, **asdict(verdict), "run": run}, indent=2) + "\n"
        sheet = comparison_sheet(
            [("training images", self.concept), *((one.label, one.pictures) for one in (self.before, self.after))]
        )
        others = _run_of(numbers) != run
        # The numbers say whose report it is, so they come last.
        write_png(picture, sheet, keep_old=others)
        write_atomically(numbers, content.encode(), keep_old=others)
        return picture


class LearningMeasure:
    """Measures a word before and after its training, with everything else the same: captions, noise, seeds."""

    def __init__(
        self, pipeline: SamplingPipeline, task: DenoisingTask, concept: Concept, word: NewWord, rows: TrainableRows
    ) -> None:
        self.pipeline, self.task, self.concept, self.word, self.rows = pipeline, task, concept, word, rows
        self.pictures = concept.pictures(_CONCEPT_PICTURES)
        self.captions = concept.captions(PICTURES)
        self.held_out = any(batch.has_token.any() for batch in self._batches(held_out=True))
        if concept.held_out is not None and not self.held_out:
            logger.warning("No held-out caption holds the token: the report takes its loss from the training images.")

    def report(self, init_word: str | None, starts: Sequence[Tensor]) -> LearningReport:
        """Compare the rows as they are with ``init_word`` as a user would write it, or without one with ``starts``.

        ``starts`` [N, D] per text encoder are the rows that the training began with.
        """
        if init_word is not None:
            placeholder = self.word.placeholder
            before = self._measure(f'"{init_word}"', lambda text: placeholder.replace(text, init_word))
        else:
            with self.rows.holding(starts):
                before = self._measure("the start", _unchanged)
        after = self._measure(f'"{self.word.placeholder.text}"', _unchanged)
        return LearningReport(before, after, self.pictures, self.held_out)

    def _measure(self, label: str, rewrite: Callable[[str], str]) -> Measured:
        """Loss and images with every caption as ``rewrite`` leaves it."""
        wanted = [
            SamplePrompt(
                rewrite(caption), width=width, height=height, steps=_STEPS, scale=_SCALE, seed=seed, weighted=False
            )
            for seed, (caption, (width, height)) in enumerate(self.captions)
        ]
        title = "" if rank() else f"Drawing {label}"
        pictures = shared_out(
            wanted, lambda part: self.pipeline.draw(part, batch_size=self.concept.batch_size, title=title)
        )
        return Measured(label, self._loss(rewrite), concept_distance(pictures, self.pictures), pictures)

    @torch.no_grad()
    def _loss(self, rewrite: Callable[[str], str]) -> float:
        """Mean over the samples whose caption holds the token. Raises UserError where there are none."""
        losses = []
        for batch in self._batches(held_out=self.held_out):
            if not batch.has_token.any():
                continue
            encoded = [self.word.prompts.encode(rewrite(caption)) for caption in batch.captions]
            ids = [torch.stack(each) for each in zip(*encoded, strict=True)]
            moved = replace(batch, input_ids=ids).to(self.pipeline.device)
            losses.append(self.task.losses(moved)[moved.has_token])
        if not losses:
            raise UserError("No caption that was drawn holds the token, so there is no loss to compare.")
        return float(torch.cat(losses).mean())

    def _batches(self, *, held_out: bool) -> Iterator[Batch]:
        return self.concept.fixed_batches(_LOSS_SAMPLES, held_out=held_out)


class LearningReporting(Callback):
    """At the end: measures what the word learned, and says it; with a verdict it is written by the run's report."""

    def __init__(self, measure: Callable[[], LearningReport]) -> None:
        """All processes take part in ``measure``."""
        self.measure = measure
        self.report: LearningReport | None = None

    def after_result(self, path: Path) -> None:
        """Make the report; where that fails, the embedding is there all the same."""
        with (
            survived("The learning report could not be made; the embedding is complete without it."),
            phase("Measuring what was learned"),
        ):
            self.report = self.measure()
        if self.report:
            say(f"\n{self.report.text}")


def comparison_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """Rows of up to eight images (uint8 [H, W, 3]) below a heading each; small images are enlarged."""
    largest = max(max(picture.shape[:2]) for _, pictures in rows for picture in pictures)
    cell = min(max(largest, _SMALLEST_CELL), _LARGEST_CELL)
    sheet = Image.new("RGB", (_COLUMNS * cell, len(rows) * (cell + _HEADING)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (heading, pictures) in enumerate(rows):
        top = number * (cell + _HEADING)
        draw.text((4, top + 4), heading, fill="black")
        for column, picture in enumerate(pictures[:_COLUMNS]):
            scale = (cell - 4) / max(picture.shape[:2])
            size = tuple(max(1, round(side * scale)) for side in reversed(picture.shape[:2]))
            way = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(picture).resize(size, way), (column * cell + 2, top + _HEADING))
    return sheet


def _run_of(report: Path) -> str | None:
    """The run that wrote a report's JSON file; None where it does not say so, or is not there."""
    try:
        return (read_object(report) or {}).get("run")
    except UserError:
        return None


def _unchanged(text: str) -> str:
    return text
