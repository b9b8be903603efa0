"""How far long work has come: a bar on a terminal, a line for each tenth where lines are kept (a pipe, a file)."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class _Lines(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's numbers as whole lines, without the carriage returns by which a bar is drawn over itself."""

    disable: bool
    _tenths = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line when another tenth is done."""
        tenths = 10 * self.n // self.total if self.total else 0
        if tenths > self._tenths:
            self._tenths = tenths
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, *_: Any, **__: Any) -> None:
        """Lines stay."""

    def close(self) -> None:
        """Print what is left to say."""
        if not self.disable:
            self.display()
            self.disable = True  # tqdm's own way of closing would begin another line
            self._decr_instances(self)


def progress_bar(title: str, total: int, unit: str, *, done: int = 0, silent: bool = False) -> tqdm:
    """A bar on stderr of ``total`` units, of which ``done`` are behind us; to be closed (``with``) at the end.

    As all that a run says it is subject to --console_log_level; it counts as INFO.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    silent = silent or logging.getLogger("library").level > logging.INFO
    return kind(desc=title, total=total, initial=done, unit=unit, disable=silent)


@contextmanager
def paused(bar: tqdm) -> Iterator[None]:
    """Within a ``with``: work that is none of the bar's units, and so says nothing of how long the rest will take."""
    began = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            bar.start_t += time.time() - began  # tqdm reckons from these two
            bar.last_print_t += time.time() - began
