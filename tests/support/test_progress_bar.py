"""How far work has come: lines in a pipe, a bar on a terminal."""

import io
import logging

import pytest

from library.support import progress_bar as module
from library.support.progress_bar import paused, progress_bar


def test_lines_have_the_tenths_and_nothing_else(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", screen)
    with progress_bar("steps", 40, "step", done=10) as bar:
        for _ in range(30):
            bar.update()
            bar.refresh()
    lines = screen.getvalue().splitlines()
    assert [line.split("|")[0] for line in lines] == [
        f"steps: {done:>3}%" for done in (25, 30, 40, 50, 60, 70, 80, 90, 100)
    ]
    assert "40/40" in lines[-1]


def test_nothing_is_shown_of_no_work_or_in_silence(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", screen)
    for bar in (progress_bar("steps", 0, "step"), progress_bar("steps", 4, "step", silent=True)):
        with bar:
            bar.update()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_the_level_of_the_console_rules_bars_too(level, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", screen)
    monkeypatch.setattr(logging.getLogger("library"), "level", level)
    with progress_bar("steps", 1, "step") as bar:
        bar.update()
    assert bool(screen.getvalue()) == (level == logging.INFO)


def test_a_pause_is_no_slow_step(monkeypatch):
    """Steps of a second each; between two of them images are drawn for 1,000 seconds."""
    now = [0.0]
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar("steps", 10, "step") as bar:
        for step in range(6):
            now[0] += 1
            bar.update()
            if step == 3:
                with paused(bar):
                    now[0] += 1000
        assert bar.format_dict["rate"] == pytest.approx(1.0)
        assert bar.format_dict["elapsed"] == pytest.approx(6.0)
