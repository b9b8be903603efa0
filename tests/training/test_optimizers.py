"""Optimizers by name: the measured classes and defaults, sentences for mistakes, and that each really learns."""

import importlib.util
import math
import sys

import pytest
import torch
from departures import departure
from golden_data import golden_cases
from torch import nn

from library.options.checks import chosen_optimizer
from library.options.options import OptimizerOptions, Options
from library.options.parser import build_parser, read_values
from library.support.errors import UserError
from library.training.optimizers import (
    KNOWN_OPTIMIZERS,
    OptimizerChoice,
    averaged_values,
    build_optimizer,
    default_learning_rate,
    farthest_movement,
    known_optimizer,
    largest_rate,
    set_train_mode,
    slow_learning_warning,
)

EXTRAS = {"lion_pytorch", "prodigyopt", "dadaptation", "schedulefree"}


def rows(count: int = 2, width: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 0.014)


def build(name: str = "", *arguments: str, **options) -> OptimizerChoice:
    return build_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=arguments or None, **options), [rows()])


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


# Golden cases


def assert_same_path(module: str, name: str, full: str) -> None:
    """``module.name``, where the user finds the class, is the class whose full path was measured as ``full``."""
    package, measured = full.partition(".")[0], full.rpartition(".")[2]
    assert (module.partition(".")[0], name) == (package, measured)


def assert_as_measured(choice: OptimizerChoice, case: dict, compare_defaults: bool = True) -> None:
    assert type(choice.optimizer).__name__ == case["class"].rpartition(".")[2]
    assert choice.arguments_text == case["args_string"]
    scheduler = f"adafactor:{choice.shown_rate:g}" if choice.relative_step else "constant"
    assert scheduler == case["lr_scheduler_after"]
    assert choice.learning_rate == case["learning_rate_after"]
    if compare_defaults:
        assert choice.name == case["class"]
        found = plain(choice.optimizer.defaults)
        # Another version of a library may know more settings; those measured must be what they were.
        assert {key: found.get(key, "gone") for key in case["defaults"]} == case["defaults"]


