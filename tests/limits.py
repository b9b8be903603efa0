"""Runs something in a forked child with bounds on time and memory, and tells how it ended.

A tool that is handed a damaged or hostile file either works or says a sentence (UserError); everything else is a
defect: another exception, more than ``memory`` bytes, more than ``seconds`` of work, a process that dies.
"""

import contextlib
import faulthandler
import os
import pickle
import resource
import select
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from library.support.errors import UserError

_OUT_OF_MEMORY = ("allocate memory", "can't allocate", "bad_alloc", "Cannot allocate")
_PATIENCE = 12  # a loaded machine may take this many times as long as the work itself


class Outcome(NamedTuple):
    """``kind`` is "ok", "error" (a UserError), "crash" (another exception), "memory", "hang" or "died" (by a signal).

    ``detail`` is the result's ``repr``, the error's message, or the traceback.
    """

    kind: str
    detail: str = ""

    @property
    def sound(self) -> bool:
        return self.kind in ("ok", "error")


def outcome(action: Callable[[], Any], *, seconds: float = 5, memory: int = 2**30) -> Outcome:
    """How ``action`` ends within ``seconds`` of processor time and ``memory`` bytes beyond what is in use now."""
    return next(outcomes(lambda _: action(), [None], seconds=seconds, memory=memory))


def outcome_in_locked(folder: Path, action: Callable[[], Any]) -> Outcome:
    """How ``action`` ends where nothing in ``folder`` may be read, whoever runs the tests."""

    def locked_out() -> Any:
        folder.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nobody; root may read everything
        return action()

    try:
        return outcome(locked_out)
    finally:
        folder.chmod(0o700)


def outcomes(
    action: Callable[[Any], Any], inputs: Iterable[Any], *, seconds: float = 5, memory: int = 2**30
) -> Iterator[Outcome]:
    """The outcome of ``action`` for each input, in order: one child serves many, a new one follows one that fell."""
    child = None
    try:
        for value in inputs:
            if child is None:
                child = _Child(action, seconds, memory)
            found = child.ask(value)
            if found.kind in ("hang", "died", "memory"):  # what such a child does next proves nothing
                child.end()
                child = None
            yield found
    finally:  # also where nobody asks for another outcome
        if child is not None:
            child.end()


class _Child:
    """A forked process that applies ``action`` to pickled inputs, one after another."""

    def __init__(self, action: Callable[[Any], Any], seconds: float, memory: int):
        self.seconds = seconds
        down, self.into = os.pipe()
        self.back, up = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.into)
            os.close(self.back)
            _serve(action, os.fdopen(down, "rb"), os.fdopen(up, "wb"), seconds, memory)
        os.close(down)
        os.close(up)

    def ask(self, value: Any) -> Outcome:
        data = pickle.dumps(value)
        try:
            with os.fdopen(os.dup(self.into), "wb") as file:
                file.write(len(data).to_bytes(8, "little") + data)
        except BrokenPipeError:
            return self._ended()
        if not select.select([self.back], [], [], _PATIENCE * self.seconds)[0]:
            return Outcome("hang", f"no answer within {_PATIENCE * self.seconds:g} s")
        answer = _read(self.back)
        return Outcome(*pickle.loads(answer)) if answer else self._ended()

    def _ended(self) -> Outcome:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = None
        if -status in (signal.SIGPROF, signal.SIGALRM):
            return Outcome("hang", f"more than {self.seconds:g} s of work")
        return Outcome("died", f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}")

    def end(self) -> None:
        os.close(self.into)
        os.close(self.back)
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None


def _read(descriptor: int) -> bytes:
    """One answer: eight bytes of length and that many of content; empty if the child is gone."""
    content = b""
    while len(content) < 8 or len(content) < 8 + int.from_bytes(content[:8], "little"):
        part = os.read(descriptor, 2**16)
        if not part:
            return b""
        content += part
    return content[8:]


def _serve(action, requests, answers, seconds: float, memory: int) -> None:
    """The child's life; it never returns, so that nothing of the test runner is run twice."""
    try:
        faulthandler.disable()  # how it ends is told by the parent
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        torch.set_num_threads(1)  # a forked process has none of the threads that its parent's pool counts on
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        bound = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        while length := requests.read(8):
            value = pickle.loads(requests.read(int.from_bytes(length, "little")))
            signal.setitimer(signal.ITIMER_PROF, seconds)
            found = _apply(action, value)
            signal.setitimer(signal.ITIMER_PROF, 0)
            data = pickle.dumps(found)
            answers.write(len(data).to_bytes(8, "little") + data)
            answers.flush()
    finally:
        os._exit(0)


def _apply(action: Callable[[Any], Any], value: Any) -> tuple[str, str]:
    try:
        result = action(value)
    except BaseException as error:
        if _was_memory(error):
            return "memory", _short(error)
        return ("error", str(error)) if isinstance(error, UserError) else ("crash", _short(error))
    return "ok", repr(result)[:1000]


def _was_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also where a wide ``except`` made another error of it."""
    while error is not None:
        if isinstance(error, MemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= 4000 else f"{text[:1500]}\n…\n{text[-2500:]}"
