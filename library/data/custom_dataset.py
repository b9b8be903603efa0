"""``--dataset_class``: a dataset of the user's own, in place of folders and files.

The class is called as in sd-scripts, ``Class(tokenizer=None, max_token_length, resolution, debug_dataset)``, and must
have a length and give a dictionary for each number below it: one finished batch. Keys that are read:

- ``input_ids_list``: ids per tokenizer, int [B, 77] or [B, chunks, 77]; or else ``captions``, a list of B texts
- ``latents`` float [B, 4, h, w] (unscaled), or else ``images`` float [B, 3, H, W] in [-1, 1]
- optional: ``loss_weights`` [B], ``alpha_masks`` [B, H, W] in [0, 1], ``conditioning_images`` [B, 3, H, W] in [-1, 1]
  (masks, which win), ``original_sizes_hw``, ``crop_top_lefts`` and ``target_sizes_hw`` [B, 2]; with
  ``--train_inpainting``, which needs images, ``masks`` [B, 1, H, W] in [0, 1] (1 is hidden) in place of random ones
"""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from library.data.batch_order import BatchRef, EpochOrder
from library.data.batches import Batch, collate
from library.data.buckets import Size
from library.data.concept import FAR_AWAY, Concept
from library.data.image_table import ImageTable
from library.data.latent_cache import LatentCache
from library.data.latent_entry import PIXELS_PER_LATENT, LatentEntry
from library.data.loader import BatchLoader, make_loader
from library.data.preflight import Report
from library.data.random_masks import random_mask
from library.data.samples import sample_seeds
from library.embedding.tokenizer import PromptTokenizer
from library.options.data import DatasetOptions
from library.options.declaration import required
from library.support.errors import UserError
from library.support.user_classes import load_class


