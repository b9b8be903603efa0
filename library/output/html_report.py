"""``<output_name>.html``: a run to look at in a browser while it trains and afterwards, in one self-contained file.

The page is drawn from the metrics file and what was known before the first step; ``report.html`` is its frame.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from library.output.charts import smoothed
from library.output.learning_report import LearningReport
from library.output.metrics_file import Line
from library.output.report_sections import (
    Section,
    Snippets,
    images_section,
    learning_section,
    points,
    samples_section,
    settings_section,
    training_section,
    use_section,
    value,
    vectors_section,
)
from library.output.run_facts import RunFacts
from library.output.thumbnails import Thumbnails
from library.output.verdict import HARDLY_CHANGED, LEARNED, NOT_LEARNED, TOO_FAR, Verdict
from library.support.errors import counted
from library.support.phase import duration

ENDING = ".html"
_REFRESH = 15  # seconds between two looks of a browser at a page that is still written
_TONES = {LEARNED: "good", HARDLY_CHANGED: "warn", NOT_LEARNED: "bad", TOO_FAR: "bad"}
_RUN = re.compile(rb'<meta name="run" content="([^"]*)">')


@dataclass(frozen=True)
class Standing:
    """Where a run stands: ``seconds`` of training so far, and how many more it will take, if that is known.

    ``running`` is whether the page will be written again, ``saved`` whether the result is written. ``sheet`` is the
    file with the images of what was learned.
    """

    step: int
    seconds: float
    seconds_left: float | None = None
    running: bool = True
    saved: bool = False
    verdict: Verdict | None = None
    learned: LearningReport | None = None
    sheet: Path | None = None


@dataclass(frozen=True)
class HtmlReport:
    """Draws the page of one run; ``typical`` norms are by vector, ``samples`` is the folder of the sample images."""

    facts: RunFacts
    typical: Mapping[str, float]
    samples: Path
    thumbnails: Thumbnails = field(default_factory=Thumbnails)

    def page(self, lines: Sequence[Line], standing: Standing) -> str:
        """The whole page."""
        facts, snippets = self.facts, Snippets()
        sections = [
            training_section(lines),
            vectors_section(lines, dict(self.typical)),
            samples_section(lines, facts.prompts, self.samples, self.thumbnails),
            learning_section(standing.learned, standing.sheet, self.thumbnails),
            images_section(facts, self.thumbnails),
            use_section(facts, snippets),
            settings_section(facts, snippets),
        ]
        sections = [section for section in sections if section.content]
        return _frame().substitute(
            run=escape(facts.run),
            refresh=f'<meta http-equiv="refresh" content="{_REFRESH}">' if standing.running else "",
            title=escape(f"{facts.token}: {self._state(standing)}"),
            heading=escape(facts.token),
            subtitle=escape(f"{counted(facts.num_vectors, 'vector')} for {facts.base}"),
            verdict=self._verdict(standing),
            links=" ".join(f'<a href="#{section.anchor}">{section.title}</a>' for section in sections),
            tiles=_tiles(lines, standing, facts.total_steps),
            sections="\n".join(map(_card, sections)),
            footer=f"Written on {datetime.now():%Y-%m-%d at %H:%M:%S}. This file needs no network and may be sent on.",
            updated=f"{datetime.now().timestamp():.0f}",
            running="yes" if standing.running else "no",
        )

    def _state(self, standing: Standing) -> str:
        if standing.verdict:
            return standing.verdict.verdict
        if not standing.running:
            return "ended early"
        return f"{standing.step:,} of {self.facts.total_steps:,}"

    def _verdict(self, standing: Standing) -> str:
        """The verdict, or how far the run has come."""
        total = self.facts.total_steps
        if standing.verdict:
            tone = _TONES.get(standing.verdict.verdict, "idle")
            return _banner(tone, standing.verdict.verdict, _sentence(standing.verdict.reason))
        if not standing.running:
            unfinished = "before the result was judged" if standing.saved else "before its result was written"
            reason = f"The run ended at step {standing.step:,} of {total:,}, {unfinished}."
            return _banner("idle", "ENDED EARLY", reason)
        if standing.step >= total:
            text = "All steps are done; what is left is being measured and written."
        else:
            left = f"About {duration(standing.seconds_left)} left. " if standing.seconds_left is not None else ""
            text = f"{standing.step:,} of {counted(total, 'step')}. {left}This page reloads itself."
        bar = f'<progress max="{total}" value="{standing.step}"></progress><small id="alive"></small>'
        return _banner("live", "TRAINED" if standing.step >= total else "TRAINING", text, bar)


@cache
def _frame() -> Template:
    """What all pages have in common; a page is drawn often."""
    return Template(files("library.output").joinpath("report.html").read_text(encoding="utf-8"))


def run_of_report(path: Path) -> str | None:
    """The run that wrote a page; None where there is none, or where it is no page of ours."""
    try:
        with path.open("rb") as file:
            found = _RUN.search(file.read(2048))
    except OSError:
        return None
    return found[1].decode(errors="replace") if found else None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _banner(tone: str, word: str, text: str, more: str = "") -> str:
    return f'<section class="card verdict {tone}"><b>{escape(word)}</b><p>{escape(text)}</p>{more}</section>'


def _card(section: Section) -> str:
    intro = f'<p class="soft">{section.intro}</p>' if section.intro else ""
    return f'<section class="card" id="{section.anchor}"><h2>{section.title}</h2>{intro}{section.content}</section>'


def _tiles(lines: Sequence[Line], standing: Standing, total: int) -> str:
    """The few numbers that are looked for first."""
    loss = smoothed(points(lines, "loss"))
    rates = [point[1] for name in ("lr/d*lr", "lr") for point in points(lines, name)[-1:]]
    memory, speed = points(lines, "memory_gib"), points(lines, "steps_per_second")
    tiles = {
        "steps": f"{standing.step:,} of {total:,}",
        "time": duration(standing.seconds),
        "steps per second": value(speed[-1][1] if speed else None),
        "peak memory": value(memory[-1][1] if memory else None, " GiB"),
        "smoothed loss": value(loss[-1][1] if loss else None),
        "learning rate": value(rates[0] if rates else None),
    }
    return "".join(f'<div class="tile"><span>{name}</span><b>{text}</b></div>' for name, text in tiles.items())
