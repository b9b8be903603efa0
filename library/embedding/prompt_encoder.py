"""From ids to the U-Net's conditioning with the live rows, and the cache of what training cannot change."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.embedding.sample_gradients import with_normalized_gradients
from library.embedding.tokenizer import MergedEmbedding, PromptTokenizer, token_table
from library.model.family import Conditioning, ModelFamily
from library.support.transfers import sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptEncoder:
    """Encodes prompts through the frozen text encoders, the token's rows taking part with their gradient."""

    def __init__(
        self,
        family: ModelFamily,
        text_encoders: "Sequence[PreTrainedModel]",
        prompts: PromptTokenizer,
        rows: nn.Module,
        clip_skip: int | None = None,
    ) -> None:
        """Puts a ``MergedEmbedding`` into every encoder.

        ``rows`` is a ``TrainableRows`` or what accelerate made of it; called with None it gives one [N, D] per encoder.
        """
        self.family = family
        self.text_encoders = list(text_encoders)
        self.rows = rows
        self.clip_skip = clip_skip
        self.prompts = prompts
        self.embeddings: list[MergedEmbedding] = []
        for index, encoder in enumerate(self.text_encoders):
            merged = MergedEmbedding(token_table(encoder), prompts.first_new_id(index))
            encoder.set_input_embeddings(merged)
            self.embeddings.append(merged)
        self._cache: dict[bytes, Conditioning] = {}

    def encode(self, input_ids: Sequence[torch.Tensor], shares: torch.Tensor | None = None) -> Conditioning:
        """Conditioning of B prompts; ``input_ids`` holds [B, chunks, 77] per text encoder, on the CPU.

        Calls the rows' module once, so that it may be called once per backward. Cached prompts are not encoded again.
        With ``shares`` [B] each prompt's gradient is normalized: see ``with_normalized_gradients``.
        """
        rows: list[torch.Tensor] = self.rows(None)
        if shares is not None:
            rows = with_normalized_gradients(rows, shares)
        self._use(rows)
        if not self._cache:
            return self._run(input_ids)
        cached = [self._cache.get(_key(input_ids, i)) for i in range(len(input_ids[0]))]
        live = [i for i, found in enumerate(cached) if found is None]
        if len(live) == len(cached):
            return self._run(input_ids)
        if live:
            if shares is not None:
                self._use([each[live] for each in rows])
            fresh = self._run([ids[live] for ids in input_ids])
            for place, i in enumerate(live):
                cached[i] = _one(fresh, place)
        return _join([found for found in cached if found is not None], self.device)

    def _use(self, rows: Sequence[torch.Tensor]) -> None:
        for merged, each in zip(self.embeddings, rows, strict=True):
            merged.rows = each

    @property
    def tables(self) -> list[torch.nn.Embedding]:
        """The frozen token embedding of each text encoder's vocabulary."""
        return [embedding.table for embedding in self.embeddings]

    @property
    def device(self) -> torch.device:
        """Where the conditioning is made."""
        return self.embeddings[0].table.weight.device

    def _run(self, input_ids: Sequence[torch.Tensor]) -> Conditioning:
        ids = [
            sent(tensor, merged.table.weight.device) for tensor, merged in zip(input_ids, self.embeddings, strict=True)
        ]
        return self.family.encode_prompts(self.text_encoders, ids, self.clip_skip)

    @torch.no_grad()
    def cache(self, prompts: Iterable[Sequence[torch.Tensor]]) -> tuple[int, int]:
        """Encode once, and keep in memory, every prompt that cannot change during the training.

        ``prompts`` gives the ids of one prompt at a time, [1, chunks, 77] per text encoder. Prompts with the token
        depend on the rows and stay live. Returns how many different prompts are cached and how many stay live.
        """
        live = set()
        for input_ids in prompts:
            key = _key(input_ids, 0)
            if self.prompts.holding_word(input_ids).any():
                live.add(key)
            elif key not in self._cache:
                self._cache[key] = _on_cpu(self._run(input_ids))  # of very many captions: gigabytes
        return len(self._cache), len(live)


def _one(conditioning: Conditioning, index: int) -> Conditioning:
    pooled = None if conditioning.pooled is None else conditioning.pooled[index : index + 1]
    return Conditioning(conditioning.context[index : index + 1], pooled)


def _on_cpu(conditioning: Conditioning) -> Conditioning:
    pooled = None if conditioning.pooled is None else conditioning.pooled.cpu()
    return Conditioning(conditioning.context.cpu(), pooled)


def _join(parts: Sequence[Conditioning], device: torch.device) -> Conditioning:
    context = torch.cat([sent(part.context, device) for part in parts])
    pooled = [sent(part.pooled, device) for part in parts if part.pooled is not None]
    return Conditioning(context, torch.cat(pooled) if pooled else None)


def _key(input_ids: Sequence[torch.Tensor], index: int) -> bytes:
    return b"".join(ids[index].numpy().tobytes() for ids in input_ids)
