"""The long run: many inputs of every target, counted, and failures shown once per kind."""

import argparse
import ast
import itertools
import os
import sys
import time
from pathlib import Path

from fuzz.running import Count, Target, explore, keep_files, prober
from fuzz.targets import TARGETS


def main() -> int:
    """Run what the command line asks for; 1 where an input failed."""
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"some of: {', '.join(names)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="a round, shared by the targets by their speed")
    parser.add_argument("--minutes", type=float, default=0, help="begin rounds of other inputs until then")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other inputs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where files of failing inputs are kept")
    parser.add_argument("--recipe", help="try this one recipe of the one target named, and show what happens")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    chosen = [target for target in TARGETS if not given.targets or target.name in given.targets]
    if given.recipe:
        return _try_one(chosen[0], given.recipe)
    share, end = given.inputs / sum(target.quick for target in chosen), time.monotonic() + 60 * given.minutes
    counts = {target.name: Count() for target in chosen}
    for number in itertools.count():
        for target in chosen:
            explore(target, round(share * target.quick), given.seed + 1000 * number, counts[target.name])
            print(_line(target.name, counts[target.name]), flush=True)
            _show_failures(target, counts[target.name], given.keep)
        print(f"{sum(count.inputs for count in counts.values()):,} inputs after {number + 1} rounds\n", flush=True)
        if time.monotonic() >= end:
            break
    failed = sum(failure.count for count in counts.values() for failure in count.failures.values())
    idle = [name for name, count in counts.items() if not (count.accepted and count.refused)]
    print(f"{failed:,} failures")
    if idle:
        print(f"Nothing was accepted, or nothing refused, by {', '.join(idle)}: nothing is tried there.")
    return 1 if failed or idle else 0


def _try_one(target: Target, recipe: str) -> int:
    nan, inf = float("nan"), float("inf")  # ``repr`` writes them so
    code = compile(ast.parse(recipe, mode="eval"), "recipe", "eval")
    with prober(target) as probe:
        found = probe(eval(code, {"nan": nan, "inf": inf}))
    print(found.kind, found.detail)
    return 0 if found.sound else 1


def _line(name: str, count: Count) -> str:
    failed = sum(failure.count for failure in count.failures.values())
    return (
        f"{name:24} {count.inputs:9,} inputs  {count.accepted:9,} accepted  {count.refused:9,} refused  "
        f"{failed:6,} failures  {count.seconds:7.1f} s  slowest {count.slowest:.2f} s"
    )


def _show_failures(target: Target, count: Count, keep: Path | None) -> None:
    ranked = sorted(count.failures.items(), key=lambda item: -item[1].count)
    for number, (signature, failure) in enumerate(ranked):
        detail = failure.outcome.detail.strip().splitlines()
        print(f"  {failure.count:6,} × {signature}\n           {failure.recipe!r:.300}\n           {detail[-1:]}")
        if keep is not None:
            keep_files(failure, keep / f"{target.name}-{number}")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(main())
