"""The loss on held-out images at the end of every epoch, with the same noise and timesteps every time."""

import logging

import torch

from library.data.loader import BatchLoader
from library.training.callbacks import Callback, Callbacks
from library.training.denoising import DenoisingTask
from library.training.optimizer_step import Learner
from library.training.progress import Progress

logger = logging.getLogger(__name__)


class Validation(Callback):
    """Measures the loss over a loader that gives the same batches in every pass."""

    def __init__(self, loader: BatchLoader, task: DenoisingTask, learner: Learner, callbacks: Callbacks) -> None:
        """The loss is told to the ``callbacks``."""
        self.loader, self.task, self.learner, self.callbacks = loader, task, learner, callbacks

    def after_epoch(self, progress: Progress) -> None:
        """Measure, say it, and tell the others."""
        loss = self.loss()
        logger.info("Epoch %d, step %d: loss/validation %.5f", progress.epoch, progress.step, loss)
        self.callbacks.after_validation(progress, loss)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over all held-out images, of all processes."""
        device = self.learner.accelerator.device
        loss = torch.zeros((), device=device)
        with self.learner.averaged_rows():
            for batch in self.loader:
                if len(batch):
                    loss += self.task.losses(batch.to(device)).mean() * batch.weight
        return self.learner.agreed(loss)
