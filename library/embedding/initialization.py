"""The word that a run teaches: checked against the vocabulary, and given its first vectors."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPTokenizer

from library.embedding.files import Origin, origin_of, rows_from_file
from library.embedding.placeholder import Placeholder
from library.embedding.tokenizer import (
    PromptTokenizer,
    check_token_string,
    init_word_ids,
    rows_from_statistics,
    rows_from_word,
)
from library.model.base_model import BaseModel
from library.model.family import ModelFamily
from library.options.declaration import required
from library.options.options import TokenOptions

logger = logging.getLogger(__name__)
_LONGEST_SHOWN = 100


@dataclass(frozen=True)
class NewWord:
    """The word, how texts that hold it become ids, and the vocabulary ids its vectors start from.

    ``start_ids`` holds N ids per tokenizer, or is None where no ``--init_word`` is given, or none is chosen yet.
    """

    prompts: PromptTokenizer
    start_ids: list[list[int]] | None

    @property
    def placeholder(self) -> Placeholder:
        """The word as text."""
        return self.prompts.placeholder

    @classmethod
    def check(cls, options: TokenOptions, tokenizers: Sequence[CLIPTokenizer]) -> "NewWord":
        """Check ``--token_string`` and ``--init_word`` with the tokenizers alone. Raises UserError."""
        placeholder = Placeholder(required(options.token_string, "token_string"), options.num_vectors_per_token)
        check_token_string(placeholder, tokenizers)
        start_ids = None
        if options.init_word is not None and not options.chooses_start:  # a choice takes the images and the networks
            start_ids = [init_word_ids(options.init_word, placeholder.count, tokenizer) for tokenizer in tokenizers]
        elif options.init_word is None and options.weights is None:
            logger.warning(
                "No --init_word: the vectors start from the average of all words plus noise. A word for something "
                "close (girl, dog, painting) usually learns faster and better."
            )
        return cls(PromptTokenizer(tokenizers, placeholder, options.max_token_length), start_ids)


def warn_of_other_base(options: TokenOptions, model: BaseModel) -> None:
    """Say so where the file of ``--weights`` names another base model than this run's.

    It may wait for the hash of the base model's file. Raises UserError where the file of ``--weights`` is missing or
    damaged.
    """
    origin = origin_of(options.weights) if options.weights is not None else None
    if origin is None or _is_same_base(origin, model):
        return
    other = _shown(origin.base_model) if origin.base_model != model.name else f"another file named {model.name}"
    logger.warning(
        "--weights %s was trained on %s, and this run's base model is %s. An embedding belongs to its base model: the "
        "shapes fit, but expect a longer training, or give the model that the file was trained on.",
        *(options.weights, other, model.name),
    )


def _shown(name: str | None) -> str:
    """A name out of a file that may come from anybody, as a message can hold it."""
    if name is None:
        return "another model"
    return "".join(letter if letter.isprintable() else " " for letter in name[:_LONGEST_SHOWN])


def _is_same_base(origin: Origin, model: BaseModel) -> bool:
    """Compare hashes where both are known (web UIs keep shortened or old ones), else names without endings."""
    base_hash = (origin.base_hash or "").lower()
    hashes = [found for found in (model.hash(), model.legacy_hash()) if found] if base_hash else []
    if hashes:
        return any(found.startswith(base_hash) for found in hashes)
    return origin.base_model is None or _plain_name(origin.base_model) == _plain_name(model.name)


def _plain_name(name: str) -> str:
    return re.sub(r"\.(safetensors|ckpt)$", "", name.lower())


def initial_rows(
    word: NewWord, options: TokenOptions, family: ModelFamily, tables: Sequence[nn.Embedding], seed: int
) -> list[torch.Tensor]:
    """The vectors that training starts from, float32 [N, D] per text encoder.

    Rows of ``--weights`` come first; an encoder that the file lacks starts like one without a file: from the
    ``--init_word``, or else from the table's average. Raises UserError for a file of another base or vector count, and
    for a start word that the model does not know.
    """
    count, widths = word.placeholder.count, [table.embedding_dim for table in tables]
    given: list[torch.Tensor | None] = [None] * len(tables)
    if options.weights is not None:
        given = rows_from_file(options.weights, family.embedding_keys, widths, count)
        logger.info("Continuing from %s (%d vectors).", options.weights, count)
    generator = torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []
    for index, (table, found) in enumerate(zip(tables, given, strict=True)):
        if found is not None:
            rows.append(found)
            continue
        if word.start_ids is None:
            rows.append(rows_from_statistics(table.weight, count, generator))
            source = "the average of all words"
        else:
            rows.append(rows_from_word(table.weight, word.start_ids[index], options.init_word or ""))
            source = f'--init_word "{options.init_word}"'
        if options.weights is not None:
            logger.warning(
                "%s holds no vectors for %s: these start from %s.",
                options.weights,
                family.embedding_keys[index],
                source,
            )
    return rows
