"""Which words a start is chosen from."""

import pytest
import torch
from tiny_models import tokenizer as clip_tokenizer
from torch import nn

from library.embedding.placeholder import Placeholder
from library.embedding.start_words import candidates, names_something, usable_ids, words_of


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer("<|endoftext|>")


def test_words_of_captions_come_by_frequency_without_the_token():
    texts = ["a photo of mychar with a red Hat", "mychar1, hat and 2 tables", "photo of the hat"]
    assert words_of(texts, Placeholder("mychar", 2)) == ["hat", "photo", "red", "tables"]


def test_what_may_be_a_noun():
    assert [word for word in ("girl", "with", "ox", "4k", "hat,", "auto") if names_something(word)] == ["girl"]


def test_given_words_come_first_and_others_take_turns():
    assert candidates(["b", "x"], ["a", "b"], {"a", "b"}.__contains__) == ["b", "a"]
    assert candidates([], ["chapel", "hat", "woman"], {"chapel", "hat", "person", "woman"}.__contains__) == [
        *("person", "chapel", "woman", "hat")
    ]


def test_what_the_model_does_not_know_is_not_usable(tokenizer):
    table = nn.Embedding(len(tokenizer), 4)
    (cat,) = tokenizer.encode("cat", add_special_tokens=False)
    (dog,) = tokenizer.encode("dog", add_special_tokens=False)
    with torch.no_grad():
        table.weight[dog] = 0
    assert usable_ids("cat", 2, [tokenizer], [table]) == [[cat, cat]]
    assert usable_ids("dog", 2, [tokenizer], [table]) is None
    assert usable_ids("dog", 2, [tokenizer], []) == [[dog, dog]]
    assert usable_ids("qwertyuiop", 2, [tokenizer], [table]) is None
