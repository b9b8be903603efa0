"""From checked options to a finished run: what can go wrong without a model is found before one is loaded."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from library.data.batched_data import BatchedData
from library.data.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES
from library.data.custom_dataset import CustomData
from library.data.found_images import FoundImages
from library.data.preview import show_batches, show_dataset
from library.data.training_data import TrainingData
from library.embedding.clients import name_warnings
from library.embedding.initialization import NewWord, warn_of_other_base
from library.model import runtime
from library.model.base_model import BaseModel
from library.model.device_settings import let_memory_grow
from library.model.distillation import distillation_warning
from library.model.family import FAMILIES
from library.model.hub import download_state
from library.model.objective import followed
from library.options.declaration import required
from library.options.launcher import with_launcher
from library.options.notices import notices
from library.options.options import Options, TokenOptions
from library.output.trackers import check_trackers
from library.rehearsal import rehearse
from library.setup import Job
from library.start_choice import check_choice
from library.support.errors import UserError
from library.trainer import train_and_save
from library.training.early_stopping import check_stopping
from library.training.save_schedule import CheckpointNames, RunPlan
from library.training.state import FILE as STATE_FILE
from library.training.state import TrainingState

logger = logging.getLogger(__name__)


@runtime.lost_processes_said()
def train(options: Options, family_name: str, found: FoundImages | None) -> Path | None:
    """Run one training and return the path of its embedding. Raises UserError.

    None after ``--debug_dataset`` and ``--dry_run``.

    ``found`` is what :func:`find_images` gives for the options.
    """
    family = FAMILIES[family_name]
    options = replace(options, runtime=with_launcher(options.runtime))
    runtime.check_runtime(options.runtime)
    check_trackers(options.logging)
    for sentence in notices(options):
        logger.info(sentence)
    if sentences := name_warnings(options.save.output_name or ""):
        logger.warning(" ".join(sentences))
    state = find_state(options)
    options = state.begun_alike(options) if state else options
    model = BaseModel.open(options.model, family, half=runtime.halves(options.runtime))
    if warning := distillation_warning(model.source, model.name):
        logger.warning(warning)
    options = followed(options, model.objective, model.name)
    if not options.dataset.debug_dataset:
        model.check_parts()
    word = NewWord.check(options.token, model.tokenizers())
    machine = runtime.Machine.create(options.runtime)
    if state is None and machine.accelerator.is_main_process and not options.dataset.debug_dataset:
        warn_of_other_base(options.token, model)
    # What is in force, wherever it comes from: states record it.
    in_force = replace(options.runtime, mixed_precision=machine.precision.mixed_precision)
    options = replace(options, runtime=in_force)
    seed = state.seed if state and options.training.seed is None else options.training.seed
    data = build_data(options, word, runtime.seed_everything(seed), found)
    options = replace(options, dataset=replace(options.dataset, train_inpainting=data.inpainting))
    model.check_inpainting(data.inpainting)
    let_memory_grow(data.sizes, machine.accelerator.device)
    if options.dataset.debug_dataset:
        if isinstance(data, TrainingData):
            plan = RunPlan.create(options.training, data.order.num_batches)
            show_dataset(data, options.save.output_dir, plan.total_steps)
        else:
            show_batches(data.loader(), data.prompts)
        return None
    try:
        job = Job.create(options, family, machine, model, word, data, state)
        check_choice(job)
        check_stopping(options, job.stop_rule)
        if options.dataset.dry_run:
            rehearse(job)
            return None
        return train_and_save(job)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device's memory is full: {error} Give the run less to hold: --gradient_checkpointing, a smaller "
            "batch_size or resolution, --cache_latents, --mixed_precision=bf16, --fp8_base."
        ) from error


def find_state(options: Options) -> TrainingState | None:
    """The state that ``--resume`` names, if any. Raises UserError."""
    if options.save.resume is None:
        return None
    folder = Path(options.save.resume)
    if options.save.resume == "latest" and not options.hub.resume_from_huggingface:
        names = CheckpointNames(options.save.output_name, options.save.save_model_as)
        folder = TrainingState.latest(Path(required(options.save.output_dir, "output_dir")), names)
        logger.info("--resume=latest: the state in %s.", folder)
    if options.hub.resume_from_huggingface:
        folder = download_state(options.save.resume, STATE_FILE, options.hub.huggingface_token)
    state = TrainingState.read(folder)
    state.check(options)
    return state


def build_data(options: Options, word: NewWord, seed: int, found: FoundImages | None) -> BatchedData:
    """Check the images and captions that were ``found``, or load a dataset class, and report on them."""
    data: BatchedData
    sentences = templates(options.token)
    if found is None:
        length = options.token.max_token_length
        data = CustomData(options.dataset, word.prompts, max_token_length=length, templates=sentences, seed=seed)
    else:
        data = TrainingData(found.configs, word.prompts, templates=sentences, seed=seed, sets=found.sets)
    report = data.check()
    logger.info(report.text)
    for warning in report.warnings:
        logger.warning(warning)
    return data


def templates(options: TokenOptions) -> tuple[str, ...] | None:
    """The sentences that replace all captions, if any; the object templates win over the style templates."""
    if options.use_object_template:
        return OBJECT_TEMPLATES
    return STYLE_TEMPLATES if options.use_style_template else None
