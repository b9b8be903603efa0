"""The one exception for a user's mistake, the search for what they may have meant, and what a run can do without."""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

NAMES_SHOWN = 5  # in one message


class UserError(Exception):
    """Something the user can put right.

    The message is one or more full sentences: which option or file, what was wrong, what to do. The scripts print it
    without a traceback and exit with a code other than 0.
    """


@dataclass
class Attempts:
    """What is tried again and again and may fail: the first error is said after ``what_happened``, a sentence."""

    what_happened: str
    failed: bool = False

    @contextmanager
    def survived(self) -> Iterator[None]:
        """Within a ``with``: any error is passed over, as :func:`survived` does."""
        try:
            yield
        except Exception as error:
            # An error, not a warning: processes other than the main one say nothing less.
            level = logging.DEBUG if self.failed else logging.ERROR
            reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            logger.log(level, "%s %s", self.what_happened, reason)
            logger.debug("Where it happened:", exc_info=True)
            self.failed = True


def survived(what_happened: str) -> AbstractContextManager[None]:
    """Within a ``with``: say any error after ``what_happened``, a sentence, and go on.

    For what only shows a training: no image is worth a run, whatever a full memory, a disk or a server did to it.
    """
    return Attempts(what_happened).survived()


def counted(count: int, noun: str) -> str:
    """A number and what it counts, in the right form: "1 image", "1,200 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_names(names: Sequence[str]) -> str:
    """The first few of the names of files or folders, for a message."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown}, …" if len(names) > NAMES_SHOWN else shown


def looked_for(path: str | Path) -> str:
    """Where a relative path was looked for, for a message: " (looked for in /home/me)"; empty for an absolute one."""
    return "" if Path(path).is_absolute() else f" (looked for in {Path.cwd()})"


def first_line(error: BaseException) -> str:
    """The first line of another library's error that says something, or what kind of error it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like ``name``, or None when nothing is similar.

    The only name that begins with what was written wins over names that are merely similar.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    begun = [candidate for lower, candidate in by_lower.items() if lower.startswith(name.lower())]
    if len(begun) == 1 and name:
        return begun[0]
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean "x"?`` (with the leading space) for the closest known name, or an empty string."""
    guess = closest(name, known)
    return f' Did you mean "{guess}"?' if guess else ""
