"""placeholder.py: where the word stands, and what one occurrence becomes."""

import pytest

from library.embedding.placeholder import Placeholder

FOUR = Placeholder("mychar", 4)
ALL = "mychar mychar1 mychar2 mychar3"


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a mychar, MyChar", f"a {ALL}, {ALL}"),
        ("mychars xmychar mychar10", "mychars xmychar mychar10"),
        ("mychar_(x) mycharの", f"{ALL}_(x) {ALL}の"),
        ("mychar2 alone", "mychar2 alone"),
        (f"{ALL} once, mychar twice", f"{ALL} once, {ALL} twice"),
        ("MYCHAR  mychar1 mychar2 mychar3", ALL),
        ("mychar mychar1", f"{ALL} mychar1"),
        ("", ""),
    ],
)
def test_expand(text, expanded):
    assert FOUR.expand(text) == expanded
    assert FOUR.expand(expanded) == expanded


def test_one_vector_leaves_texts_alone():
    assert Placeholder("mychar").expand("a MyChar here") == "a MyChar here"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a mychar2 b", ["a ", 2, " b"]),
        ("MYCHAR3mychar", ["MYCHAR3mychar"]),
        ("mychar mychar1", [0, " ", 1]),
        ("nothing", ["nothing"]),
        ("", []),
    ],
)
def test_split(text, pieces):
    assert FOUR.split(text) == pieces
    assert FOUR.found_in(text) == any(isinstance(piece, int) for piece in pieces)


def test_letters_that_only_regular_expressions_think_equal():
    # IGNORECASE matches the long s, the Kelvin sign and the dotted I; none of them may be an error.
    for word, text in (("sksq", "\u017fksq"), ("kqx", "\u212aqx"), ("iqx", "\u0130qx")):
        assert Placeholder(word, 2).split(text) == [0]


def test_a_word_of_signs():
    word = Placeholder("<tok>", 3)
    assert word.expand("a <tok>, <tok>1") == "a <tok> <tok>1 <tok>2, <tok>1"
    assert word.split("<tok>2, <tok>") == [2, ", ", 0]


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("a mychar, MyChar", "a girl, girl"),
        (f"a {ALL} here", "a girl here"),
        ("mychar2 and mychars", "girl and mychars"),
        ("nothing", "nothing"),
    ],
)
def test_replace(text, replaced):
    assert FOUR.replace(text, "girl") == replaced
    assert Placeholder("mychar").replace("a MYCHAR", r"\1") == r"a \1"
