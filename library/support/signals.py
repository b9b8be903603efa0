"""Signals that end a run: Ctrl-C, SIGTERM (as clusters send it) and SIGHUP (a closed terminal) are treated alike.

Only the exit code differs: 130, 143, 129. What they do depends on the moment. Python's own answer, an exception at any
place, would tear what must stay whole, and a second one would end the process in a traceback.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Answer(Enum):
    AT_ONCE = "end the process, there is nothing to keep"
    GENTLY = "raise KeyboardInterrupt"
    LATER = "raise it when what must not be torn is done"
    NEVER = "do nothing"


# A change of the answer is one assignment: no signal can arrive halfway. Handlers run in the main thread alone.
_answer = _Answer.GENTLY
_waiting = False
_first: int | None = None  # of those that came


def exit_code(number: int | None = None) -> int:
    """With what a process ends that a signal has ended, as shells count; without a ``number`` the first that came."""
    return 128 + (number or _first or signal.SIGINT)


def _handle(number: int, frame: FrameType | None) -> None:
    global _first, _waiting
    if _first is None and _answer is not _Answer.NEVER:
        _first = number
    if _answer is _Answer.AT_ONCE:
        # Exceptions raised while modules are imported, or while Python shuts down, end in tracebacks.
        with suppress(OSError):
            os.write(2, b"Interrupted.\n")  # print is not to be used in a handler: it may have been interrupted itself
        os._exit(exit_code(_first or number))
    elif _answer is _Answer.GENTLY:
        raise KeyboardInterrupt
    elif _answer is _Answer.LATER:
        _waiting = True


@contextmanager
def signals_handled(*, own_process: bool) -> Iterator[None]:
    """Within a ``with``: a signal raises KeyboardInterrupt, or what the parts below say.

    In a process that is ours it ends the process at once but for those parts, also after the ``with``, while Python
    shuts down; in another one the old handlers come back. Signals that are ignored (``nohup``, a job in the background)
    stay so.
    """
    global _first, _waiting
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    _first, _waiting = None, False
    found = {each: signal.getsignal(each) for each in SIGNALS}
    before = {each: handler for each, handler in found.items() if handler is not signal.SIG_IGN}
    _answer_with(_Answer.AT_ONCE if own_process else _Answer.GENTLY)
    for each in before:
        signal.signal(each, _handle)
    try:
        yield
    finally:
        for each, handler in () if own_process else before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: it is not Python's


@contextmanager
def ended_gently() -> Iterator[None]:
    """Within a ``with``: a signal raises KeyboardInterrupt, and so does every further one."""
    with _answering(_Answer.GENTLY):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within a ``with``: signals do nothing. For moments only."""
    with _answering(_Answer.NEVER):
        yield


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Within a ``with``: a signal raises KeyboardInterrupt as soon as the block is done. For moments only."""
    global _waiting
    with _answering(_Answer.LATER):
        yield
    if _waiting:
        _waiting = False
        raise KeyboardInterrupt


def _answer_with(answer: _Answer) -> None:
    global _answer
    _answer = answer


@contextmanager
def _answering(answer: _Answer) -> Iterator[None]:
    before = _answer
    _answer_with(answer)
    try:
        yield
    finally:
        _answer_with(before)