class CustomData:
    """The batches of the user's object; of its images nothing else is known. See ``BatchedData``."""

    sizes: Collection[Size] = ()
    templates: Sequence[str] | None = None  # the object is told of them
    table: ImageTable | None = None
    contents = ""

    def __init__(
        self,
        options: DatasetOptions,
        prompts: PromptTokenizer,
        *,
        max_token_length: int | None = None,
        templates: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Make the user's dataset and tell it the seed and the word's replacements, as far as it takes them."""
        self.name = required(options.dataset_class, "dataset_class")
        self.prompts = prompts
        self.seed = seed
        self.resolution: Size = options.resolution or (512, 512)
        self.masked_loss = options.masked_loss
        self.inpainting = options.train_inpainting
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
        self.fingerprint = f"{self.name} of {count} samples"
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
        batch = CustomSource(self)[BatchRef((0,), 1, 0, 0, 1.0)]
        report = Report([f"Training data: {len(self.dataset)} batches of {self.name}."])
        if not batch.has_token.any():
            report.warnings.append(
                f'The first batch of {self.name} does not hold the token "{self.prompts.placeholder.text}", so it '
                f"teaches it nothing. Ids of the token start at {self.prompts.first_new_id()}."
            )
        return report

    def latent_entries(self) -> list[LatentEntry]:
        """Nothing can be cached: only the user's class knows its images."""
        return []

    def first_prompts(self) -> Iterator[list[torch.Tensor]]:
        """No prompt is known beforehand."""
        return iter(())

    def use_cache(self, cache: LatentCache) -> None:
        """Refuse a latent cache where the batches bring pixels."""
        if CustomSource(self)[BatchRef((0,), 1, 0, 0, 1.0)].latents is None:
            raise UserError(
                f"--cache_latents cannot cache the images of --dataset_class {self.name}. Leave it out, or let the "
                'class give "latents".'
            )

    def loader(self, *, max_steps: int = 0, **details: Any) -> BatchLoader:
        """See ``BatchedData.loader``. The user's object is told ``max_steps``."""
        _tell(self.dataset, "set_max_train_steps", max_steps)
        return make_loader(self.order, CustomSource(self), **details)

    def validation_loader(self, *, process_index: int = 0, num_processes: int = 1) -> BatchLoader | None:
        """Nothing is held out."""
        return None

    def fixed_batches(self, samples: int, *, held_out: bool) -> Iterator[Batch]:
        """The first batches of the user's object, as many as make so many samples; nothing is held out.

        The object is told that the first epoch begins; noise and masks are those of an epoch that no run reaches.
        """
        source, given = CustomSource(self), 0
        for position in itertools.count():
            if held_out or given >= samples:
                return
            passes, number = divmod(position, len(self.dataset))
            told = BatchRef((number,), 1, 0, position, 1.0)
            batch = source.batch(told, replace(told, epoch=FAR_AWAY + passes))
            if not len(batch):
                return
            yield batch
            given += len(batch)

    def concept(self) -> Concept | None:
        """Only the user's class knows which images teach the word."""
        return None


def _tell(dataset: Any, method: str, *values: object) -> None:
    """Call a method that sd-scripts' own datasets have, if this one has it."""
    if hasattr(dataset, method):
        getattr(dataset, method)(*values)


class CustomSource(Dataset[Batch]):
    """Turns the user's dictionaries into batches, in whatever process the loader runs."""

    def __init__(self, data: CustomData) -> None:
        self.data = data

    def __getitem__(self, ref: BatchRef) -> Batch:
        if not ref.indices:
            return collate([], 0.0, len(self.data.prompts.tokenizers))
        return self.batch(ref, ref)

    def batch(self, ref: BatchRef, seeds_of: BatchRef) -> Batch:
        """The batch that the object is asked for by one reference, with the noise and masks of another."""
        data = self.data
        _tell(data.dataset, "set_current_epoch", ref.epoch)
        _tell(data.dataset, "set_current_step", ref.step)
        number = ref.indices[0]
        try:
            values = data.dataset[number]
        except Exception as error:  # the user's class may fail in any way
            raise UserError(
                f"--dataset_class {data.name} fails at batch {number}: {type(error).__name__}: {error}."
            ) from error
        return _Reader(data, seeds_of).batch(values)


class _Reader:
    """Reads one dictionary, with errors that name the class and the key."""

    def __init__(self, data: CustomData, ref: BatchRef) -> None:
        self.data = data
        self.ref = ref

    def batch(self, values: Any) -> Batch:
        if not isinstance(values, dict):
            raise self._error(f"must give dictionaries, not {type(values).__name__}")
        latents = self._floats(values, "latents", (None, 4, None, None))
        images = self._floats(values, "images", (None, 3, None, None))
        pictures = images if latents is None else latents
        if pictures is None:
            raise self._error('gives neither "latents" nor "images"')
        if self.data.inpainting:
            if images is None:
                raise self._error('gives "latents", but masks for --train_inpainting need "images"')
            latents, pictures = None, images
        count, scale = len(pictures), 1 if latents is None else PIXELS_PER_LATENT
        height, width = (side * scale for side in pictures.shape[-2:])
        captions = self._captions(values, count)
        input_ids = self._input_ids(values, captions, count)
        weights = self._floats(values, "loss_weights", (count,))
        return Batch(
            keys=[f"{self.data.name}[{self.ref.indices[0]}] {number}" for number in range(count)],
            captions=captions,
            input_ids=input_ids,
            has_token=self.data.prompts.holding_word(input_ids),
            latents=latents,
            images=None if latents is not None else images,
            masks=self._masks(values, count),
            loss_weights=torch.ones(count) if weights is None else weights,
            size_conditioning=self._sizes(values, count, (height, width)),
            seeds=[self._seeds(number)[2] for number in range(count)],
            weight=self.ref.weight,
            holes=self._holes(values, count, (height, width)) if self.data.inpainting else None,
        )

    def _error(self, problem: str) -> UserError:
        return UserError(f"--dataset_class {self.data.name} {problem} (batch {self.ref.indices[0]}).")

    def _tensor(self, key: str, value: Any) -> torch.Tensor:
        """A value of numbers as a tensor; sd-scripts' datasets give lists of tensors here and there."""
        try:
            if isinstance(value, list | tuple) and all(isinstance(item, torch.Tensor) for item in value):
                return torch.stack(tuple(value))
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(f'gives "{key}" that cannot become a tensor: {error}') from error

    def _floats(self, values: dict[str, Any], key: str, shape: tuple[int | None, ...]) -> torch.Tensor | None:
        """The tensor under a key, if there is one; None in ``shape`` stands for any length."""
        if values.get(key) is None:
            return None
        tensor = self._tensor(key, values[key]).float()
        fits = tensor.ndim == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise self._error(f'gives "{key}" of shape {list(tensor.shape)}; it must be [{wanted}]')
        return tensor

    def _shares(self, values: dict[str, Any], key: str, shape: tuple[int | None, ...]) -> torch.Tensor | None:
        """The same for numbers from 0 to 1."""
        tensor = self._floats(values, key, shape)
        if tensor is not None and not ((tensor >= 0) & (tensor <= 1)).all():  # nor is NaN
            lowest, highest = tensor.min().item(), tensor.max().item()
            raise self._error(f'gives "{key}" with values from {lowest:g} to {highest:g}; they must be from 0 to 1')
        return tensor

    def _captions(self, values: dict[str, Any], count: int) -> list[str]:
        captions = values.get("captions")
        if not captions:
            return [""] * count
        if isinstance(captions, str) or len(captions) != count or not all(isinstance(one, str) for one in captions):
            raise self._error(f'gives "captions" that are not a list of {count} texts')
        return list(map(self.data.prompts.repaired, captions))

    def _input_ids(self, values: dict[str, Any], captions: list[str], count: int) -> list[torch.Tensor]:
        prompts, given = self.data.prompts, values.get("input_ids_list")
        if given is None:
            if not values.get("captions"):
                raise self._error(f'gives neither "input_ids_list" nor {count} "captions"')
            encoded = [prompts.encode(prompts.placeholder.expand(caption)) for caption in captions]
            return [torch.stack(ids) for ids in zip(*encoded, strict=True)]
        if len(given) != len(prompts.tokenizers):
            raise self._error(f'gives "input_ids_list" of {len(given)} items; it must have {len(prompts.tokenizers)}')
        return [self._ids_of(number, ids, count) for number, ids in enumerate(given)]

    def _ids_of(self, number: int, given: Any, count: int) -> torch.Tensor:
        ids, prompts = self._tensor("input_ids_list", given), self.data.prompts
        if ids.ndim not in (2, 3) or ids.shape[0] != count or ids.shape[-1] != 77:
            raise self._error(
                f'gives "input_ids_list" with shape {list(ids.shape)}; it must be [{count}, 77] or '
                f"[{count}, chunks, 77]"
            )
        end = prompts.first_new_id(number) + prompts.placeholder.count
        if ids.min() < 0 or ids.max() >= end:
            raise self._error(
                f'gives "input_ids_list" with ids from {ids.min()} to {ids.max()}; with the word, ids go from 0 to '
                f"{end - 1}"
            )
        return ids.long().reshape(count, -1, 77)

    def _masks(self, values: dict[str, Any], count: int) -> torch.Tensor | None:
        if self.data.masked_loss:
            masks = self._floats(values, "conditioning_images", (count, None, None, None))
            if masks is not None:
                return (masks[:, :1] + 1) / 2
        alpha = self._shares(values, "alpha_masks", (count, None, None))
        return None if alpha is None else alpha.unsqueeze(1)

    def _seeds(self, number: int) -> tuple[int, int, int]:
        """See ``samples.sample_seeds``."""
        return sample_seeds(self.data.seed, self.ref.epoch, self.ref.position << 16 | number)

    def _holes(self, values: dict[str, Any], count: int, size_hw: tuple[int, int]) -> torch.Tensor:
        given = self._shares(values, "masks", (count, 1, *size_hw))
        if given is not None:
            return given
        rngs = [random.Random(self._seeds(number)[0]) for number in range(count)]
        return torch.stack([torch.from_numpy(random_mask(size_hw[::-1], rng))[None].float() for rng in rngs])

    def _sizes(self, values: dict[str, Any], count: int, size_hw: tuple[int, int]) -> torch.Tensor:
        """File size, crop and target size of each sample; what is not given is the whole image."""
        whole = torch.tensor(size_hw, dtype=torch.float32).expand(count, 2)
        usual = {"original_sizes_hw": whole, "crop_top_lefts": torch.zeros(count, 2), "target_sizes_hw": whole}
        given = ((whole, self._floats(values, key, (count, 2))) for key, whole in usual.items())
        return torch.cat([whole if own is None else own for whole, own in given], dim=1)
