"""Lines end between words on a terminal, and are left alone elsewhere."""

import io

import pytest

from library.support import terminal
from library.support.terminal import coloured, fitted


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(terminal, "columns", lambda stream: 20 if stream.isatty() else None)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


def test_lines_are_broken_between_words_only(screen):
    path = "/a/very/long/path-of-a-file.safetensors"
    code = f'    load("{path}", token="a")'
    text = f"some words that are too many\n  label  and its value\nsee {path}\n{code}"
    assert fitted(text, screen).split("\n") == [
        *("some words that are", "  too many", "  label  and its", "    value", "see", f"  {path}", code)
    ]
    assert fitted(text, io.StringIO()) == text


def test_only_a_warning_on_a_terminal_has_a_colour(screen, monkeypatch):
    assert coloured("12:00 WARNING a WARNING", "WARNING", screen) == "12:00 \x1b[33mWARNING\x1b[0m a WARNING"
    assert coloured("12:00 INFO a", "INFO", screen) == "12:00 INFO a"
    assert coloured("WARNING", "WARNING", io.StringIO()) == "WARNING"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("WARNING", "WARNING", screen) == "WARNING"
