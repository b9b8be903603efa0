"""Measures this machine and prints one page of Markdown: ``python -m tests.benchmarks [--profile tiny|small|full]``.

Random models of the real sizes are made on the spot. Each measurement is a process of its own; within it, rounds of the
real training alternate with rounds of a bare loop (see ``case``), and medians are shown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.case import ROOT, Case, Result
from tests.benchmarks.page import Row, Section, written

CHECKPOINTING, COMPILED, FLOAT8 = ("--gradient_checkpointing",), ("--torch_compile",), ("--fp8_base",)
FRUGAL_ATTENTION, UNCACHED = ("--mem_eff_attn",), ("--cache_latents=false",)
# The bare loop needs weights and latents as they are.
_WITHOUT_BARE = {*FLOAT8, *UNCACHED}


@dataclass(frozen=True)
class Profile:
    """What is measured: models with their sizes and batches, variants, a sweep over sizes and batches, vectors."""

    tiny: bool
    models: tuple[tuple[str, int], ...]
    batches: tuple[int, ...]
    variants: tuple[tuple[str, ...], ...]
    sweep_sizes: tuple[int, ...]
    sweep_batches: tuple[int, ...]
    vectors: tuple[int, ...]
    images: int
    usual: dict


PROFILES = {
    "full": Profile(
        tiny=False,
        models=(("sd1", 512), ("sdxl", 1024)),
        batches=(1, 4),
        variants=((), CHECKPOINTING, COMPILED, FLOAT8, (*CHECKPOINTING, *FLOAT8), FRUGAL_ATTENTION, UNCACHED),
        sweep_sizes=(256, 512, 768, 1024),
        sweep_batches=(1, 2, 4, 8),
        vectors=(1, 4, 16, 64),
        images=100,
        usual={},
    ),
    "small": Profile(
        tiny=False,
        models=(("sd1", 256),),
        batches=(1,),
        variants=((), CHECKPOINTING, FLOAT8),
        sweep_sizes=(256,),
        sweep_batches=(1, 2),
        vectors=(1, 64),
        images=4,
        usual={"rounds": 2, "steps": 1},
    ),
    "tiny": Profile(
        tiny=True,
        models=(("sd1", 64), ("sdxl", 64)),
        batches=(1,),
        variants=((), CHECKPOINTING),
        sweep_sizes=(64,),
        sweep_batches=(1, 2),
        vectors=(1, 64),
        images=4,
        usual={"rounds": 2, "steps": 1, "precision": "no"},
    ),
}


def measured(case: Case, folder: Path) -> Result:
    """The result of a case, from a process of its own. What it says goes to standard error."""
    file = folder / "case.json"
    file.write_text(json.dumps({"case": json.loads(case.text()), "started": time.time()}), encoding="utf-8")
    print(f"+ {case.text()}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.benchmarks.case", str(file)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return Result(failed=f"exit code {done.returncode}")
    return Result(**json.loads(lines[-1]))


class Measuring:
    """Plans the sections of the page for one profile, and measures each case once."""

    def __init__(self, profile: Profile, folder: Path, measure=measured):
        self.profile, self.folder, self.measure = profile, folder, measure
        self.models: dict[str, str] = {}
        self.results: dict[Case, Result] = {}

    def case(self, family: str, size: int, **details) -> Case:
        """A case of the profile; its model is written when it is first asked for."""
        if family not in self.models:
            from tests.benchmarks.random_models import write_model

            self.models[family] = str(write_model(family, self.folder / family, tiny=self.profile.tiny))
        case = Case(family, self.models[family], size, images=self.profile.images)
        case = replace(case, **{**self.profile.usual, **details})
        return replace(case, bare=case.bare and _WITHOUT_BARE.isdisjoint(case.flags))

    def __call__(self, case: Case) -> Result:
        """The case's result."""
        if case not in self.results:
            self.results[case] = self.measure(case, self.folder)
        return self.results[case]

    def steps(self) -> Section:
        """Every model, batch and variant beside the bare eager loop of the same model and batch."""
        rows = []
        for family, size in self.profile.models:
            for batch in self.profile.batches:
                eager = self(self.case(family, size, batch=batch))
                for flags in self.profile.variants:
                    case = self.case(family, size, batch=batch, flags=flags)
                    rows.append(Row.of_steps(case, self(case), eager))
        return Section.of_steps(rows)

    def sizes(self) -> Section:
        """Time per sample at each size, in batches."""
        (family, _), *_ = self.profile.models
        rows = []
        for size in self.profile.sweep_sizes:
            alone = self(self.case(family, size))
            for batch in self.profile.sweep_batches:
                case = self.case(family, size, batch=batch)
                rows.append(Row.of_batch(case, self(case), alone))
        return Section.of_batches(rows)

    def vectors(self) -> Section:
        """What more vectors cost."""
        (family, size), *_ = self.profile.models
        cases = [self.case(family, size, vectors=count) for count in self.profile.vectors]
        return Section.of_vectors([Row.of_vectors(case, self(case), self(cases[0])) for case in cases])

    def caching(self) -> Section:
        """The latent cache beside the VAE alone."""
        cases = [self.case(family, size, kind="caching") for family, size in self.profile.models]
        return Section.of_caching([Row.of_caching(case, self(case)) for case in cases])


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the page or write it to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", choices=tuple(PROFILES), help="unset: full with a CUDA GPU, else small")
    parser.add_argument("--out", type=Path, help="the file to write, instead of standard output")
    parser.add_argument("--only", nargs="+", choices=("steps", "sizes", "vectors", "caching"), metavar="SECTION")
    given = parser.parse_args(arguments)
    import torch

    name = given.profile or ("full" if torch.cuda.is_available() else "small")
    with tempfile.TemporaryDirectory() as folder:
        measuring = Measuring(PROFILES[name], Path(folder))
        chosen = given.only or ("steps", "sizes", "vectors", "caching")
        page = written(name, [getattr(measuring, section)() for section in chosen])
    if given.out:
        given.out.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 1 if any(result.failed for result in measuring.results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
