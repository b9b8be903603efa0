"""The one list of places where this project departs from a golden case, each with its Q- or D-number.

A departure is a rule about a case's inputs, so that it also covers cases that are not in our copy. The golden tests
ask ``departure(file, case)``; where it answers, they assert our behaviour instead of the measured one.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Departure:
    """One documented difference: the golden file, its number in the decisions, why, and which cases it concerns."""

    file: str
    number: str
    why: str
    applies: Callable[[dict], bool]


def _pieces_where_sd_scripts_finds_the_names(case: dict) -> list[str]:
    """Split at the names anywhere in the text, longest first, minding case: what added tokens do."""
    names = sorted(case["added_tokens"], key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, names)) + ")", case["caption"])


def _names_are_found_elsewhere(case: dict) -> bool:
    names = sorted(case["added_tokens"], key=len, reverse=True)
    whole_words = rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, names))})(?![A-Za-z0-9])"
    return re.split(whole_words, case["caption"], flags=re.IGNORECASE) != _pieces_where_sd_scripts_finds_the_names(case)


@functools.cache
def _whole_words() -> frozenset[str]:
    vocabulary = json.loads((Path(__file__).parents[1] / "configs/tokenizer/vocab.json").read_text(encoding="utf-8"))
    return frozenset(piece.removesuffix("</w>") for piece in vocabulary if piece.endswith("</w>"))


DEPARTURES: list[Departure] = [
    Departure(
        "tokenize", "Q29", "the word is matched in any case and only as a whole word", _names_are_found_elsewhere
    ),
    Departure(
        "add_tokens",
        "Q45",
        "a name that already is a whole word of the vocabulary is refused",
        lambda case: any(name.lower() in _whole_words() for name in case["names"]),
    ),
    Departure(
        "load_weights",
        "Q22",
        "a file for two encoders is refused by a model with one; sd-scripts takes its first tensor",
        lambda case: not case["sdxl"] and "clip_l" in str(case["content"]) and "clip_g" in str(case["content"]),
    ),
    Departure("sai_metadata", "D1", "the version is ours; more keys where the user gave none", lambda case: True),
    Departure("saved_file", "D1", "torch files hold AUTOMATIC1111's fields too; more metadata keys", lambda case: True),
]


def departure(file: str, case: dict) -> Departure | None:
    """The first departure that concerns this case of this golden file, or None."""
    return next((d for d in DEPARTURES if d.file == file and d.applies(case)), None)
