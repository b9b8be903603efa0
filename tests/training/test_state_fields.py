"""Every field of a state that is not what a training writes is named before anything uses it."""

import pytest
import torch

from library.options.options import Options
from library.support.errors import UserError
from library.training.state import FILE, TrainingState, packed, random_states, recorded

ROWS = torch.ones(2, 8)


def sound() -> dict:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(ROWS.clone())])
    return {
        "format": 1,
        "step": 3,
        "total_steps": 9,
        "epoch_closed": True,
        "seed": 1,
        "data": "fingerprint",
        "options": recorded(Options()),
        "starts": [ROWS],
        "learner": {"rows": [ROWS], "optimizer": optimizer.state_dict(), "schedule": {}, "scaler": {}, "taught": True},
        "epoch_losses": [0.5],
        "random_states": [random_states()],
    }


def numpy_state(position) -> list:
    state = random_states()
    kind, keys, _, *rest = state["numpy"]
    return [{**state, "numpy": (kind, keys, position, *rest)}]


def read(content: dict, folder) -> TrainingState:
    (folder / FILE).write_bytes(packed(content))
    return TrainingState.read(folder)


def test_a_sound_state(tmp_path):
    state = read(sound(), tmp_path)
    assert state.step == 3
    assert torch.equal(state.starts[0], ROWS)


@pytest.mark.parametrize(
    "stopping", [None, {"losses": [], "best": None}, {"losses": [0.5], "best": {"rows": [ROWS], "step": 3, "epoch": 1}}]
)
def test_what_early_stopping_keeps(stopping, tmp_path):
    assert read({**sound(), "stopping": stopping}, tmp_path).stopping is not None or stopping is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", True),
        ("step", 2.0),
        ("step", 10**30),
        ("total_steps", None),
        ("epoch_closed", 1),
        ("seed", 2**64),
        ("data", 5),
        ("options", []),
        ("options", {1: 2}),
        ("options", {}),
        ("options", {**recorded(Options()), "weights": 3}),
        ("options", {**recorded(Options()), "seed": [[1]]}),
        ("starts", []),
        ("starts", ROWS),
        ("starts", [ROWS[0]]),
        ("starts", [ROWS.half()]),
        ("starts", [ROWS * float("nan")]),
        ("starts", [ROWS] * 3),
        ("learner", {}),
        ("learner", {**sound()["learner"], "optimizer": []}),
        ("learner", {**sound()["learner"], "optimizer": {"state": {}, "param_groups": [1]}}),
        ("learner", {**sound()["learner"], "schedule": None}),
        ("learner", {**sound()["learner"], "taught": "yes"}),
        ("learner", {**sound()["learner"], "optimizer": {"param_groups": ROWS, "state": {}}}),
        ("learner", {**sound()["learner"], "optimizer": {"param_groups": [], "state": {}}}),
        ("learner", {**sound()["learner"], "rows": [torch.ones(2)]}),
        ("stopping", []),
        ("stopping", {"losses": [0.5]}),
        ("stopping", {"losses": [1], "best": None}),
        ("stopping", {"losses": [0.5], "best": [ROWS]}),
        ("stopping", {"losses": [0.5], "best": {"rows": [ROWS], "step": 1}}),
        ("stopping", {"losses": [0.5], "best": {"rows": [ROWS[0]], "step": 1, "epoch": 1}}),
        ("stopping", {"losses": [0.5], "best": {"rows": [ROWS], "step": -1, "epoch": 1}}),
        ("averaging", []),
        ("averaging", {"mean": [ROWS], "count": 2}),
        ("averaging", {"mean": [ROWS[0]], "count": 2, "begin": 1}),
        ("averaging", {"mean": [ROWS], "count": 2.0, "begin": 1}),
        ("averaging", {"mean": [ROWS], "count": 2, "begin": -1}),
        ("epoch_losses", [1]),
        ("epoch_losses", 0.5),
        ("random_states", []),
        ("random_states", [{}]),
        ("random_states", [{**random_states(), "torch": torch.zeros(5)}]),
        ("random_states", [{**random_states(), "python": (3, (1, 2), None)}]),
        ("random_states", numpy_state(625)),
        ("random_states", numpy_state("a")),
        ("random_states", [{**random_states(), "cuda": 5}]),
    ],
)
def test_a_field_of_another_kind_is_named(field, value, tmp_path):
    with pytest.raises(UserError, match=f'state.pt is damaged: its field "{field}"'):
        read({**sound(), field: value}, tmp_path)
