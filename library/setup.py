"""What a training works with, from checked data to loaded networks: each step takes what those before it have made."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import accelerate
import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel

from library.data.batched_data import BatchedData
from library.data.latent_cache import LatentCache
from library.embedding.initialization import NewWord, initial_rows
from library.embedding.prompt_encoder import PromptEncoder
from library.embedding.start_words import RankedWord
from library.embedding.tokenizer import TrainableRows, table_spread, token_table, typical_norm
from library.model import device_settings, runtime
from library.model.base_model import BaseModel
from library.model.family import ModelFamily
from library.model.vae import FrozenVae
from library.options.checks import clip_limit
from library.options.options import Options
from library.output.results import Results
from library.output.sample_images import SampleImages
from library.output.sampling import SamplingPipeline
from library.support.errors import UserError
from library.support.phase import phase
from library.training.denoising import DenoisingTask
from library.training.diffusion import NoiseSchedule
from library.training.divergence_guard import DivergenceGuard
from library.training.early_stopping import StopRule
from library.training.loss_bands import LossBands
from library.training.lr_schedulers import LearningRateSchedule, build_lr_schedule
from library.training.optimizer_step import Learner, StepRules
from library.training.optimizers import (
    OptimizerChoice,
    build_optimizer,
    fast_learning_warning,
    slow_learning_warning,
)
from library.training.progress import Progress
from library.training.save_schedule import RunPlan, SaveSchedule
from library.training.state import TrainingState, note_contents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A training as it is asked for: the arguments have been checked, and nothing large is loaded yet.

    ``state`` is where to resume, if anywhere; ``results`` takes it into account.
    """

    options: Options
    family: ModelFamily
    machine: runtime.Machine
    model: BaseModel
    word: NewWord
    data: BatchedData
    state: TrainingState | None
    plan: RunPlan
    saves: SaveSchedule
    results: Results
    album: SampleImages

    @classmethod
    def create(
        cls,
        options: Options,
        family: ModelFamily,
        machine: runtime.Machine,
        model: BaseModel,
        word: NewWord,
        data: BatchedData,
        state: TrainingState | None = None,
    ) -> "Job":
        """Plan the run. Raises UserError for a state that it cannot go on from (see ``Results.continuing``)."""
        if machine.accelerator.is_main_process and not options.dataset.dry_run:
            model.begin_hash()
        processes = machine.accelerator.num_processes
        plan = RunPlan.create(options.training, data.order.num_batches, processes)
        saves = SaveSchedule.create(options.save, plan.epochs)
        results = Results.create(options, family, model, word, data)
        album = SampleImages.create(options, word.prompts, model.name)
        if state:
            results = results.continuing(state, plan, data.fingerprint, processes)
        return cls(options, family, machine, model, word, data, state, plan, saves, results, album)

    @property
    def accelerator(self) -> accelerate.Accelerator:
        """This process among those of the run."""
        return self.machine.accelerator

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.machine.accelerator.device
        return device

    @property
    def samples_per_step(self) -> float:
        """How many samples an optimizer step of all processes has, on the average."""
        order = self.data.order
        batches = self.plan.accumulation * self.accelerator.num_processes
        return float(batches * order.num_samples / order.num_batches)

    @property
    def stop_rule(self) -> StopRule:
        """When ``--early_stopping`` measures the loss and stops the run."""
        return StopRule.create(self.options, self.plan, self.samples_per_step)

    @property
    def reports(self) -> bool:
        """Whether this process writes the run's report."""
        return self.accelerator.is_main_process and not self.options.logging.no_report

    @property
    def share(self) -> dict[str, int]:
        """The number of this process and of all, by the names that loaders and caches give them."""
        return {"process_index": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}


@dataclass(frozen=True)
class Setup:
    """What a training works with. Only the rows that the ``learner`` holds change; all networks are frozen.

    ``starts`` [N, D] per text encoder are the rows that the training began with. ``vae`` is None where nothing is
    encoded or decoded any more, and with it the ``pipeline``, which draws with the rows as they are. ``contents`` is
    what states say of images and latents. ``results`` writes this run's files. ``ranking`` are the best of the words
    that were tried as a start, if that was asked for.
    """

    learner: Learner
    starts: list[Tensor]
    prompt_encoder: PromptEncoder
    vae: FrozenVae | None
    task: DenoisingTask
    pipeline: SamplingPipeline | None
    contents: str
    results: Results
    ranking: tuple[RankedWord, ...] = ()

    @property
    def rows(self) -> TrainableRows:
        """The only parameters."""
        return self.learner.rows

    @property
    def progress(self) -> Progress:
        """Where the training stands."""
        return self.learner.progress


