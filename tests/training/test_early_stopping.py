"""``--early_stopping``: the rule against hand-made references, and real runs that measure, stop and keep the best."""

import itertools
import json
import logging
import math
import statistics
import sys
from datetime import datetime, timedelta

import pytest
import torch
from option_effects import Bench, shows
from PIL import Image
from runs import TOKEN, arguments, run, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file
from test_processes import one_run

import train_textual_inversion
from library.options.options import Options
from library.options.recipe import RecipeOptions
from library.options.training import OptimizerOptions, ScheduleOptions, TrainingOptions
from library.output.trackers import measured
from library.support.errors import UserError
from library.training.early_stopping import StopRule, check_stopping
from library.training.optimizer_step import Learner
from library.training.save_schedule import RunPlan
from library.training.state import FILE, TrainingState, packed

RESULT = f"{TOKEN}.safetensors"
EAGER = ["--early_stopping", "--early_stopping_every=1", "--early_stopping_patience=2", "--num_vectors_per_token=2"]
STEPS = 12


# ---- the rule


def rule(patience: int = 8) -> StopRule:
    return StopRule(every=5, patience=patience, total_steps=1000)


def plan_of(**options) -> RunPlan:
    return RunPlan.create(TrainingOptions(**options), 10)


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0], 1, False),
        ([3.0, 3.0], 1, True),
        ([3.0, 2.0, 2.5, 2.1], 3, False),
        ([3.0, 2.0, 2.5, 2.1, 2.0], 3, True),
        ([3.0, 2.0, 2.5, 2.1, 1.9], 3, False),
        ([3.0, math.nan, math.inf], 2, True),
        ([math.nan, 3.0, 2.0], 2, False),
        ([math.nan, math.nan], 1, True),
    ],
)
def test_it_stops_when_nothing_was_lower_for_so_many_measurements(losses, patience, stops):
    assert (rule(patience).reason(losses) is not None) == stops


def test_it_stops_when_the_loss_has_settled():
    """By hand: the variance of the last eight, divided by that of all, once there are sixteen."""
    falling = [1 / (1 + number) for number in range(40)]
    for count in range(1, 41):
        losses = falling[:count]
        mean = sum(losses[-8:]) / 8
        last = sum((loss - mean) ** 2 for loss in losses[-8:]) / 8
        overall = sum(loss**2 for loss in losses) / count - (sum(losses) / count) ** 2
        expected = count >= 16 and last < 0.15 * overall
        assert (rule().reason(losses) is not None) == expected, count
    straight = [1 - number / 40 for number in range(17)]  # its variance is (n² - 1)/12: 63 of 288, or 0.22
    assert statistics.pvariance(straight[-8:]) / statistics.pvariance(straight) == pytest.approx(63 / 288)
    assert rule().reason(straight) is None
    assert "is 0.14 of that in all" in rule().reason([1 - number / 40 for number in range(21)])


def test_the_window_is_as_long_as_the_patience_but_not_of_a_few():
    falling = [1 / (1 + number) for number in range(40)]
    assert rule(patience=2).reason(falling[:15]) is None
    assert rule(patience=2).reason(falling[:16])
    assert rule(patience=12).reason(falling[:23]) is None
    assert rule(patience=12).reason(falling[:24])


def test_by_default_it_measures_forty_times_in_a_tenth_of_the_time_at_most():
    """Sixteen samples forward, where a step's samples go forward and back."""
    create, options = StopRule.create, Options(recipe=RecipeOptions(early_stopping=True))
    assert create(options, plan_of(max_train_steps=2000), 4).every == 50
    assert create(options, plan_of(max_train_steps=2000), 1).every == 80
    assert create(options, plan_of(max_train_steps=201), 16).every == 6
    given = Options(recipe=RecipeOptions(early_stopping=True, early_stopping_every=7, early_stopping_patience=3))
    assert create(given, plan_of(max_train_steps=2000), 1) == StopRule(7, 3, 2000)


