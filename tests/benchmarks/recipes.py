"""Which recipe teaches a token best? Trains the miniatures by a list of recipes and prints a page of Markdown.

    python -m tests.benchmarks.recipes --results recipes.jsonl [--recipes FILE.toml] [--out page.md --plot plot.html]

Every run is a line of the results file and is not carried out again; an interrupted benchmark goes on where it was.
``--concepts choosing`` is for choosing; ``once`` is looked at when the choice is made.
"""

import argparse
import json
import math
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
from tests.benchmarks.concepts import CONCEPTS, Concept
from tests.benchmarks.recipe_run import BATCH_SIZE, Found, Run, base, begin, carried_out

GROUPS = {"choosing": True, "once": False}
STEPS = 100  # within which a recipe is to be where the first one ends


@dataclass(frozen=True)
class Recipe:
    """Options over those of the quickstart, under a name."""

    name: str
    options: str  # as JSON with sorted keys

    def run(self, model: str, concept: str, seed: int) -> Run:
        """One training of it."""
        return Run(model, concept, seed, self.options)

    @property
    def samples(self) -> int:
        """How many samples it trains on, where nothing stops it before."""
        options = json.loads(self.options)
        return options["max_train_steps"] * options.get("batch_size", BATCH_SIZE)


def read_recipes(file: Path) -> list[Recipe]:
    """All recipes of a TOML file, in order."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return [Recipe(name, json.dumps(options, sort_keys=True)) for name, options in tables.items()]


class Results:
    """The runs that have been carried out, a line of JSON each.

    Those of other miniatures, settings or images stay in the file and count for nothing; ``others`` is their number.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.others = file, 0
        self.found: dict[Run, Found] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            entry = json.loads(line)
            run = Run(**entry["run"])
            if entry.get("base") == base(run):
                self.found[run] = Found(**entry["found"])
            else:
                self.others += 1

    def add(self, run: Run, found: Found) -> None:
        """Keep what a run has given."""
        self.found[run] = found
        with self.file.open("a", encoding="utf-8") as file:
            line = {"base": base(run), "run": vars(run), "found": vars(found)}
            file.write(json.dumps(line) + "\n")


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
    """The runs of one recipe on one model and concept, by seed; never empty."""

    by_seed: dict[int, Found]

    @property
    def found(self) -> Sequence[Found]:
        """All of them."""
        return list(self.by_seed.values())

    @property
    def last(self) -> int:
        """The last step that any of them was measured at."""
        return max(each.losses[-1][0] for each in self.found)

    def steps_to(self, reference: "Group") -> Sequence[float]:
        """For each seed the step at which the loss on training images is what the reference ends at; infinite: never.

        A seed draws noise of its own to measure with, so that only runs of one seed can be compared.
        """
        ends = {seed: measure(each, "training") for seed, each in reference.by_seed.items()}
        return [
            next((step for step, loss in each.losses if loss <= ends[seed]), math.inf)
            for seed, each in self.by_seed.items()
        ]

    def share(self, reference: "Group", name: str) -> float:
        """A measure as a share of the reference's, seed by seed, as a mean."""
        return statistics.mean(
            measure(found, name) / measure(reference.by_seed[seed], name) for seed, found in self.by_seed.items()
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

    def curve(self) -> list[tuple[float, float]]:
        """The mean loss at each step but the first that all were measured at: some may have been stopped before."""
        curves = [dict(each.losses) for each in self.found]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(float(step), statistics.mean(curve[step] for curve in curves)) for step in steps[1:]]


def measure(found: Found, name: str) -> float:
    """One of the measures of a run; ``training`` is the last loss on training images."""
    return found.losses[-1][1] if name == "training" else getattr(found, name)


def shown_step(step: float, last: int) -> str:
    """A step as it is written; one that never came is after the last."""
    return f"> {last}" if step == math.inf else f"{step:g}"


