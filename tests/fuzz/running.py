"""Runs a target's inputs in bounded children: checked one by one in tests, counted and collected in a long run."""

import logging
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from limits import Outcome, outcome, outcomes

from library.support.errors import UserError

_ROUND = 2000  # inputs of one hypothesis run; it remembers all of them
_SECONDS, _MEMORY = 5.0, 2**30
_NO_MORE = object()


class LeftAsideError(UserError):
    """Raised by a target where the library rightly made a damaged file anew instead of refusing it."""


@dataclass(frozen=True)
class Target:
    """``prepare`` makes a folder ready and returns what a child does with a recipe there.

    ``plain`` is a recipe without damage, which must succeed. ``seeds`` are recipes that are always tried first;
    ``quick`` is how many others CI tries. Some of them must be accepted and some refused.
    """

    name: str
    prepare: Callable[[Path], Callable[[Any], Any]]
    recipes: hypothesis.strategies.SearchStrategy
    plain: Any
    seeds: tuple = ()
    quick: int = 1000


@dataclass
class Failure:
    """One kind of failure: how often it came, and its smallest recipe with the outcome and the files."""

    recipe: Any
    outcome: Outcome
    count: int = 0
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Count:
    """What a target got through."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0  # seconds
    slowest_recipe: Any = None
    failures: dict[str, Failure] = field(default_factory=dict)


class _Heard(logging.Handler):
    """Makes the text of every record, as a console would, and drops it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


def _listening(action: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The action, in a child whose log records are made, and who shows nothing."""

    def act(recipe: Any) -> Any:
        logger = logging.getLogger("library")
        if not logger.handlers or not isinstance(logger.handlers[0], _Heard):
            logger.handlers[:], logger.propagate = [_Heard()], False
            logger.setLevel(logging.INFO)
            logging.captureWarnings(True)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                os.dup2(nowhere, descriptor)
            sys.stdout = sys.stderr = os.fdopen(nowhere, "w")  # under pytest they are other files
        return action(recipe)

    return act


class Prober:
    """Asks a target's child about recipes; what falls is tried again in a child of its own before it counts."""

    def __init__(self, target: Target, folder: Path):
        self.folder = folder
        self._action = _listening(target.prepare(folder))
        self._waiting: deque = deque()
        self._answers = self._answer()

    def _answer(self) -> Iterator[Outcome]:
        return outcomes(self._action, iter(self._waiting.popleft, _NO_MORE), seconds=_SECONDS, memory=_MEMORY)

    def __call__(self, recipe: Any) -> Outcome:
        self._waiting.append(recipe)
        found = next(self._answers)
        if found.sound:
            return found
        # A child that has served thousands of inputs may be full of their remains.
        return outcome(lambda: self._action(recipe), seconds=_SECONDS, memory=_MEMORY)

    def renew(self) -> None:
        """End the child; the next recipe gets a fresh one."""
        self._waiting.append(_NO_MORE)
        next(self._answers, None)
        self._answers = self._answer()


@contextmanager
def prober(target: Target) -> Iterator[Prober]:
    """A prober in a folder of its own, in memory where that is possible."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(prefix="fuzz", dir=shared if shared.is_dir() else None) as folder:
        inner = Path(folder) / "inner"  # what climbs out of it is still in the folder
        inner.mkdir()
        with chdir(inner):  # targets work there, and what runs afterwards in this process must not
            probe = Prober(target, inner)
            yield probe
            probe.renew()


def check(target: Target, inputs: int) -> None:
    """Assert that the seeds and ``inputs`` recipes, always the same ones, end in success or in a UserError.

    Both must occur: where nothing is accepted, or nothing refused, nothing is tried.
    """
    kinds = Counter()
    with prober(target) as probe:
        undamaged = probe(target.plain)
        assert undamaged.kind == "ok", undamaged.detail

        @settings(
            max_examples=inputs, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(target.recipes)
        def holds(recipe):
            found = probe(recipe)
            kinds[found.kind] += 1
            assert found.sound, f"{target.name} {recipe!r:.2000}: {found.kind}\n{found.detail}"

        for seed in target.seeds:
            holds = hypothesis.example(seed)(holds)
        holds()
    assert kinds.keys() == {"ok", "error"}, kinds


def explore(target: Target, inputs: int, seed: int, count: Count) -> None:
    """Try ``inputs`` random recipes, at first the seeds too, and collect in ``count`` what fails."""
    started = time.monotonic()
    with prober(target) as probe:
        if not count.inputs:
            for recipe in (target.plain, *target.seeds):
                _try(probe, recipe, count)
        for number, done in enumerate(range(0, inputs, _ROUND)):
            _round(probe, target, min(_ROUND, inputs - done), seed * 100_000 + number, count)
            probe.renew()
    count.seconds += time.monotonic() - started


def _round(probe: Prober, target: Target, inputs: int, seed: int, count: Count) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(target.recipes)
    def tried(recipe):
        _try(probe, recipe, count)

    tried()


def _try(probe: Prober, recipe: Any, count: Count) -> None:
    started = time.perf_counter()
    found = probe(recipe)
    taken = time.perf_counter() - started
    count.inputs += 1
    count.accepted += found.kind == "ok"
    count.refused += found.kind == "error"
    if found.sound:
        if taken > count.slowest:
            count.slowest, count.slowest_recipe = taken, recipe
        return
    failure = count.failures.setdefault(_signature(found), Failure(recipe, found))
    failure.count += 1
    if len(repr(recipe)) < len(repr(failure.recipe)) or failure.count == 1:
        failure.recipe, failure.outcome = recipe, found
        failure.files = {path.name: path.read_bytes() for path in probe.folder.glob("input*") if path.is_file()}


def _signature(found: Outcome) -> str:
    """What failures of one cause have in common: the kind of error and the last line of the library in its trace."""
    lines = found.detail.strip().splitlines()
    ours = [line.strip() for line in lines if "/library/" in line and line.strip().startswith("File")]
    where = ours[-1].split("/library/")[-1].replace('"', "") if ours else ""
    what = lines[-1].split(":")[0][:80] if lines else ""
    return f"{found.kind} {what} {where}".strip()


def keep_files(failure: Failure, folder: Path) -> None:
    """Write the files of a failure for a closer look."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in failure.files.items():
        (folder / name).write_bytes(content)