def test_it_measures_after_the_last_step_too():
    assert [step for step in range(1, 13) if StopRule(5, 8, 12).is_due(step)] == [5, 10, 12]


def checked(total: int, every: int, patience: int = 8, **more) -> None:
    recipe = RecipeOptions(early_stopping=True, early_stopping_every=every, early_stopping_patience=patience)
    check_stopping(Options(recipe=recipe, **more), StopRule(every, patience, total))


def test_a_run_with_nothing_to_compare_is_refused():
    with pytest.raises(UserError, match="would measure the loss every 60 steps, and the run has 119 in all"):
        checked(119, 60)
    checked(120, 60)
    check_stopping(Options(), StopRule(60, 8, 119))  # it was not asked for


def test_what_cannot_stop_is_said(caplog):
    checked(90, 10, 8)
    assert "with a measurement every 10 steps and a patience of 8 it stops after step 90 at the earliest" in caplog.text
    caplog.clear()
    checked(91, 10, 8)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("optimizer", "schedule", "last"),
    [
        (OptimizerOptions(), ScheduleOptions(), None),
        (OptimizerOptions(), ScheduleOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.5), None),
        (OptimizerOptions(learning_rate=1.0), ScheduleOptions(lr_scheduler="linear"), "0.005 by step 200"),
        (OptimizerOptions(learning_rate=((0.1, 50), (0.01, None))), ScheduleOptions(), "0.01 by step 200"),
        (OptimizerOptions(), ScheduleOptions(lr_scheduler="reduce_lr_on_plateau"), None),
    ],
)
def test_a_rate_that_comes_down_is_said(optimizer, schedule, last, caplog):
    checked(200, 10, optimizer=optimizer, schedule=schedule)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert (last is None) == (said == [])
    assert all(f"the learning rate is to come down to {last}" in sentence for sentence in said)


# ---- runs


def moving_until(step: int) -> str:
    """A rate with which nothing moves after the step, so that a run stops whatever its processor rounds."""
    return f"--learning_rate=1e-2:{step},1e-12"


def lines(folder):
    return list(map(json.loads, (folder / f"{TOKEN}_metrics.jsonl").read_text().splitlines()))


def fixed_losses(folder) -> list[float]:
    return [line["loss/fixed"] for line in lines(folder) if "loss/fixed" in line]


def when_it_stops(losses, patience: int = 2) -> int | None:
    """After how many measurements, counted one by one."""
    lowest, since = math.inf, 0
    for number, loss in enumerate(losses, start=1):
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        if since == patience:
            return number
    return None


def saved(outcome, step: int) -> list[torch.Tensor]:
    """The vectors in the file of a step, by text encoder."""
    tensors = outcome.tensors(f"{TOKEN}-step{step:08d}.safetensors")
    return [tensors[key] for key in outcome.job.family.embedding_keys]


@torch.no_grad()
def loss_of(outcome, rows, held_out=False) -> float:
    """The mean loss over the first sixteen samples that the measurement has."""
    losses = []
    with outcome.setup.rows.holding(rows):
        for batch in outcome.job.data.fixed_batches(16, held_out=held_out):
            losses += outcome.setup.task.losses(batch).tolist()
    return sum(losses[:16]) / 16


