"""One training of the recipes' benchmark: the real script, watched by a callback that measures it on fixed noise."""

import contextlib
import hashlib
import io
import json
import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sdxl_train_textual_inversion
import train_textual_inversion
from library import trainer
from library.data.concept import Concept as TaughtConcept
from library.data.found_images import find_images
from library.data.latent_cache import LatentCache
from library.data.latent_files import content_hash
from library.embedding.tokenizer import typical_norm
from library.output.concept_distance import concept_distance
from library.output.sample_prompts import SamplePrompt
from library.run import build_data
from library.setup import Job, Setup
from library.training.callbacks import Callback, StepResult
from library.training.progress import Progress
from library.training.state import TrainingState
from tests.benchmarks.concepts import CONCEPTS, TOKEN, Concept, measures, world

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sd": train_textual_inversion, "sdxl": sdxl_train_textual_inversion}
# Fixed-noise losses: how often up to which step and how often afterwards, on how many samples, and with how many sets
# of noise (the first is that of the loss itself) their own noise is measured.
EVERY, EARLY, LATER, SAMPLES, NOISE_SETS = 5, 100, 20, 32, 4
# Images are drawn in few steps, to save time, at a scale between the miniatures' best one and the learning report's.
SIZE, STEPS, SCALE = world.SIZE, 12, 4.0
BATCH_SIZE = 8  # a recipe may have another, as "batch_size"

# In place of the quickstart's own recipe.
REFERENCE = {
    "optimizer_args": [],
    "learning_rate": 5e-3,
    "lr_scheduler": "constant",
    "normalize_sample_gradients": False,
}


@dataclass(frozen=True)
class Run:
    """What is trained: a miniature, a concept, a seed, and the options of a recipe over the quickstart's."""

    model: str
    concept: str
    seed: int
    options: str  # as JSON, so that a run can be a key

    @property
    def subject(self) -> Concept:
        """The concept itself."""
        return next(each for each in CONCEPTS if each.name == self.concept)


def base(run: Run) -> str:
    """What all runs of a miniature on a concept share, as a hash.

    Weights, the settings under the recipe's, the images, and how it is measured.
    """
    how = [EVERY, EARLY, LATER, SAMPLES, STEPS, SCALE]
    shared = [_hashes_of_miniature(run.model), _hash_of_images(run.subject), REFERENCE, how]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _hashes_of_miniature(model: str) -> list[str]:
    folder = ROOT / "configs" / "quickstart"
    return [content_hash(file) for file in (folder / f"{model}.toml", *sorted((folder / model).rglob("*.safetensors")))]


@cache
def _hash_of_images(subject: Concept) -> str:
    digest = hashlib.sha256()
    for image, caption in (*subject.training_images(), *subject.fresh_images()):
        digest.update(image.tobytes() + caption.encode())
    return digest.hexdigest()


@dataclass
class Found:
    """What was measured: losses on training images as (step, loss), and the rest at the end.

    ``fresh`` is the loss on fresh images of the concept, ``noise`` the standard deviation of the two losses between
    sets of noise, ``norm`` the mean norm of the vectors in norms of a usual word. ``seconds`` are those of the
    training alone, without measuring and without the choosing of a word.
    """

    losses: list[tuple[int, float]]
    fresh: float = 0.0
    noise: tuple[float, float] = (0.0, 0.0)
    distance: float = 0.0
    iou: float = 0.0
    composed: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0


