"""``--init_word=auto``: of many words that are tried, the vectors start from the one that explains the images best."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

from torch import Tensor, nn

from library.data.concept import Concept
from library.embedding.initialization import initial_rows
from library.embedding.start_words import RankedWord, candidates, names_something, usable_ids, words_of
from library.embedding.tokenizer import init_word_ids, rows_from_word
from library.embedding.vocabulary import Vocabulary
from library.model.runtime import shared_out
from library.setup import Job, Setup
from library.support.errors import UserError
from library.support.progress_bar import progress_bar
from library.training.fixed_loss import PASSES_OF_A_STEP, FixedLoss
from library.training.state import random_states_kept

logger = logging.getLogger(__name__)

_SHARE = 0.05  # of the run's time
# Every word is judged by the loss on few samples, and the best of them by more.
_FIRST_SAMPLES, _SAMPLES = 4, 16
_PART_LEFT = 4  # one word of so many is looked at again
_NEIGHBOURS = 3  # one word of so many is a neighbour of the best
_FEWEST = 4
_CAPTIONS = 1000  # that are read for their words


def check_choice(job: Job) -> None:
    """Say what is going to be tried. Raises UserError where nothing can be chosen; no network is needed for it."""
    if not _is_wanted(job):
        return
    token, tokenizers = job.options.token, job.word.prompts.tokenizers
    given = token.candidates
    for word in given:
        for tokenizer in tokenizers:
            init_word_ids(word, job.word.placeholder.count, tokenizer, option="--init_word_candidates")
    count = _affordable(job)
    if count < _FEWEST:
        raise UserError(
            f"--init_word=auto may take {_SHARE:.0%} of the run's time, and the run is too short to try {_FEWEST} "
            "words in that. Name a word for something close, for example --init_word=girl, or train longer."
        )
    if len(given) > (first := count - count // _NEIGHBOURS):
        logger.warning("--init_word_candidates: the run has the time to try only the first %d.", first)
    logger.info(
        "--init_word=auto: up to %d words are tried on the training images before the first step, which takes about "
        "%d %% of the time of the run.",
        *(min(count, len(_words(job))), 100 * _SHARE),
    )


def with_best_start(job: Job, setup: Setup) -> tuple[Job, Setup]:
    """The job with the word that was chosen, and the setup with vectors that start from it, if it is to be chosen."""
    if not _is_wanted(job):
        return job, setup
    tables = setup.prompt_encoder.tables
    with random_states_kept():  # the run is the same to the bit as one that names the word
        words = _words(job, tables)
        if unknown := [word for word in job.options.token.candidates if word not in words]:
            logger.warning("--init_word_candidates: the model has never learned %s.", ", ".join(unknown))
        ranking = _Trial(job, setup, tables).ranking(words, _affordable(job))
    best, others = ranking[0], ", ".join(f"{one.word} {one.loss:.4f}" for one in ranking[1:4])
    logger.info('The vectors start from "%s", which has the lowest loss: %.4f (%s).', best.word, best.loss, others)
    options = replace(job.options, token=replace(job.options.token, init_word=best.word, init_word_candidates=None))
    count, tokenizers = job.word.placeholder.count, job.word.prompts.tokenizers
    word = replace(job.word, start_ids=[init_word_ids(best.word, count, each) for each in tokenizers])
    starts = initial_rows(word, options.token, job.family, tables, job.data.seed)
    setup.rows.assign(starts)
    results = replace(setup.results, options=options, word=word)
    setup = replace(setup, starts=[start.cpu() for start in starts], results=results, ranking=ranking)
    return replace(job, options=options, word=word, results=results), setup


def _is_wanted(job: Job) -> bool:
    return job.options.token.chooses_start and job.state is None


def _concept(job: Job) -> Concept:
    concept = job.data.concept()
    if concept is None:
        raise ValueError("--init_word=auto without image folders")  # the checks of the options refuse that
    return concept


def _words(job: Job, tables: Sequence[nn.Embedding] = ()) -> list[str]:
    """The words to try, in order; without the ``tables`` of the text encoders some of them may be unknown to them."""
    concept, placeholder, tokenizers = _concept(job), job.word.placeholder, job.word.prompts.tokenizers
    mentioned = words_of(concept.texts(_CAPTIONS), placeholder)

    def usable(word: str) -> object:
        return usable_ids(word, placeholder.count, tokenizers, tables)

    return candidates(job.options.token.candidates, mentioned, usable)


def _affordable(job: Job) -> int:
    """How many words the run has the time to try, as long as all their passes take as long as those of its steps."""
    samples = job.plan.total_steps * job.samples_per_step
    return int(_SHARE * PASSES_OF_A_STEP * samples / (_FIRST_SAMPLES + _SAMPLES / _PART_LEFT))


class _Trial:
    """Measures what the vectors would lose on the training images if they started from a word."""

    def __init__(self, job: Job, setup: Setup, tables: Sequence[nn.Embedding]) -> None:
        self.word, self.rows, self.tables = job.word, setup.rows, tables
        found = partial(job.data.fixed_batches, held_out=False)
        self.whole = FixedLoss.of(setup.task, found, _SAMPLES, job.device)
        self.first = self.whole.first(_FIRST_SAMPLES)
        if not len(self.whole):
            raise UserError("--init_word=auto: no caption holds the token. Name a word, for example --init_word=girl.")
        self.silent = not job.accelerator.is_local_main_process

    def ranking(self, words: Sequence[str], most: int) -> tuple[RankedWord, ...]:
        """Of ``most`` words, neighbours of the best in the vocabulary included, the better part, best first."""
        if not words:
            raise UserError(
                "--init_word=auto: the model knows none of the words of the captions and of --init_word_candidates as "
                "one token. Name a word that it knows, for example --init_word=girl."
            )
        tried = self.losses(words[: most - most // _NEIGHBOURS], self.first, "Trying words")
        near = [word for word in self._near(tried[0].word, most) if word not in {one.word for one in tried}]
        tried += self.losses(near[: most // _NEIGHBOURS], self.first, "Trying their neighbours")
        tried.sort(key=lambda one: one.loss)
        best = [one.word for one in tried[: max(2, len(tried) // _PART_LEFT)]]
        return tuple(self.losses(best, self.whole, "Comparing the best words"))

    def losses(self, words: Sequence[str], over: FixedLoss, title: str) -> list[RankedWord]:
        """The words with their losses, the least first; of several processes each measures a part.

        Words whose loss is no number are left out. Raises UserError where no word is left.
        """

        def measured(part: Sequence[str]) -> list[RankedWord]:
            found = []
            with progress_bar(title, len(part), "word", silent=self.silent) as bar:
                for word in part:
                    found.append(RankedWord(word, self._loss(word, over)))
                    bar.update()
            return found

        found = [one for one in shared_out(words, measured) if isfinite(one.loss)]
        if words and not found:
            raise UserError(
                "--init_word=auto: the loss is NaN or infinite, whatever word the vectors start from. Try "
                "--mixed_precision=bf16 or no, and look at the images and the base model."
            )
        return sorted(found, key=lambda one: one.loss)

    def _loss(self, word: str, over: FixedLoss) -> float:
        with self.rows.holding(self._rows(word)):
            return over.mean()

    def _near(self, word: str, count: int) -> list[str]:
        """Words of the vocabulary that are near to one, by the first text encoder."""
        vocabulary = Vocabulary(self.tables[0], self.word.prompts.tokenizers[0])
        near = vocabulary.nearest(self._rows(word)[0][:1], count)[0]
        return [neighbour.word for neighbour in near if names_something(neighbour.word) and self._ids(neighbour.word)]

    def _ids(self, word: str) -> list[list[int]] | None:
        return usable_ids(word, self.word.placeholder.count, self.word.prompts.tokenizers, self.tables)

    def _rows(self, word: str) -> list[Tensor]:
        """The vectors that start from a word that can be used, [N, D] per text encoder."""
        ids = self._ids(word) or []
        return [rows_from_word(table.weight, each, word) for table, each in zip(self.tables, ids, strict=True)]
