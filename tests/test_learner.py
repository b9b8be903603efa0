"""One optimizer step: what its loss is the mean of, and a step that cannot teach."""

from pathlib import Path

import pytest
import torch
from option_effects import train
from runs import arguments, write_dataset

from library.trackers import RunLog


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_sd1):
    """Four photographs, of which two lack the word, in batches of one."""
    folder = tmp_path_factory.mktemp("data")
    data = write_dataset(folder, count=4)
    for number in (2, 4):
        (folder / "images" / f"photo_{number}.txt").write_text("a photo")
    data.write_text(data.read_text().replace("batch_size = 2", "batch_size = 1"))

    def build(out, *more: str) -> list[str]:
        return arguments("sd1", tiny_sd1, data, out, "--max_train_steps=4", *more)

    return build


def test_a_step_without_the_token_has_no_loss(command, tmp_path, monkeypatch):
    """Nothing is logged for it and no schedule goes on, but it counts."""
    logged, values = [], RunLog.values

    def record(log, numbers, step):
        logged.append((sorted(numbers), step))
        values(log, numbers, step)

    monkeypatch.setattr(RunLog, "values", record)
    outcome = train("sd1", command(tmp_path, "--lr_scheduler=linear"), tmp_path)
    taught = [bool(batches[0].has_token.any()) for batches in outcome.batches]
    assert sorted(taught) == [False, False, True, True]
    assert [loss is not None for loss in outcome.losses] == taught
    steps = [number for number, each in enumerate(taught, start=1) if each]
    assert logged == [*((["loss", "lr"], step) for step in steps), (["loss/epoch"], 4)]
    assert outcome.trainer.step == 4
    assert outcome.rates == [pytest.approx(0.01 * (1 - sum(taught[:number]) / 4)) for number in range(4)]
    for before, after, learned in zip(outcome.rows[:-1], outcome.rows[1:], taught[1:], strict=True):
        assert torch.equal(before[0], after[0]) != learned


@pytest.mark.parametrize("how", ["accumulated", "in one batch"])
def test_the_loss_is_the_mean_of_what_taught(how, command, tmp_path):
    more = ["--gradient_accumulation_steps=4", "--max_train_steps=1"]
    if how == "in one batch":
        argv = command(tmp_path)
        file = tmp_path / "dataset.toml"
        (given,) = (argument.partition("=")[2] for argument in argv if argument.startswith("--dataset_config"))
        file.write_text(Path(given).read_text().replace("batch_size = 1", "batch_size = 4"))
        more = [f"--dataset_config={file}", "--max_train_steps=1"]
    outcome = train("sd1", command(tmp_path / "out", *more), tmp_path / "out")
    batches = outcome.batches[0]
    tried = iter(outcome.judged)
    losses = [next(tried).losses[batch.has_token] for batch in batches if batch.has_token.any()]
    assert sum(len(batch) for batch in batches) == 4
    assert torch.cat(losses).shape == (2,)
    assert outcome.losses == [pytest.approx(torch.cat(losses).mean().item())]


def test_a_plateau_is_not_seen_where_nothing_teaches(command, tmp_path):
    """A loss of 0 would be the best of all, and the rate would fall for ever after."""
    more = ["--lr_scheduler=reduce_lr_on_plateau", "--lr_scheduler_args", "patience=99"]
    outcome = train("sd1", command(tmp_path, *more), tmp_path)
    best = outcome.trainer.lr_schedule.scheduler.best
    assert best == min(loss for loss in outcome.losses if loss is not None) > 0
