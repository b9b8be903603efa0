"""Which recipe teaches a token best? Trains the miniatures by a list of recipes and prints a page of Markdown.

    python -m tests.benchmarks.recipes --results recipes.jsonl [--recipes FILE.toml] [--out page.md --plot plot.html]

Every run is a line of the results file and is not carried out again; an interrupted benchmark goes on where it was.
``--concepts choosing`` is for choosing; ``once`` is looked at when the choice is made.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from library.output.charts import Series, line_chart
from library.support.processes import usable_cores
from tests.benchmarks.concepts import CONCEPTS
from tests.benchmarks.recipe_run import Found, Run, begin, carried_out

GROUPS = {"choosing": True, "once": False}


@dataclass(frozen=True)
class Recipe:
    """Options over those of the quickstart, under a name."""

    name: str
    options: str  # as JSON with sorted keys

    def run(self, model: str, concept: str, seed: int) -> Run:
        """One training of it."""
        return Run(model, concept, seed, self.options)

    @property
    def steps(self) -> int:
        """How long it trains."""
        return json.loads(self.options)["max_train_steps"]


def read_recipes(file: Path) -> list[Recipe]:
    """All recipes of a TOML file, in order."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return [Recipe(name, json.dumps(options, sort_keys=True)) for name, options in tables.items()]


class Results:
    """The runs that have been carried out, a line of JSON each."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.found[Run(**entry["run"])] = Found(**entry["found"])

    def add(self, run: Run, found: Found) -> None:
        """Keep what a run has given."""
        self.found[run] = found
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": vars(run), "found": vars(found)}) + "\n")


def carry_out(runs: Sequence[Run], results: Results, workers: int) -> None:
    """Carry out what has not been yet, in processes of a core each. Raises RuntimeError where a training fails."""
    pending = [run for run in dict.fromkeys(runs) if run not in results.found]
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, initializer=begin, initargs=(numbers,)) as pool:
        running = {pool.submit(carried_out, run): run for run in pending}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                results.add(running[future], future.result())
                print(f"{done} of {len(pending)}: {running[future]}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Group:
    """The runs of one recipe on one model and concept, by seed."""

    by_seed: dict[int, Found]

    @property
    def found(self) -> Sequence[Found]:
        """All of them."""
        return list(self.by_seed.values())

    @property
    def end(self) -> float:
        """The mean loss on training images at the end."""
        return self.mean("training")

    def steps_to(self, reference: "Group") -> list[int | None]:
        """For each seed the step at which the loss on training images is what the reference ends at; None: never.

        A seed draws noise of its own to measure with, so that only runs of one seed can be compared.
        """
        ends = {seed: measure(each, "training") for seed, each in reference.by_seed.items()}
        return [
            next((step for step, loss in each.losses if loss <= ends[seed]), None)
            for seed, each in self.by_seed.items()
            if seed in ends
        ]

    def share(self, reference: "Group", name: str) -> float:
        """A measure as a share of the reference's, seed by seed, as a mean over the seeds that both have."""
        return statistics.mean(
            measure(found, name) / measure(reference.by_seed[seed], name)
            for seed, found in self.by_seed.items()
            if seed in reference.by_seed
        )

    def mean(self, name: str) -> float:
        """Of a measure, over the seeds."""
        return statistics.mean(measure(each, name) for each in self.found)

    def spread(self, name: str) -> str:
        """Mean and standard deviation over the seeds of a measure."""
        values = [measure(each, name) for each in self.found]
        digits = 4 if name in ("training", "fresh") else 1 if name in ("distance", "norm") else 2
        more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{more}"


def measure(found: Found, name: str) -> float:
    """One of the measures of a run; ``training`` is the last loss on training images."""
    return found.losses[-1][1] if name == "training" else getattr(found, name)


def middle(steps: Sequence[int | None]) -> float:
    """The median, where never counts as later than anything."""
    return statistics.median(float("inf") if step is None else step for step in steps)


def shown_steps(steps: Sequence[int | None], most: int) -> str:
    """The median with the least and the most."""
    ordered = sorted(float("inf") if step is None else step for step in steps)
    return shown_median(steps, most) + (
        "" if len(ordered) == 1 else f" ({_shown(ordered[0], most)} to {_shown(ordered[-1], most)})"
    )


def shown_median(steps: Sequence[int | None], most: int) -> str:
    """The median alone."""
    return _shown(middle(steps), most)


def _shown(step: float, most: int) -> str:
    return f"> {most}" if step == float("inf") else f"{step:g}"


