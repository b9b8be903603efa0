"""Which samples make which batch: the order of an epoch, and each process's share of it.

Everything follows from (seed, epoch): every image comes exactly as often as its repeats say, a batch never mixes
buckets, and the order is the same for any number of processes and loader workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class BatchRef:
    """One batch to load: which samples, and everything their random choices derive from.

    ``position`` is the place of the first sample in the epoch, ``epoch`` counts from 1, ``step`` is the number of
    optimizer steps done before, ``weight`` what the batch's mean loss is multiplied by (see ``BatchSampler``). A batch
    without samples has weight 0: it keeps the number of batches equal over the processes.
    """

    indices: tuple[int, ...]
    epoch: int
    position: int
    step: int
    weight: float


class EpochOrder:
    """All samples of an epoch in batches: within buckets, buckets of all datasets mixed."""

    def __init__(self, bucket_of: np.ndarray, repeats: np.ndarray, batch_sizes: np.ndarray, seed: int) -> None:
        """``bucket_of`` int [n] and ``repeats`` int [n] by image; ``batch_sizes`` int [buckets]; any integer seed."""
        self.seed = seed & 0xFFFF_FFFF_FFFF_FFFF
        pictures = np.argsort(bucket_of, kind="stable")
        self._samples = np.repeat(pictures, repeats[pictures]).astype(np.int32)
        counts = np.bincount(bucket_of, weights=repeats, minlength=len(batch_sizes)).astype(np.int64)
        self._bucket_ends = np.cumsum(counts)
        starts = self._bucket_ends - counts
        self._batch_starts = np.concatenate(
            [np.arange(*run) for run in zip(starts, self._bucket_ends, batch_sizes, strict=True)] or [np.arange(0)]
        )
        self._batch_ends = np.append(self._batch_starts[1:], self.num_samples)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch: every image as often as it is repeated."""
        return len(self._samples)

    @property
    def num_batches(self) -> int:
        """Batches of one epoch, over all processes."""
        return len(self._batch_starts)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of epoch ``number`` (int32 [samples]) and where each batch ends in them (int64 [batches])."""
        rng = np.random.default_rng([self.seed, number])
        shuffled = self._samples.copy()
        start = 0
        for end in self._bucket_ends:
            rng.shuffle(shuffled[start:end])
            start = end
        return self._gather(shuffled, rng.permutation(self.num_batches))

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`epoch`, without any shuffling."""
        return self._gather(self._samples, np.arange(self.num_batches))

    def _gather(self, samples: np.ndarray, batches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = (self._batch_ends - self._batch_starts)[batches]
        ends = np.cumsum(lengths)
        shift = np.repeat(self._batch_starts[batches] - (ends - lengths), lengths)
        return samples[shift + np.arange(len(samples))], ends


class BatchSampler:
    """Yields the batches of one process, one :class:`BatchRef` each; iterate it again for every epoch.

    Consecutive batches go to different processes, so in round r the processes hold batches r·P to r·P + P - 1. Where
    the last round has too few, some processes get an empty batch. ``accumulation`` rounds make an optimizer step (fewer
    at the end of an epoch), and the weights are such that the sum over a step's rounds of (weight x mean loss of the
    batch), averaged over the processes, is the mean over all samples of the step.
    """

    def __init__(
        self,
        order: EpochOrder,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.order = order
        self.process_index = process_index
        self.num_processes = num_processes
        self.accumulation = accumulation
        self.shuffle = shuffle
        self.set_epoch(1, 0)

    def set_epoch(self, epoch: int, steps_done: int, skip: int = 0) -> None:
        """Choose the epoch (from 1), with the optimizer steps done before it.

        ``skip`` leaves out that many batches of this process that an interrupted run has used already.
        """
        self.epoch, self.steps_done, self.skip = epoch, steps_done, skip

    def __len__(self) -> int:
        """Batches per process and epoch, empty ones included."""
        return -(-self.order.num_batches // self.num_processes)

    def __iter__(self) -> Iterator[BatchRef]:
        epoch, steps_done, skip = self.epoch, self.steps_done, self.skip
        samples, ends = self.order.epoch(epoch) if self.shuffle else self.order.in_order()
        starts = np.append(0, ends[:-1])
        weights = self._weights(ends - starts)
        for round_number in range(skip, len(self)):
            batch = round_number * self.num_processes + self.process_index
            step = steps_done + round_number // self.accumulation
            if batch >= len(ends):
                yield BatchRef((), epoch, len(samples), step, 0.0)
                continue
            indices = tuple(samples[starts[batch] : ends[batch]].tolist())
            yield BatchRef(indices, epoch, int(starts[batch]), step, float(weights[batch]))

    def _weights(self, lengths: np.ndarray) -> np.ndarray:
        """P x (samples of the batch) / (samples of its optimizer step), by batch."""
        step_of = np.arange(len(lengths)) // (self.num_processes * self.accumulation)
        return self.num_processes * lengths / np.bincount(step_of, weights=lengths)[step_of]
