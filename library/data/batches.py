"""What the training loop receives: one batch of samples as tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from library.data.images import Cut
from library.support.transfers import sent

_FOR_THE_NETWORKS = ("latents", "images", "masks", "loss_weights", "size_conditioning")


@dataclass
class Sample:
    """One drawn image with its finished caption, before it joins others. Sizes h, w are those of the latents."""

    key: str
    caption: str
    input_ids: list[torch.Tensor]  # per tokenizer int64 [chunks, 77]
    has_token: bool
    latents: torch.Tensor | None  # float32 [4, h, w], unscaled
    image: torch.Tensor | None  # uint8 [3, H, W]
    mask: torch.Tensor | None  # float32 [H, W] in [0, 1]
    loss_weight: float
    size_conditioning: tuple[int, int, int, int, int, int]
    seed: int
    cut: Cut  # what was taken of the file
    flipped: bool
    hole: torch.Tensor | None = None  # float32 [H, W], 1 where the image is hidden, to be painted anew


@dataclass
class Batch:
    """Samples of one bucket. B may be 0: such a batch only keeps the processes in step, and its weight is 0.

    ``weight`` is what the mean loss of this batch is multiplied by, so that the sum over an optimizer step's batches,
    averaged over the processes, is the mean over all of the step's samples.
    """

    keys: list[str]  # image paths
    captions: list[str]  # as tokenized
    input_ids: list[torch.Tensor]  # per tokenizer int64 [B, chunks, 77]
    has_token: torch.Tensor  # bool [B]: whether a vector of the word is left after the length limit
    latents: torch.Tensor | None  # float32 [B, 4, h, w], unscaled; None where pixels are given
    images: torch.Tensor | None  # [B, 3, H, W], uint8 or float32 in [-1, 1]; None where latents are given
    masks: torch.Tensor | None  # float32 [B, 1, H, W] in [0, 1]; None if no sample has one
    loss_weights: torch.Tensor  # float32 [B]
    size_conditioning: torch.Tensor  # float32 [B, 6]: file height, width, crop top, left, target height, width
    seeds: list[int]  # of each sample's own noise generator
    weight: float
    holes: torch.Tensor | None = None  # float32 [B, 1, H, W], 1 where the images are hidden; None but for inpainting

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with what the networks and the loss read on ``device``.

        The ids and what is known of them stay: they are looked at here, and reading them back would take waiting.
        """
        return self._with_tensors(lambda tensor: sent(tensor, device))

    def only(self, numbers: Sequence[int]) -> "Batch":
        """The batch of those of its samples that have these ``numbers``; its weight stays."""
        places = list(numbers)
        chosen: dict[str, Any] = {}
        for name in ("keys", "captions", "seeds"):
            chosen[name] = [getattr(self, name)[place] for place in places]
        chosen["input_ids"] = [ids[places] for ids in self.input_ids]
        chosen["has_token"] = self.has_token[places]
        chosen["holes"] = None if self.holes is None else self.holes[places]
        return replace(self._with_tensors(lambda tensor: tensor[places]), **chosen)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the data loader asks for it by this name."""
        ids = [ids.pin_memory() for ids in self.input_ids]
        return replace(self._with_tensors(torch.Tensor.pin_memory), input_ids=ids)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        found = {name: getattr(self, name) for name in _FOR_THE_NETWORKS}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in found.items() if tensor is not None}
        return replace(self, **changed)


def collate(samples: Sequence[Sample], weight: float, num_tokenizers: int) -> Batch:
    """Join samples of one bucket. Where some have a mask, the others get one of ones."""
    if samples:
        input_ids = [torch.stack(ids) for ids in zip(*(sample.input_ids for sample in samples), strict=True)]
    else:
        input_ids = [torch.zeros(0, 1, 77, dtype=torch.int64) for _ in range(num_tokenizers)]
    return Batch(
        keys=[sample.key for sample in samples],
        captions=[sample.caption for sample in samples],
        input_ids=input_ids,
        has_token=torch.tensor([sample.has_token for sample in samples], dtype=torch.bool),
        latents=_stacked([sample.latents for sample in samples]),
        images=_stacked([sample.image for sample in samples]),
        masks=_stacked_masks([sample.mask for sample in samples]),
        loss_weights=torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32),
        size_conditioning=torch.tensor([sample.size_conditioning for sample in samples], dtype=torch.float32).reshape(
            -1, 6
        ),
        seeds=[sample.seed for sample in samples],
        weight=weight,
        holes=_stacked([sample.hole if sample.hole is None else sample.hole[None] for sample in samples]),
    )


def _stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if given and len(given) < len(tensors):
        raise ValueError("some samples of a batch have what others lack")
    return torch.stack(given) if given else None


def _stacked_masks(masks: list[torch.Tensor | None]) -> torch.Tensor | None:
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if mask is None else mask for mask in masks]).unsqueeze(1)


def groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive batches in lists of ``size``; the last list of an epoch may be shorter."""
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