def plain(value):
    """As JSON would hold it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


@pytest.mark.parametrize("case", golden_cases("optimizer_map"))
def test_golden_optimizer_map(case):
    name = case["optimizer_type"]
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-3)
    if "error" in case:
        with pytest.raises(UserError, match="--optimizer_type"):
            build_optimizer(options, [rows()])
        return
    known = known_optimizer(name or "AdamW")
    assert_same_path(known.module, known.name, case["class"])
    if is_installed(known.module):
        assert_as_measured(build_optimizer(options, [rows()]), case, not departure("optimizer_map", case))


def options_of(arguments: list[str]) -> OptimizerOptions:
    values = read_values(build_parser("", "sd"), ["--learning_rate=1e-3", *arguments])
    return Options.from_values(values).optimizer


@pytest.mark.parametrize("case", golden_cases("optimizer_args"))
def test_golden_optimizer_args(case):
    options = options_of(case["argv"])
    if departure("optimizer_args", case):
        flagged = build_optimizer(options, [rows()])
        without = build_optimizer(options_of([a for a in case["argv"] if a != "--fused_backward_pass"]), [rows()])
        assert flagged.name == without.name
        assert flagged.optimizer.defaults == without.optimizer.defaults
    elif "error" in case:
        with pytest.raises(UserError, match=r"^--(optimizer|use)_"):
            build_optimizer(options, [rows()])
    else:
        known = known_optimizer(chosen_optimizer(options))
        assert_same_path(known.module, known.name, case["class"])
        if is_installed(known.module):
            assert_as_measured(build_optimizer(options, [rows()]), case)


# Every known optimizer learns


def learn(optimizer: torch.optim.Optimizer, row: nn.Parameter, steps: int) -> list[float]:
    """Minimise the distance to a target and return the loss at each step."""
    target = torch.linspace(-0.1, 0.1, row.shape[-1])
    losses = []
    for _ in range(steps):
        loss = ((row - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", [*KNOWN_OPTIMIZERS, "Adam", "NAdam", "RMSprop", "torch.optim.Adagrad", "Muon"])
def test_every_optimizer_learns_with_its_default_rate(name):
    pytest.importorskip(known_optimizer(name).module.partition(".")[0])
    row = rows(2, 16)
    choice = build_optimizer(OptimizerOptions(optimizer_type=name), [row])
    losses = learn(choice.optimizer, row, 40)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit", "sgdnesterov8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_8bit_optimizers_keep_an_8bit_state(name):
    """bitsandbytes does so from 4,096 elements on: 6 vectors of width 768 are enough."""
    row = rows(6, 768)
    choice = build_optimizer(OptimizerOptions(optimizer_type=name), [row])
    losses = learn(choice.optimizer, row, 5)
    assert losses[-1] < losses[0]
    assert choice.optimizer.state[row]["state1"].dtype == torch.uint8
    assert choice.optimizer.state[row]["state1"].shape == row.shape


def test_a_stored_8bit_state_continues_exactly():
    first, second = rows(6, 768), rows(6, 768)
    one = build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), [first]).optimizer
    learn(one, first, 3)
    other = build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), [second]).optimizer
    other.load_state_dict(one.state_dict())
    second.data.copy_(first.data)
    learn(one, first, 3)
    learn(other, second, 3)
    assert torch.equal(first, second)


# Names


@pytest.mark.parametrize("name", ["adamw8bit", "LION", "prodigy", "ADAFACTOR", "dadaptadam", "AdamWSCHEDULEFREE"])
def test_known_names_mind_no_case(name):
    assert known_optimizer(name).name.lower() == name.lower()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AdamW8bits", 'Did you mean "AdamW8bit"?'),
        ("adam", 'Did you mean "Adam"?'),
        ("DAdaptAdm", 'Did you mean "DAdaptAdam"?'),
        ("Optimizer", "unknown optimizer"),
        ("torch.optim.Adan", "torch.optim has no class Adan"),
        ("torch.nn.Linear", "is not an optimizer"),
        ("LBFGS", "computes the loss several times"),
        ("SparseAdam", "wants sparse gradients"),
        (".Adam", "--optimizer_type"),
        ("torch.optim.", "--optimizer_type"),
    ],
)
def test_names_that_do_not_work_are_answered(name, said):
    with pytest.raises(UserError) as error:
        build(name)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "pip"),
    [
        ("Lion", "lion_pytorch", "pip install lion-pytorch"),
        ("Prodigy", "prodigyopt", "pip install prodigyopt"),
        ("DAdaptation", "dadaptation", "pip install dadaptation"),
        ("RAdamScheduleFree", "schedulefree", "pip install schedulefree"),
        ("AdamW8bit", "bitsandbytes", "pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(name, module, pip, monkeypatch):
    class Missing:
        def find_spec(self, fullname, path=None, target=None):
            if fullname.partition(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname.partition(".")[0])

    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UserError) as error:
        build(name)
    assert pip in str(error.value)


def test_a_package_that_breaks_on_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_optimizers.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no_such_package_anywhere"):
        build("broken_optimizers.Best")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, "name two optimizers"),
        ({"use_8bit_adam": True, "optimizer_type": "AdamW"}, "--optimizer_type=AdamW8bit"),
        ({"use_lion_optimizer": True, "optimizer_type": "Lion"}, "--optimizer_type=Lion"),
    ],
)
def test_contradicting_flags(options, said):
    with pytest.raises(UserError) as error:
        build_optimizer(OptimizerOptions(**options), [rows()])
    assert said in str(error.value)


# Arguments


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("weight_decay", "must be one key=value"),
        ("a=b=c", "must be one key=value"),
        ("weight_decay=abc", "weight_decay='text'"),
        ("betas=(0.9,", "cannot be read"),
        ("weight_decay =0.1", "without spaces"),
        ("=1", "is no name"),
        ("wieght_decay=0.1", 'Did you mean "weight_decay"?'),
        ("betas=(2,3)", "Invalid beta"),
        ("betas=1", "refuses its arguments"),
        ("lr=0.1", 'cannot set "lr"'),
        ("params=1", 'has no argument "params"'),
    ],
)
def test_malformed_arguments_are_answered(argument, said):
    with pytest.raises(UserError) as error:
        build("AdamW", argument)
    assert str(error.value).startswith("--optimizer_args")
    assert said in str(error.value)


def test_of_an_argument_given_twice_the_last_counts(caplog):
    assert build("AdamW", "eps=1e-6", "eps=1e-7").optimizer.defaults["eps"] == 1e-7
    assert 'gives "eps" more than once' in caplog.text


def test_arguments_reach_the_optimizer():
    choice = build("AdamW", "betas=0.8,0.9", "weight_decay=0")
    assert choice.optimizer.defaults["betas"] == (0.8, 0.9)
    assert choice.optimizer.defaults["weight_decay"] == 0
    assert build("SGDNesterov", "momentum=0.5").optimizer.defaults["momentum"] == 0.5


# Learning rates


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("", 5e-4),
        ("AdamW8bit", 5e-4),
        ("AdamWScheduleFree", 5e-4),
        ("RMSprop", 5e-4),
        ("Lion", 1e-4),
        ("PagedLion8bit", 1e-4),
        ("SGDNesterov", 5e-3),
        ("SGDScheduleFree", 5e-3),
        ("Prodigy", 1.0),
        ("prodigyopt.Prodigy", 1.0),
        ("DAdaptLion", 1.0),
        ("DAdaptSGD", 1.0),
    ],
)
def test_default_learning_rates(name, rate):
    assert default_learning_rate(known_optimizer(name or "AdamW").name) == rate
    if is_installed(known_optimizer(name or "AdamW").module):
        choice = build(name)
        assert choice.learning_rate == rate
        assert choice.optimizer.param_groups[0]["lr"] == rate


def test_adafactor_makes_its_own_rate_unless_told_otherwise(caplog):
    own = build("Adafactor")
    assert own.relative_step
    assert own.learning_rate is None
    assert not caplog.records
    shown = build("Adafactor", learning_rate=1e-3)
    assert (shown.relative_step, shown.shown_rate) == (True, 1e-3)
    assert "only shown, not used" in caplog.text
    given = build("Adafactor", "relative_step=False", "scale_parameter=False")
    assert (given.relative_step, given.learning_rate) == (False, 5e-4)
    assert build("transformers.Adafactor").relative_step
    assert build("torch.optim.Adafactor", learning_rate=1e-3).learning_rate == 1e-3


def test_stages_begin_with_their_first_rate():
    stages = ((5e-3, 100), (1e-3, None))
    choice = build("AdamW", learning_rate=stages)
    assert (choice.learning_rate, choice.stages) == (5e-3, stages)
    assert choice.optimizer.param_groups[0]["lr"] == 5e-3
    assert largest_rate(build("AdamW", learning_rate=((1e-4, 10), (1e-3, None)))) == 1e-3
    with pytest.raises(UserError, match="relative_step=False"):
        build("Adafactor", learning_rate=stages)


def test_a_small_factor_for_d_adaptation_is_warned_of(caplog):
    pytest.importorskip("prodigyopt")
    build("Prodigy", learning_rate=0.5)
    assert not caplog.records
    build("Prodigy", learning_rate=1e-4)
    assert "should be near 1" in caplog.text


@pytest.mark.parametrize(
    ("stages", "steps", "expected"),
    [
        (((1e-6, None),), 1600, 1.6e-3),
        (((0.1, 10), (0.01, 20), (0.001, None)), 100, 1.0 + 0.1 + 0.08),
        (((0.1, 10), (0.01, 20)), 100, 1.0 + 0.9),
        (((0.1, 10), (0.01, 20)), 5, 0.5),
    ],
)
def test_farthest_movement(stages, steps, expected):
    assert farthest_movement(stages, steps) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_farthest_movement_bounds_what_the_optimizer_does(name):
    pytest.importorskip(known_optimizer(name).module.partition(".")[0])
    row = rows(1, 16)
    start = row.detach().clone()
    choice = build_optimizer(OptimizerOptions(name, learning_rate=1e-4, optimizer_args=("weight_decay=0",)), [row])
    for _ in range(50):
        row.grad = torch.ones_like(row)  # every step the same way: the farthest it can get
        choice.optimizer.step()
    moved = (row - start).abs().max().item()
    assert moved == pytest.approx(farthest_movement(((1e-4, None),), 50), rel=1e-3)


def test_a_rate_too_low_to_learn_is_warned_of():
    said = slow_learning_warning(build("AdamW", learning_rate=1e-6), 1600, 0.0144)
    assert "1e-06" in said
    assert "0.0016" in said
    assert "0.014" in said
    assert "11%" in said
    staged = slow_learning_warning(build("AdamW", learning_rate=((5e-6, 100), (1e-6, None))), 200, 0.01)
    assert "0.0006" in staged


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("AdamW", 1e-5),
        ("AdamW", None),
        ("SGDNesterov", 1e-6),
        ("Adafactor", None),
        ("AdamW", ((1e-3, 10), (1e-6, None))),
    ],
)
def test_other_rates_are_not_warned_of(name, rate):
    assert slow_learning_warning(build(name, learning_rate=rate), 1600, 0.0144) is None


# Schedule-free optimizers


@pytest.mark.parametrize("name", ["RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_optimizers_hand_out_their_average(name):
    pytest.importorskip("schedulefree")
    row = rows(1, 16)
    choice = build_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=0.05), [row])
    assert choice.schedule_free
    learn(choice.optimizer, row, 10)
    training = row.detach().clone()
    with averaged_values(choice.optimizer):
        averaged = row.detach().clone()
        assert not choice.optimizer.param_groups[0]["train_mode"]
    assert choice.optimizer.param_groups[0]["train_mode"]
    assert not torch.allclose(averaged, training, atol=1e-6)
    torch.testing.assert_close(row.detach(), training)
    learn(choice.optimizer, row, 1)


def test_train_mode_returns_after_an_error():
    pytest.importorskip("schedulefree")
    choice = build("AdamWScheduleFree")
    with pytest.raises(RuntimeError), averaged_values(choice.optimizer):
        raise RuntimeError
    assert choice.optimizer.param_groups[0]["train_mode"]


def test_other_optimizers_have_no_modes():
    choice = build("AdamW")
    set_train_mode(choice.optimizer, False)
    with averaged_values(choice.optimizer):
        pass
    assert not choice.schedule_free


@pytest.mark.parametrize(("count", "said"), [(64, True), (4, False)])
def test_eight_bit_states_become_wider_on_apples_gpus(count, said, caplog, monkeypatch):
    """They are in 8 bits from 4096 numbers on."""
    vectors = nn.Parameter(torch.randn(count, 64))
    on_mps = property(lambda _: torch.device("mps"))
    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "device", on_mps, raising=False)
        choice = build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), [vectors])
    assert ("AdamW8bit keeps its states in 32 bits" in caplog.text) == said
    vectors.grad = torch.randn_like(vectors)
    choice.optimizer.step()
    assert choice.optimizer.state[vectors]["state1"].dtype == torch.float32


def test_eight_bit_states_stay_so_elsewhere():
    vectors = nn.Parameter(torch.randn(64, 64))
    choice = build_optimizer(OptimizerOptions(optimizer_type="AdamW8bit"), [vectors])
    vectors.grad = torch.randn_like(vectors)
    choice.optimizer.step()
    assert choice.optimizer.state[vectors]["state1"].dtype == torch.uint8
