"""``--dataset_class``: a dataset of the user's own, in place of folders and files.

The class is called as in sd-scripts, ``Class(tokenizer=None, max_token_length, resolution, debug_dataset)``, and must
have a length and give a dictionary for each number below it: one finished batch. Keys that are read:

- ``input_ids_list``: ids per tokenizer, int [B, 77] or [B, chunks, 77]; or else ``captions``, a list of B texts
- ``latents`` float [B, 4, h, w] (unscaled), or else ``images`` float [B, 3, H, W] in [-1, 1]
- optional: ``loss_weights`` [B], ``alpha_masks`` [B, H, W] in [0, 1], ``conditioning_images`` [B, 3, H, W] in [-1, 1]
  (masks, which win), ``original_sizes_hw``, ``crop_top_lefts`` and ``target_sizes_hw`` [B, 2]
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from library.batch_order import BatchRef, BatchSampler, EpochOrder
from library.batches import Batch, collate
from library.dataset import BatchLoader, sample_seeds
from library.errors import UserError
from library.latents import LatentCache, LatentEntry
from library.named_classes import load_class
from library.options import DatasetOptions
from library.preflight import Report
from library.tokens import PromptTokenizer

_PIXELS_PER_LATENT = 8


class CustomData:
    """Has what ``TrainingData`` has, and takes the batches from the user's object."""

    has_validation = False

    def __init__(
        self,
        options: DatasetOptions,
        prompts: PromptTokenizer,
        *,
        max_token_length: int | None = None,
        templates: Sequence[str] | None = None,
        seed: int = 0,
    ):
        """Make the user's dataset and tell it the seed and the word's replacements, as far as it takes them."""
        self.name = options.dataset_class
        self.prompts = prompts
        self.seed = seed
        self.resolution = options.resolution or (512, 512)
        self.masked_loss = options.masked_loss
        size = options.resolution and f"{options.resolution[0]},{options.resolution[1]}"
        module, _, class_name = self.name.rpartition(".")
        if not module:
            raise UserError(f"--dataset_class {self.name} must be a module and a class, such as my_data.MyDataset.")
        made_by = load_class("--dataset_class", module, class_name)
        try:
            self.dataset = made_by(None, max_token_length, size, options.debug_dataset)
            count = len(self.dataset)
        except Exception as error:  # the user's class may fail in any way
            raise UserError(f"--dataset_class {self.name} cannot be used: {type(error).__name__}: {error}.") from error
        if count == 0:
            raise UserError(f"--dataset_class {self.name} has no batches, so there is nothing to train on.")
        word = prompts.placeholder
        _tell(self.dataset, "set_seed", seed)
        if templates:
            _tell(self.dataset, "add_replacement", "", [text.replace("{}", word.expanded) for text in templates])
        elif word.count > 1:
            _tell(self.dataset, "add_replacement", word.text, word.expanded)
        self.order = EpochOrder(np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64), np.array([1]), seed)

    def check(self) -> Report:
        """Make the first batch and look at it. Raises UserError if it is not as it must be."""
        batch = CustomSource(self, 0)[BatchRef((0,), 1, 0, 0, 1.0)]
        report = Report([f"Training data: {len(self.dataset)} batches of {self.name}."])
        if not batch.has_token.any():
            report.warnings.append(
                f'The first batch of {self.name} does not hold the word "{self.prompts.placeholder.text}", so it '
                f"teaches it nothing. Ids of the word start at {self.prompts.first_new_id()}."
            )
        return report

    def num_batches(self, num_processes: int = 1) -> int:
        """Batches of each process in an epoch."""
        return -(-self.order.num_batches // num_processes)

    def latent_entries(self) -> list[LatentEntry]:
        """Nothing can be cached: only the user's class knows its pictures."""
        return []

    def first_prompts(self) -> Iterator[list[torch.Tensor]]:
        """No prompt is known beforehand."""
        return iter(())

    def use_cache(self, cache: LatentCache) -> None:
        """Refuse a latent cache where the batches bring pixels."""
        if CustomSource(self, 0)[BatchRef((0,), 1, 0, 0, 1.0)].latents is None:
            raise UserError(
                f"--cache_latents cannot cache the pictures of --dataset_class {self.name}. Leave it out, or let the "
                'class give "latents".'
            )

    def loader(
        self,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
        max_steps: int = 0,
        workers: int = 0,
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> BatchLoader:
        """The batches of one process, in another order every epoch."""
        sampler = BatchSampler(
            self.order, process_index=process_index, num_processes=num_processes, accumulation=accumulation
        )
        _tell(self.dataset, "set_max_train_steps", max_steps)
        source = CustomSource(self, max_steps)
        return BatchLoader(source, sampler, workers=workers, persistent=persistent, pin_memory=pin_memory)


def _tell(dataset: Any, method: str, *values) -> None:
    """Call a method that sd-scripts' own datasets have, if this one has it."""
    if hasattr(dataset, method):
        getattr(dataset, method)(*values)


class CustomSource(Dataset):
    """Turns the user's dictionaries into batches, in whatever process the loader runs."""

    def __init__(self, data: CustomData, max_steps: int):
        self.data = data
        self.max_steps = max_steps

    def __getitem__(self, ref: BatchRef) -> Batch:
        data = self.data
        if not ref.indices:
            return collate([], 0.0, len(data.prompts.tokenizers))
        _tell(data.dataset, "set_current_epoch", ref.epoch)
        _tell(data.dataset, "set_current_step", ref.step)
        return _Reader(data, ref).batch(data.dataset[ref.indices[0]])


class _Reader:
    """Reads one dictionary, with errors that name the class and the key."""

    def __init__(self, data: CustomData, ref: BatchRef):
        self.data = data
        self.ref = ref

    def batch(self, values: Any) -> Batch:
        if not isinstance(values, dict):
            raise self._error(f"must give dictionaries, not {type(values).__name__}")
        latents, images = self._floats(values, "latents", 4), self._floats(values, "images", 4)
        if latents is None and images is None:
            raise self._error('gives neither "latents" nor "images"')
        pictures = images if latents is None else latents
        count, scale = len(pictures), 1 if latents is None else _PIXELS_PER_LATENT
        height, width = (side * scale for side in pictures.shape[-2:])
        captions = list(values.get("captions") or [""] * count)
        input_ids = self._input_ids(values, captions, count)
        weights = self._floats(values, "loss_weights", 1)
        first_ids = [self.data.prompts.first_new_id(number) for number in range(len(input_ids))]
        held = [(ids >= first).flatten(1).any(1) for ids, first in zip(input_ids, first_ids, strict=True)]
        return Batch(
            keys=[f"{self.data.name}[{self.ref.indices[0]}] {number}" for number in range(count)],
            captions=captions,
            input_ids=input_ids,
            has_token=torch.stack(held).any(0),
            latents=latents,
            images=None if latents is not None else images,
            masks=self._masks(values),
            loss_weights=torch.ones(count) if weights is None else weights,
            size_conditioning=self._sizes(values, count, (height, width)),
            seeds=[sample_seeds(self.data.seed, self.ref.epoch, self.ref.position << 16 | i)[2] for i in range(count)],
            weight=self.ref.weight,
        )

    def _error(self, problem: str) -> UserError:
        return UserError(f"--dataset_class {self.data.name} {problem} (batch {self.ref.indices[0]}).")

    def _floats(self, values: dict, key: str, dimensions: int) -> torch.Tensor | None:
        value = values.get(key)
        if value is None:
            return None
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(f'gives "{key}" that cannot become a tensor: {error}') from error
        if tensor.ndim != dimensions:
            raise self._error(f'gives "{key}" of shape {tuple(tensor.shape)}; it must have {dimensions} dimensions')
        return tensor

    def _input_ids(self, values: dict, captions: list[str], count: int) -> list[torch.Tensor]:
        prompts, given = self.data.prompts, values.get("input_ids_list")
        if given is None:
            if not values.get("captions") or len(captions) != count:
                raise self._error(f'gives neither "input_ids_list" nor {count} "captions"')
            encoded = [prompts.encode(prompts.placeholder.expand(caption)) for caption in captions]
            return [torch.stack(ids) for ids in zip(*encoded, strict=True)]
        if len(given) != len(prompts.tokenizers):
            raise self._error(f'gives "input_ids_list" of {len(given)} items; it must have {len(prompts.tokenizers)}')
        shaped = []
        for ids in map(torch.as_tensor, given):
            if ids.ndim not in (2, 3) or ids.shape[0] != count or ids.shape[-1] != 77:
                raise self._error(
                    f'gives "input_ids_list" with shape {tuple(ids.shape)}; it must be [{count}, 77] or '
                    f"[{count}, chunks, 77]"
                )
            shaped.append(ids.long().reshape(count, -1, 77))
        return shaped

    def _masks(self, values: dict) -> torch.Tensor | None:
        masks = self._floats(values, "conditioning_images", 4) if self.data.masked_loss else None
        if masks is not None:
            return (masks[:, :1] + 1) / 2
        alpha = self._floats(values, "alpha_masks", 3)
        return None if alpha is None else alpha.unsqueeze(1)

    def _sizes(self, values: dict, count: int, size_hw: tuple[int, int]) -> torch.Tensor:
        """File size, crop and target size of each sample; what is not given is the whole picture."""
        whole = torch.tensor(size_hw, dtype=torch.float32).expand(count, 2)
        usual = {"original_sizes_hw": whole, "crop_top_lefts": torch.zeros(count, 2), "target_sizes_hw": whole}
        columns = []
        for key, default in usual.items():
            given = values.get(key)
            # sd-scripts gives lists of tensors here.
            column = default if given is None else torch.stack([torch.as_tensor(pair).float() for pair in given])
            if column.shape != (count, 2):
                raise self._error(f'gives "{key}" of shape {tuple(column.shape)}; it must be [{count}, 2]')
            columns.append(column)
        return torch.cat(columns, dim=1)
