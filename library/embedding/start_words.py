"""Words that the new vectors may start from: those of the captions, and common nouns."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from torch import nn

from library.embedding.placeholder import Placeholder
from library.embedding.tokenizer import init_word_ids, rows_from_word
from library.options.options import AUTO
from library.support.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# What images to learn from mostly show, the most common first: a short run tries only the first ones.
_NOUNS = """
    person woman man girl boy dog cat toy painting car character drawing doll robot building sculpture monster
    illustration bird plant chair dress cartoon bottle house bag flower shoe child horse anime backpack pattern
    portrait food bear sketch animal cup lamp hat mask dragon fish bowl clock statue teapot glasses boat airplane
    bicycle motorcycle castle tree mountain landscape watercolor poster logo jewelry cake book sofa guitar
"""
_FUNCTION_WORDS = """
    and are but for from had has have her his into its near not off one onto our out over own she that the their them
    then there these they this those three two under very was were who whose with without your
"""
_NAMELESS = {*_FUNCTION_WORDS.split(), AUTO}
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class RankedWord:
    """A word that was tried as a start, and the mean loss of vectors that start from it."""

    word: str
    loss: float


def words_of(captions: Iterable[str], placeholder: Placeholder) -> list[str]:
    """The words of the captions beside the token, the most frequent first, without those that name nothing."""
    counts = Counter(
        word for text in captions for word in dict.fromkeys(_WORD.findall(placeholder.replace(text, " ").lower()))
    )
    return [word for word, _ in counts.most_common() if names_something(word)]


def names_something(word: str) -> bool:
    """Whether it may be a noun: no number, preposition or the like, nor what asks for the choice among nouns."""
    return _WORD.fullmatch(word) is not None and word not in _NAMELESS


def candidates(given: Sequence[str], mentioned: Sequence[str], usable: Callable[[str], object]) -> list[str]:
    """The words to try that are ``usable``, in order: those ``given`` and those ``mentioned`` in the captions.

    Without given ones nouns and mentioned words take turns, so that a short run tries some of both.
    """
    if given:
        return list(filter(usable, dict.fromkeys([*given, *mentioned])))
    turns = zip_longest(filter(usable, _NOUNS.split()), filter(usable, mentioned))
    return list(dict.fromkeys(word for word in chain.from_iterable(turns) if word is not None))


def usable_ids(
    word: str, count: int, tokenizers: "Sequence[CLIPTokenizer]", tables: Sequence[nn.Embedding]
) -> list[list[int]] | None:
    """The vocabulary ids of ``count`` vectors for each encoder; None where the model does not know the word as such.

    What only the ``tables`` of the encoders tell is not looked at where these are left out.
    """
    try:
        ids = [init_word_ids(word, count, tokenizer) for tokenizer in tokenizers]
        for table, each in zip(tables, ids, strict=False):
            rows_from_word(table.weight, each, word)
    except UserError:
        return None
    return ids
