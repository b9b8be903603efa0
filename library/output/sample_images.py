"""The images of ``--sample_prompts``: when they are drawn, and the files they become."""

import glob
import json
import logging
import re
from collections.abc import Callable, Sequence
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
from library.support.file_hash import FileHash
from library.support.progress_bar import progress_bar
from library.training.callbacks import Callback, Callbacks, StepResult
from library.training.optimizer_step import Learner
from library.training.progress import Progress
from library.training.save_schedule import Action, SampleSchedule
from library.training.state import TrainingState

logger = logging.getLogger(__name__)

FOLDER = "sample"
_A1111_HASH = 12  # characters by which it knows an embedding file
_LOST = "A sample image was lost; the training goes on without it."


@dataclass(frozen=True)
class SampleImages:
    """Draws the same prompts again and again during a run, into the folder ``sample`` of ``--output_dir``."""

    prompts: tuple[SamplePrompt | None, ...]  # None keeps the number of one that is left out
    schedule: SampleSchedule
    folder: Path
    output_name: str
    sampler: str  # of prompts that name none
    model: str  # its name
    token: str

    @classmethod
    def create(cls, options: Options, tokenizer: PromptTokenizer, model: str) -> "SampleImages":
        """Read the prompts, if any are to be drawn; ``model`` is the name of what draws them.

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
        return cls(
            tuple(drawn),
            SampleSchedule.create(options.sample),
            folder,
            required(options.save.output_name, "output_name"),
            options.sample.sample_sampler,
            model,
            tokenizer.placeholder.text,
        )

    def draw(
        self,
        pipeline: SamplingPipeline,
        mark: str,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        missing: bool = False,
        embedding_hash: str | None = None,
    ) -> dict[int, np.ndarray]:
        """Draw this process's share of the prompts, or what is ``missing`` of it, one by one, and write the files.

        Returns the images, uint8 [H, W, 3], by the number of their prompt (from 0). What cannot be drawn or written
        is said and left out.

        ``mark`` tells in the files' names when it was: see :func:`epoch_mark` and :func:`step_mark`. ``embedding_hash``
        is the SHA-256 of the file that holds the vectors as they are, if there is one.
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
                    self._write(prompt, picture, f"{mark}_{number:02d}_{moment}", embedding_hash)
                bar.update()
        return pictures

    def newest(self) -> dict[int, str]:
        """The names of the newest images in the folder, by the number of their prompt (from 0) and when written."""
        name = re.compile(rf"{re.escape(self.output_name)}_e?\d{{6,}}_(\d{{2,}})_\d{{14}}(_\d+)?\.png")
        files = sorted(self.folder.glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
        numbered = {int(match[1]): file.name for file in files if (match := name.fullmatch(file.name))}
        return {number: numbered[number] for number in range(len(self.prompts)) if number in numbered}

    def _write(self, prompt: SamplePrompt, picture: np.ndarray, mark: str, embedding_hash: str | None) -> None:
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        notes = PngInfo()
        notes.add_itxt("parameters", self._parameters(prompt, embedding_hash))
        write_png(self.folder / f"{self.output_name}_{mark}{seed}.png", Image.fromarray(picture), notes)

    def _parameters(self, prompt: SamplePrompt, embedding_hash: str | None) -> str:
        """How an image was drawn, in the form of AUTOMATIC1111, which image browsers and other programs read."""
        negative = [f"Negative prompt: {prompt.negative_prompt}"] if prompt.negative_prompt else []
        drawn = [f"Steps: {prompt.steps}", f"Sampler: {prompt.sampler or self.sampler}", f"CFG scale: {prompt.scale:g}"]
        drawn += [] if prompt.seed is None else [f"Seed: {prompt.seed}"]
        drawn += [f"Size: {prompt.width}x{prompt.height}", f"Model: {_quoted(self.model)}"]
        if embedding_hash is not None:
            drawn.append(f"TI hashes: {_quoted(f'{self.token}: {embedding_hash[:_A1111_HASH]}')}")
        return "\n".join([prompt.prompt, *negative, ", ".join(drawn)])


def _quoted(value: str) -> str:
    """As AUTOMATIC1111 writes a value that its own separators would cut."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ",:\n") else value


class Sampling(Callback):
    """Draws the album when it is due, with the rows as they would be saved; the others hear of the images."""

    def __init__(
        self,
        album: SampleImages,
        pipeline: SamplingPipeline,
        learner: Learner,
        callbacks: Callbacks,
        path: Callable[[str], Path],
    ) -> None:
        """``path`` is where an embedding of a name is saved."""
        self.album, self.pipeline, self.learner, self.callbacks = album, pipeline, learner, callbacks
        self.path = path
        self.saved: tuple[int, str] | None = None  # the step and the name of the last embedding file

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

    def after_save(self, progress: Progress, action: Action) -> None:
        """Remember which vectors a file holds."""
        if action.kind == "save":
            self.saved = progress.step, action.name

    def before_result(self, progress: Progress) -> None:
        """Draw the vectors of the result where they are not simply those of the last step."""
        if self.learner.result is not None:
            self._draw(progress, step_mark(self.learner.result.step))

    def _draw(self, progress: Progress, mark: str, *, missing: bool = False) -> None:
        machine = self.learner.accelerator
        share = {"process_index": machine.process_index, "num_processes": machine.num_processes}
        with self.learner.averaged_rows():
            known = self._embedding_hash(progress)
            mine = self.album.draw(self.pipeline, mark, missing=missing, embedding_hash=known, **share)
        # All have drawn when all have told: the folder is complete then.
        self.callbacks.after_samples(progress, dict(gather_object([*mine.items()])))

    def _embedding_hash(self, progress: Progress) -> str | None:
        """That of the file with the vectors of this step, where one was saved; the main process tells the others."""
        found: str | None = None
        step, name = self.saved or (None, "")
        last_vectors = self.learner.result is None
        if step == progress.step and last_vectors and self.learner.accelerator.is_main_process:
            found = FileHash(self.path(name)).get()
        first: str | None = gather_object([found])[0]
        return first


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