@shows("early_stopping", "early_stopping_every", "early_stopping_patience")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_result_is_the_best_of_what_was_measured(family, bench):
    """And until the stop the training is the same to the bit as without it."""
    each = ["--num_vectors_per_token=2", "--save_every_n_steps=1"]
    plain = bench(*each, family=family, steps=STEPS)
    done = bench(*EAGER, *each, "--no_report=false", family=family, steps=STEPS)
    losses = fixed_losses(done.folder)
    stop = when_it_stops(losses)
    assert len(losses) == len(done.rows) == stop < STEPS
    for step, loss in enumerate(losses, start=1):
        assert all(map(torch.equal, saved(done, step), saved(plain, step)))
        assert loss == pytest.approx(loss_of(done, saved(done, step)), abs=2e-5)
    assert done.losses == plain.losses[:stop]
    best = losses.index(min(losses)) + 1
    assert all(map(torch.equal, done.tensors().values(), plain.tensors(f"{TOKEN}-step{best:08d}.safetensors").values()))
    chosen = f"those of step {best}, with the lowest loss/fixed on training images: {min(losses):.5f}"
    told = done.metadata()
    assert (told["ti.steps"], told["ss_steps"], told["ti.chosen"]) == (str(best), str(best), chosen)
    assert (told["ti.early_stopping"], told["ti.early_stopping_patience"]) == ("True", "2")
    assert "ti.chosen" not in done.metadata(f"{TOKEN}-step{stop:08d}.safetensors")
    assert f"Stopped after step {stop} of {STEPS}: loss/fixed has not got lower in the last 2 measurements." in done.err
    assert f"steps          {stop} of {STEPS}, then it was stopped" in done.out
    assert f"vectors        {chosen}" in done.out
    page = (done.folder / f"{TOKEN}.html").read_text()
    assert "Loss with fixed noise" in page
    assert f"The vectors of the result are {chosen}." in page
    (last,) = [line for line in lines(done.folder) if "result" in line]
    assert (last["step"], last["result_step"], last["chosen"]) == (stop, best, chosen)
    assert measured(last)["chosen"] == chosen


@pytest.mark.parametrize(("patience", "stop"), [(1, 2), (2, 3)])
def test_an_epoch_that_ends_where_the_run_is_stopped_has_ended(patience, stop, bench):
    """Three steps make one: what is due at its end is saved, and not in the middle of one."""
    more = [f"--early_stopping_patience={patience}", moving_until(1), "--save_every_n_epochs=1", "--save_state"]
    done = bench(*EAGER, *more, steps=6)
    assert len(done.rows) == stop
    assert (f"{TOKEN}-000001.safetensors" in done.files) == (stop == 3)
    assert TrainingState.read(done.folder / f"{TOKEN}-state").epoch_closed == (stop == 3)


def test_a_run_that_is_not_stopped_keeps_its_best_vectors_too(bench):
    done = bench(*EAGER, "--early_stopping_patience=20", "--no_report=false", "--save_every_n_steps=1", steps=6)
    losses = fixed_losses(done.folder)
    best = losses.index(min(losses)) + 1
    assert len(losses) == 6 > best
    assert torch.equal(done.tensors()["emb_params"], done.tensors(f"{TOKEN}-step{best:08d}.safetensors")["emb_params"])
    assert "Stopped after" not in done.said
    assert "then it was stopped" not in done.said
    assert "cannot shorten this run, and only chooses the best vectors of it" in done.said


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_accumulation_steps=2", "--cache_latents=false"],
        ["--optimizer_type=AdamWScheduleFree", "--cache_text_encoder_outputs", "--masked_loss"],
    ],
)
def test_whatever_is_trained_the_measure_is_that_of_the_saved_vectors(more, bench, tmp_path):
    """Of several batches a step, of images that are encoded in each step, of masks, of an optimizer that averages."""
    for number in range(5):
        Image.linear_gradient("L").resize((96, 80)).rotate(90 * number).save(tmp_path / f"photo_{number + 1}.png")
    more = [*more, f"--conditioning_data_dir={tmp_path}"] if "--masked_loss" in more else more
    done = bench(*EAGER, *more, "--save_every_n_steps=1", "--no_report=false", steps=4)
    losses = fixed_losses(done.folder)
    assert len(losses) >= 3
    for step, loss in enumerate(losses, start=1):
        assert loss == pytest.approx(loss_of(done, saved(done, step)), abs=2e-5)


def test_held_out_images_are_measured_where_there_are_any(bench, tmp_path):
    data = write_dataset(tmp_path, dataset="validation_split = 0.4", count=5)
    done = bench(*EAGER, "--save_every_n_steps=1", "--no_report=false", steps=3, dataset=data)
    losses = fixed_losses(done.folder)
    assert "16 samples of the held-out images, with fixed noise" in done.said
    for step, loss in enumerate(losses, start=1):
        assert loss == pytest.approx(loss_of(done, saved(done, step), held_out=True), abs=2e-5)
        assert loss != pytest.approx(loss_of(done, saved(done, step)), abs=1e-3)


