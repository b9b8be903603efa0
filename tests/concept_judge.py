"""Judges an embedding of the quickstart's character from outside: diffusers draws, the world's own measures look."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from test_trainer import load_as_printed

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import check_miniatures  # noqa: E402
import measures  # noqa: E402
import world  # noqa: E402

from library.output.concept_distance import concept_distance  # noqa: E402

CONCEPT = [picture for picture, _ in world.character_concept()]
CAPTIONS = [caption for _, caption in world.character_concept()]
# The distance of one image scatters by 3 % of the init word's, so the mean of eight by 1 %.
SEEDS = list(range(8))


@dataclass(frozen=True)
class Verdict:
    """How 8 images compare with the concept: colour distance (0 is best) and overlap of outlines (1 is best)."""

    distance: float
    iou: float


def open_pipeline(family: str, embedding: Path | None = None) -> DiffusionPipeline:
    """diffusers' pipeline of a miniature; with an embedding file loaded as the end of a run says."""
    pipeline = check_miniatures.open_pipeline(QUICKSTART / family)
    if embedding is not None:
        load_as_printed(pipeline, family, embedding)
    return pipeline


def draw(pipeline: DiffusionPipeline, prompts: list[str]) -> list[np.ndarray]:
    """One image for each prompt, from the first seeds."""
    return check_miniatures.generate(pipeline, prompts, SEEDS[: len(prompts)])


def captions_with(word: str) -> list[str]:
    """The concept's 8 captions with another word in place of the new one."""
    return [caption.replace("mychar", word) for caption in CAPTIONS]


def judge(pictures: list[np.ndarray]) -> Verdict:
    """Compare images with the concept's."""
    return Verdict(concept_distance(pictures, CONCEPT), measures.shape_iou(pictures, CONCEPT))


def known_words(pipeline: DiffusionPipeline) -> list[str]:
    """Every word of the miniature's vocabulary that it has learned: the others' rows are zero."""
    table = pipeline.text_encoder.get_input_embeddings().weight
    ids = table.abs().amax(dim=1).nonzero().flatten().tolist()
    words = [pipeline.tokenizer.decode([i]).strip() for i in ids]
    return sorted({word for word in words if word.isalpha()})


def best_known_word(pipeline: DiffusionPipeline, finalists: int = 3) -> tuple[str, float]:
    """The single known word whose images are nearest to the concept, and their distance.

    All words compete with two images each that are drawn in a few steps, the best of them with all eight in full.
    """
    words = known_words(pipeline)
    # In large batches: one word's images alone take three times as long.
    prompts = [caption for word in words for caption in captions_with(word)[:2]]
    images = check_miniatures.generate(pipeline, prompts, SEEDS[:2] * len(words), steps=6)
    first = {word: judge(images[2 * place : 2 * place + 2]).distance for place, word in enumerate(words)}
    best = sorted(first, key=first.get)[:finalists]
    full = {word: judge(draw(pipeline, captions_with(word))).distance for word in best}
    word = min(full, key=full.get)
    return word, full[word]
