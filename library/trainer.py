"""The training, from loaded data to the saved file: build steps that return what they made, then the loop."""

import logging
import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from library.data.batches import groups
from library.data.latent_cache import LatentCache
from library.data.training_data import TrainingData
from library.embedding.initialization import NewWord, initial_rows
from library.embedding.prompt_encoder import PromptEncoder
from library.embedding.tokenizer import TrainableRows, table_spread, typical_norm
from library.model import device_settings, runtime
from library.model.base_model import BaseModel
from library.model.family import ModelFamily
from library.model.hub import HubUpload
from library.model.vae import FrozenVae
from library.options.options import Options
from library.output.learning_report import LearningMeasure
from library.output.results import Results
from library.output.sample_images import SampleAlbum, epoch_mark, step_mark
from library.output.sampling import SamplingPipeline
from library.output.trackers import RunLog
from library.rescue import Rescue
from library.support.errors import UserError, survived
from library.support.signals import undisturbed
from library.training.denoising import DenoisingTask
from library.training.diffusion import NoiseSchedule
from library.training.learning_watch import LearningWatch
from library.training.lr_schedulers import LearningRateSchedule, build_lr_schedule
from library.training.optimizer_step import Learner, check_learning
from library.training.optimizers import OptimizerChoice, build_optimizer, largest_rate, slow_learning_warning
from library.training.save_schedule import Action, RunPlan, SaveSchedule
from library.training.state import TrainingState, note_contents, random_states, recorded

logger = logging.getLogger(__name__)


