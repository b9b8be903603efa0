"""The words that a model knows, by one text encoder's table: how long their vectors are, and which are nearest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.embedding.tokenizer import typical_norm

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from library.model.base_model import BaseModel

_NO_WORD = -2.0  # in place of a cosine
_AT_ONCE = 4096  # words whose vectors are widened to float32 together, so that no second table is ever made
_WORD_END = "</w>"  # of CLIP's tokens that end a word; others are pieces of words
# CLIP's tokens are spelt in bytes, each with a sign of its own; those from 0x80 on are parts of letters.
_LETTER = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Neighbour:
    """A word of the vocabulary and the cosine between its vector and the one that was asked about."""

    word: str
    cosine: float


class Vocabulary:
    """The frozen token embedding [V, D] of one text encoder, with the words of its tokenizer."""

    def __init__(self, embedding: nn.Embedding, tokenizer: "CLIPTokenizer") -> None:
        self.embedding, self.tokenizer = embedding, tokenizer
        self.typical_norm = typical_norm(embedding.weight)

    @property
    def table(self) -> Tensor:
        """The vectors [V, D], wherever their module is now."""
        return self.embedding.weight.detach()

    @torch.no_grad()
    def nearest(self, rows: Tensor, count: int) -> list[list[Neighbour]]:
        """The ``count`` whole words whose vectors point most nearly the way of each row [N, D], nearest first.

        Pieces of words, punctuation and control tokens are left out: they tell nobody anything.
        """
        directions = torch.nn.functional.normalize(rows.detach().to(self.table.device, torch.float32), dim=1)
        parts = [self._cosines(directions, start) for start in range(0, len(self.table), _AT_ONCE)]
        cosines = torch.cat(parts, dim=1).cpu()
        cosines[:, ~self._is_word] = _NO_WORD
        best = cosines.topk(min(count, cosines.shape[1]), dim=1)
        return [self._named(*row) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def _cosines(self, directions: Tensor, start: int) -> Tensor:
        return directions @ torch.nn.functional.normalize(self.table[start : start + _AT_ONCE].float(), dim=1).T

    @cached_property
    def _is_word(self) -> Tensor:
        """Whether each row of the table [V] is a whole word."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(min(len(self.table), len(self.tokenizer)))))
        found = [token.endswith(_WORD_END) and _LETTER.search(token[: -len(_WORD_END)]) is not None for token in tokens]
        return torch.tensor(found + [False] * (len(self.table) - len(found)))

    def _named(self, ids: Sequence[int], cosines: Sequence[float]) -> list[Neighbour]:
        named = [(i, cosine) for i, cosine in zip(ids, cosines, strict=True) if cosine > _NO_WORD]
        return [Neighbour(str(self.tokenizer.decode([i])).strip(), cosine) for i, cosine in named]


def vocabularies_of(model: "BaseModel") -> list[Vocabulary]:
    """The vocabulary of each of a model's text encoders; nothing else of them is read. Raises UserError."""
    tables = [nn.Embedding.from_pretrained(table) for table in model.token_tables()]
    return [Vocabulary(table, words) for table, words in zip(tables, model.tokenizers(), strict=True)]