class FixedLosses(Callback):
    """Measures the loss on training images, in the end on fresh ones of the concept, always with the same noise."""

    def __init__(self, job: Job, setup: Setup, subject: Concept, fresh: Path, found: Found) -> None:
        """``fresh`` is the dataset file of the fresh images of the ``subject``; ``found`` is filled."""
        self.job, self.setup, self.subject, self.found = job, setup, subject, found
        self.trained, self.fresh = job.data.concept(), self._fresh(fresh)
        self.started = time.monotonic()
        self.measuring = 0.0

    def _fresh(self, file: Path) -> TaughtConcept:
        """The fresh images with latents of their own."""
        options = self.job.options
        options = replace(options, dataset=replace(options.dataset, dataset_config=str(file)))
        found = find_images(options, self.job.family.name)
        data = build_data(options, self.job.word, 0, found)
        cache = LatentCache(suffix=".npz", to_disk=False, seed=0)
        with self.setup.vae.on(self.job.device):
            cache.fill(data.latent_entries(), self.setup.vae, batch_size=8)
        data.use_cache(cache)
        return data.concept()

    def on_start(self, progress: Progress, state: TrainingState | None) -> None:
        """Before the first step."""
        self._measure(0)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Often at first."""
        every = EVERY if progress.step <= EARLY else LATER
        if progress.step % every == 0 or progress.step == self.job.plan.total_steps:
            self._measure(progress.step)

    def before_result(self, progress: Progress) -> None:
        """In the end, where the result is not simply the last vectors: they have been measured already."""
        if self.setup.learner.result is not None:
            self._measure(progress.step)

    def after_training(self, path: Path) -> None:
        """Noise of the losses, images and norms."""
        self.found.seconds = time.monotonic() - self.started - self.measuring
        with self.setup.learner.averaged_rows():
            sets = [self._set_losses(concept) for concept in (self.trained, self.fresh)]
            self.found.noise = tuple(float(np.std(each, ddof=1)) for each in sets)
            self.found.fresh = sets[1][0]
            images, captions = zip(*self.subject.training_images(), strict=True)
            drawn = self._drawn(captions * 2)
            self.found.distance = concept_distance(drawn, images)
            self.found.iou = 0.0 if self.subject.is_style else measures.shape_iou(drawn, images)
            self.found.composed = self.subject.composed(self._drawn(self.subject.composition()))
            norms = [
                rows.norm(dim=1).mean().item() / typical_norm(embedding.table.weight)
                for rows, embedding in zip(
                    self.setup.learner.rows.parameters(), self.setup.prompt_encoder.embeddings, strict=True
                )
            ]
        self.found.norm = float(np.mean(norms))

    def _drawn(self, captions: Sequence[str]) -> list[np.ndarray]:
        word, how = self.job.word.placeholder, {"width": SIZE, "height": SIZE, "steps": STEPS, "scale": SCALE}
        wanted = [
            SamplePrompt(word.replace(caption, word.expanded), seed=seed, **how)
            for seed, caption in enumerate(captions)
        ]
        return self.setup.pipeline.draw(wanted, batch_size=8)

    def _measure(self, step: int) -> None:
        begun = time.monotonic()
        with self.setup.learner.averaged_rows():
            loss = float(np.mean(self._losses(self.trained, SAMPLES)))
        self.found.losses.append((step, loss))
        self.measuring += time.monotonic() - begun

    def _set_losses(self, concept: TaughtConcept) -> list[float]:
        losses = self._losses(concept, SAMPLES * NOISE_SETS)
        return [float(np.mean(losses[i * SAMPLES : (i + 1) * SAMPLES])) for i in range(NOISE_SETS)]

    @torch.no_grad()
    def _losses(self, concept: TaughtConcept, samples: int) -> list[float]:
        task = replace(self.setup.task, bands=None)
        batches = concept.fixed_batches(samples, held_out=False)
        return [loss for batch in batches for loss in task.losses(batch.to(self.job.device)).tolist()]


def write_images(folder: Path, images: Sequence[tuple[np.ndarray, str]], batch_size: int, repeats: int) -> Path:
    """Images with caption files, and the dataset file that names them."""
    folder.mkdir()
    for number, (image, caption) in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption, encoding="utf-8")
    file = folder.with_suffix(".toml")
    file.write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = {SIZE}\nbatch_size = {batch_size}\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\nnum_repeats = {repeats}\n",
        encoding="utf-8",
    )
    return file


def carried_out(run: Run) -> Found:
    """Train in this process and measure. Raises RuntimeError where the script ends with another code than 0."""
    found = Found([])
    with TemporaryDirectory() as place, contextlib.chdir(ROOT):
        folder, subject = Path(place), run.subject
        options = json.loads(run.options)
        trained = write_images(folder / "images", subject.training_images(), options.pop("batch_size", BATCH_SIZE), 10)
        fresh = write_images(folder / "fresh", subject.fresh_images(), BATCH_SIZE, 1)
        argv = arguments(run, trained, folder, options)

        def watched(job: Job, setup: Setup, hub):
            callbacks, saving = original(job, setup, hub)
            callbacks.entries.append(FixedLosses(job, setup, subject, fresh, found))
            return callbacks, saving

        original, said = trainer.happenings, io.StringIO()
        AcceleratorState._reset_state(True)  # accelerate keeps what a process's first run has set
        with (
            patch.object(trainer, "happenings", watched),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
        ):
            code = SCRIPTS[run.model].main(argv)
    if code:
        raise RuntimeError(f"{run} ended with {code}:\n{said.getvalue()[-3000:]}")
    return found


def arguments(run: Run, dataset: Path, folder: Path, options: dict) -> list[str]:
    """The command line: the quickstart's settings, and those of the recipe over them."""
    given = tomllib.loads((ROOT / "configs" / "quickstart" / f"{run.model}.toml").read_text(encoding="utf-8"))
    settings = folder / "settings.toml"
    given |= {"dataset_config": str(dataset), "output_dir": str(folder / "out"), "output_name": run.concept}
    given |= {"token_string": TOKEN, "init_word": run.subject.init_word, "seed": run.seed, "no_report": True}
    given |= REFERENCE
    # Nothing is drawn, but the VAE stays.
    given |= {"learning_report": False, "sample_every_n_steps": 10**6}
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w {SIZE} --h {SIZE}\n", encoding="utf-8")
    given |= {"sample_prompts": str(prompts), "max_data_loader_n_workers": 0, **options}
    settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items()), encoding="utf-8")
    return [f"--config_file={settings}"]


def begin(numbers: "SimpleQueue[int]") -> None:
    """Keep a process to a core of its own: torch's threads would only wait for each other in models this small."""
    if hasattr(os, "sched_setaffinity") and not torch.cuda.is_available():
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[numbers.get() % len(cores)]})
        torch.set_num_threads(1)
