"""``<output_name>_metrics.jsonl``: what a run measured, a line of JSON for every logged step, for people and programs.

The first line says which run it is; every other has a ``step``. A line may hold anything else besides, and a reader
passes over what it does not know.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from library.support.atomic_files import write_atomically

Line = dict[str, Any]
_T = TypeVar("_T")
MOST_ROWS = 24  # of a table that grows with the run
ENDING = "_metrics.jsonl"
# What tells that a line is of the end of an epoch, or of the run.
_OF_AN_EPOCH, _OF_THE_END = {"loss/validation"}, {"result", "verdict"}


class MetricsFile:
    """Appends lines to a file that may be read at any time; each goes out whole, and at once."""

    def __init__(self, path: Path, run: str) -> None:
        """Go on with the file at ``path``, which :func:`begin` has written for ``run``."""
        self.path, self.run = path, run
        self._torn = False

    @classmethod
    def begin(cls, path: Path, run: str, earlier: Iterable[Line] = ()) -> "MetricsFile":
        """Write a new file that holds the ``earlier`` lines of a run that is resumed. Raises UserError."""
        lines = [{"run": run}, *earlier]
        write_atomically(path, "".join(map(_text, lines)).encode())
        return cls(path, run)

    def append(self, line: Line) -> None:
        """Write one line. Raises OSError; what was written of it by then is no line, and readers pass over it."""
        text = ("\n" if self._torn else "") + _text(line)
        self._torn = True
        with self.path.open("ab") as file:
            file.write(text.encode())
        self._torn = False

    def lines(self) -> list[Line]:
        """All lines with a step, in the file's order."""
        return [line for line in _read(self.path) if isinstance(line.get("step"), int)]


def run_of_metrics(path: Path) -> str | None:
    """The run that wrote a metrics file; None where there is none, or where it does not say so."""
    return next(_read(path), {}).get("run")


def lines_until(path: Path, step: int, *, epoch_closed: bool) -> list[Line]:
    """The lines of a run that goes on after ``step``: later ones are left out, for they will be written again.

    So are those of the run's end, and what is measured at the end of an epoch where that of the step is not
    ``epoch_closed``.
    """
    again = _OF_THE_END if epoch_closed else _OF_THE_END | _OF_AN_EPOCH
    lines = [line for line in _read(path) if line.get("step", step + 1) <= step]
    return [line for line in lines if not (_OF_THE_END & line.keys() or (line["step"] == step and again & line.keys()))]


def _read(path: Path) -> Iterator[Line]:
    try:
        content = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return
    for text in content.split("\n"):
        try:
            line = json.loads(text)
        except ValueError:  # empty, or torn by a full disk
            continue
        if isinstance(line, dict):
            yield line


def _text(line: Line) -> str:
    return json.dumps({name: _number(value) for name, value in line.items()}, ensure_ascii=False) + "\n"


def _number(value: Any) -> Any:
    """A float as JSON can hold it: six digits are more than anyone reads, and NaN is no JSON."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def sample_files(lines: Sequence[Line]) -> dict[int, dict[int, str]]:
    """The names of the sample images' files, by the step at which they were drawn and the number of their prompt."""
    drawn: dict[int, dict[int, str]] = {}
    for line in lines:
        if isinstance(line.get("samples"), dict):
            drawn.setdefault(line["step"], {}).update({int(number): name for number, name in line["samples"].items()})
    return dict(sorted(drawn.items()))


def moment(step: int) -> str:
    """When something was, for a reader."""
    return f"step {step:,}" if step else "at first"


def spread(items: Sequence[_T]) -> list[_T]:
    """At most so many of the items, from all over them, the first and the last among them."""
    if len(items) <= MOST_ROWS:
        return list(items)
    return [items[number * (len(items) - 1) // (MOST_ROWS - 1)] for number in range(MOST_ROWS)]