def set_up(job: Job) -> Setup:
    """Load, build and cache everything. Raises UserError."""
    text_encoders = load_text_encoders(job)
    tables = [token_table(encoder) for encoder in text_encoders]
    starts = first_rows(job, tables)
    learner = build_learner(job, TrainableRows(starts), tables)
    prompt_encoder = build_prompt_encoder(job, text_encoders, learner)
    vae = prepare_latents(job)
    contents = runtime.decided_by_main(lambda: note_contents(job.data, job.options, job.state))
    differs = job.state is not None and job.state.differs_from(contents)
    results = job.results.as_another_run() if differs else job.results
    unet = load_unet(job)
    task = build_task(job, unet, prompt_encoder, vae)
    runtime.set_attention(job.options.runtime, unet, vae.vae if vae else None)
    runtime.compile_modules(job.options.runtime, [unet, *text_encoders])
    if job.options.cache.cache_text_encoder_outputs:
        cache_prompts(job.data, prompt_encoder)
    pipeline = build_pipeline(job, task, vae) if vae else None
    return Setup(learner, [start.cpu() for start in starts], prompt_encoder, vae, task, pipeline, contents, results)


def load_text_encoders(job: Job) -> list[PreTrainedModel]:
    """The frozen text encoders in the run's precision, on the device."""
    several = len(job.model.architecture.text_encoders) > 1
    with phase("Loading the text encoders" if several else "Loading the text encoder"):
        encoders = job.model.text_encoders(job.machine.precision.dtype, job.device)
    if job.options.training.gradient_checkpointing:
        for encoder in encoders:
            encoder.activation_checkpointing_enable()
            encoder.train()  # transformers checkpoints in train mode only; CLIP has no dropout
    return encoders


def first_rows(job: Job, tables: Sequence[torch.nn.Embedding]) -> list[Tensor]:
    """The rows that the training begins with, [N, D] per text encoder; with ``--resume`` those that it began with."""
    if job.state:
        return job.state.starts_for(tables)
    return initial_rows(job.word, job.options.token, job.family, tables, job.data.seed)


def optimizer_and_rates(job: Job, rows: TrainableRows, spread: float) -> tuple[OptimizerChoice, LearningRateSchedule]:
    """The optimizer over the rows alone, and its learning rates; ``spread`` is that of the token embedding table."""
    choice = build_optimizer(job.options.optimizer, rows.parameters())
    schedule = build_lr_schedule(job.options.schedule, choice, job.plan.total_steps)
    slow = slow_learning_warning(choice, job.plan.total_steps, spread)
    if warning := slow or fast_learning_warning(choice, spread):
        logger.warning(warning)
    return choice, schedule


def build_learner(job: Job, rows: TrainableRows, tables: Sequence[torch.nn.Embedding]) -> Learner:
    """What steps the rows; with ``--resume`` as it was when the state was saved."""
    state, accelerator = job.state, job.accelerator
    spread = max(table_spread(table.weight) for table in tables)
    rows.to(job.device)
    rules, limit = step_rules(job.options, tables), job.options.recipe.max_embedding_norm
    if limit and rules.max_norms and not state:
        warn_of_shortened(rows, rules.max_norms, limit)
    choice, schedule = optimizer_and_rates(job, rows, spread)
    watch = DivergenceGuard(
        job.word.placeholder.names, job.plan.total_steps, scales_loss=accelerator.scaler is not None
    )
    learner = Learner(
        accelerator,
        rows,
        choice,
        schedule,
        watch,
        progress=Progress.at(job.plan, state.step, closed=state.epoch_closed) if state else Progress(),
        rules=rules,
    )
    if state:
        learner.load_state_dict(state.learner, new_rates=bool(state.other_rates(job.options)))
    return learner


def warn_of_shortened(rows: TrainableRows, max_norms: Sequence[float], limit: float) -> None:
    """Say that ``--max_embedding_norm``, which is the ``limit``, will cut the start itself in the first step."""
    longest = max(each.norm(dim=1).max().item() / most for each, most in zip(rows.rows, max_norms, strict=True))
    if longest > 1:
        logger.warning(
            "--max_embedding_norm=%g: the vectors that the training starts from are up to %.2g times as long as a "
            "usual word's, and the first step will shorten them to the limit. Raise it above that to keep the start.",
            *(limit, limit * longest),
        )


def step_rules(options: Options, tables: Sequence[torch.nn.Embedding]) -> StepRules:
    """What a step does besides following the gradient; ``tables`` are the frozen token embeddings."""
    keeps_norm, most = options.token.preserve_embedding_norm, options.recipe.max_embedding_norm
    return StepRules(
        max_grad_norm=clip_limit(options),
        normalizes_samples=options.recipe.normalize_sample_gradients,
        norms=[typical_norm(table.weight) for table in tables] if keeps_norm else None,
        max_norms=[most * typical_norm(table.weight) for table in tables] if most and not keeps_norm else None,
    )


