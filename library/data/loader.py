"""Batches in the order of an epoch, made by worker processes."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from library.data.batch_order import BatchRef, BatchSampler, EpochOrder
from library.data.batches import Batch
from library.support.errors import UserError
from library.support.processes import usable_cores

_T = TypeVar("_T")


class BatchLoader:
    """The batches of one process, epoch by epoch: call :meth:`set_epoch`, then iterate."""

    def __init__(
        self,
        source: Dataset[Batch],
        sampler: BatchSampler,
        *,
        workers: int = 0,
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """``workers`` processes at most, which live on between epochs if ``persistent``; see torch's ``DataLoader``."""
        self.sampler = sampler
        # torch draws a base seed for its workers; from its global generator that would disturb the training.
        self._generator = torch.Generator()
        workers = min(workers, usable_cores(), len(sampler))
        self._loader = DataLoader(
            _Handing(source),
            sampler=sampler,
            batch_size=None,  # the sampler's items are whole batches already
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            generator=self._generator,
        )

    def set_epoch(self, epoch: int, steps_done: int, skip: int = 0) -> None:
        """Choose the epoch (from 1), the optimizer steps done before it, and how many of its batches to leave out."""
        self.sampler.set_epoch(epoch, steps_done, skip)
        self._generator.manual_seed(epoch)  # whatever epochs came before in this process

    def __len__(self) -> int:
        """Batches of this process in a whole epoch; the same number in every process."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch. Raises UserError for an image that cannot be read any more."""
        for found in self._loader:
            if isinstance(found, UserError):
                raise found
            yield found


class _Handing(Dataset[Batch | UserError]):
    """Hands a user's mistake over as a value: torch would put the worker's traceback into its text."""

    def __init__(self, source: Dataset[Batch]) -> None:
        self.source = source

    def __getitem__(self, ref: BatchRef) -> Batch | UserError:
        try:
            batch: Batch = self.source[ref]
            return batch
        except UserError as error:
            return UserError(str(error))


def _as_it_is(item: _T) -> _T:
    return item


def make_loader(
    order: EpochOrder,
    source: Dataset[Batch],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    accumulation: int = 1,
    **working: Any,
) -> BatchLoader:
    """The batches of one process in ``order``, which ``source`` makes; ``working`` says how: see ``BatchLoader``."""
    sampler = BatchSampler(order, process_index=process_index, num_processes=num_processes, accumulation=accumulation)
    return BatchLoader(source, sampler, **working)
