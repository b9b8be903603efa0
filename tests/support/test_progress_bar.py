"""How far work has come: lines in a pipe, a bar on a terminal."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from runs import SCRIPTS, arguments, write_dataset

from library.support import progress_bar as module
from library.support.progress_bar import paused, progress_bar


@pytest.fixture
def command(tmp_path, tiny_sd1) -> list[str]:
    argv = arguments("sd1", tiny_sd1, write_dataset(tmp_path), tmp_path / "out", "--max_train_steps=20")
    return [sys.executable, str(Path(SCRIPTS["sd1"].__file__)), *argv]


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


def test_a_pipe_gets_lines(command):
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr
    assert b"steps: 100%" in done.stderr
    assert b"Caching latents: 100%" in done.stderr


def test_a_terminal_gets_a_bar(command):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # on Linux the end of a terminal is an error
        pass
    assert process.wait() == 0
    bars = [part for part in shown.split(b"\r") if part.startswith(b"steps:")]
    assert len(bars) > 1
    assert b"20/20" in bars[-1]