class Page:
    """The tables of all that has been carried out."""

    def __init__(self, recipes: Sequence[Recipe], models: Sequence[str], seeds: Sequence[int], results: Results):
        self.recipes, self.models, self.seeds, self.results = recipes, models, seeds, results

    def group(self, recipe: Recipe, model: str, concept: str) -> Group | None:
        """None where no seed has been carried out."""
        runs = {seed: recipe.run(model, concept, seed) for seed in self.seeds}
        found = {seed: self.results.found[run] for seed, run in runs.items() if run in self.results.found}
        return Group(found) if found else None

    def written(self) -> str:
        """Markdown: how far the figures can be trusted, a table for each model and concept, and the tally."""
        parts = ["# Recipes", self._noise()]
        parts += [self._table(model, concept.name) for model in self.models for concept in CONCEPTS]
        parts += [self._summary(model) for model in self.models]
        return "\n\n".join(part for part in parts if part) + "\n"

    def plot(self) -> str:
        """Losses on training images, a chart for each model and concept, as a page of HTML."""
        charts = []
        for model in self.models:
            for concept in CONCEPTS:
                series = []
                for colour, recipe in enumerate(self.recipes):
                    if group := self.group(recipe, model, concept.name):
                        means = [
                            (float(step[0][0]), statistics.mean(loss for _, loss in step))
                            # Some may have been stopped before others.
                            for step in zip(*(each.losses for each in group.found), strict=False)
                        ]
                        series.append(Series(recipe.name, means[1:], colour % 8))
                charts.append(line_chart(f"{model}, {concept.name}", series))
        colours = ("4269d0", "efb118", "ff725c", "6cc5b0", "3ca951", "ff8ab7", "a463f2", "97bbf5")
        styles = "".join(f".c{n}{{stroke:#{c};fill:none}}i.c{n}{{background:#{c}}}" for n, c in enumerate(colours))
        styles += "body{font:13px sans-serif}figure{display:inline-block;width:390px}.grid{stroke:#ddd}"
        styles += "i{display:inline-block;width:9px;height:9px}"
        return f"<!doctype html><meta charset='utf-8'><style>{styles}</style>{''.join(charts)}"

    def _noise(self) -> str:
        found = list(self.results.found.values())
        if not found:
            return ""
        training, fresh = (statistics.median(each.noise[number] for each in found) for number in (0, 1))
        return (
            f"{len(found)} runs. Standard deviation of a loss between sets of noise: {training:.5f} on training "
            f"images, {fresh:.5f} on fresh ones; a seed's runs are all measured with one set. ± is between seeds."
        )

    def _table(self, model: str, concept: str) -> str:
        reference = self.group(self.recipes[0], model, concept)
        if not reference:
            return ""
        kind = "choosing" if next(each.choosing for each in CONCEPTS if each.name == concept) else "once"
        lines = [f"## {model}, {concept} ({kind}): loss to reach {reference.end:.4f} on average", ""]
        columns = ["recipe", "seeds", "steps to it", "loss at the end", "on fresh images", "distance", "outline IoU"]
        lines += [f"| {' | '.join([*columns, 'composition', 'norm', 's/step'])} |", "|---" * 10 + "|"]
        for recipe in self.recipes:
            if group := self.group(recipe, model, concept):
                steps = shown_steps(group.steps_to(reference), recipe.steps)
                seconds = statistics.mean(each.seconds / each.losses[-1][0] for each in group.found)
                names = ("training", "fresh", "distance", "iou", "composed", "norm")
                cells = [recipe.name, str(len(group.found)), steps, *map(group.spread, names), f"{seconds:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _summary(self, model: str) -> str:
        """A row for each concept, a column for each recipe, and below how often each is there within 100 steps."""
        reference, *others = self.recipes
        lines = [
            f"## {model}: against {reference.name}",
            "",
            "The step at which its end is reached (median over the seeds); then, as means over the seeds, by how much "
            "the losses at the end, on training images and on fresh ones, are above its own; and the composition.",
            "",
            f"| concept | {' | '.join(recipe.name for recipe in self.recipes)} |",
            "|---" * (len(self.recipes) + 1) + "|",
        ]
        there = dict.fromkeys(others, 0)
        counted = dict.fromkeys(others, 0)
        for concept in CONCEPTS:
            if not (base := self.group(reference, model, concept.name)):
                continue
            cells = [f"{shown_median(base.steps_to(base), reference.steps)}; {base.mean('composed'):.2f}"]
            for recipe in others:
                group = self.group(recipe, model, concept.name)
                steps = group.steps_to(base) if group else []
                if not (group and steps):
                    cells.append("")
                    continue
                there[recipe] += middle(steps) <= 100
                counted[recipe] += 1
                more = [f"{100 * (group.share(base, name) - 1):+.0f} %" for name in ("training", "fresh")]
                words = [shown_median(steps, recipe.steps), ", ".join(more), f"{group.mean('composed'):.2f}"]
                cells.append("; ".join(words))
            lines.append(f"| {concept.name} | {' | '.join(cells)} |")
        tally = [f"{there[recipe]} of {counted[recipe]}" for recipe in others]
        return "\n".join([*lines, f"| there within 100 steps |  | {' | '.join(tally)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure recipes on the miniatures, each on concepts and seeds.")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_name("recipes.toml"))
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="carry out these only; the page shows all")
    parser.add_argument("--results", type=Path, required=True, help="what has been carried out is kept in this file")
    parser.add_argument("--models", nargs="+", choices=("sd", "sdxl"), default=["sd", "sdxl"])
    parser.add_argument("--concepts", nargs="+", default=list(GROUPS), help="choosing, once, or names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--plot", type=Path, help="write charts of the losses here, as HTML")
    workers = 1 if torch.cuda.is_available() else usable_cores()
    parser.add_argument("--workers", type=int, default=workers)
    options = parser.parse_args()
    recipes, results = read_recipes(options.recipes), Results(options.results)
    groups = [GROUPS[name] for name in options.concepts if name in GROUPS]
    concepts = [each.name for each in CONCEPTS if each.choosing in groups or each.name in options.concepts]
    runs = [
        recipe.run(model, concept, seed)
        for seed in options.seeds
        for recipe in recipes
        if not options.only or recipe.name in options.only
        for model in options.models
        for concept in concepts
    ]
    try:
        carry_out(runs, results, options.workers)
    finally:
        page = Page(recipes, options.models, options.seeds, results)
        if options.plot:
            options.plot.write_text(page.plot(), encoding="utf-8")
        if options.out:
            options.out.write_text(page.written(), encoding="utf-8")
        print(page.written())


if __name__ == "__main__":
    main()
