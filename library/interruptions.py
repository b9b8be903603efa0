"""Signals that end a run: treated alike, and held back while something must not be torn."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_gently() -> Iterator[None]:
    """Within a ``with``: a request to end (SIGTERM, as clusters send it) raises KeyboardInterrupt, as Ctrl-C does."""
    with _handled_by(signal.default_int_handler, signal.SIGTERM):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within a ``with``: Ctrl-C and SIGTERM do nothing. For moments only."""
    with _handled_by(signal.SIG_IGN, signal.SIGTERM, signal.SIGINT):
        yield


@contextmanager
def _handled_by(handler, *signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, signal.SIG_DFL if old is None else old)  # None: a handler that is not Python's
