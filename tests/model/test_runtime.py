"""What a run stands on: threads, and what its processes agree on."""

from types import SimpleNamespace

import pytest
import torch

from library.model import runtime
from library.options.options import RuntimeOptions
from library.support.errors import UserError

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("device", "timeout", "seconds"),
    [("cpu", None, None), ("cpu", 5, None), ("cuda", None, 540), ("cuda", 5, 270)],
)
def test_a_gpu_run_waits_for_others_a_little_less_than_nccl(device, timeout, seconds):
    """NCCL's own end comes without a word, and the vectors would be lost with it."""
    assert runtime.patience(RuntimeOptions(ddp_timeout=timeout), torch.device(device)) == seconds


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 6),
        ({"LOCAL_WORLD_SIZE": "2"}, 3),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"MKL_NUM_THREADS": "2"}, None),
        ({"OMP_NUM_THREADS": ""}, 6),
        ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, 6),  # what accelerate launch sets by itself
        ({**BY_TORCHRUN, "OMP_NUM_THREADS": "1"}, 6),
        ({**LAUNCHED, "OMP_NUM_THREADS": "4"}, None),
        ({**LAUNCHED, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, None),
    ],
)
def test_the_number_of_threads_is_the_users_or_that_of_the_cores(environment, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", *LAUNCHED, *BY_TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    runtime._use_all_cores()
    assert chosen == ([threads] if threads else [])


def test_work_is_shared_out_in_order_and_a_mistake_reaches_all(monkeypatch):
    """Three processes one after another; each then gets what all have made."""
    made: dict[int, list] = {}

    def as_process(process, items, work, *, last=False):
        state = SimpleNamespace(process_index=process, num_processes=3)
        monkeypatch.setattr(runtime.accelerate, "PartialState", lambda: state)

        def gather(mine):
            made[process] = mine
            return [part for number in sorted(made) for part in made[number]] if last else mine

        monkeypatch.setattr(runtime, "gather_object", gather)
        return runtime.shared_out(items, work)

    def doubled(items):
        return [2 * item for item in items]

    for count, shares in ((7, [3, 3, 1]), (2, [1, 1, 0])):
        made.clear()
        parts = [as_process(process, range(count), doubled) for process in (0, 1, 2)]
        assert [len(part) for part in parts] == shares
        assert as_process(2, range(count), doubled, last=True) == doubled(range(count))
    made.clear()
    as_process(0, range(7), doubled)
    for error, said in ((UserError("No room."), "No room."), (ValueError("odd"), "ValueError: odd")):

        def failing(_, error=error):
            raise error

        with pytest.raises(UserError, match=said):
            as_process(1, range(7), failing)
        with pytest.raises(UserError, match=said):
            as_process(2, range(7), doubled, last=True)


def mistake():
    raise UserError("The file is gone.")


@pytest.mark.parametrize("process", [0, 1])
def test_the_main_process_decides_for_all(process, monkeypatch):
    """Two processes one after another; what the first one says reaches the second."""
    said: list = []

    def broadcast(answer):
        answer[:] = said if process else answer
        said[:] = answer

    monkeypatch.setattr(runtime.accelerate, "PartialState", lambda: SimpleNamespace(is_main_process=process == 0))
    monkeypatch.setattr(runtime, "broadcast_object_list", broadcast)
    said[:] = ["from the main process"]
    assert runtime.decided_by_main(lambda: "here") == ("here" if process == 0 else "from the main process")
    said[:] = [UserError("The file is gone.")]
    with pytest.raises(UserError, match="The file is gone"):
        runtime.decided_by_main(mistake if process == 0 else lambda: "here")
