"""How far long work has come: a bar on a terminal, a line for each tenth where lines are kept (a pipe, a file)."""

import sys
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
    """A bar on stderr of ``total`` units, of which ``done`` are behind us; to be closed (``with``) at the end."""
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(desc=title, total=total, initial=done, unit=unit, disable=silent)
