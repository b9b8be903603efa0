"""A run of several processes: which of them this one is, and how it ends whatever became of the others."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# What torch's launcher sets, and accelerate's, and those of MPI.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# Microseconds of computing in each so many microseconds: version 2 of control groups has one file, version 1 two.
_CONTAINER_LIMITS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def rank() -> int:
    """The number of this process in its run, from 0, as its launcher says."""
    return _number(_RANKS, 0)


def count() -> int:
    """How many processes the launcher started for this run."""
    return _number(_COUNTS, 1)


def ended_at_once(work: Callable[[], int]) -> int:
    """Return the exit code of ``work``; where other processes belong to the run, end this one with it instead.

    What this process has to say and to write is said and written by then, so nothing is left to wait for. At an
    interpreter's ordinary end torch takes its process groups down, and that of Gloo waits for its threads: one that
    sums with a partner which is stuck waits until the group's timeout, half an hour. An ordinary end may also
    hang or abort where such a thread lets go of a tensor while Python shuts down (issues 154976 and 190489 of PyTorch).
    """
    if count() == 1:
        return work()
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now, with nothing said lost, and without the work that an interpreter does at its end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a closed or full output keeps no process from its end
            stream.flush()
    os._exit(code)


def _number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        with suppress(KeyError, ValueError):
            return int(os.environ[name])
    return otherwise


def usable_cores() -> int:
    """Processor cores that this process may run on: those it is bound to, and no more than its container's share."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, _container_cores() or bound)


def _container_cores() -> int | None:
    """Cores that Linux' control groups leave to this process, rounded up; None without a limit."""
    for names in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max": no limit
            quota, period = map(int, " ".join(Path(name).read_text("ascii") for name in names).split())
            return max(1, -(-quota // period)) if quota > 0 else None
    return None
