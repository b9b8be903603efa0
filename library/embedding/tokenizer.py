"""The token as ids and vectors: tokenization with new ids, first values, and the rows that train.

The tokenizers and the encoders' tables are never changed. A token's ids start behind the vocabulary (49408 for
CLIP); ``MergedEmbedding`` looks ids of the vocabulary up in the frozen table and takes all others from the rows.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.nn import functional

from library.embedding.placeholder import Placeholder
from library.embedding.prompt_weights import escape, parse_weights
from library.embedding.text_repair import check_spelling, repair, repaired_around
from library.support.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
BODY = 75  # of CLIP's 77 positions; the others are BOS and EOS
# In a caption these are text: as control tokens they would end it, and move what SDXL pools. Spaces are no tokens.
_CONTROL = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE)


class PromptTokenizer:
    """Turns finished captions and prompts into ids, for every tokenizer of the model."""

    def __init__(
        self, tokenizers: "Sequence[CLIPTokenizer]", placeholder: Placeholder, max_token_length: int | None = None
    ) -> None:
        """``max_token_length`` is 75 (or None), 150 or 225 body tokens; longer texts are cut."""
        self.tokenizers = list(tokenizers)
        self.placeholder = placeholder
        self.capacity = max_token_length or BODY

    def first_new_id(self, index: int = 0) -> int:
        """The id of the word's first vector in tokenizer ``index``: the next one behind its vocabulary."""
        return len(self.tokenizers[index])

    def repaired(self, text: str) -> str:
        """Return ``text`` as it is read: repaired around the word's names. Raises UserError for a line too long."""
        return repaired_around(self.placeholder, text)

    def body_ids(self, text: str, index: int = 0) -> list[int]:
        """Ids of ``text`` without BOS and EOS, not cut, the word's names as new ids; the text is not expanded."""
        tokenizer, first = self.tokenizers[index], self.first_new_id(index)
        ids: list[int] = []
        for piece in self.placeholder.split(text):
            if isinstance(piece, int):
                ids.append(first + piece)
            else:
                # The tokenizer lowers by itself, but does not know that a Greek word ends with another sigma.
                text = piece.lower() if "Σ" in piece else piece
                ids.extend(tokenizer.encode(_CONTROL.sub(r"<| \1 |>", text), add_special_tokens=False))
        return ids

    def _expanded_ids(self, text: str) -> list[int]:
        return self.body_ids(self.placeholder.expand(self.repaired(text)))

    def encode(self, text: str) -> list[torch.Tensor]:
        """Ids of one text per tokenizer, each int64 [chunks, 77].

        The text is repaired, but the word is not expanded: ``process_caption`` or ``Placeholder.expand`` have done it.
        Longer windows than 77 are cut into chunks of BOS, 75 body tokens and the sequence's last token.
        """
        text = self.repaired(text)
        return [self._windows(self.body_ids(text, i), tokenizer) for i, tokenizer in enumerate(self.tokenizers)]

    def hold_word(self, input_ids: Sequence[torch.Tensor]) -> bool:
        """Whether a vector of the word is among the ids that :meth:`encode` gave, for any tokenizer."""
        return bool(self.holding_word([ids[None] for ids in input_ids]))

    def holding_word(self, input_ids: Sequence[torch.Tensor]) -> torch.Tensor:
        """Which prompts hold a vector of the word, bool [B], from ids [B, …] for each of the tokenizers."""
        held = [(ids >= self.first_new_id(i)).flatten(1).any(1) for i, ids in enumerate(input_ids)]
        return torch.stack(held).any(0)

    def encode_weighted(self, text: str, *, weighted: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Ids of one prompt with attention syntax, and their weights; int64 and float32 [chunks, 77] per tokenizer.

        The word is expanded here, so that ``(mychar:1.2)`` weighs all its vectors. BOS, EOS and padding weigh 1.
        Without attention syntax, or where it is not ``weighted``, the ids are those of :meth:`encode` for the expanded
        text.
        """
        parts = self.weighted_parts(text) if weighted else [(self.repaired(text), 1.0)]
        ids, weights = [], []
        for index, tokenizer in enumerate(self.tokenizers):
            bodies = [(self.body_ids(self.placeholder.expand(part), index), weight) for part, weight in parts]
            ids.append(self._windows([i for body, _ in bodies for i in body], tokenizer))
            weights.append(torch.tensor(self._chunks([weight for body, weight in bodies for _ in body], 1.0, 1.0, 1.0)))
        return ids, weights

    def weighted_parts(self, text: str) -> list[tuple[str, float]]:
        """The parts of a prompt and their weights; brackets that belong to the word (``[V]``) are no attention syntax.

        The word is not expanded. Parts are repaired once they are cut: full-width brackets are text, as in sd-scripts.
        """
        names = self.placeholder.names
        pieces = self.placeholder.split(text)
        parts = parse_weights("".join(piece if isinstance(piece, str) else escape(names[piece]) for piece in pieces))
        return [(self.repaired(part), weight) for part, weight in parts]

    def _windows(self, body: list[int], tokenizer: "CLIPTokenizer") -> torch.Tensor:
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        chunks = self._chunks(body, bos, eos, pad)
        if pad != eos and len(chunks) > 1:  # SD 2 and OpenCLIP pad with "!": a chunk must still end with EOS somewhere
            for chunk in chunks:
                if chunk[-2] not in (eos, pad):
                    chunk[-1] = eos
                if chunk[1] == pad:
                    chunk[1] = eos
        return torch.tensor(chunks)

    def _chunks(self, body: list[_T], first: _T, last: _T, fill: _T) -> list[list[_T]]:
        """What stands at the windows' 77 places: ``first`` and ``last`` for BOS and EOS, ``fill`` for padding."""
        line = [first, *body[: self.capacity], last]
        line += [fill] * (self.capacity + 2 - len(line))
        return [[first, *line[start : start + BODY], line[-1]] for start in range(1, self.capacity + 1, BODY)]

    def length(self, text: str) -> int:
        """How many body tokens ``text`` needs once the word in it is expanded."""
        return len(self._expanded_ids(text))

    def lost_rows(self, text: str) -> set[int]:
        """Vectors (0 to N-1) that stand in the expanded ``text`` but only behind the length limit."""
        first = self.first_new_id()
        ids = self._expanded_ids(text)
        kept = {i - first for i in ids[: self.capacity] if i >= first}
        return {i - first for i in ids[self.capacity :] if i >= first} - kept


def check_token_string(placeholder: Placeholder, tokenizers: "Sequence[CLIPTokenizer]") -> None:
    """Refuse a word that the model knows already.

    A name that encodes to one existing id would replace that word everywhere (in the clients too), so every one of the
    N names must be unknown to every tokenizer. Raises UserError, proposing a free variant.
    """
    check_spelling(placeholder)
    text = placeholder.text
    if not any(tok.encode(text.lower(), add_special_tokens=False) for tok in tokenizers):
        raise UserError(
            f"--token_string {text!r} contains no characters that CLIP can tokenize. Give a word such as mychar."
        )
    known = _known_name(placeholder, tokenizers)
    if known is not None:
        raise UserError(
            f'--token_string "{text}" cannot be used: "{known}" already is a word of the model\'s vocabulary. '
            f'Choose a word that is not, for example "{_free_variant(placeholder, tokenizers)}", and write it in the '
            "captions."
        )


def _known_name(placeholder: Placeholder, tokenizers: "Sequence[CLIPTokenizer]") -> str | None:
    """Of the names the first one that is one id for a tokenizer; special tokens may be read as text, and are words."""
    special = {token.lower() for tok in tokenizers for token in tok.get_added_vocab()}
    for name in placeholder.names:
        known = any(len(tok.encode(name.lower(), add_special_tokens=False)) == 1 for tok in tokenizers)
        if known or name.lower() in special:
            return name
    return None


def _free_variant(placeholder: Placeholder, tokenizers: "Sequence[CLIPTokenizer]") -> str:
    stem = "".join(c for c in placeholder.text.lower() if c.isalnum()) or "concept"
    candidates = (f"my{stem}", f"{stem}xyz", f"my{stem}xyz", f"xyz{stem}qq")
    return next((c for c in candidates if _known_name(Placeholder(c, placeholder.count), tokenizers) is None), "mychar")


def init_word_ids(init_word: str, count: int, tokenizer: "CLIPTokenizer", *, option: str = "--init_word") -> list[int]:
    """The vocabulary id that each of ``count`` vectors starts from.

    One token serves all vectors; exactly ``count`` tokens are used one each. Raises UserError for anything else.
    """
    ids: list[int] = tokenizer.encode(repair(init_word), add_special_tokens=False)
    if not ids:
        raise UserError(f"{option} is empty. Give one known word close to the concept, such as girl, dog or painting.")
    if len(ids) == 1:
        return ids * count
    if len(ids) == count:
        return ids
    pieces = ", ".join(f'"{str(tokenizer.decode([i])).strip()}"' for i in ids)
    wanted = "one token" if count == 1 else f"one token, or exactly {count} tokens for --num_vectors_per_token={count}"
    raise UserError(
        f'{option} "{init_word}" is {len(ids)} tokens to the model ({pieces}), but {wanted} can be used. '
        "Choose a common single word."
    )


def token_table(encoder: "PreTrainedModel") -> nn.Embedding:
    """A text encoder's own embeddings of its vocabulary. Raises TypeError where others have taken their place."""
    table = encoder.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise TypeError(f"the text encoder's token table is a {type(table).__name__}")
    return table


def _used_rows(table: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding table [V, D] that are not all zero, as float32; zero rows are words a model never saw."""
    table = table.detach().float()
    return table[table.abs().amax(dim=1) > 0]


def table_spread(table: torch.Tensor) -> float:
    """Standard deviation of a coordinate over the rows in use, averaged over coordinates (CLIP-L: about 0.014)."""
    return float(_used_rows(table).std(dim=0).mean())


def typical_norm(table: torch.Tensor) -> float:
    """The median Euclidean norm of the rows in use (CLIP-L: about 0.4)."""
    return float(_used_rows(table).norm(dim=1).median())


def rows_from_word(table: torch.Tensor, ids: Sequence[int], init_word: str) -> torch.Tensor:
    """Copies of the table's rows for ``ids``: float32 [N, D]. Raises UserError when one of them is all zero."""
    rows = table.detach()[list(ids)].float().clone()
    if (rows.abs().amax(dim=1) == 0).any():
        raise UserError(
            f'--init_word "{init_word}" has an all-zero vector in this model: the model has never learned the word. '
            "Choose another word."
        )
    return rows


def rows_from_statistics(table: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Start values without a word: the mean row plus noise of the table's own spread, float32 [N, D]."""
    used = _used_rows(table)
    noise = torch.randn(count, used.shape[1], generator=generator).to(used.device)
    return used.mean(dim=0) + noise * used.std(dim=0)


class TrainableRows(nn.Module):
    """The only parameters of a training: one float32 [N, D] tensor per text encoder.

    Its ``forward`` returns them, so that whatever wraps the module (DistributedDataParallel) sees its parameters used
    once per backward, also where a batch does not hold the token. It needs no input and still takes one, ``None``: with
    a device of its own, DistributedDataParallel moves the first input there and fails where there is none.
    """

    def __init__(self, starts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(start.detach().float().clone()) for start in starts)

    def forward(self, _: None = None) -> list[torch.Tensor]:
        """The rows of every text encoder, each [N, D]; views, which no other module can take for its parameters."""
        return [rows.view_as(rows) for rows in self.rows]

    @contextmanager
    def holding(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within a ``with``: hold other values, [N, D] per text encoder. Then every bit is as it was."""
        with self.kept():
            self.assign(values)
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo, after a ``with``, whatever was done to the rows within it."""
        before = [rows.detach().clone() for rows in self.rows]
        try:
            yield
        finally:
            self.assign(before)

    def assign(self, values: Sequence[torch.Tensor]) -> None:
        """Take on ``values``, [N, D] per text encoder. Raises ValueError for values of another shape."""
        for rows, value in zip(self.rows, values, strict=True):
            if rows.shape != value.shape:
                raise ValueError(f"vectors of shape {list(value.shape)} for {list(rows.shape)}")
            rows.data.copy_(value)

    @torch.no_grad()
    def rescale(self, norms: Sequence[float]) -> None:
        """Scale every row to the given norm (one per text encoder), keeping its direction."""
        for rows, norm in zip(self.rows, norms, strict=True):
            rows.mul_(norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def shorten(self, norms: Sequence[float]) -> None:
        """Scale every row that is longer than the given norm (one per text encoder) to it; others keep every bit."""
        for rows, norm in zip(self.rows, norms, strict=True):
            rows.mul_((norm / rows.norm(dim=1, keepdim=True)).clamp(max=1))


class MergedEmbedding(nn.Module):
    """Stands in for a text encoder's token table: known ids from the frozen table, new ids from the rows.

    ``rows`` [N, D], or [B, N, D] for each of B prompts, is set before each use and keeps its gradient; it is cast to
    the table's dtype here. No table with more rows is ever built, and the rows are in the graph even if no new id
    occurs (their gradient is then zero).
    """

    def __init__(self, table: nn.Embedding, first_new_id: int) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first_new_id = first_new_id
        self.rows: torch.Tensor | None = None

    # The rows are another tensor at every step; compiling around them is enough.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's is not annotated
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[..., T] ids to [..., T, D] embeddings in the table's dtype."""
        known: torch.Tensor = self.table(input_ids.clamp(max=self.first_new_id - 1))
        if self.rows is None:
            return known
        offsets, rows = input_ids - self.first_new_id, self.rows.to(known.dtype)
        places = offsets.clamp(0, rows.shape[-2] - 1)
        if rows.ndim == 3:  # the windows of a prompt follow each other
            prompts = torch.arange(len(input_ids), device=places.device) // (len(input_ids) // len(rows))
            places, rows = places + prompts.unsqueeze(-1) * rows.shape[1], rows.flatten(0, 1)
        # Not by indexing: on the CPU its gradient adds up in an order that changes from run to run.
        return torch.where((offsets >= 0).unsqueeze(-1), functional.embedding(places, rows), known)