class Trainer:
    """One training run; :meth:`run` is its table of contents.

    The arguments have been checked and nothing large is loaded yet. ``rows`` are the only parameters; everything else
    is frozen when it is loaded and never written to.
    """

    def __init__(
        self,
        options: Options,
        family: ModelFamily,
        machine: runtime.Machine,
        model: BaseModel,
        word: NewWord,
        data: TrainingData,
        state: TrainingState | None = None,
    ):
        """``state`` is where to go on; see ``Results.continuing``. Raises UserError."""
        if machine.accelerator.is_main_process:
            model.begin_hash()
        self.options, self.family, self.model, self.word, self.data = options, family, model, word, data
        self.state, self.device = state, machine.accelerator.device
        self.accelerator, self.precision = machine.accelerator, machine.precision
        processes = self.accelerator.num_processes
        self.plan = RunPlan.create(options.training, data.order.num_batches, processes)
        self.saves = SaveSchedule.create(options.save, self.plan.epochs)
        self.results = Results.create(options, family, model, word, data)
        self.album, self.epoch_closed = SampleAlbum.create(options, word.prompts), True
        done = state.step if state else 0
        self.epoch, self.batches_done = self.plan.position(done, closed=state is None or state.epoch_closed)
        if state:
            self.results = self.results.continuing(state, self.plan, data.fingerprint, processes)

    @property
    def step(self) -> int:
        """How many optimizer steps have been done."""
        return self.learner.steps

    def run(self) -> Path:
        """Train and save; return the path of the embedding file."""
        check_learning(self.options, self.plan.total_steps)
        if self.accelerator.is_main_process:
            self.results.sweep()
        self.hub = HubUpload.open(self.options.hub) if self.accelerator.is_main_process else None
        text_encoders = self.load_text_encoders()
        self.rows, self.starts = self.build_rows(text_encoders)
        self.choice, self.lr_schedule = self.build_optimizer(self.rows)
        self.learner = self.build_learner()
        self.prompt_encoder = PromptEncoder(
            self.family, text_encoders, self.word.prompts, self.learner.prepared_rows, self.options.model.clip_skip
        )
        self.check_text_encoders()
        self.vae = self.prepare_latents()
        self.contents = runtime.decided_by_main(lambda: note_contents(self.data, self.options, self.state))
        if self.state and self.state.differs_from(self.contents):
            self.results = self.results.as_another_run()
        self.task = self.build_task(self.load_unet(), self.vae)
        runtime.set_attention(self.options.runtime, self.task.unet, self.vae and self.vae.vae)
        runtime.compile_modules(self.options.runtime, [self.task.unet, *text_encoders])
        self.cache_prompts()
        self.rescue = self.build_rescue()
        self.log = RunLog.start(self.options)
        try:
            with self.rescue.lookout:
                path = self.learn()
        finally:
            self.log.finish()
            if self.hub:
                self.hub.finish()
        if self.options.sample.learning_report:
            self.report_learning(path)
        return path

    def learn(self) -> Path:
        """The loop and the result; whatever ends it early, what was learned is kept."""
        try:
            self.fit()
            return self.finish()
        except BaseException:
            with undisturbed():
                self.rescue.save(self.step, self.epoch)
            raise

    # ---- build steps

    def load_text_encoders(self) -> list[torch.nn.Module]:
        """The frozen text encoders in the run's precision, on the device."""
        logger.info("Loading the text encoder%s.", "s" if len(self.model.architecture.text_encoders) > 1 else "")
        encoders = self.model.text_encoders(self.precision.dtype, self.device)
        if self.options.training.gradient_checkpointing:
            for encoder in encoders:
                encoder.activation_checkpointing_enable()
                encoder.train()  # transformers checkpoints in train mode only; CLIP has no dropout
        return encoders

    def check_text_encoders(self) -> None:
        """Encode the word once, so that a bad ``--clip_skip`` or an encoder that overflows is found at once."""
        with torch.no_grad():
            ids = self.word.prompts.encode(self.word.placeholder.expanded)
            conditioning = self.prompt_encoder.encode([windows.unsqueeze(0) for windows in ids])
        if not torch.isfinite(conditioning.context).all():
            raise UserError(
                f"The text encoder gives values that are not finite in {self.precision.mixed_precision}. Use "
                "--mixed_precision=bf16 or no; if that does not help, the model file is damaged."
            )

    def build_rows(self, text_encoders: list[torch.nn.Module]) -> tuple[TrainableRows, list[Tensor]]:
        """The trained rows and a copy of their start values."""
        tables = [encoder.get_input_embeddings() for encoder in text_encoders]
        if self.state:
            starts = self.state.starts_for(tables)
        else:
            starts = initial_rows(self.word, self.options.token, self.family, tables, self.data.seed)
        self.table_spread = max(table_spread(table.weight) for table in tables)
        self.usual_norms = None
        if self.options.token.preserve_embedding_norm:
            self.usual_norms = [typical_norm(table.weight) for table in tables]
        return TrainableRows(starts), [start.cpu() for start in starts]

    def build_optimizer(self, rows: TrainableRows) -> tuple[OptimizerChoice, LearningRateSchedule]:
        """The optimizer over the rows alone, and its learning rates."""
        rows.to(self.device)
        choice = build_optimizer(self.options.optimizer, rows.parameters())
        schedule = build_lr_schedule(self.options.schedule, choice, self.plan.total_steps)
        if warning := slow_learning_warning(choice, self.plan.total_steps, self.table_spread):
            logger.warning(warning)
        return choice, schedule

    def build_learner(self) -> Learner:
        """What steps the rows; with ``--resume`` as it was when the state was saved."""
        watch = LearningWatch(
            self.word.placeholder.names, self.plan.total_steps, scales_loss=self.accelerator.scaler is not None
        )
        limit, norms = self.options.optimizer.max_grad_norm, self.usual_norms
        learner = Learner(
            self.accelerator, self.rows, self.choice, self.lr_schedule, watch, max_grad_norm=limit, norms=norms
        )
        if self.state:
            learner.load_state_dict(
                self.state.learner, self.state.step, new_rates=bool(self.state.other_rates(self.options))
            )
        return learner

    def build_rescue(self) -> Rescue:
        """What keeps the vectors of a run that ends early."""
        return Rescue(
            self.learner,
            self.results,
            self.saves.names,
            process=self.accelerator.process_index,
            watch=self.accelerator.num_processes > 1,
            patience=runtime.patience(self.options.runtime, self.device),
        )

    def prepare_latents(self) -> FrozenVae | None:
        """Fill the latent cache and return the VAE: in the main memory for drawing pictures, None if there are none.

        Without a cache it stays on the device, for encoding at every step.
        """
        cache = self.options.cache
        whole = self.options.model.no_half_vae
        dtype = runtime.vae_dtype(self.precision, self.device, whole=whole)
        logger.info("Loading the VAE.")
        vae = FrozenVae(self.model.vae(dtype, self.device), self.device, dtype, load=self.model.vae)
        if not cache.cache_latents:
            return vae
        runtime.set_attention(self.options.runtime, None, vae.vae)
        latents = LatentCache(
            suffix=self.family.cache_suffix,
            to_disk=cache.cache_latents_to_disk,
            seed=self.data.seed,
            skip_check=cache.skip_cache_check,
            highvram=self.options.runtime.highvram,
            precision=torch.float32 if whole else self.precision.dtype,
        )
        latents.fill(
            self.data.latent_entries(),
            vae,
            batch_size=cache.vae_batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
        )
        self.data.use_cache(latents)
        if not self.options.sample.draws_pictures:
            return None
        vae.move("cpu")
        return vae

    def load_unet(self) -> torch.nn.Module:
        """The frozen U-Net in the run's precision (or float8), on the device, in eval mode."""
        logger.info("Loading the U-Net.")
        kind = {"float8": self.options.runtime.fp8_base, "inpainting": self.options.dataset.train_inpainting}
        unet = self.model.unet(self.precision.dtype, self.device, **kind)
        unet.to(memory_format=device_settings.fastest_format(self.device, self.precision.dtype))
        if self.options.training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    def build_task(self, unet: torch.nn.Module, vae: FrozenVae | None) -> DenoisingTask:
        """What every batch goes through."""
        return DenoisingTask(
            family=self.family,
            unet=unet,
            prompt_encoder=self.prompt_encoder,
            schedule=NoiseSchedule.create(zero_terminal_snr=self.options.noise.zero_terminal_snr).to(self.device),
            noise=self.options.noise,
            loss=self.options.loss,
            v_prediction=self.options.model.v_parameterization,
            vae_scale_factor=self.model.vae_scale_factor,
            vae=vae,
        )

    def sampling_pipeline(self) -> SamplingPipeline:
        """Draws pictures with the rows as they are."""
        return SamplingPipeline(
            family=self.family,
            unet=self.task.unet,
            prompt_encoder=self.prompt_encoder,
            prompts=self.word.prompts,
            vae=self.vae,
            vae_scale_factor=self.model.vae_scale_factor,
            device=self.device,
            sampler=self.options.sample.sample_sampler,
            v_prediction=self.options.model.v_parameterization,
            zero_terminal_snr=self.options.noise.zero_terminal_snr,
        )

    def cache_prompts(self) -> None:
        """Encode captions that lack the word once and for all, with ``--cache_text_encoder_outputs``."""
        if not self.options.cache.cache_text_encoder_outputs:
            return
        cached, live = self.prompt_encoder.cache(self.data.first_prompts())
        logger.info(
            "Text encoder outputs: %d captions without the word are cached, %d captions with it stay live "
            "(their output changes at every step).",
            cached,
            live,
        )

    # ---- the loop

    def fit(self) -> None:
        """Epochs of optimizer steps until the planned number of steps is done."""
        loader = self.data.loader(
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            accumulation=self.plan.accumulation,
            max_steps=self.plan.total_steps,
            workers=self.options.dataset.max_data_loader_n_workers,
            persistent=self.options.dataset.persistent_data_loader_workers,
            pin_memory=self.device.type == "cuda",
        )
        logger.info(self.plan.described(self.word.placeholder.count, self.accelerator.num_processes))
        lookout = self.rescue.lookout
        progress = tqdm(
            total=self.plan.total_steps,
            initial=self.step,
            desc="steps",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        if self.state:
            self.go_on()
        elif self.album.schedule.at_first():
            self.draw_samples(epoch_mark(0))
        with progress, warnings.catch_warnings():
            # torch says so where the first steps cannot teach the rows, or overflow in fp16.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for epoch in range(self.epoch + 1, self.plan.epochs + 1):
                self.epoch, self.epoch_closed = epoch, False
                loader.set_epoch(epoch, (epoch - 1) * self.plan.steps_per_epoch, self.batches_done)
                self.batches_done = 0
                for batches in islice(groups(loader, self.plan.accumulation), self.plan.total_steps - self.step):
                    rates = self.learner.rates()
                    loss = self.learner.step(lookout.beating(batches), self.task)
                    lookout.step_done(lambda: self.rescue.vectors(self.step, self.epoch))
                    progress.update()
                    if loss is not None:
                        self.log.step(loss, rates, self.step)
                        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr_schedule.get_last_lr()[0]:.3g}")
                    self.carry_out(self.saves.after_step(self.step))
                    if self.album.schedule.after_step(self.step):
                        self.draw_samples(step_mark(self.step))
                self.log.epoch(self.step)
                self.validate()
                self.epoch_closed = True
                self.carry_out(self.saves.after_epoch(epoch))
                if self.album.schedule.after_epoch(epoch):
                    self.draw_samples(epoch_mark(epoch))

    def go_on(self) -> None:
        """Say where the training goes on, and set what the state holds besides the rows and the optimizer.

        What was due after the state was saved is made up for: old files go, samples that are missing are drawn.
        """
        logger.info("Going on after step %d of %d (--resume).", self.step, self.plan.total_steps)
        self.log.epoch_losses = list(self.state.epoch_losses)
        self.state.set_random_states(self.accelerator.process_index)
        actions, due = self.saves.after_step(self.step), self.album.schedule.after_step(self.step)
        mark = step_mark(self.step)
        if self.state.epoch_closed and not self.batches_done:
            actions, due = self.saves.after_epoch(self.epoch), self.album.schedule.after_epoch(self.epoch)
            mark = epoch_mark(self.epoch)
        self.carry_out(action for action in actions if action.kind == "remove")
        if due:
            self.draw_samples(mark, missing=True)

    def validate(self) -> None:
        """Log the loss on held-out pictures, with the same noise and timesteps every time."""
        if not self.data.has_validation:
            return
        loader = self.data.validation_loader(
            process_index=self.accelerator.process_index, num_processes=self.accelerator.num_processes
        )
        loss = torch.zeros((), device=self.device)
        with torch.no_grad(), self.learner.averaged_rows():
            for batch in loader:
                if len(batch):
                    loss += self.task.losses(batch.to(self.device)).mean() * batch.weight
        loss = self.learner.agree(torch.stack([loss, torch.ones_like(loss)]))
        logger.info("Epoch %d, step %d: loss/validation %.5f", self.epoch, self.step, loss)
        self.log.values({"loss/validation": loss}, self.step)

    # ---- results

    def draw_samples(self, mark: str, *, missing: bool = False) -> None:
        """Draw the pictures of ``--sample_prompts``, or those ``missing``, with the rows as they would be saved now."""
        with self.learner.averaged_rows():
            pictures = self.album.draw(
                self.sampling_pipeline(),
                mark,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                missing=missing,
            )
        self.log.pictures(pictures, self.step)

    def carry_out(self, actions: Iterable[Action]) -> None:
        """Save and remove what the schedule says."""
        for action in actions:
            if action.kind == "save":
                self.save(action.name)
                self.upload(action)
            elif action.kind == "state":
                self.save_state(action.name)
                self.upload(action)
            elif action.kind == "remove" and self.accelerator.is_main_process:
                self.results.remove(action.name)

    def save(self, name: str) -> list[Tensor]:
        """Write the embedding file ``name`` and return the rows in it; all processes take part, one writes."""
        with self.learner.averaged_rows() as rows:
            if self.accelerator.is_main_process:
                self.results.write(name, rows, self.step, self.epoch, self.choice)
        return rows

    def save_state(self, name: str) -> None:
        """Write the folder ``name`` for ``--resume``; all processes take part, one writes."""
        state = TrainingState(
            step=self.step,
            total_steps=self.plan.total_steps,
            epoch_closed=self.epoch_closed,
            seed=self.data.seed,
            data=self.data.fingerprint,
            contents=self.contents,
            options=recorded(self.options),
            starts=self.starts,
            learner=self.learner.state_dict(),
            epoch_losses=self.log.epoch_losses,
            random_states=gather_object([random_states()]),
        )
        if self.accelerator.is_main_process:
            self.results.write_state(name, state)

    def upload(self, action: Action) -> None:
        """Bring what was saved to the hub, if that was asked for; only the main process has a ``hub``."""
        if self.hub and (action.kind == "save" or self.options.hub.save_state_to_huggingface):
            self.hub.upload(self.results.path(action.name))

    def finish(self) -> Path:
        """Save the result and say where it is, how far it moved and how to use it."""
        *before, result = self.saves.at_end()
        try:
            self.carry_out(before)
        except UserError:  # the result does not wait for a state that cannot be written
            self.save(result.name)
            raise
        rows = self.save(result.name)
        self.upload(result)
        path = self.results.path(result.name)
        if self.accelerator.is_main_process:
            self.results.report(path, self.starts, rows, self.step, largest_rate(self.choice) or None)
        return path

    def report_learning(self, path: Path) -> None:
        """Measure what the word learned, say it, and write it beside the embedding file; all processes take part."""
        token = self.options.token
        with survived("The learning report could not be made; the embedding is complete without it."):
            with self.learner.averaged_rows():
                measure = LearningMeasure(self.sampling_pipeline(), self.task, self.data, self.word, self.rows)
                report = measure.report(None if token.weights else token.init_word, self.starts)
            if self.accelerator.is_main_process:
                print(f"\n{report.text}")
                print(f"The pictures are in {report.write(path.with_suffix(''), self.results.run)}")