MY_DATA = """
import random

import torch


class Mine:
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.epochs = []

    def __len__(self):
        return 3

    def set_current_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitem__(self, index):
        drawn = torch.rand(1, 4, 8, 8) + random.random()
        return {"captions": ["mychar of mine" if index else "nothing"], "latents": drawn}
"""


def test_a_dataset_of_ones_own(bench, tmp_path, monkeypatch):
    """Which draws from the global generators, is asked for no epoch that a run does not have, and has a batch without
    the token."""
    (tmp_path / "data_that_is_mine.py").write_text(MY_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "data_that_is_mine", raising=False)
    given = ["--dataset_class=data_that_is_mine.Mine", "--resolution=64", "--num_vectors_per_token=2"]
    plain = bench(*given, dataset=None, steps=4)
    done = bench(*given, *EAGER, "--early_stopping_patience=3", "--no_report=false", dataset=None, steps=4)
    assert "16 samples of the training images" in done.said
    assert done.losses == plain.losses
    assert max(done.job.data.dataset.epochs) == 2
    losses = fixed_losses(done.folder)
    best = losses.index(min(losses))
    assert torch.equal(done.tensors()["emb_params"], done.rows[best][0])


def test_samples_without_the_token_measure_nothing(bench, tmp_path, monkeypatch):
    (tmp_path / "data_of_nobody.py").write_text(MY_DATA.replace("mychar of mine", "nothing"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "data_of_nobody", raising=False)
    given = ["--dataset_class=data_of_nobody.Mine", "--resolution=64", "--num_vectors_per_token=2"]
    done = bench(*given, *EAGER, dataset=None, steps=4, code=1)
    assert (
        "--early_stopping measures the loss of samples that hold the token, and none of the first 64 does" in done.said
    )


def test_a_rate_that_had_not_come_down_is_said(bench):
    done = bench(*EAGER, "--lr_scheduler=linear", steps=STEPS)
    assert f"the learning rate is to come down to 0.000833 by step {STEPS}" in done.said
    best = int(done.metadata()["ti.steps"])
    rate = 0.01 * (STEPS + 1 - best) / STEPS
    assert f"The learning rate of step {best} was {rate:.3g}, and was to come down to 0.000833" in done.said
    assert f"--max_train_steps={best} without --early_stopping" in done.said
    assert "come down" not in bench(*EAGER, steps=STEPS).said


class Seconds(datetime):
    """A clock that goes on by a second at each look, so that no two files have the same time in their name."""

    looks = itertools.count()

    @classmethod
    def now(cls, *_):
        return datetime(2025, 1, 1) + timedelta(seconds=next(cls.looks))


def test_the_result_is_drawn_in_the_end(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("library.output.sample_images.datetime", Seconds)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w 64 --h 64 --s 2 --d 1")
    drawn = [f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--no_report=false"]
    done = bench(*EAGER, *drawn, steps=STEPS)
    best = int(done.metadata()["ti.steps"])
    samples = [line for line in lines(done.folder) if "samples" in line]
    by_step = {line["step"]: done.folder / "sample" / line["samples"]["0"] for line in samples}
    last = max(by_step)
    assert last == len(done.rows) > best
    assert by_step[last].name.startswith(f"{TOKEN}_{best:06d}_00_")
    assert by_step[last].read_bytes() == by_step[best].read_bytes() != by_step[last - 1].read_bytes()
    assert f"{TOKEN}.preview.png" in done.files


# ---- resuming


@pytest.fixture
def command(dataset, tmp_path, tiny_sd1):
    def build(folder: str, *more: str) -> list[str]:
        given = arguments("sd1", tiny_sd1, dataset, tmp_path / folder, f"--max_train_steps={STEPS}", *EAGER)
        return [*given, "--save_state", "--save_every_n_steps=1", "--no_report=false", *more]

    return build


def outcome(folder):
    """All that tells of what was measured and chosen."""
    with safe_open(folder / RESULT, "pt") as file:
        told = {key: file.metadata()[key] for key in ("ti.steps", "ti.chosen")}
    told["losses"] = fixed_losses(folder)
    state = TrainingState.read(folder / f"{TOKEN}-state")
    return told, [*load_file(folder / RESULT).values(), *state.learner["rows"], *state.stopping["best"]["rows"]]


def assert_same(one, other):
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1])
    assert all(map(torch.equal, one[1], other[1]))


def state_of(folder, step):
    return folder / f"{TOKEN}-step{step:08d}-state"


def test_a_resumed_run_stops_where_it_would_have(command, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert run("sd1", command("whole")) == 0
    stop = when_it_stops(fixed_losses(whole))
    assert stop < STEPS
    for step in (1, stop - 1, stop):
        assert run("sd1", command(f"from {step}", f"--resume={state_of(whole, step)}")) == 0
        assert_same(outcome(tmp_path / f"from {step}"), outcome(whole))
    assert "begins anew" not in capsys.readouterr().err


def test_a_resumed_run_that_stops_where_an_epoch_ends_ends_it_too(command, tmp_path):
    """From the state of the very step, which was saved before the epoch's end."""
    more = [moving_until(1), "--save_every_n_epochs=1"]  # after the first of three steps
    assert run("sd1", command("whole", *more)) == 0
    state = state_of(tmp_path / "whole", 3)
    assert not TrainingState.read(state).epoch_closed
    assert run("sd1", command("out", *more, f"--resume={state}")) == 0
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "whole"))
    for folder in (tmp_path / "whole", tmp_path / "out"):
        assert (folder / f"{TOKEN}-000001.safetensors").exists()
        assert TrainingState.read(folder / f"{TOKEN}-state").epoch_closed


