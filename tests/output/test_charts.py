"""Charts: valid SVG, axes that hold every point, and numbers as people write them."""

import math
import xml.etree.ElementTree as ET

import pytest

from library.output.charts import Series, line_chart, shown, smoothed, ticks


def parsed(chart: str) -> ET.Element:
    return ET.fromstring(chart)


def test_a_chart_is_well_formed_and_holds_its_points():
    points = [(step, math.sin(step / 10)) for step in range(1, 101)]
    figure = parsed(line_chart("Loss <b>", [Series("raw & such", points, 1)], "a note"))
    svg = figure.find("svg")
    assert svg.get("aria-label") == "Loss <b>"
    (line,) = [path for path in svg.iter("path") if path.get("class").startswith("line")]
    places = [tuple(map(float, place.split())) for place in line.get("d")[1:].split("L")]
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert len(places) == 100
    assert all(0 < x < width and 0 < y < height for x, y in places)
    assert sorted(x for x, _ in places) == [x for x, _ in places]
    assert "raw & such" in "".join(figure.itertext())


def test_what_has_no_points_is_left_out():
    assert line_chart("Loss", []) == line_chart("Loss", [Series("a", [])]) == ""


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(0, 1e-9), (9, 2e-9)], [(1, -5.0), (2, 1e7)]])
def test_odd_values_still_make_a_chart(points):
    text = line_chart("x", [Series("a", points)])
    assert "nan" not in text
    assert parsed(text) is not None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.29), (-3, 8), (5, 5), (0, 0), (1e-7, 3e-7), (1, 1600)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high
    assert len({shown(tick) for tick in found}) == len(found)


def test_numbers_are_written_as_people_write_them():
    assert [shown(value) for value in (0, 0.005, 1600, 2.5e-6, 12.3456, 5e7)] == [
        *("0", "0.005", "1,600", "2.5e-6", "12.35", "5e7")
    ]


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert [y for _, y in smoothed([(x, 2.0) for x in range(50)])] == pytest.approx([2.0] * 50)
    noisy = [(x, 1.0 + (-1) ** x) for x in range(200)]
    assert all(abs(y - 1.0) < 0.2 for _, y in smoothed(noisy)[50:])


def test_long_runs_become_short_paths_that_keep_their_end():
    text = line_chart("x", [Series("a", [(x, float(x)) for x in range(100_000)])])
    assert len(text) < 12_000
    assert "<b>99,999</b>" in text
