"""Where a training stands."""

from dataclasses import dataclass

from library.training.save_schedule import RunPlan


@dataclass
class Progress:
    """After ``step`` optimizer steps, the last of them in ``epoch`` (from 1; 0 before the first).

    Of that epoch this process has done ``batches_done`` batches; ``epoch_closed`` tells whether its end has come, and
    with it what is due then. The step is counted in the same moment in which it changes the vectors. A run that is
    ``stopped`` takes no more steps, however many were planned.
    """

    step: int = 0
    epoch: int = 0
    batches_done: int = 0
    epoch_closed: bool = True
    stopped: bool = False

    @classmethod
    def at(cls, plan: RunPlan, step: int, *, closed: bool) -> "Progress":
        """Where a run goes on after ``step`` steps; see ``RunPlan.position``."""
        epochs, batches = plan.position(step, closed=closed)
        return cls(step, epochs + bool(batches), batches, epoch_closed=not batches)

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step: the one before, where an epoch has begun and has no step yet."""
        return self.epoch if self.epoch_closed or self.batches_done else self.epoch - 1

    def begin_epoch(self) -> None:
        """Begin the next epoch, unless one is under way already."""
        if self.epoch_closed:
            self.epoch, self.batches_done, self.epoch_closed = self.epoch + 1, 0, False

    def step_done(self, batches: int) -> None:
        """Count an optimizer step over so many batches."""
        self.step += 1
        self.batches_done += batches

    def close_epoch(self) -> None:
        """The epoch has no more steps; what is due at its end follows."""
        self.epoch_closed = True
