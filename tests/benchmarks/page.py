"""The page of Markdown that the benchmarks make: tables with what was measured beside what it should be."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.case import Case, Result

# As multiples of the bare eager loop, of one sample alone, of one vector, of the VAE alone.
MOST_EAGER, MOST_COMPILED, MOST_BATCHED, MOST_VECTORS, MOST_CACHING = 1.03, 0.8, 1.0, 1.03, 1.05
# Bytes that SDXL at 1024 pixels, batch 1, bf16 may take: with checkpointing, and with --fp8_base too.
MOST_MEMORY = {("--gradient_checkpointing",): 10e9, ("--gradient_checkpointing", "--fp8_base"): 8e9}


def seconds(value: float | None) -> str:
    """Three digits of it."""
    return "–" if value is None else f"{value:.3g}"


def gigabytes(value: int | None) -> str:
    """Two decimals of it."""
    return "–" if not value else f"{value / 1e9:.2f}"


def against(value: float | None, most: float | None = None) -> str:
    """A multiple, with what it should be at most."""
    if value is None:
        return "–"
    verdict = "" if most is None else f" (≤ {most:g}: {'yes' if value <= most else '**no**'})"
    return f"{value:.3f}{verdict}"


@dataclass(frozen=True)
class Row:
    """The cells of one line."""

    cells: tuple[str, ...]

    @classmethod
    def _of(cls, case: Case, result: Result, *cells: str) -> "Row":
        names = (case.family, f"{case.size}", f"{case.batch}", case.precision)
        return cls((*names, *((result.failed,) if result.failed else cells)))

    @classmethod
    def of_steps(cls, case: Case, result: Result, eager: Result) -> "Row":
        """A variant beside ``eager``, the plain training of the same model and batch and its bare loop."""
        flags = " ".join(case.flags)
        of_bare = result.ours / eager.bare if result.ours and eager.bare else None
        most = {(): MOST_EAGER, ("--torch_compile",): MOST_COMPILED}.get(case.flags)
        outside = 1 - result.bare / result.ours if result.bare and result.ours and "compile" not in flags else None
        saved = eager.memory - result.memory if eager.memory and result.memory else None
        most_memory = MOST_MEMORY.get(case.flags) if (case.family, case.size, case.batch) == ("sdxl", 1024, 1) else None
        memory = gigabytes(result.memory)
        if most_memory and result.memory:
            verdict = "yes" if result.memory <= most_memory else "**no**"
            memory += f" (≤ {gigabytes(int(most_memory))}: {verdict})"
        return cls._of(
            case,
            result,
            flags or "–",
            seconds(result.ours),
            seconds(result.bare),
            against(of_bare, most),
            "–" if outside is None else f"{outside:.1%}",
            memory,
            gigabytes(result.bare_memory),
            f"{saved / 1e9:.2f}" if saved is not None and case.flags else "–",
            seconds(result.first_step),
        )

    @classmethod
    def of_batch(cls, case: Case, result: Result, alone: Result) -> "Row":
        """A batch beside a single sample."""
        each = result.ours / case.batch if result.ours else None
        ratio = each / alone.ours if each and alone.ours else None
        return cls._of(case, result, seconds(each), against(ratio, MOST_BATCHED), gigabytes(result.memory))

    @classmethod
    def of_vectors(cls, case: Case, result: Result, least: Result) -> "Row":
        """A number of vectors beside the least."""
        ratio = result.ours / least.ours if result.ours and least.ours else None
        return cls._of(case, result, f"{case.vectors}", seconds(result.ours), against(ratio, MOST_VECTORS))

    @classmethod
    def of_caching(cls, case: Case, result: Result) -> "Row":
        """Caching beside the VAE alone."""
        counts = (f"{case.images}", seconds(result.ours), seconds(result.bare))
        return cls._of(case, result, *counts, against(result.ratio, MOST_CACHING))


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a table."""

    heading: str
    text: str
    columns: tuple[str, ...]
    rows: Sequence[Row]

    @classmethod
    def of_steps(cls, rows: Sequence[Row]) -> "Section":
        """Steps, and what each option saves."""
        text = (
            "Whole optimizer steps of the real training, with cached latents unless the row says otherwise, beside a "
            "loop that only runs plain frozen networks forward and backward (with checkpointing where the training has "
            "it). The multiple is of the bare loop without any option."
        )
        columns = ("options", "s/step", "bare s/step", "× bare eager loop", "outside the networks")
        columns += ("peak GB", "bare peak GB", "GB saved", "s from launch to the first step")
        return cls("Steps and memory", text, columns, rows)

    @classmethod
    def of_batches(cls, rows: Sequence[Row]) -> "Section":
        """Sizes and batches."""
        return cls("Sizes and batches", "Time for each sample.", ("s/sample", "× one sample alone", "peak GB"), rows)

    @classmethod
    def of_vectors(cls, rows: Sequence[Row]) -> "Section":
        """Numbers of vectors."""
        return cls("Vectors", "The same step with more vectors.", ("vectors", "s/step", "× the fewest"), rows)

    @classmethod
    def of_caching(cls, rows: Sequence[Row]) -> "Section":
        """The latent cache."""
        text = "Reading the images and filling the latent cache, beside the VAE's encoder alone."
        return cls("Caching latents", text, ("images", "s", "VAE alone, s", "× VAE alone"), rows)

    def written(self) -> str:
        """The section as Markdown."""
        columns = ("model", "px", "batch", "precision", *self.columns)
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in self.rows:
            lines.append(f"| {' | '.join([*row.cells, *[''] * (len(columns) - len(row.cells))])} |")
        return "\n".join([f"## {self.heading}", "", self.text, "", *lines])


def written(profile: str, sections: Sequence[Section]) -> str:
    """The whole page, beginning with the machine."""
    head = f"# Benchmarks\n\n{machine()}\nProfile `{profile}`; random weights; medians of alternating rounds."
    return "\n\n".join([head, *(section.written() for section in sections)]) + "\n"


def machine() -> str:
    """The device, PyTorch and the system in a sentence."""
    import torch

    from library.model.device_report import describe_device

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    said = describe_device(device, "no").replace(" in float32", "")
    return f"Computing on {said}. {platform.system()}, Python {platform.python_version()}."
