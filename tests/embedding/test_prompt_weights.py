"""The attention syntax: as measured, and what must hold for any text."""

import itertools
import re

import pytest
from departures import departure
from golden_data import golden_cases
from hypothesis import given
from hypothesis import strategies as st
from limits import outcome

from library.embedding.prompt_weights import escape, parse_weights


@pytest.mark.parametrize("case", golden_cases("prompt_weights"))
def test_golden_prompt_weights(case):
    parts = parse_weights(case["prompt"])
    if departure("prompt_weights", case):
        # What is no number is text like any other: letters in its place change nothing else.
        spelt = re.sub(r"(?<=:)([+-]?\d*\.[.\d]*\.\d*|[+-]?\.)(?=\))", lambda no: "n" * len(no[0]), case["prompt"])
        expected = parse_weights(spelt)
        assert [(len(text), weight) for text, weight in parts] == [(len(text), weight) for text, weight in expected]
        return
    assert [text for text, _ in parts] == [text for text, _ in case["parts"]]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in case["parts"]], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a: 1.2)", [("a: 1.2", 1.1)]),
        ("(a:.5)(b:+2.)", [("a", 0.5), ("b", 2.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("()", [("", 1.0)]),
        ("a\nb (c)", [("a\nb ", 1.0), ("c", 1.1)]),
    ],
)
def test_parts(prompt, parts):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@given(st.text(alphabet="ab:1.2\\()[] \n"))
def test_escaped_text_is_given_back(text):
    assert parse_weights(escape(text)) == [(text, 1.0)]


@given(st.text(alphabet="ab:1.\\()[] "))
def test_every_prompt_can_be_read(prompt):
    parts = parse_weights(prompt)
    assert all(weight >= 0 for _, weight in parts)
    assert all(one[1] != other[1] for one, other in itertools.pairwise(parts))
    letters = "".join(text for text, _ in parts)
    assert letters.count("a") == prompt.count("a")


@pytest.mark.parametrize("prompt", ["(a" * 20_000, "(a" * 20_000 + ")" * 20_000, "[a" * 20_000, "(" * 60_000])
def test_brackets_within_brackets_take_no_time(prompt):
    """Each of them changes the weight of all that follows."""
    assert outcome(lambda: len(parse_weights(prompt)), seconds=3).kind == "ok"