def test_a_run_that_was_stopped_can_go_on(command, tmp_path, capsys):
    """With more patience it is what it would have been; without early stopping too."""
    assert run("sd1", command("short")) == 0
    for folder, more in (("patient", ["--early_stopping_patience=9"]), ("plain", ["--early_stopping=false"])):
        assert run("sd1", command(f"{folder} whole", *more)) == 0
        assert run("sd1", command(folder, *more, f"--resume={tmp_path / 'short' / f'{TOKEN}-state'}")) == 0
        one, two = (load_file(tmp_path / name / RESULT)["emb_params"] for name in (folder, f"{folder} whole"))
        assert torch.equal(one, two)
        states = [TrainingState.read(tmp_path / name / f"{TOKEN}-state") for name in (folder, f"{folder} whole")]
        assert torch.equal(*(state.learner["rows"][0] for state in states))
        assert states[0].step == states[1].step > when_it_stops(fixed_losses(tmp_path / "short"))
    assert "--early_stopping_patience was 2 in the saved state and is now 9" in capsys.readouterr().err


def test_an_interrupted_run_keeps_the_best_beside_the_last(command, tmp_path, monkeypatch, capsys):
    """The best by a loss that is given here; no checkpoint is due so soon."""
    step = Learner.step

    def interrupted(learner, *given):
        if learner.progress.step == 4:
            raise KeyboardInterrupt
        return step(learner, *given)

    more = ["--early_stopping_patience=9", "--save_every_n_steps=100"]
    monkeypatch.setattr("library.training.fixed_loss.FixedLoss.mean_of_all", lambda _: next(losses))
    monkeypatch.setattr(Learner, "step", interrupted)
    losses = iter([3.0, 1.0, 2.0, 2.0])
    assert run("sd1", command("out", *more)) == 130
    said = capsys.readouterr().err
    files = {number: tmp_path / "out" / f"{TOKEN}-step{number:08d}.safetensors" for number in (2, 4)}
    assert sorted((tmp_path / "out").glob("*.safetensors")) == list(files.values())
    assert f"The vectors of step 4 are kept in {files[4]}." in said
    assert f"The vectors of step 2, the best so far, are kept in {files[2]}." in said
    monkeypatch.undo()
    assert run("sd1", command("whole", "--early_stopping=false", "--max_train_steps=4")) == 0
    for number, file in files.items():
        whole = tmp_path / "whole" / f"{TOKEN}-step{number:08d}.safetensors"
        whole = whole if whole.exists() else tmp_path / "whole" / RESULT
        assert torch.equal(load_file(file)["emb_params"], load_file(whole)["emb_params"])
    with safe_open(files[2], "pt") as file:
        assert file.metadata()["ti.chosen"] == "those of step 2, with the lowest loss/fixed on training images: 1.00000"


