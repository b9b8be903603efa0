"""The pictures of ``--sample_prompts``: when they are drawn, and the files they become."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.atomic_files import write_png
from library.checkpoints import SampleSchedule
from library.options import Options
from library.prompt_weights import parse_weights
from library.sample_prompts import SamplePrompt, read_sample_prompts
from library.samplers import check_sampler
from library.sampling import SamplingPipeline
from library.tokens import PromptTokenizer

logger = logging.getLogger(__name__)

FOLDER = "sample"


@dataclass(frozen=True)
class SampleAlbum:
    """Draws the same prompts again and again during a run, into the folder ``sample`` of ``--output_dir``."""

    prompts: tuple[SamplePrompt, ...]
    schedule: SampleSchedule
    folder: Path
    output_name: str

    @classmethod
    def create(cls, options: Options, tokenizer: PromptTokenizer) -> "SampleAlbum":
        """Read the prompts, if any are to be drawn. Raises UserError for a file or a sampler that cannot be used."""
        if options.sample.draws_pictures:
            check_sampler(options.sample.sample_sampler)
        wanted = read_sample_prompts(options.sample.sample_prompts) if options.sample.draws_during_training else []
        _warn_of_weak_prompts(wanted, tokenizer)
        folder = Path(options.save.output_dir) / FOLDER
        return cls(tuple(wanted), SampleSchedule.create(options.sample), folder, options.save.output_name)

    def draw(
        self, pipeline: SamplingPipeline, mark: str, *, process_index: int = 0, num_processes: int = 1
    ) -> dict[int, np.ndarray]:
        """Draw this process's share of the prompts, one by one, and write the files.

        Returns the pictures, uint8 [H, W, 3], by the number of their prompt (from 0).

        ``mark`` tells in the files' names when it was: see :func:`epoch_mark` and :func:`step_mark`.
        """
        numbers = range(process_index, len(self.prompts), num_processes)
        pictures = pipeline.draw([self.prompts[number] for number in numbers], title="Drawing samples")
        moment = datetime.now().strftime("%Y%m%d%H%M%S")
        for number, picture in zip(numbers, pictures, strict=True):
            prompt = self.prompts[number]
            seed = "" if prompt.seed is None else f"_{prompt.seed}"
            name = f"{self.output_name}_{mark}_{number:02d}_{moment}{seed}.png"
            notes = PngInfo()
            notes.add_itxt("parameters", prompt.prompt)  # where other programs look for the prompt
            write_png(self.folder / name, Image.fromarray(picture), notes)
        return dict(zip(numbers, pictures, strict=True))


def _warn_of_weak_prompts(wanted: Sequence[SamplePrompt], tokenizer: PromptTokenizer) -> None:
    """Say which prompts are cut off, and if none of them can show what is learned."""
    word = tokenizer.placeholder
    if wanted and not any(word.found_in(prompt.prompt + prompt.negative_prompt) for prompt in wanted):
        logger.warning("No prompt of --sample_prompts holds the word %s, so no picture will show it.", word.text)
    for text in (text for prompt in wanted for text in (prompt.prompt, prompt.negative_prompt)):
        plain = "".join(part for part, _ in parse_weights(text))
        if (length := tokenizer.length(plain)) > tokenizer.capacity:
            logger.warning(
                'The sample prompt "%s…" has %d tokens; only the first %d count. --max_token_length takes more.',
                *(text[:40], length, tokenizer.capacity),
            )


def epoch_mark(epoch: int) -> str:
    """The mark of pictures drawn at the end of an epoch (from 1), or before the training (0)."""
    return f"e{epoch:06d}"


def step_mark(step: int) -> str:
    """The mark of pictures drawn after a step."""
    return f"{step:06d}"
