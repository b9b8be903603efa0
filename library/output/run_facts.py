"""What is known of a run before its first step, as its report shows it: settings, model, device, images, prompts."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.batched_data import BatchedData
from library.data.image_entry import ImageEntry
from library.data.image_table import ImageTable
from library.embedding.clients import Usage, diffusers_token, usages
from library.model.device_report import describe_device
from library.options.config_file import as_toml
from library.options.declaration import Option
from library.options.option_types import written
from library.options.options import Options, as_dict, declared_options
from library.output.report import diffusers_snippet, usage_notes
from library.output.results import Results
from library.output.sample_prompts import SamplePrompt
from library.output.thumbnails import Box
from library.support.errors import counted
from library.training.optimizer_step import Learner
from library.training.save_schedule import RunPlan

MOST_IMAGES = 24  # that are shown


@dataclass(frozen=True)
class ImageFact:
    """An image that is trained on, and what becomes of it; sizes are (width, height) in pixels.

    ``kept`` is what the crop leaves, as shares (left, top, right, bottom); None where it differs from time to time.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    repeats: int
    lost: float  # share of its area that is cropped away
    kept: Box | None
    is_reg: bool


@dataclass(frozen=True)
class RunFacts:
    """All that a report tells besides what was measured; ``details`` are labels with their values."""

    run: str
    token: str
    num_vectors: int
    base: str
    total_steps: int
    file: Path
    details: tuple[tuple[str, str], ...]
    command: str
    toml: str
    images: tuple[ImageFact, ...]
    num_images: int
    prompts: tuple[SamplePrompt | None, ...]
    usages: tuple[Usage, ...]
    notes: tuple[str, ...]
    snippet: str

    @classmethod
    def gather(
        cls,
        results: Results,
        file: Path,
        data: BatchedData,
        plan: RunPlan,
        learner: Learner,
        prompts: Sequence[SamplePrompt | None],
    ) -> "RunFacts":
        """Collect what the run's parts know; ``file`` is where its embedding will be."""
        options, placeholder, keys = results.options, results.word.placeholder, results.family.embedding_keys
        table, processes = data.table, learner.accelerator.num_processes
        return cls(
            run=results.run,
            token=placeholder.text,
            num_vectors=placeholder.count,
            base=f"{results.model.architecture.title}, {results.model.name}",
            total_steps=plan.total_steps,
            file=file,
            details=_details(results, data, plan, learner),
            command=command_line(options, results.family.script, results.seed, processes),
            toml=as_toml(_given(options, results.seed)),
            images=tuple(image_facts(table)) if table is not None else (),
            num_images=len(table) if table is not None else 0,
            prompts=tuple(prompts),
            usages=tuple(usages(file.stem, file.suffix, placeholder.text, placeholder.count, pair=len(keys) > 1)),
            notes=tuple(usage_notes(file, placeholder.text, keys, placeholder.count)),
            snippet=diffusers_snippet(file, diffusers_token(placeholder.text, placeholder.count), keys).rstrip(),
        )


def _details(results: Results, data: BatchedData, plan: RunPlan, learner: Learner) -> tuple[tuple[str, str], ...]:
    """What the run is, in labels with their values."""
    options, placeholder = results.options, results.word.placeholder
    accelerator, rates = learner.accelerator, learner.choice.rates_text
    vectors = f"{placeholder.text}, {counted(placeholder.count, 'vector')}"
    return (
        ("Base model", f"{results.model.name} ({results.model.architecture.title})"),
        ("Model file", str(options.model.pretrained_model_name_or_path)),
        ("Device", describe_device(accelerator.device, options.runtime.mixed_precision or "no")),
        ("Token", f"{vectors}, from {_start(options)}"),
        ("Images", _counted_images(data.table)),
        ("Plan", plan.described(accelerator.num_processes)),
        ("Optimizer", f"{learner.choice.description}, learning rate {rates}" if rates else learner.choice.description),
        ("Seed", str(results.seed)),
    )


def command_line(options: Options, script: str, seed: int, processes: int = 1) -> str:
    """The command that does the run again, an option a line; without secrets."""
    start = f"python {script}" if processes == 1 else f"accelerate launch --num_processes={processes} {script}"
    declared = dict(declared_options())
    lines = [_flag(name, declared[name], value) for name, value in _given(options, seed).items()]
    return " \\\n  ".join([start, *lines])


def _given(options: Options, seed: int) -> dict[str, Any]:
    """The options that are not as they are by default, and the seed that was drawn; secrets are left out."""
    defaults = as_dict(Options())
    given = {name: value for name, value in as_dict(options).items() if value != defaults[name] and value is not None}
    return {**given, "seed": seed}


def _flag(name: str, option: Option, value: Any) -> str:
    if value is True and option.is_flag and option.default is False:
        return f"--{name}"
    if option.many:
        return f"--{name} {shlex.join(value)}"
    text = ("false", "true")[value] if isinstance(value, bool) else str(written(value))
    return f"--{name}={shlex.quote(text)}"


def _start(options: Options) -> str:
    if options.save.resume:
        return f"the state {options.save.resume}"
    if options.token.weights:
        return f"the file {options.token.weights}"
    return f'the word "{options.token.init_word}"' if options.token.init_word else "the average of all words"


def _counted_images(table: ImageTable | None) -> str:
    if table is None:
        return "those of --dataset_class"
    return f"{len(table):,} ({int(table.repeats().sum()):,} samples an epoch with repeats)"


def image_facts(table: ImageTable, most: int = MOST_IMAGES) -> list[ImageFact]:
    """The images of a table, or so many from all over it."""
    count = min(len(table), most)
    return [_image_fact(table[number * len(table) // count]) for number in range(count)]


def _image_fact(image: ImageEntry) -> ImageFact:
    framing = image.framing
    cut, (width, height), (bucket_width, bucket_height) = framing.centre, framing.resized, framing.bucket
    left, top = cut.left / width, cut.top / height
    lost = 1 - bucket_width * bucket_height / (width * height)
    varies = framing.random_crop or framing.face_crop_range is not None
    return ImageFact(
        path=Path(image.path),
        caption=image.caption,
        size=image.image_size,
        bucket=framing.bucket,
        repeats=image.repeats,
        lost=max(lost, 0.0),
        kept=None if varies or lost <= 0 else (left, top, left + bucket_width / width, top + bucket_height / height),
        is_reg=image.subset.is_reg,
    )
