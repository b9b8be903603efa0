"""The training: the loop over epochs and steps, and the list of all that happens besides."""

import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from accelerate.utils import gather_object
from tqdm import tqdm

from library.data.batches import Batch, groups
from library.data.concept import Concept
from library.data.loader import BatchLoader
from library.embedding.vocabulary import Vocabulary
from library.model import runtime
from library.model.hub import HubUpload
from library.output.learning_report import LearningMeasure, LearningReport, LearningReporting
from library.output.measurements import Measurements
from library.output.run_facts import RunFacts
from library.output.run_report import RunReport, Watched
from library.output.sample_images import Sampling
from library.output.sampling import SamplingPipeline
from library.output.saving import Saving, Uploads
from library.output.trackers import RunLog
from library.output.vector_meter import VectorMeter
from library.rescue import Rescue
from library.setup import Job, Setup, set_up
from library.start_choice import with_best_start
from library.support.progress_bar import paused, progress_bar
from library.support.running_mean import RunningMean, readable_span
from library.support.signals import undisturbed
from library.training.callbacks import Callbacks, StepResult
from library.training.early_stopping import EarlyStopping
from library.training.optimizer_step import check_learning
from library.training.state import TrainingState, random_states, recorded
from library.training.tail_average import TailAverage
from library.training.validation import Validation

logger = logging.getLogger(__name__)


def train_and_save(job: Job) -> Path:
    """Carry out a training; returns the path of its embedding file. Raises UserError."""
    check_learning(job.options, job.plan.total_steps)
    if job.accelerator.is_main_process:
        job.results.sweep()
    hub = HubUpload.open(job.options.hub) if job.accelerator.is_main_process else None
    job, setup = with_best_start(job, set_up(job))
    callbacks, saving = happenings(job, setup, hub)
    return Trainer(job, setup, callbacks, saving).run()


def happenings(job: Job, setup: Setup, hub: HubUpload | None) -> tuple[Callbacks, Saving]:
    """Everything that happens besides the steps, in this order: a new feature of that kind is an entry here.

    The entry that saves is given by itself too, since the result of the run is its business. Only the main process has
    a ``hub``.
    """
    callbacks, log, options = Callbacks(), RunLog.start(job.options), job.options
    entries, results, learner = callbacks.entries, setup.results, setup.learner
    concept, learning = job.data.concept(), None
    if setup.pipeline and concept and options.sample.learning_report:
        learning = LearningReporting(partial(learning_report, job, setup, setup.pipeline, concept))
        entries.append(learning)
    if job.accelerator.is_main_process:
        measurements = measurements_of(job, setup)
        report = run_report(job, setup, measurements, log, learning)
        measurements.readers += [*([report.told] if job.reports else []), *([log.told] if log.trackers else [])]
        entries += [report, measurements]
    entries.append(log)
    if (held_out := job.data.validation_loader(**job.share)) is not None:
        entries.append(Validation(held_out, setup.task, learner, callbacks))
    stopping = None
    if options.recipe.early_stopping:
        stopping = EarlyStopping.create(options, job.stop_rule, job.data, setup.task, learner, callbacks)
        entries.append(stopping)
    averaging = None
    if options.recipe.average_last:
        averaging = TailAverage(options.recipe.average_last, job.plan.total_steps, learner)
        entries.append(averaging)
    state_now = partial(current_state, job, setup, log, stopping, averaging)
    saving = Saving(job.saves, results, learner, setup.starts, state_now, callbacks)
    entries.append(saving)
    if setup.pipeline and options.sample.draws_during_training:
        entries.append(Sampling(job.album, setup.pipeline, learner, callbacks, results.path))
    if hub:
        entries.append(Uploads(hub, results, states=options.hub.save_state_to_huggingface))
    return callbacks, saving


def measurements_of(job: Job, setup: Setup) -> Measurements:
    """What measures the run; nobody reads it yet."""
    vocabularies = list(map(Vocabulary, setup.prompt_encoder.tables, job.word.prompts.tokenizers))
    meter = VectorMeter(job.word.placeholder.names, job.family.embedding_keys, setup.starts, vocabularies)
    every = job.options.logging.log_every_n_steps
    result, ranking = job.saves.at_end()[-1].name, setup.ranking
    return Measurements(setup.learner, meter, setup.task.bands, every=every, result=result, ranking=ranking)


def run_report(
    job: Job, setup: Setup, measurements: Measurements, log: RunLog, learning: LearningReporting | None
) -> RunReport:
    """What notes and shows the run, and judges it at its end."""
    results, file = setup.results, setup.results.path(measurements.result)
    watched = Watched(results, file, job.plan.total_steps, measurements, job.album, learning, log.show)
    return RunReport(
        watched, partial(RunFacts.gather, results, file, job.data, job.plan, setup.learner, job.album.prompts)
    )


def learning_report(job: Job, setup: Setup, pipeline: SamplingPipeline, concept: Concept) -> LearningReport:
    """The word, with its vectors as they were saved, beside what it started from."""
    token = job.options.token
    with setup.learner.averaged_rows():
        measure = LearningMeasure(pipeline, setup.task, concept, job.word, setup.rows)
        return measure.report(None if token.weights else token.init_word, setup.starts)


