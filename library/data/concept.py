"""The images that teach the word, beside the training: what the learning report compares with."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.batch_order import BatchSampler
from library.data.batches import Batch
from library.data.buckets import Size
from library.data.captions import token_presence
from library.data.image_table import ImageTable
from library.data.images import frame_image
from library.data.latent_cache import LatentCache
from library.data.loader import BatchLoader
from library.data.samples import SampleSource, deterministic_caption
from library.embedding.tokenizer import PromptTokenizer
from library.support.errors import UserError

# Epoch of batches that are not trained on: no run gets as far, so their noise is never trained on.
FAR_AWAY = 1_000_000_000
# Of lines and wildcards, in search of a caption that holds the token.
_DRAWS = 64


@dataclass(frozen=True)
class Concept:
    """The images of ``table`` whose captions can hold the token, and those that are ``held_out`` of the training.

    ``templates`` replace all captions; ``cache`` (filled) gives latents in place of pixels.
    """

    table: ImageTable
    held_out: ImageTable | None
    prompts: PromptTokenizer
    templates: Sequence[str] | None
    seed: int
    cache: LatentCache | None

    @property
    def batch_size(self) -> int:
        """The largest of all datasets."""
        return max(config.batch_size for config in self.table.configs)

    def fixed_batches(self, samples: int, *, held_out: bool) -> Iterator[Batch]:
        """The same batches at every call, of the images whose caption can hold the token: held-out ones, or others.

        ``samples`` samples or a few more, if there are any: the images come again with other noise until it is so.
        Nothing in their captions is shuffled or dropped; lines and wildcards may still leave the word out.
        """
        found = self.held_out if held_out else self.table
        if found is None:
            return
        table = found.with_deterministic_captions()
        order = table.only(self._teaching(table)).order(self.seed)
        if not order.num_samples:
            return
        source = SampleSource(table, self.prompts, templates=self.templates, seed=self.seed, cache=self.cache)
        loader = BatchLoader(source, BatchSampler(order))
        given = 0
        for passes in itertools.count():
            loader.set_epoch(FAR_AWAY + passes, 0)
            for batch in loader:
                yield batch
                given += len(batch)
                if given >= samples:
                    return

    def pictures(self, limit: int) -> list[np.ndarray]:
        """Up to ``limit`` of the images that teach the word, as framed for training: uint8 [H, W, 3]."""
        teaching = self._teaching(self.table)
        chosen = _spread(teaching, min(limit, len(teaching)))
        entries = map(self.table.__getitem__, chosen)
        return [frame_image(entry.path, entry.framing).pixels for entry in entries]

    def texts(self, limit: int) -> list[str]:
        """The captions, as they are in their files, of up to ``limit`` of the images that teach the word."""
        if self.templates:
            return []
        teaching = self._teaching(self.table)
        return [str(self.table[index].caption) for index in _spread(teaching, min(limit, len(teaching)))]

    def captions(self, count: int) -> list[tuple[str, Size]]:
        """``count`` captions that hold the token, the word expanded, with their images' (width, height).

        Nothing in them is shuffled or dropped. The images take turns. Raises UserError where the length limit cuts
        the word off everywhere.
        """
        captions = []
        for number, index in enumerate(_spread(self._teaching(self.table), count)):
            entry = self.table[index]
            draws = (
                deterministic_caption(entry, self.prompts, self.templates, number * _DRAWS + n) for n in range(_DRAWS)
            )
            caption = next((text for text in draws if self.prompts.hold_word(self.prompts.encode(text))), None)
            if caption is not None:
                captions.append((caption, entry.bucket))
        if not captions:
            raise UserError("No caption holds the token within the length limit when its tags are not shuffled.")
        return list(itertools.islice(itertools.cycle(captions), count))

    def _teaching(self, table: ImageTable) -> list[int]:
        """Numbers of the images whose caption can hold the token; with templates all but regularisation images."""
        word = self.prompts.placeholder
        return [
            number
            for number, entry in enumerate(table)
            if not entry.subset.is_reg
            and (self.templates or token_presence(entry.caption, entry.subset.captions, word) != "never")
        ]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of the numbers, from all over them; they take turns where there are fewer."""
    given = len(numbers)
    return [numbers[i * given // count if given > count else i % given] for i in range(count)]
