"""``--dry_run``: everything that comes before a training, a few steps for a measure, and what the run would leave."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from library.data.metadata_files import CACHE_NAME
from library.data.training_data import TrainingData
from library.model.device_report import peak_memory
from library.output import html_report, metrics_file
from library.output.results import REPORT_ENDINGS, USAGE_ENDING
from library.output.sample_grid import PREVIEW_ENDING
from library.setup import Job, Setup, set_up
from library.support.errors import counted
from library.support.phase import duration
from library.training.optimizer_step import check_learning

_TRIAL_STEPS = 3  # of which the first, that warms everything up, is not timed


def rehearse(job: Job) -> None:
    """Load and try everything, and print what the run would take and write. Raises UserError as the run would.

    One batch of images is read and encoded, not all of them, and nothing is written: the vectors that the trial steps
    move are thrown away.
    """
    check_learning(job.options, job.plan.total_steps)
    trial = _with_one_batch(job)
    begun = time.perf_counter()
    setup = set_up(trial)
    loading = time.perf_counter() - begun
    seconds, images = _trial_steps(trial, setup)
    if job.accelerator.is_main_process:
        lines = [*_cost(job, loading, seconds, images), "It would write:", *(f"  {each}" for each in _files(job))]
        print("\n".join(["\nDry run: all is well. Nothing was trained, and nothing was written.", *lines]))


def _with_one_batch(job: Job) -> Job:
    """The job with the images of its largest batch alone, their latents in memory."""
    data = job.data.of_largest_batch() if isinstance(job.data, TrainingData) else job.data
    cache = replace(job.options.cache, cache_latents_to_disk=False)
    # A state knows the images of the whole run, which these are not.
    state = job.state and replace(job.state, contents="")
    return replace(job, options=replace(job.options, cache=cache), data=data, state=state)


def _trial_steps(job: Job, setup: Setup) -> tuple[list[float], str]:
    """Seconds of some optimizer steps on the first batch, each as large as the run's; what a step was made of."""
    left = job.plan.total_steps - setup.progress.step
    loader = job.data.loader(max_steps=job.plan.total_steps)
    loader.set_epoch(1, 0)
    batch = next(iter(loader))
    seconds = []
    for _ in range(min(_TRIAL_STEPS, left)):
        begun = time.perf_counter()
        setup.learner.step([batch] * job.plan.accumulation, setup.task)
        seconds.append(time.perf_counter() - begun)
    height, width = (int(side) for side in batch.size_conditioning[0, 4:].tolist()) if len(batch) else (0, 0)
    return seconds, f"{counted(len(batch) * job.plan.accumulation, 'image')} of {width}x{height} pixels"


def _cost(job: Job, loading: float, seconds: list[float], images: str) -> Iterator[str]:
    """Time and memory, and how they were measured."""
    plan = job.plan
    vectors = counted(job.word.placeholder.count, "vector")
    yield f"It would train {vectors} for {plan.described(job.accelerator.num_processes)}."
    if seconds:
        timed = seconds[1:] or seconds
        mean = sum(timed) / len(timed)
        left = plan.total_steps - (job.state.step if job.state else 0)
        yield (
            f"Time: {mean:.2g} s a step, so about {duration(mean * left)} for {counted(left, 'step')}. This was "
            f"measured in {counted(len(timed), 'trial step')} on {images}, the largest batch of the run. Loading took "
            f"{duration(loading)}; {_not_measured(job)} on top."
        )
    if (gigabytes := peak_memory(job.device)) is not None:
        kind = "GPU memory" if job.device.type == "cuda" else "main memory"
        yield f"Memory: {gigabytes:.1f} GiB of {kind} at most, while loading and in the trial steps."


def _not_measured(job: Job) -> str:
    """What a run spends its time on besides."""
    options = job.options
    parts = ["reading the images"]
    if options.cache.cache_latents:
        parts = [f"encoding {counted(len(job.data.latent_entries()), 'image')} whose latents are not cached yet"]
    parts += ["measuring for --early_stopping"] if options.recipe.early_stopping else []
    parts += ["drawing sample images"] if options.sample.draws_images else []
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"{listed} {'comes' if len(parts) == 1 else 'come'}"


def _files(job: Job) -> Iterator[str]:
    """What the run would write, a line each."""
    options, names = job.options, job.saves.names
    result = job.results.path(names.file(names.last()))
    kept = " (the file that is there is kept under another name)" if result.exists() else ""
    yield f"{result}{kept}"
    yield from _checkpoints(job)
    endings = [] if options.logging.no_report else [html_report.ENDING, metrics_file.ENDING, USAGE_ENDING]
    endings += REPORT_ENDINGS if options.sample.learning_report else ()
    endings += [PREVIEW_ENDING] if options.sample.draws_during_training and not options.logging.no_report else []
    yield from (f"{result.with_suffix('')}{ending}" for ending in endings)
    if options.sample.draws_during_training:
        prompts = counted(sum(prompt is not None for prompt in job.album.prompts), "prompt")
        yield f"{job.album.folder}, with the images of {prompts} each time they are drawn"
    yield from _beside_the_images(job)
    if options.logging.trackers:
        where = options.logging.logging_dir or Path.cwd()
        yield f"logs for {' and '.join(options.logging.trackers)} in {where}"
    if options.runtime.console_log_file:
        yield f"{options.runtime.console_log_file}, with its messages"
    if options.hub.huggingface_repo_id:
        yield f"the saved files to {options.hub.huggingface_repo_id} on the Hugging Face Hub"


def _checkpoints(job: Job) -> Iterator[str]:
    """The files that are saved on the way, and the states."""
    save, saves, names = job.options.save, job.saves, job.saves.names
    every_steps, every_epochs = save.save_every_n_steps, saves.every_n_epochs
    if every_steps and (times := job.plan.total_steps // every_steps):
        yield f"{names.file(names.step(every_steps))} and so on, after every {every_steps} steps: {times} times"
    if every_epochs and (times := (job.plan.epochs - 1) // every_epochs):
        yield f"{names.file(names.epoch(every_epochs))} and so on, after every {every_epochs} epochs: {times} times"
    if save.save_state:
        yield f"{names.state(names.last())} and a state beside each of these files"
    elif save.save_state_on_train_end:
        yield names.state(names.last())


def _beside_the_images(job: Job) -> Iterator[str]:
    """The caches among the images."""
    if job.options.cache.cache_latents_to_disk:
        yield f"latents beside {counted(len(job.data.latent_entries()), 'image')}, where they are not cached yet"
    if isinstance(job.data, TrainingData):
        subsets = (subset for config in job.data.configs for subset in config.subsets)
        yield from dict.fromkeys(str(Path(subset.source) / CACHE_NAME) for subset in subsets if subset.cache_info)