def test_states_without_it_go_on(command, tmp_path):
    """Of a run without early stopping, and of an older version, whose states have no such field."""
    assert run("sd1", command("plain", "--early_stopping=false", moving_until(5))) == 0
    content = torch.load(state_of(tmp_path / "plain", 2) / FILE, weights_only=False)
    assert content.pop("stopping") is None
    (state_of(tmp_path / "plain", 2) / FILE).write_bytes(packed(content))
    assert run("sd1", command("out", moving_until(5), f"--resume={state_of(tmp_path / 'plain', 2)}")) == 0
    losses = fixed_losses(tmp_path / "out")
    assert len(losses) == when_it_stops(losses) < STEPS - 2
    best = 2 + losses.index(min(losses)) + 1
    one = load_file(tmp_path / "plain" / f"{TOKEN}-step{best:08d}.safetensors")["emb_params"]
    assert torch.equal(one, load_file(tmp_path / "out" / RESULT)["emb_params"])


def test_another_measure_begins_anew(command, tmp_path, capsys):
    assert run("sd1", command("first", "--max_train_steps=4")) == 0
    state = state_of(tmp_path / "first", 2)
    assert run("sd1", command("out", f"--resume={state}", "--noise_offset=0.3")) == 0
    assert "--early_stopping begins anew: the loss of the best vectors so far is" in capsys.readouterr().err
    ended = TrainingState.read(tmp_path / "out" / f"{TOKEN}-state")
    assert len(ended.stopping["losses"]) == ended.step - 2 + 1


def test_best_vectors_of_another_model_are_refused(command, tmp_path, capsys):
    assert run("sd1", command("first", "--max_train_steps=4")) == 0
    state = state_of(tmp_path / "first", 2)
    content = torch.load(state / FILE, weights_only=False)
    content["stopping"]["best"]["rows"] = [torch.ones(2, 5)]
    (state / FILE).write_bytes(packed(content))
    assert run("sd1", command("out", f"--resume={state}")) == 1
    assert "the best vectors in the state are not of this model" in capsys.readouterr().err


# ---- several processes


def test_two_processes_stop_together(tmp_path, tiny_sd1):
    """Each measures a part; the numbers are those that one process measures of the same vectors."""
    data = write_dataset(tmp_path, count=5)
    data.write_text(data.read_text().replace("batch_size = 2", "batch_size = 1"))
    argv = arguments("sd1", tiny_sd1, data, tmp_path / "two", *EAGER, f"--max_train_steps={STEPS}")
    argv += ["--save_every_n_steps=1", "--no_report=false"]
    one_run(train_textual_inversion.__file__, argv, tmp_path)
    losses = fixed_losses(tmp_path / "two")
    stop = when_it_stops(losses) or STEPS
    assert len(losses) == len(list((tmp_path / "two").glob("*-step*.safetensors"))) == stop
    alone = Bench({"sd1": tiny_sd1}, data)(*EAGER, steps=2)
    for step, loss in enumerate(losses, start=1):
        rows = load_file(tmp_path / "two" / f"{TOKEN}-step{step:08d}.safetensors")["emb_params"]
        assert loss == pytest.approx(loss_of(alone, [rows]), abs=2e-5)
    with safe_open(tmp_path / "two" / RESULT, "pt") as file:
        assert file.metadata()["ti.steps"] == str(losses.index(min(losses)) + 1)