class Page:
    """The tables of all that has been carried out."""

    def __init__(self, recipes: Sequence[Recipe], models: Sequence[str], seeds: Sequence[int], results: Results):
        self.recipes, self.models, self.seeds, self.results = recipes, models, seeds, results

    def groups(self, model: str, concept: str) -> dict[Recipe, Group]:
        """What has been carried out of each recipe, with those seeds alone that the first one has too."""
        groups: dict[Recipe, Group] = {}
        seeds = list(self.seeds)
        for recipe in self.recipes:
            runs = {seed: recipe.run(model, concept, seed) for seed in seeds}
            found = {seed: self.results.found[run] for seed, run in runs.items() if run in self.results.found}
            if found:
                groups[recipe] = Group(found)
            if recipe == self.recipes[0]:
                seeds = list(found)
        return groups

    def written(self) -> str:
        """Markdown: how far the figures can be trusted, a table for each model and concept, and a summary."""
        parts = ["# Recipes", self._noise()]
        parts += [self._table(model, concept) for model in self.models for concept in CONCEPTS]
        parts += [self._summary(model) for model in self.models]
        return "\n\n".join(part for part in parts if part) + "\n"

    def plot(self) -> str:
        """Losses on training images, a chart for each model and concept, as a page of HTML."""
        charts = []
        for model in self.models:
            for concept in CONCEPTS:
                groups = self.groups(model, concept.name)
                series = [
                    Series(recipe.name, groups[recipe].curve(), colour % 8)
                    for colour, recipe in enumerate(self.recipes)
                    if recipe in groups
                ]
                charts.append(line_chart(f"{model}, {concept.name}", series))
        colours = ("4269d0", "efb118", "ff725c", "6cc5b0", "3ca951", "ff8ab7", "a463f2", "97bbf5")
        styles = "".join(f".c{n}{{stroke:#{c};fill:none}}i.c{n}{{background:#{c}}}" for n, c in enumerate(colours))
        styles += "body{font:13px sans-serif}figure{display:inline-block;width:390px}.grid{stroke:#ddd}"
        styles += "i{display:inline-block;width:9px;height:9px}"
        return f"<!doctype html><meta charset='utf-8'><style>{styles}</style>{''.join(charts)}"

    def _noise(self) -> str:
        groups = [self.groups(model, concept.name) for model in self.models for concept in CONCEPTS]
        found = [each for those in groups for group in those.values() for each in group.found]
        if not found:
            return ""
        training, fresh = (statistics.median(each.noise[number] for each in found) for number in (0, 1))
        return (
            f"{len(found)} runs. Standard deviation of a loss between sets of noise: {training:.5f} on training "
            f"images, {fresh:.5f} on fresh ones. A seed's runs are all measured with one set on training images, and "
            "those of all seeds with one on fresh ones. ± is between seeds."
        )

    def _table(self, model: str, concept: Concept) -> str:
        groups = self.groups(model, concept.name)
        if not groups:
            return ""
        reference = groups[self.recipes[0]]
        kind = "choosing" if concept.choosing else "once"
        loss = reference.mean("training")
        lines = [f"## {model}, {concept.name} ({kind}): loss to reach {loss:.4f} on average", ""]
        columns = ["recipe", "seeds", "steps to it", "loss at the end", "on fresh images", "distance", "outline IoU"]
        lines += [f"| {' | '.join([*columns, 'composition', 'norm', 's/step'])} |", "|---" * 10 + "|"]
        for recipe, group in groups.items():
            steps = sorted(group.steps_to(reference))
            shown = [shown_step(step, group.last) for step in (statistics.median(steps), steps[0], steps[-1])]
            reached = shown[0] if len(steps) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"
            seconds = statistics.mean(each.seconds / each.losses[-1][0] for each in group.found)
            names = ("training", "fresh", "distance", "iou", "composed", "norm")
            # A style has no other pictures than those few, and no outline.
            cells = ["" if concept.is_style and name in ("fresh", "iou") else group.spread(name) for name in names]
            lines.append(f"| {' | '.join([recipe.name, str(len(steps)), reached, *cells, f'{seconds:.2f}'])} |")
        return "\n".join(lines)

    def _summary(self, model: str) -> str:
        """A row for each concept, a column for each recipe, and below how often each is there within ``STEPS``."""
        reference, *others = self.recipes
        there: dict[Recipe, list[bool]] = {recipe: [] for recipe in others}
        rows = []
        for concept in CONCEPTS:
            groups = self.groups(model, concept.name)
            if not groups:
                continue
            first = groups[reference]
            end = statistics.median(first.steps_to(first))
            cells = [concept.name, f"{end:g}; {first.mean('composed'):.2f}"]
            for recipe in others:
                if not (group := groups.get(recipe)):
                    cells.append("")
                    continue
                step = statistics.median(group.steps_to(first))
                there[recipe].append(step <= STEPS)
                names = ("training",) if concept.is_style else ("training", "fresh")
                more = ", ".join(f"{100 * (group.share(first, name) - 1):+.0f} %" for name in names)
                cells.append(f"{shown_step(step, group.last)}; {more}; {group.mean('composed'):.2f}")
            rows.append(cells)
        if not rows:
            return ""
        tally = [f"{sum(reached)} of {len(reached)}" for reached in there.values()]
        rows.append([f"there within {STEPS} steps", "", *tally])
        heads = ["concept", *(f"{recipe.name} ({recipe.samples:,} samples)" for recipe in self.recipes)]
        return "\n".join(
            [
                f"## {model}: against {reference.name}",
                "",
                "The step at which its end is reached (median over the seeds); then, as means over the seeds, by how "
                "much the losses at the end, on training images and on fresh ones, are above its own; and the "
                "composition.",
                "",
                *(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]),
            ]
        )


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
    if results.others:
        left = f"{results.others} of its runs had another miniature, other settings or images"
        print(f"{options.results}: {left}, and do not count.", file=sys.stderr)
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
