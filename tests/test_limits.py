"""The bounds themselves: what each kind of end is called, and that one bad input does not spoil the next."""

import os
import signal
import time

import pytest
import torch

from library.support.errors import UserError
from tests.limits import outcome, outcomes

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")  # noqa: PTH110


def user_error():
    raise UserError("--weights x is damaged.")


def hidden_memory_error():
    try:
        bytearray(2**31)
    except MemoryError as error:
        raise UserError("It is damaged.") from error


def endless():
    while True:
        pass


@pytest.mark.parametrize(
    ("action", "kind", "said"),
    [
        (lambda: 1 + 1, "ok", "2"),
        (user_error, "error", "is damaged"),
        (lambda: {}["a"], "crash", "KeyError"),
        (lambda: bytearray(2**31), "memory", "MemoryError"),
        (lambda: torch.zeros(2**29), "memory", "allocate"),
        (hidden_memory_error, "memory", "MemoryError"),
        (endless, "hang", "of work"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "died", "SIGSEGV"),
        (lambda: os._exit(3), "died", "exit code 3"),
    ],
)
def test_each_end_has_its_name(action, kind, said):
    found = outcome(action, seconds=1)
    assert found.kind == kind
    assert said in found.detail
    assert found.sound == (kind in ("ok", "error"))


def test_sleeping_counts_after_a_longer_while():
    assert outcome(lambda: time.sleep(60), seconds=0.1).kind == "hang"


def test_the_next_input_is_judged_by_itself():
    actions = {"good": lambda: 0, "large": lambda: bytearray(2**31), "fatal": lambda: os._exit(3), "bad": user_error}
    asked = ["good", "large", "good", "fatal", "good", "bad", "good"]
    found = outcomes(lambda name: actions[name](), asked)
    assert [one.kind for one in found] == ["ok", "memory", "ok", "died", "ok", "error", "ok"]


def test_no_child_is_left():
    child = int(outcome(os.getpid).detail)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
