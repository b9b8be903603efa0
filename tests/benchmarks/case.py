"""One measurement in a process of its own: ``python -m tests.benchmarks.case FILE``; its last line is the result.

The real script runs. Every few steps it is held, and the bare loop runs as many: both alternate on the same machine, in
the same minute, on the same weights.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
TOKEN = "mychar"
_STEPS_FIRST = 3  # which compile, choose kernels and fill caches


@dataclass(frozen=True)
class Case:
    """What is run: ``kind`` "steps" or "caching"; images of ``size`` pixels, ``batch`` at a time."""

    family: str
    model: str
    size: int
    batch: int = 1
    flags: tuple[str, ...] = ()
    vectors: int = 4
    kind: str = "steps"
    bare: bool = True
    images: int = 100
    rounds: int = 5
    steps: int = 4  # a round's
    precision: str = "bf16"

    def text(self) -> str:
        """The case as it goes to a process."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Result:
    """Seconds a step (a round of caching) of ours and of the bare loop, peak memory in bytes, seconds to first step."""

    ours: float | None = None
    bare: float | None = None
    memory: int | None = None
    bare_memory: int | None = None
    first_step: float | None = None
    failed: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours as a multiple of the bare loop."""
        return self.ours / self.bare if self.ours and self.bare else None


class Meter:
    """Time and memory of the device that a training uses."""

    def __init__(self, device):
        self.device = device

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> int:
        """Most bytes in use since the last call; on a CPU the process's most resident ones since its start."""
        import torch

        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        if sys.platform == "win32":
            return 0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(case: Case, folder: Path, started: float) -> Result:
    """Run the case; ``started`` is when its process was asked for (seconds since 1970)."""
    watch = _Caching(case) if case.kind == "caching" else _Steps(case, started)
    with watch.patch():
        code = _script(case.family).main(_arguments(case, folder))
    return watch.result() if code == 0 else Result(failed=f"exit code {code}")


def _script(family: str):
    import sdxl_train_textual_inversion
    import train_textual_inversion

    return sdxl_train_textual_inversion if family == "sdxl" else train_textual_inversion


def _arguments(case: Case, folder: Path) -> list[str]:
    from tests.photos import make_photos

    caching = case.kind == "caching"
    make_photos(folder / "images", count=case.images if caching else case.batch, size=(case.size, case.size))
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {case.size}\nbatch_size = {case.batch}\n[[datasets.subsets]]\n"
        f"image_dir = '{(folder / 'images').as_posix()}'\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    steps = 1 if caching else _STEPS_FIRST + case.rounds * case.steps + 1
    given = {
        "pretrained_model_name_or_path": case.model,
        "dataset_config": dataset,
        "output_dir": folder / "output",
        "token_string": TOKEN,
        "init_word": "girl",
        "num_vectors_per_token": case.vectors,
        "max_train_steps": steps,
        "mixed_precision": case.precision,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        "cache_latents": "true",
        "vae_batch_size": case.batch,
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *case.flags]


class _Steps:
    """Measures whole steps of the real loop, from the beginning of one to that of the next."""

    def __init__(self, case: Case, started: float):
        self.case, self.started = case, started
        self.done = 0
        self.first_step: float | None = None
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.memory = self.bare_memory = 0
        self.loop = None

    def patch(self) -> AbstractContextManager:
        """What has to be entered around the script."""
        from library.training.optimizer_step import Learner

        self.original = Learner.step
        return patch.object(Learner, "step", lambda *given: self._step(*given))

    def _step(self, learner, batches, task):
        batches = list(batches)
        self.meter = Meter(learner.accelerator.device)
        position = self.done - _STEPS_FIRST
        if position >= 0 and position % self.case.steps == 0:
            if position:
                self.ours.append((self.meter.now() - self.since) / self.case.steps)
                self.memory = max(self.memory, self.meter.peak())
            if self.case.bare:
                self._bare_round(task, batches[0])
            self.meter.peak()
            self.since = self.meter.now()
        loss = self.original(learner, batches, task)
        self.done += 1
        if self.first_step is None:
            self.meter.now()
            self.first_step = time.time() - self.started
        return loss

    def _bare_round(self, task, batch) -> None:
        from tests.benchmarks.bare_loop import BareLoop

        if self.loop is None:
            checkpointing = "--gradient_checkpointing" in self.case.flags
            self.loop = BareLoop(task, batch, checkpointing=checkpointing)
            self.loop.step()
        self.meter.peak()
        began = self.meter.now()
        for _ in range(self.case.steps):
            self.loop.step()
        self.bare.append((self.meter.now() - began) / self.case.steps)
        self.bare_memory = max(self.bare_memory, self.meter.peak())

    def result(self) -> Result:
        """Medians of all rounds."""
        bare = statistics.median(self.bare) if self.bare else None
        memory = (self.memory, self.bare_memory or None)
        return Result(statistics.median(self.ours), bare, *memory, first_step=self.first_step)


class _Caching:
    """Measures the filling of the latent cache beside the VAE alone, on images that are on the device already."""

    def __init__(self, case: Case):
        self.case = case
        self.ours: list[float] = []
        self.bare: list[float] = []

    def patch(self) -> AbstractContextManager:
        """What has to be entered around the script."""
        from library.data.latent_cache import LatentCache

        self.original = LatentCache.fill

        def fill(cache, entries, encoder, **details):
            entries = list(entries)
            self.meter = Meter(encoder.device)
            for _ in range(self.case.rounds):
                cache.memory.clear()
                began = self.meter.now()
                report = self.original(cache, entries, encoder, **details)
                self.ours.append(self.meter.now() - began)
                self.bare.append(self._bare(encoder, len(entries), details["batch_size"]))
            return report

        return patch.object(LatentCache, "fill", fill)

    def _bare(self, encoder, count: int, batch: int) -> float:
        import torch

        images = torch.zeros(batch, 3, self.case.size, self.case.size, device=encoder.device, dtype=encoder.dtype)
        with torch.no_grad():
            began = self.meter.now()
            for _ in range(-(-count // batch)):
                encoder.vae.encode(images).latent_dist.mean.float()
            return self.meter.now() - began

    def result(self) -> Result:
        """Medians of all rounds."""
        return Result(statistics.median(self.ours), statistics.median(self.bare), self.meter.peak())


def main() -> int:
    """Measure the case of the file that is named, and print the result."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    case = Case(**{**given["case"], "flags": tuple(given["case"]["flags"])})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = measure(case, Path(folder), given["started"])
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
