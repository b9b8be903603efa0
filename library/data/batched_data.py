"""What a training asks of its data, wherever the batches come from."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch

from library.data.batch_order import EpochOrder
from library.data.batches import Batch
from library.data.buckets import Size
from library.data.concept import Concept
from library.data.image_table import ImageTable
from library.data.latent_cache import LatentCache
from library.data.latent_entry import LatentEntry
from library.data.loader import BatchLoader
from library.data.preflight import Report
from library.embedding.tokenizer import PromptTokenizer


class BatchedData(Protocol):
    """Image folders (``TrainingData``) and ``--dataset_class`` (``CustomData``) have all of this."""

    @property
    def prompts(self) -> PromptTokenizer:
        """Makes ids of captions."""

    @property
    def seed(self) -> int:
        """All random choices derive from it."""

    @property
    def templates(self) -> Sequence[str] | None:
        """The sentences that replace all captions, if any."""

    @property
    def order(self) -> EpochOrder:
        """Which samples make which batch of an epoch."""

    @property
    def resolution(self) -> Size:
        """(width, height) that an embedding's metadata names."""

    @property
    def sizes(self) -> Collection[Size]:
        """(width, height) of the batches' images, as far as they are known."""

    @property
    def inpainting(self) -> bool:
        """Whether random masks hide parts of the images."""

    @property
    def table(self) -> ImageTable | None:
        """The images, where they were found in folders."""

    @property
    def fingerprint(self) -> str:
        """Another one for other captions, repeats, sizes or rules, as far as they are known."""

    @property
    def contents(self) -> str:
        """Another one for other images, latents or masks; "" where they are not known. It may read every file."""

    def check(self) -> Report:
        """What there is and what looks wrong. Raises UserError where a training would be pointless."""

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
        """The batches of one process, in another order every epoch.

        ``max_steps`` (of the whole run) scales a token warm-up given as a share.
        """

    def validation_loader(self, *, process_index: int = 0, num_processes: int = 1) -> BatchLoader | None:
        """What is held out, the same in every pass; None where nothing is.

        The sum of (weight x mean loss) over its batches, averaged over the processes, is the mean over all samples.
        """

    def latent_entries(self) -> list[LatentEntry]:
        """What the latent cache must hold."""

    def use_cache(self, cache: LatentCache) -> None:
        """Take latents from ``cache`` (filled) instead of pixels, in loaders made from now on. Raises UserError."""

    def first_prompts(self) -> Iterator[list[torch.Tensor]]:
        """Ids of captions that are known beforehand, int64 [1, chunks, 77] per tokenizer."""

    def fixed_batches(self, samples: int, *, held_out: bool) -> Iterator[Batch]:
        """The same batches at every call, with noise that is never trained on; see ``Concept.fixed_batches``.

        Of held-out images, or of those that are trained on; nothing where there are none.
        """

    def concept(self) -> Concept | None:
        """The images that teach the word, for the learning report; None where they are not known."""
