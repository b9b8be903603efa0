"""The first thing that a training says: what it is, in a line for each part of it."""

from collections.abc import Iterable, Mapping


def start_block(details: Iterable[tuple[str, str]], places: Mapping[str, str | None]) -> str:
    """The ``details`` of a run and its ``places``, by their labels; those that are None are left out."""
    rows = [*details, *((label, place) for label, place in places.items() if place is not None)]
    longest = max(len(label) for label, _ in rows)
    return "\n".join(["This run:", *(f"  {label.lower():<{longest}}  {value}" for label, value in rows)])
