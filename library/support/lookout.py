"""What a training has learned outlives its device and its partners: a copy in main memory, and a thread to save it."""

import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from library.support.processes import leave
from library.support.signals import exit_code

logger = logging.getLogger(__name__)

COPY_EVERY = 10.0  # seconds of work that a lost device may cost at most
GRACE = 8.0  # seconds for the main thread to obey a signal; torch's launcher kills after 30
_ENDING = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Vectors:
    """The vectors as they would be saved after ``step`` steps in ``epoch`` (from 1): on the CPU, [N, D] per encoder.

    ``chosen`` says how they became the result of a run, where they are not simply those of its last step.
    """

    rows: Sequence[Tensor]
    step: int
    epoch: int
    chosen: str | None = None


class Lookout:
    """Keeps a copy of the vectors, and saves it where the main thread waits for a lost process and cannot.

    A collective operation on GPUs does not fail when its partner is gone: it waits, no signal is heard, and in the end
    the launcher or NCCL kills the process. A thread sees both coming. Used as a context, from the first step on.
    """

    def __init__(
        self,
        keep: Callable[[Vectors], None],
        *,
        watch: bool,
        patience: float | None = None,
        end: Callable[[int], None] = leave,
    ) -> None:
        """``keep`` writes the copy to a file and says so, touching no device; it is called in another thread.

        ``watch``: there are other processes to be lost. ``patience``: seconds that a batch may take, None without end.
        """
        self.keep, self.patience, self.end = keep, patience, end
        self.copy: Vectors | None = None
        self._copied = -COPY_EVERY
        self._since: float | None = None
        self._stopped = not watch or threading.current_thread() is not threading.main_thread()
        self._ending = threading.Lock()

    def __enter__(self) -> "Lookout":
        """Begin to watch."""
        if not self._stopped:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            # Python's own handlers run in the main thread only; this descriptor hears of signals at once.
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End watching."""
        self.stop()
        if hasattr(self, "_thread"):
            signal.set_wakeup_fd(self._before)
            self._writer.send(b"\0")
            self._thread.join()
            self._reader.close()
            self._writer.close()

    def stop(self) -> None:
        """The main thread saves by itself from here on; where the lookout is at it already, this does not return."""
        with self._ending:
            self._stopped = True

    def beating(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The batches of one step; each one, and the step's end, may take ``patience`` seconds from the second step on.

        The first step may have to compile, and there is nothing to save before its end.
        """
        for batch in batches:
            self._beat()
            yield batch
        self._beat()

    def step_done(self, vectors: Callable[[], Vectors | None]) -> None:
        """A step is complete: renew the copy where it is due, with what ``vectors`` gives."""
        self._since = None
        now = time.monotonic()
        if now - self._copied >= COPY_EVERY:
            self.copy, self._copied = vectors(), now

    def _beat(self) -> None:
        if self.copy is not None:
            self._since = time.monotonic()

    def _watch(self) -> None:
        asked: float | None = None
        ending = 0
        while not self._stopped:
            readable, _, _ = select.select([self._reader], [], [], 0.5)
            now = time.monotonic()
            signals = set(self._reader.recv(4096)) if readable else set()
            if asked is None and _ENDING & signals:
                asked, ending = now, min(_ENDING & signals)
            if asked is not None and now - asked > GRACE:
                self._save_and_end("The run was told to end while it waited for another process.", exit_code(ending))
            elif self.patience and self._since is not None and now - self._since > self.patience:
                self._save_and_end(
                    f"Nothing has come from the other processes for {self.patience / 60:.0f} minutes: one of them has "
                    "ended, or hangs. Look at its messages; --ddp_timeout sets how long to wait.",
                    1,
                )

    def _save_and_end(self, sentence: str, code: int) -> None:
        with self._ending:
            if self._stopped:
                return
            try:
                logger.error(sentence)
                if self.copy is not None:
                    self.keep(self.copy)
            finally:
                self.end(code)
                self._stopped = True


def appears(path: Path, since: float, seconds: float) -> bool:
    """Whether the file is there, or comes within so many seconds, and was written after the time ``since``."""
    end = time.monotonic() + seconds
    while True:
        try:
            if path.stat().st_mtime >= since - 2:  # to which some file systems round
                return True
        except OSError:
            pass  # not there yet
        if time.monotonic() >= end:
            return False
        time.sleep(min(0.1, seconds))
