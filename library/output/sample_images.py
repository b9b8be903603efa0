"""The images of ``--sample_prompts``: when they are drawn, and the files they become."""

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.embedding.tokenizer import PromptTokenizer
from library.options.declaration import required
from library.options.options import Options
from library.output.sample_prompts import SamplePrompt, read_sample_prompts
from library.output.sample_scene import check_scene
from library.output.samplers import check_sampler
from library.output.sampling import SamplingPipeline
from library.support.atomic_files import write_png
from library.support.errors import UserError, survived
from library.support.progress_bar import progress_bar
from library.training.callbacks import Callback, Callbacks, StepResult
from library.training.optimizer_step import Learner
from library.training.progress import Progress
from library.training.save_schedule import SampleSchedule
from library.training.state import TrainingState

logger = logging.getLogger(__name__)

FOLDER = "sample"
_LOST = "A sample image was lost; the training goes on without it."


@dataclass(frozen=True)
class SampleImages:
    """Draws the same prompts again and again during a run, into the folder ``sample`` of ``--output_dir``."""

    prompts: tuple[SamplePrompt | None, ...]  # None keeps the number of one that is left out
    schedule: SampleSchedule
    folder: Path
    output_name: str
    sampler: str  # of prompts that name none

    @classmethod
    def create(cls, options: Options, tokenizer: PromptTokenizer) -> "SampleImages":
        """Read the prompts, if any are to be drawn.

        Raises UserError for a file, a sampler or a folder that cannot be used.
        """
        if options.sample.draws_images:
            check_sampler(options.sample.sample_sampler)
        wanted: Sequence[SamplePrompt] = ()
        if options.sample.draws_during_training:
            wanted = read_sample_prompts(required(options.sample.sample_prompts, "sample_prompts"))
        _warn_of_weak_prompts(wanted, tokenizer)
        drawn = _with_scenes(wanted) if options.dataset.train_inpainting else _without_scenes(wanted)
        folder = Path(required(options.save.output_dir, "output_dir")) / FOLDER
        if drawn and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, but sample images go into a folder of this name. Move the file.")
        name = required(options.save.output_name, "output_name")
        return cls(tuple(drawn), SampleSchedule.create(options.sample), folder, name, options.sample.sample_sampler)

    def draw(
        self,
        pipeline: SamplingPipeline,
        mark: str,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        missing: bool = False,
    ) -> dict[int, np.ndarray]:
        """Draw this process's share of the prompts, or what is ``missing`` of it, one by one, and write the files.

        Returns the images, uint8 [H, W, 3], by the number of their prompt (from 0). What cannot be drawn or written
        is said and left out.

        ``mark`` tells in the files' names when it was: see :func:`epoch_mark` and :func:`step_mark`.
        """
        wanted = [(number, prompt) for number, prompt in enumerate(self.prompts) if prompt]
        mine = wanted[process_index::num_processes]
        if missing:
            begin = f"{glob.escape(self.output_name)}_{mark}"
            mine = [one for one in mine if not any(self.folder.glob(f"{begin}_{one[0]:02d}_*.png"))]
        moment = datetime.now().strftime("%Y%m%d%H%M%S")
        pictures = {}
        bar = progress_bar("Drawing samples", len(mine), "image", silent=process_index > 0)
        with survived(_LOST), pipeline.vae.on(pipeline.device), bar:
            for number, prompt in mine:
                with survived(_LOST):
                    (picture,) = pipeline.draw([prompt])
                    pictures[number] = picture
                    self._write(prompt, picture, f"{mark}_{number:02d}_{moment}")
                bar.update()
        return pictures

    def newest(self) -> dict[int, str]:
        """The names of the newest images in the folder, by the number of their prompt (from 0) and when written."""
        name = re.compile(rf"{re.escape(self.output_name)}_e?\d{{6,}}_(\d{{2,}})_\d{{14}}(_\d+)?\.png")
        files = sorted(self.folder.glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
        numbered = {int(match[1]): file.name for file in files if (match := name.fullmatch(file.name))}
        return {number: numbered[number] for number in range(len(self.prompts)) if number in numbered}

    def _write(self, prompt: SamplePrompt, picture: np.ndarray, mark: str) -> None:
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        notes = PngInfo()
        notes.add_itxt("parameters", parameters(prompt, self.sampler))
        write_png(self.folder / f"{self.output_name}_{mark}{seed}.png", Image.fromarray(picture), notes)


def parameters(prompt: SamplePrompt, sampler: str) -> str:
    """How an image was drawn, in the form of AUTOMATIC1111, which image browsers and other programs read."""
    negative = [f"Negative prompt: {prompt.negative_prompt}"] if prompt.negative_prompt else []
    seed = [] if prompt.seed is None else [f"Seed: {prompt.seed}"]
    drawn = [f"Steps: {prompt.steps}", f"Sampler: {prompt.sampler or sampler}", f"CFG scale: {prompt.scale:g}"]
    return "\n".join([prompt.prompt, *negative, ", ".join([*drawn, *seed, f"Size: {prompt.width}x{prompt.height}"])])


class Sampling(Callback):
    """Draws the album when it is due, with the rows as they would be saved; the others hear of the images."""

    def __init__(self, album: SampleImages, pipeline: SamplingPipeline, learner: Learner, callbacks: Callbacks) -> None:
        self.album, self.pipeline, self.learner, self.callbacks = album, pipeline, learner, callbacks

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Draw what is wanted of an untrained word, or what is missing of the moment at which the state was saved."""
        schedule = self.album.schedule
        if state is None:
            if schedule.at_first():
                self._draw(progress, epoch_mark(0))
        elif progress.epoch_closed and schedule.after_epoch(progress.epoch):
            self._draw(progress, epoch_mark(progress.epoch), missing=True)
        elif not progress.epoch_closed and schedule.after_step(progress.step):
            self._draw(progress, step_mark(progress.step), missing=True)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Draw, if it is due."""
        if self.album.schedule.after_step(progress.step):
            self._draw(progress, step_mark(progress.step))

    def after_epoch(self, progress: Progress) -> None:
        """Draw, if it is due."""
        if self.album.schedule.after_epoch(progress.epoch):
            self._draw(progress, epoch_mark(progress.epoch))

    def before_result(self, progress: Progress) -> None:
        """Draw the vectors of the result where they are not simply those of the last step."""
        if self.learner.result is not None:
            self._draw(progress, step_mark(self.learner.result.step))

    def _draw(self, progress: Progress, mark: str, *, missing: bool = False) -> None:
        machine = self.learner.accelerator
        share = {"process_index": machine.process_index, "num_processes": machine.num_processes}
        with self.learner.averaged_rows():
            mine = self.album.draw(self.pipeline, mark, missing=missing, **share)
        # All have drawn when all have told: the folder is complete then.
        self.callbacks.after_samples(progress, dict(gather_object([*mine.items()])))


def _with_scenes(wanted: Sequence[SamplePrompt]) -> Sequence[SamplePrompt | None]:
    """The prompts that an inpainting model can draw. Raises UserError for an image or a mask that cannot be used."""
    for number, prompt in enumerate(wanted, start=1):
        if prompt.image is not None:
            check_scene(prompt)
        else:
            logger.warning(
                'The sample prompt number %d, "%.60s", is left out: an inpainting model draws into an image. Give it '
                "one with --i, and perhaps a mask with --m (white is painted anew).",
                *(number, prompt.prompt),
            )
    return [prompt if prompt.image is not None else None for prompt in wanted]


def _without_scenes(wanted: Sequence[SamplePrompt]) -> Sequence[SamplePrompt | None]:
    """The prompts as they are, with a warning where images in them do nothing."""
    if any(prompt.image or prompt.mask_image for prompt in wanted):
        logger.warning("--sample_prompts: images (--i) and masks (--m) have no effect without --train_inpainting.")
    return wanted


def _warn_of_weak_prompts(wanted: Sequence[SamplePrompt], tokenizer: PromptTokenizer) -> None:
    """Say which prompts are cut off, and if none of them can show what is learned."""
    word = tokenizer.placeholder
    texts = [text for prompt in wanted for text in (prompt.prompt, prompt.negative_prompt)]
    # Part by part, as they are drawn: a bracket ends a word.
    parts = {text: [part for part, _ in tokenizer.weighted_parts(text)] for text in texts}
    if wanted and not any(word.found_in(part) for text in texts for part in parts[text]):
        logger.warning("No prompt of --sample_prompts holds the token %s, so no image will show it.", word.text)
    for text in texts:
        if (length := sum(map(tokenizer.length, parts[text]))) > tokenizer.capacity:
            logger.warning(
                'The sample prompt "%s…" has %d tokens; only the first %d count. --max_token_length takes more.',
                *(text[:40], length, tokenizer.capacity),
            )


def epoch_mark(epoch: int) -> str:
    """The mark of images drawn at the end of an epoch (from 1), or before the training (0)."""
    return f"e{epoch:06d}"


def step_mark(step: int) -> str:
    """The mark of images drawn after a step."""
    return f"{step:06d}"
