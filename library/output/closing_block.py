"""The last thing on the screen: what a run has come to, and where everything is."""

import shutil
import textwrap
from collections.abc import Mapping

from library.output.verdict import Verdict


def closing_block(verdict: Verdict, places: Mapping[str, str | None]) -> str:
    """The verdict, and a line for each of the ``places`` by its label; those that are None are left out.

    The verdict's sentence is broken between words; a path is never broken.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    rows = {label: place for label, place in places.items() if place is not None}
    longest = max(map(len, rows), default=0)
    return "\n".join(
        [textwrap.fill(str(verdict), width), "", *(f"  {label:<{longest}}  {place}" for label, place in rows.items())]
    )
