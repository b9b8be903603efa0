"""The first words: a line for each part that there is."""

from library.output.start_block import start_block


def test_a_line_for_each_part():
    text = start_block([("Base model", "tiny")], {"Report": None, "Embedding": "a.pt"})
    assert text.split("\n") == ["This run:", "  base model  tiny", "  embedding   a.pt"]
