"""The words nearest to a vector: those of the table itself, whole words only, whatever the table's dtype."""

import pytest
import torch
from torch import nn

from library.embedding import vocabulary
from library.embedding.vocabulary import Vocabulary


class Spelling:
    """A tokenizer of a few tokens as CLIP spells them."""

    tokens = ("!</w>", "girl</w>", "dog</w>", "gi", "2</w>", "</w>", "_</w>", "<|endoftext|>")

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids).replace("</w>", " ")


@pytest.fixture
def words():
    table = nn.Embedding(len(Spelling.tokens), 4)
    with torch.no_grad():
        table.weight.copy_(torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(1)))
    return Vocabulary(table, Spelling())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_word_is_nearest_to_itself_whatever_its_length(words, dtype):
    words.embedding.to(dtype)
    (found,) = words.nearest(7 * words.table[1:2], 2)
    assert found[0].word == "girl"
    assert found[0].cosine == pytest.approx(1.0, abs=1e-2)
    assert found[1].cosine < found[0].cosine


def test_only_words_are_named(words):
    found = words.nearest(words.table, 99)
    assert {one.word for row in found for one in row} == {"girl", "dog", "2"}
    assert [len(row) for row in found] == [3] * 8


def test_the_table_may_be_taken_in_parts(words, monkeypatch):
    whole = words.nearest(words.table[:2], 3)
    monkeypatch.setattr(vocabulary, "_AT_ONCE", 3)
    parts = words.nearest(words.table[:2], 3)
    assert [[one.word for one in row] for row in parts] == [[one.word for one in row] for row in whole]


def test_rows_of_a_table_that_the_tokenizer_does_not_know_are_no_words(words):
    longer = nn.Embedding(12, 4)
    with torch.no_grad():
        longer.weight[:8] = words.table
        longer.weight[8:] = words.table[1]
    (found,) = Vocabulary(longer, Spelling()).nearest(words.table[1:2], 5)
    assert found[0].word == "girl"
    assert len(found) == 3


def test_a_usual_word_s_norm_is_the_median_of_those_in_use():
    table = nn.Embedding(4, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
    assert Vocabulary(table, Spelling()).typical_norm == pytest.approx(2.0)
