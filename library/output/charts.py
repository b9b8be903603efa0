"""Line charts as inline SVG, by hand: a page that needs no library and no network can show nothing else as sharply."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from library.support.running_mean import RunningMean, readable_span

Point = tuple[float, float]
_WIDTH, _HEIGHT = 390, 225
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 34
_MOST_POINTS = 400  # more than a screen has pixels for


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points with growing x, and its colour as one of the page's classes ``c0`` to ``c7``."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False  # behind the others, and not in the legend
    dashed: bool = False


def line_chart(title: str, series: Sequence[Series], note: str = "") -> str:
    """A chart with its legend as an HTML figure; nothing where there is no point to draw."""
    series = [_thinned(each) for each in series if each.points]
    if not series:
        return ""
    xs, ys = ([point[axis] for each in series for point in each.points] for axis in (0, 1))
    low = 0.0 if 0 <= min(ys) < 0.7 * max(ys) or min(ys) == max(ys) > 0 else min(ys)
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(low, max(ys))
    x_range, y_range = (min(xs), max(max(xs), min(xs) + 1)), (y_ticks[0], y_ticks[-1])

    def x_of(value: float) -> float:
        return _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_of(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{shown(tick)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            anchor = "end" if x_of(tick) > _WIDTH - 30 else "middle"
            parts.append(f'<text x="{x_of(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="{anchor}">{shown(tick)}</text>')
    for each in sorted(series, key=lambda one: not one.faint):
        kind = f"line c{each.colour}" + " faint" * each.faint + " dashed" * each.dashed
        places = [(x_of(x), y_of(y)) for x, y in each.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
        if len(places) == 1:
            parts.append(f'<circle class="c{each.colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
    legend = "".join(
        f'<span><i class="c{each.colour}"></i>{escape(each.label)} <b>{shown(each.points[-1][1])}</b></span>'
        for each in series
        if not each.faint
    )
    caption = f"<figcaption><strong>{escape(title)}</strong><small>{escape(note)}</small></figcaption>"
    return f'<figure class="chart">{caption}<div class="legend">{legend}</div>{"".join(parts)}</svg></figure>'


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round numbers of which the outer ones enclose ``low`` to ``high``."""
    if high - low <= 1e-12 * max(abs(high), 1e-30):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= 5)
    step = max(1, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def shown(value: float) -> str:
    """A number as people write it: 0.005, 1,600, 2.5e-6."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean of the points, over about a tenth of them."""
    mean = RunningMean(readable_span(len(points)))
    return [(x, mean.add(y)) for x, y in points]


def _thinned(series: Series) -> Series:
    """At most so many points, the last among them; each stands for itself, so that peaks of raw values stay true."""
    every = -(-len(series.points) // _MOST_POINTS)
    kept = [*series.points[:-1:every], series.points[-1]]
    return Series(series.label, kept, series.colour, series.faint, series.dashed)
