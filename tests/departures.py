"""The one list of places where this project departs from a golden case, each with its Q- or D-number.

A departure is a rule about a case's inputs, so that it also covers cases that are not in our copy. The golden tests
ask ``departure(file, case)``; where it answers, they assert our behaviour instead of the measured one.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """One documented difference: the golden file, its number in the decisions, why, and which cases it concerns."""

    file: str
    number: str
    why: str
    applies: Callable[[dict], bool]


DEPARTURES: list[Departure] = []


def departure(file: str, case: dict) -> Departure | None:
    """The first departure that concerns this case of this golden file, or None."""
    return next((d for d in DEPARTURES if d.file == file and d.applies(case)), None)
