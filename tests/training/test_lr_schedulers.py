"""Learning-rate schedules: the measured curves, those that sd-scripts cannot run, stages, and sentences."""

import copy
import math

import pytest
import torch
from departures import departure
from golden_data import golden_cases
from torch import nn

from library.options.options import OptimizerOptions, Options, ScheduleOptions
from library.options.parser import build_parser, read_values
from library.support.errors import UserError
from library.training.lr_schedulers import SCHEDULES, LearningRateSchedule, build_lr_schedule, steps_of
from library.training.optimizers import OptimizerChoice, build_optimizer

STEPS = 100  # of the measured runs


def choose(options: OptimizerOptions | None = None) -> OptimizerChoice:
    return build_optimizer(options or OptimizerOptions(learning_rate=1e-3), [nn.Parameter(torch.ones(2, 4))])


def used_rates(schedule: LearningRateSchedule, choice: OptimizerChoice, steps: int, loss=lambda step: 1.0) -> list:
    """The rate that each of ``steps`` optimizer steps uses."""
    rates = []
    for step in range(steps):
        rates.append(choice.optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [pytest.approx(rates[-1])]
        choice.optimizer.step()
        schedule.step(loss(step))
    return rates


def rates_of(options: ScheduleOptions, steps: int = STEPS, optimizer: OptimizerOptions | None = None, **kw) -> list:
    choice = choose(optimizer)
    return used_rates(build_lr_schedule(options, choice, steps), choice, steps, **kw)


# Golden cases


def measured_setting(case: dict) -> tuple[ScheduleOptions, OptimizerChoice]:
    values = read_values(build_parser("", "sd"), ["--learning_rate=1e-3", *case["argv"]])
    options = Options.from_values(values)
    return options.schedule, choose(options.optimizer)


def cosine_with_floor(step: int, warmup: int, floor: float, half_waves: int) -> float:
    """transformers' curve for cosine_warmup_with_min_lr: it counts the steps from 1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, STEPS - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * half_waves * progress))


@pytest.mark.parametrize("case", golden_cases("lr_schedules"))
def test_golden_lr_schedules(case):
    if "error" in case and not departure("lr_schedules", case):
        with pytest.raises(UserError, match=r"^--"):
            build_lr_schedule(*measured_setting(case), STEPS)
        return
    options, choice = measured_setting(case)
    schedule = build_lr_schedule(options, choice, STEPS)
    rates = used_rates(schedule, choice, STEPS)
    if not departure("lr_schedules", case):
        kind = type(schedule.scheduler)
        if case["scheduler_class"].startswith(("torch.", "transformers.")):
            assert f"{kind.__module__}.{kind.__qualname__}" == case["scheduler_class"]
        assert rates == pytest.approx(case["lr_used_at_step"], rel=1e-6, abs=1e-12)
    elif options.lr_scheduler == "cosine_warmup_with_min_lr":
        warmup = steps_of(options.lr_warmup_steps, STEPS, "")
        floor, waves = options.lr_scheduler_min_lr_ratio, options.lr_scheduler_num_cycles
        expected = [1e-3 * cosine_with_floor(step, warmup, floor, waves) for step in range(STEPS)]
        assert rates == pytest.approx(expected)
    else:  # on a plateau from the start: ten patient steps, then a tenth of the rate, and so on
        assert rates[:12] == [1e-3] * 12
        assert rates[12:23] == pytest.approx([1e-4] * 11)


# Schedules


def test_reduce_lr_on_plateau_looks_at_the_loss():
    options = ScheduleOptions(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=("patience=3", "factor=0.5"))
    assert set(rates_of(options, 60, loss=lambda step: 1 / (step + 1))) == {1e-3}
    assert rates_of(options, 60, loss=lambda step: max(0.5, 1 - 0.1 * step))[-1] < 1e-4
    by_class = ScheduleOptions(lr_scheduler_type="ReduceLROnPlateau", lr_scheduler_args=("patience=3", "factor=0.5"))
    assert rates_of(by_class, 60) == rates_of(options, 60)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_its_length(name):
    needed = {"piecewise_constant": ("step_rules='1:5,0.1'",)}
    options = ScheduleOptions(
        lr_scheduler=name,
        lr_scheduler_args=needed.get(name),
        lr_scheduler_min_lr_ratio=0.1,
        lr_decay_steps=0.2,
        lr_warmup_steps=0 if name in ("constant", "reduce_lr_on_plateau") else 0.1,
    )
    rates = rates_of(options, 50)
    assert all(0 <= rate <= 1e-3 for rate in rates)
    assert max(rates) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n not in ("constant", "reduce_lr_on_plateau")])
@pytest.mark.parametrize("warmup", [10, 11, 200])
def test_a_warm_up_as_long_as_the_run_does_not_crash(name, warmup, caplog):
    options = ScheduleOptions(
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        lr_scheduler_min_lr_ratio=0.1,
        lr_scheduler_args=("step_rules='1:5,0.1'",) if name == "piecewise_constant" else None,
    )
    assert all(math.isfinite(rate) for rate in rates_of(options, 10))
    assert ("longer than the run" in caplog.text) == (warmup > 10)


def test_a_share_of_the_steps():
    assert steps_of(0.25, 1000, "") == 250
    assert steps_of(0.999, 10, "") == 9
    assert steps_of(7, 1000, "") == 7
    assert steps_of(0.0, 1000, "") == 0
    with pytest.raises(UserError, match=r"--lr_warmup_steps=-0\.1 is negative"):
        steps_of(-0.1, 1000, "--lr_warmup_steps")


def test_cycles_are_restarts():
    options = ScheduleOptions(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=4)
    assert [step for step, rate in enumerate(rates_of(options)) if rate == 1e-3] == [0, 25, 50, 75]


def test_arguments_shape_what_no_option_does():
    options = ScheduleOptions(lr_scheduler="polynomial", lr_scheduler_args=("lr_end=5e-4",))
    assert rates_of(options)[-1] == pytest.approx(5.05e-4)


def test_a_scheduler_by_its_path():
    options = ScheduleOptions(
        lr_scheduler_type="torch.optim.lr_scheduler.ExponentialLR", lr_scheduler_args=("gamma=0.5",)
    )
    assert rates_of(options, 4) == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_steps_without_effect_are_mentioned(caplog):
    rates_of(ScheduleOptions(lr_scheduler="linear", lr_decay_steps=20))
    assert "--lr_decay_steps has no effect" in caplog.text
    rates_of(
        ScheduleOptions(
            lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules='1:5,0.1'",), lr_warmup_steps=3
        )
    )
    assert "--lr_warmup_steps has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_warmup_steps": 10}, "constant_with_warmup"),
        ({"lr_scheduler": "cosin"}, 'Did you mean "cosine"?'),
        ({"lr_scheduler": "Linear"}, 'Did you mean "linear"?'),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_warmup_steps": 0.5}, "has no warm-up"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules='1:500,0.1:1000,0.01'"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='a:b'",)}, "refuses"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=3",)}, "refuses"),
        ({"lr_scheduler": "cosine_warmup_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycle=1",)}, 'Did you mean "num_cycles"?'),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_warmup_steps=1",)}, "another option does"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("power=2",)}, "another option does"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("last_epoch=5",)}, "refuses"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles",)}, "must be one key=value"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='x'",)}, "Unknown decay type"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=1",)}, "must be smaller"),
        ({"lr_scheduler": "adafactor:0.001"}, "--optimizer_type=Adafactor"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "StepLRs"}, 'Did you mean "StepLR"?'),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 3}, "Set it to 0"),
        ({"lr_scheduler_type": "no_such_module.Lr"}, "pip install no_such_module"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "is not a scheduler"),
    ],
)
def test_mistakes_are_answered(options, said):
    with pytest.raises(UserError) as error:
        build_lr_schedule(ScheduleOptions(**options), choose(), STEPS)
    assert said in str(error.value)
    assert str(error.value).startswith("--")


# Several rates


STAGES = ((5e-3, 3), (1e-3, 5), (1e-5, None))


def staged(**options) -> list[float]:
    return rates_of(ScheduleOptions(**options), 8, OptimizerOptions(learning_rate=STAGES))


def test_stages_hold_until_their_step():
    assert staged() == [5e-3] * 3 + [1e-3] * 2 + [1e-5] * 3


def test_the_last_stage_holds_to_the_end():
    rates = rates_of(ScheduleOptions(), 6, OptimizerOptions(learning_rate=((5e-3, 2), (1e-3, 4))))
    assert rates == [5e-3] * 2 + [1e-3] * 4


def test_stages_after_a_warm_up():
    expected = [0, 5e-3 / 4, 5e-3 / 2, 3e-3 / 4, 1e-3, 1e-5, 1e-5, 1e-5]
    assert staged(lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == pytest.approx(expected)


def test_stages_serve_schedule_free_optimizers():
    pytest.importorskip("schedulefree")
    options = OptimizerOptions("AdamWScheduleFree", learning_rate=STAGES)
    assert rates_of(ScheduleOptions(), 8, options) == staged()


@pytest.mark.parametrize(
    "options", [{"lr_scheduler": "cosine"}, {"lr_scheduler_type": "StepLR"}, {"lr_warmup_steps": 2}]
)
def test_stages_with_another_schedule_are_refused(options):
    with pytest.raises(UserError, match=r"^--l"):
        staged(**options)


# Optimizers with a mind of their own


def test_adafactor_shows_the_rate_it_makes(caplog):
    row = nn.Parameter(torch.full((2, 4), 0.5))
    choice = build_optimizer(OptimizerOptions("Adafactor", learning_rate=1e-3), [row])
    schedule = build_lr_schedule(ScheduleOptions(lr_scheduler="cosine"), choice, STEPS)
    assert "the scheduler named is not used" in caplog.text
    assert schedule.get_last_lr() == [1e-3]
    row.grad = torch.ones_like(row)
    choice.optimizer.step()
    schedule.step(1.0)
    assert schedule.get_last_lr() == [pytest.approx(0.5 * 1e-2, rel=0.05)]  # RMS of the row × Adafactor's largest step


@pytest.mark.parametrize("given", [{"lr_scheduler_type": "StepLR"}, {"lr_scheduler": "cosine"}])
def test_adafactor_names_the_schedule_it_does_not_use(caplog, given):
    choice = build_optimizer(OptimizerOptions("Adafactor"), [nn.Parameter(torch.ones(2, 4))])
    build_lr_schedule(ScheduleOptions(**given), choice, STEPS)
    ((name, value),) = given.items()
    assert f"--{name}={value} has no effect without --optimizer_args relative_step=False" in caplog.text


def test_schedule_free_optimizers_need_no_schedule(caplog):
    pytest.importorskip("schedulefree")
    options = OptimizerOptions("RAdamScheduleFree", learning_rate=0.01)
    assert set(rates_of(ScheduleOptions(), 10, options)) == {0.01}
    assert not caplog.records
    assert set(rates_of(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=3), 10, options)) == {0.01}
    assert "needs no schedule" in caplog.text


# Resuming


@pytest.mark.parametrize("name", ["linear", "warmup_stable_decay", "reduce_lr_on_plateau", "staged", "adafactor"])
def test_a_stored_schedule_continues(name):
    kinds = {
        "staged": (ScheduleOptions(), OptimizerOptions(learning_rate=((1e-3, 7), (1e-4, None)))),
        "adafactor": (ScheduleOptions(), OptimizerOptions("Adafactor")),
    }
    usual = ScheduleOptions(lr_scheduler=name, lr_decay_steps=0.5), OptimizerOptions(learning_rate=1e-3)
    options, optimizer_options = kinds.get(name, usual)

    def start():
        choice = choose(optimizer_options)
        return choice, build_lr_schedule(options, choice, 30)

    def go_on(choice, schedule, steps):
        rates = []
        for _ in range(steps):
            choice.optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 4)
            choice.optimizer.step()
            schedule.step(1.0)
            rates += schedule.get_last_lr()
        return rates

    straight, schedule = start()
    go_on(straight, schedule, 12)
    stored = copy.deepcopy((straight.optimizer.state_dict(), schedule.state_dict()))
    values = straight.optimizer.param_groups[0]["params"][0].detach().clone()
    expected = go_on(straight, schedule, 18)

    resumed, schedule = start()
    resumed.optimizer.param_groups[0]["params"][0].data.copy_(values)
    resumed.optimizer.load_state_dict(stored[0])
    schedule.load_state_dict(stored[1])
    assert go_on(resumed, schedule, 18) == expected