def build_prompt_encoder(job: Job, text_encoders: list[PreTrainedModel], learner: Learner) -> PromptEncoder:
    """The text encoders with the learner's rows in them."""
    prompt_encoder = PromptEncoder(
        job.family, text_encoders, job.word.prompts, learner.prepared_rows, job.options.model.clip_skip
    )
    check_text_encoders(job, prompt_encoder)
    return prompt_encoder


def check_text_encoders(job: Job, prompt_encoder: PromptEncoder) -> None:
    """Encode the word once, so that a bad ``--clip_skip`` or an encoder that overflows is found at once."""
    with torch.no_grad():
        ids = job.word.prompts.encode(job.word.placeholder.expanded)
        conditioning = prompt_encoder.encode([windows.unsqueeze(0) for windows in ids])
    if not torch.isfinite(conditioning.context).all():
        raise UserError(
            f"The text encoder gives NaN or infinite values in {job.machine.precision.mixed_precision}. Use "
            "--mixed_precision=bf16 or no; if that does not help, the model file is damaged."
        )


def prepare_latents(job: Job) -> FrozenVae | None:
    """Fill the latent cache and return the VAE: in the main memory for drawing images, None if there are none.

    Without a cache it stays on the device, for encoding at every step.
    """
    cache, whole = job.options.cache, job.options.model.no_half_vae
    dtype = runtime.vae_dtype(job.machine.precision, job.device, whole=whole)
    with phase("Loading the VAE"):
        vae = FrozenVae(job.model.vae(dtype, job.device), job.device, dtype, load=job.model.vae)
    if not cache.cache_latents:
        return vae
    runtime.set_attention(job.options.runtime, None, vae.vae)
    latents = LatentCache(
        suffix=job.family.cache_suffix,
        to_disk=cache.cache_latents_to_disk,
        seed=job.data.seed,
        skip_check=cache.skip_cache_check,
        highvram=job.options.runtime.highvram,
        precision=torch.float32 if whole else job.machine.precision.dtype,
    )
    wait = job.accelerator.wait_for_everyone
    latents.fill(job.data.latent_entries(), vae, batch_size=cache.vae_batch_size, wait=wait, **job.share)
    job.data.use_cache(latents)
    if not job.options.sample.draws_images:
        return None
    vae.move("cpu")
    return vae


def load_unet(job: Job) -> UNet2DConditionModel:
    """The frozen U-Net in the run's precision (or float8), on the device, in eval mode."""
    dtype, options = job.machine.precision.dtype, job.options
    with phase("Loading the U-Net"):
        unet = job.model.unet(
            dtype, job.device, float8=options.runtime.fp8_base, inpainting=options.dataset.train_inpainting
        )
    if (layout := device_settings.fastest_format(job.device, dtype)) != torch.preserve_format:
        unet.to(memory_format=layout)  # type: ignore[call-arg]  # diffusers wraps it as if it were a function
    if options.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def build_task(
    job: Job, unet: UNet2DConditionModel, prompt_encoder: PromptEncoder, vae: FrozenVae | None
) -> DenoisingTask:
    """What every batch goes through."""
    return DenoisingTask(
        family=job.family,
        unet=unet,
        prompt_encoder=prompt_encoder,
        schedule=NoiseSchedule.create(zero_terminal_snr=bool(job.options.noise.zero_terminal_snr)).to(job.device),
        noise=job.options.noise,
        loss=job.options.loss,
        v_prediction=bool(job.options.model.v_parameterization),
        vae_scale_factor=job.model.vae_scale_factor,
        vae=vae,
        bands=LossBands() if job.reports else None,
    )


def cache_prompts(data: BatchedData, prompt_encoder: PromptEncoder) -> None:
    """Encode captions that lack the token once and for all, for ``--cache_text_encoder_outputs``."""
    cached, live = prompt_encoder.cache(data.first_prompts())
    logger.info(
        "Text encoder outputs: %d captions without the token are cached, %d captions with it stay live "
        "(their output changes at every step).",
        *(cached, live),
    )


def build_pipeline(job: Job, task: DenoisingTask, vae: FrozenVae) -> SamplingPipeline:
    """Draws images with the networks of the training."""
    return SamplingPipeline(
        family=job.family,
        unet=task.unet,
        prompt_encoder=task.prompt_encoder,
        prompts=job.word.prompts,
        vae=vae,
        vae_scale_factor=job.model.vae_scale_factor,
        device=job.device,
        sampler=job.options.sample.sample_sampler,
        v_prediction=bool(job.options.model.v_parameterization),
        zero_terminal_snr=bool(job.options.noise.zero_terminal_snr),
    )
