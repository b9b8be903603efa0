"""The save schedule, the names, retention, and the arithmetic of steps and epochs."""

import re

import pytest
from golden_data import golden_cases

from library.options.options import Options, SampleOptions, SaveOptions, TrainingOptions
from library.options.parser import build_parser, read_values
from library.training.save_schedule import (
    Action,
    CheckpointNames,
    RunPlan,
    SampleSchedule,
    SaveSchedule,
    epoch_to_remove,
    remove_checkpoint,
    step_to_remove,
)


def plan(batches, *, steps=1600, epochs=None, accumulation=1, processes=1):
    options = TrainingOptions(max_train_steps=steps, max_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    return RunPlan.create(options, batches, processes)


def options_of(argv) -> Options:
    """The options in ``argv``, without the checks of a whole command line."""
    return Options.from_values(read_values(build_parser("", "sd"), argv))


def walk(schedule: SaveSchedule, run: RunPlan) -> list[str]:
    """The events of a whole run, removals only where something is there."""
    events, there = [], set()

    def carry_out(actions):
        for action in actions:
            if action.kind == "remove" and action.name not in there:
                continue
            (there.discard if action.kind == "remove" else there.add)(action.name)
            events.append(f"{action.kind} {action.name}")

    for step in range(1, run.total_steps + 1):
        carry_out(schedule.after_step(step))
        if step % run.steps_per_epoch == 0 or step == run.total_steps:
            carry_out(schedule.after_epoch(-(-step // run.steps_per_epoch)))
    carry_out(schedule.at_end())
    return events


@pytest.mark.parametrize("case", golden_cases("ckpt_names"))
def test_golden_names(case):
    names = CheckpointNames(options_of(case["argv"]).save.output_name, case["ext"].removeprefix("."))
    epoch, step, last = names.epoch(case["epoch_no"]), names.step(case["step_no"]), names.last()
    assert [names.file(stem) for stem in (epoch, step, last)] == [
        case["epoch_name"], case["step_name"], case["last_name"]
    ]  # fmt: skip
    assert [names.state(stem) for stem in (epoch, step, last)] == [
        case["epoch_state_dir"], case["step_state_dir"], case["last_state_dir"]
    ]  # fmt: skip


@pytest.mark.parametrize("case", golden_cases("ckpt_retention"))
def test_golden_retention(case):
    rule = {"epoch": epoch_to_remove, "step": step_to_remove}[case["kind"]]
    every, keep = case[f"save_every_n_{case['kind']}s"], case[f"save_last_n_{case['kind']}s"]
    assert {now: rule(int(now), every, keep) for now in case["remove_at"]} == case["remove_at"]


@pytest.mark.parametrize("case", golden_cases("state_retention"))
def test_golden_state_retention(case):
    options = options_of([*case["argv"], "--save_state"])
    schedule = SaveSchedule.create(options.save, epochs=10**6)
    due = {"step": schedule.after_step, "epoch": schedule.after_epoch}[case["kind"]]
    there = set()
    for now, expected in zip(case["saved_at"], case["dirs_after_each"], strict=True):
        for action in due(now):
            (there.discard if action.kind == "remove" else there.add)(action.name)
        assert sorted(name for name in there if name.endswith("-state")) == expected


def run_of(case) -> tuple[Options, RunPlan]:
    options = options_of([*case["argv"], "--output_name=n", "--save_model_as=pt"])
    batches = -(-case["images"] * case["num_repeats"] // case["batch_size"])
    return options, RunPlan.create(options.training, batches)


@pytest.mark.parametrize("case", golden_cases("run_schedule"))
def test_golden_run_schedule_saves(case):
    options, run = run_of(case)
    schedule = SaveSchedule.create(options.save, run.epochs)
    assert run.total_steps == case["max_train_steps_final"]
    assert schedule.every_n_epochs == case["save_every_n_epochs_final"]
    assert walk(schedule, run) == [event for event in case["events"] if not event.startswith("sample ")]


@pytest.mark.parametrize("case", golden_cases("run_schedule"))
def test_golden_run_schedule_samples(case):
    options, run = run_of(case)
    schedule = SampleSchedule.create(options.sample)
    moments = ["e000000"] if schedule.at_first() else []
    for step in range(1, run.total_steps + 1):
        moments += [f"{step:06}"] if schedule.after_step(step) else []
        epoch, ends = -(-step // run.steps_per_epoch), step % run.steps_per_epoch == 0 or step == run.total_steps
        moments += [f"e{epoch:06}"] if ends and schedule.after_epoch(epoch) else []
    first_images = [re.match(r"sample n_(\w+)_00_", event) for event in case["events"]]
    assert moments == [found[1] for found in first_images if found]


@pytest.mark.parametrize("case", golden_cases("sample_timing"))
def test_golden_sample_timing(case):
    schedule = SampleSchedule.create(options_of(case["argv"]).sample)
    for call in case["calls"]:
        if call["step"] == 0:
            due = schedule.at_first()
        elif call["epoch"] is None:
            due = schedule.after_step(call["step"])
        else:
            due = schedule.after_epoch(call["epoch"])
        assert due == call["due"], call


def test_epochs_override_steps_and_the_last_group_of_an_epoch_counts():
    run = plan(10, epochs=3, accumulation=4)
    assert (run.steps_per_epoch, run.total_steps, run.epochs) == (3, 9, 3)


def test_steps_decide_the_number_of_epochs():
    assert plan(10, steps=21).epochs == 3
    assert plan(10, steps=20).epochs == 2
    assert plan(10, steps=1).epochs == 1


@pytest.mark.parametrize(
    ("batches", "processes", "accumulation", "steps_per_epoch"),
    [(10, 4, 1, 3), (10, 4, 2, 2), (3, 4, 1, 1), (7, 2, 3, 2), (8, 2, 2, 2)],
)
def test_processes_share_the_batches(batches, processes, accumulation, steps_per_epoch):
    run = plan(batches, epochs=2, processes=processes, accumulation=accumulation)
    assert run.batches_per_process == -(-batches // processes)
    assert run.steps_per_epoch == steps_per_epoch
    assert run.total_steps == 2 * steps_per_epoch


def test_position_finds_the_place_in_the_data():
    run = plan(10, epochs=3, accumulation=4)
    assert [run.position(step) for step in (0, 1, 2, 3, 4, 9)] == [(0, 0), (0, 4), (0, 8), (1, 0), (1, 4), (3, 0)]


def test_order_of_actions_with_states():
    options = SaveOptions(
        output_name="n", save_state=True, save_every_n_steps=10, save_last_n_steps=5, save_every_n_epochs=1,
        save_last_n_epochs=1,
    )  # fmt: skip
    schedule = SaveSchedule.create(options, epochs=9)
    assert schedule.after_step(20) == [
        Action("save", "n-step00000020.safetensors"),
        Action("state", "n-step00000020-state"),
        Action("remove", "n-step00000010-state"),
        Action("remove", "n-step00000010.safetensors"),
    ]
    assert schedule.after_epoch(2) == [
        Action("save", "n-000002.safetensors"),
        Action("remove", "n-000001.safetensors"),
        Action("state", "n-000002-state"),
        Action("remove", "n-000001-state"),
    ]
    assert schedule.at_end() == [Action("state", "n-state"), Action("save", "n.safetensors")]


def test_nothing_is_due_without_options_but_the_result():
    schedule = SaveSchedule.create(SaveOptions(output_name="n"), epochs=3)
    assert [schedule.after_step(step) for step in range(1, 9)] == [[]] * 8
    assert [schedule.after_epoch(epoch) for epoch in (1, 2, 3)] == [[]] * 3
    assert schedule.at_end() == [Action("save", "n.safetensors")]


def test_state_on_train_end_only_at_the_end():
    options = SaveOptions(output_name="n", save_state_on_train_end=True, save_every_n_epochs=1)
    schedule = SaveSchedule.create(options, epochs=3)
    assert [action.kind for action in schedule.after_epoch(1)] == ["save"]
    assert [action.kind for action in schedule.at_end()] == ["state", "save"]


@pytest.mark.parametrize(("epochs", "ratio", "every"), [(10, 3, 3), (5, 2, 2), (3, 10, 1), (1, 1, 1), (7, 0, 4)])
def test_epoch_ratio(epochs, ratio, every):
    options = SaveOptions(save_n_epoch_ratio=ratio, save_every_n_epochs=4)
    assert SaveSchedule.create(options, epochs).every_n_epochs == every


def test_images_after_steps():
    schedule = SampleSchedule.create(SampleOptions(sample_every_n_steps=3))
    assert [step for step in range(1, 10) if schedule.after_step(step)] == [3, 6, 9]
    assert not any(schedule.after_epoch(epoch) for epoch in range(1, 10))
    assert not schedule.at_first()


def test_epochs_win_over_steps():
    schedule = SampleSchedule.create(SampleOptions(sample_every_n_steps=3, sample_every_n_epochs=2))
    assert [epoch for epoch in range(1, 6) if schedule.after_epoch(epoch)] == [2, 4]
    assert not any(schedule.after_step(step) for step in range(1, 10))


def test_remove_checkpoint(tmp_path):
    file, folder = tmp_path / "n-000001.pt", tmp_path / "n-000001-state"
    file.write_bytes(b"x")
    folder.mkdir()
    (folder / "rows").write_bytes(b"x")
    assert remove_checkpoint(file)
    assert remove_checkpoint(folder)
    assert not remove_checkpoint(file)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_told_in_the_right_forms():
    one = RunPlan(batches_per_process=30, accumulation=1, steps_per_epoch=30, total_steps=1, epochs=1)
    assert one.described(1) == "1 step in 1 epoch of 30 batches"
    many = RunPlan(batches_per_process=30, accumulation=2, steps_per_epoch=15, total_steps=2000, epochs=134)
    assert many.described(2) == ("2,000 steps in 134 epochs of 30 batches in each of 2 processes, 2 of them a step")
