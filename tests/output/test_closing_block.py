"""The last words: a verdict broken between words, and places that are not broken at all."""

from library.output.closing_block import closing_block
from library.output.verdict import Verdict


def test_words_and_paths_stay_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "/a/" + "very-long-folder/" * 5 + "mychar.safetensors"
    text = closing_block(Verdict("UNCLEAR", "nothing was measured at all in this run"), {"file": long, "none": None})
    first, *_, last = text.splitlines()
    assert first == "UNCLEAR: nothing was measured at all in"
    assert last == f"  file  {long}"
    assert "none" not in text
