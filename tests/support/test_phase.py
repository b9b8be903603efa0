"""Phases say how long they took where somebody had to wait."""

import logging

from library.support import phase as module
from library.support.phase import duration, phase


def test_a_wait_is_said_with_its_length(caplog, monkeypatch):
    now = iter([0.0, 0.5, 10.0, 75.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO, "library"):
        for what in ("Loading the VAE", "Loading the U-Net"):
            with phase(what):
                pass
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Loading the VAE.", "Loading the U-Net.", "Loading the U-Net took 1 min 5 s."]


def test_times_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
