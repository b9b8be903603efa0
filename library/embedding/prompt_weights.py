"""The attention syntax of prompts: ``(more)``, ``(exactly so much:1.3)``, ``[less]``, and a backslash before a sign."""

import itertools
import re

import numpy as np

_FACTOR = {"(": 1.1, "[": 1 / 1.1}  # by what one pair of brackets without a number multiplies
_OPENING = {")": "(", "]": "["}

_PIECE = re.compile(
    r"""
    \\ (?P<escaped> [()\[\]\\]? )  # the sign after a backslash stands for itself; a lone backslash for nothing
    | : (?P<weight> [+-]? (?: \d+ \.? \d* | \. \d+ ) ) \)
    | (?P<bracket> [()\[\]] )
    | [^\\()\[\]:]+
    | :
    """,
    re.VERBOSE,
)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Cut a prompt into parts and their weights, in order; neighbours of equal weight are one part.

    Weights multiply where brackets are nested. A bracket that is never closed reaches to the end, one that was never
    opened is text, and so is a number that cannot be read. An empty prompt is one empty part.
    """
    texts: list[str] = []
    factors: list[tuple[int, int, float]] = []  # from which text to before which other one, and by how much
    open_at: dict[str, list[int]] = {"(": [], "[": []}
    for piece in _PIECE.finditer(text):
        bracket = piece["bracket"]
        opening = "(" if piece["weight"] else _OPENING.get(bracket)
        if bracket in open_at:
            open_at[bracket].append(len(texts))
        elif opening and open_at[opening]:
            factors.append((open_at[opening].pop(), len(texts), float(piece["weight"] or _FACTOR[opening])))
        else:
            texts.append(piece[0] if piece["escaped"] is None else piece["escaped"])
    factors += [(start, len(texts), _FACTOR[opening]) for opening, starts in open_at.items() for start in starts]
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", invalid="ignore"):
        for start, end, factor in factors:
            weights[start:end] *= factor
    parts = itertools.groupby(zip(texts, weights.tolist(), strict=True), key=lambda part: part[1])
    return [("".join(text for text, _ in group), weight) for weight, group in parts] or [("", 1.0)]


def escape(text: str) -> str:
    """Write ``text`` so that :func:`parse_weights` gives it back as it is."""
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