def current_state(
    job: Job, setup: Setup, log: RunLog, stopping: EarlyStopping | None, averaging: TailAverage | None
) -> TrainingState:
    """All that ``--resume`` needs; all processes take part."""
    return TrainingState(
        step=setup.progress.step,
        total_steps=job.plan.total_steps,
        epoch_closed=setup.progress.epoch_closed,
        seed=job.data.seed,
        data=job.data.fingerprint,
        contents=setup.contents,
        options=recorded(job.options),
        starts=setup.starts,
        learner=setup.learner.state_dict(),
        epoch_losses=log.epoch_losses,
        random_states=gather_object([random_states()]),
        stopping=stopping.state_dict() if stopping else None,
        averaging=averaging.state_dict() if averaging else None,
    )


class Trainer:
    """The loop. Only the rows of the setup's learner change in it; all else is what the callbacks do."""

    def __init__(self, job: Job, setup: Setup, callbacks: Callbacks, saving: Saving) -> None:
        """``saving``, one of the callbacks, also writes the result."""
        self.job, self.setup, self.callbacks, self.saving = job, setup, callbacks, saving
        self.progress, self.learner = setup.progress, setup.learner
        self.running_mean = RunningMean(readable_span(job.plan.total_steps))
        self.smoothed: float | None = None
        self.rescue = Rescue(
            setup.learner,
            setup.results,
            job.saves.names,
            process=job.accelerator.process_index,
            watch=job.accelerator.num_processes > 1,
            patience=runtime.patience(job.options.runtime, job.device),
        )

    def run(self) -> Path:
        """Train and save; returns the path of the embedding file."""
        try:
            with self.rescue.lookout:
                path = self.learn()
            self.callbacks.after_result(path)
        finally:
            self.callbacks.close()
        self.callbacks.after_training(path)
        return path

    def learn(self) -> Path:
        """The loop and the result; whatever ends it early, what was learned is kept."""
        try:
            self.fit()
            self.callbacks.before_result(self.progress)
            return self.saving.finish(self.progress)
        except BaseException:
            with undisturbed():
                self.rescue.save(self.progress.step, self.progress.last_epoch)
            raise

    def fit(self) -> None:
        """Epochs of optimizer steps until the planned number of steps is done, or the run is stopped."""
        plan, progress = self.job.plan, self.progress
        loader = self.loader()
        self.start()
        hidden = not self.job.accelerator.is_local_main_process
        bar = progress_bar("steps", plan.total_steps, "step", done=progress.step, silent=hidden)
        with bar, warnings.catch_warnings():
            # torch says so where the first steps cannot teach the rows, or overflow in fp16.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            while self.epoch_is_done or (
                not progress.stopped and (progress.epoch < plan.epochs or not progress.epoch_closed)
            ):
                self.train_epoch(loader, bar)

    def train_epoch(self, loader: BatchLoader, bar: tqdm) -> None:
        """The next epoch, or the rest of one, as far as the run goes."""
        plan, progress = self.job.plan, self.progress
        progress.begin_epoch()
        loader.set_epoch(progress.epoch, (progress.epoch - 1) * plan.steps_per_epoch, progress.batches_done)
        began = time.monotonic()
        for batches in islice(groups(loader, plan.accumulation), plan.total_steps - progress.step):
            result = self.step(batches, began)
            if result.smoothed is not None:
                rate = self.learner.schedule.get_last_lr()[0]
                bar.set_postfix(loss=f"{result.smoothed:.4f}", lr=f"{rate:.3g}", refresh=False)
            bar.update()
            with paused(bar):
                self.callbacks.after_step(progress, result)
            if progress.stopped and not self.epoch_is_done:
                return  # the epoch stays open, so that a run which is resumed from here may go on with it
            began = time.monotonic()
        progress.close_epoch()
        with paused(bar):
            self.callbacks.after_epoch(progress)

    @property
    def epoch_is_done(self) -> bool:
        """Whether all steps of an epoch are done and what is due at its end is not: also of a run that is stopped."""
        progress = self.progress
        return not progress.epoch_closed and progress.step == progress.epoch * self.job.plan.steps_per_epoch

    def loader(self) -> BatchLoader:
        """This process's batches."""
        options = self.job.options.dataset
        return self.job.data.loader(
            **self.job.share,
            accumulation=self.job.plan.accumulation,
            max_steps=self.job.plan.total_steps,
            workers=options.max_data_loader_n_workers,
            persistent=options.persistent_data_loader_workers,
            pin_memory=self.job.device.type == "cuda",
        )

    def start(self) -> None:
        """Say where a resumed training goes on, and set what the state holds besides the rows and the optimizer."""
        state = self.job.state
        if state:
            logger.info("Resuming after step %d of %d (--resume).", self.progress.step, self.job.plan.total_steps)
            state.set_random_states(self.job.accelerator.process_index)
        self.callbacks.on_start(self.progress, state)

    def step(self, batches: Sequence[Batch], began: float) -> StepResult:
        """One optimizer step, watched by the rescue; it ``began`` with the waiting for its data."""
        rates = self.learner.rates()
        loss = self.learner.step(self.rescue.lookout.beating(batches), self.setup.task)
        self.rescue.lookout.step_done(lambda: self.rescue.vectors(self.progress.step, self.progress.epoch))
        if loss is not None:
            self.smoothed = self.running_mean.add(loss)
        return StepResult(loss, rates, self.smoothed, time.monotonic() - began)
