"""progress.py: where a training stands while it runs is where it is found to stand when it resumes."""

import pytest

from library.options.options import TrainingOptions
from library.training.progress import Progress
from library.training.save_schedule import RunPlan


@pytest.mark.parametrize(
    ("batches", "accumulation", "steps"), [(7, 3, 8), (7, 3, 9), (6, 2, 7), (1, 1, 3), (5, 8, 2), (4, 1, 2)]
)
def test_a_resumed_run_stands_where_it_stood(batches, accumulation, steps):
    plan = RunPlan.create(TrainingOptions(max_train_steps=steps, gradient_accumulation_steps=accumulation), batches)
    progress, seen = Progress(), []
    assert progress == Progress.at(plan, 0, closed=True)
    while progress.epoch < plan.epochs:
        progress.begin_epoch()
        while progress.batches_done < batches and progress.step < steps:
            progress.step_done(min(accumulation, batches - progress.batches_done))
            if progress.step < steps or progress.batches_done == batches:
                assert progress == Progress.at(plan, progress.step, closed=False)
            seen.append((progress.step, progress.epoch))
        progress.close_epoch()
        resumed = Progress.at(plan, progress.step, closed=True)
        assert (resumed.step, resumed.epoch, resumed.epoch_closed) == (progress.step, progress.epoch, True)
        resumed.begin_epoch()
        assert (resumed.epoch, resumed.batches_done) == (progress.epoch + 1, 0)
    assert [step for step, _ in seen] == [*range(1, steps + 1)]
    assert [epoch for _, epoch in seen] == [-(-step // plan.steps_per_epoch) for step, _ in seen]


def test_an_epoch_under_way_goes_on():
    progress = Progress(step=4, epoch=2, batches_done=1, epoch_closed=False)
    progress.begin_epoch()
    assert progress == Progress(4, 2, 1, epoch_closed=False)
