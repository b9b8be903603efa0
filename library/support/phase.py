"""Long work without a progress bar: said when it begins, and afterwards how long it took."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_WORTH_SAYING = 1.0  # seconds


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Within a ``with``: "Loading the U-Net." is said and, where one had to wait, "… took 12 s." at its end."""
    logger.info("%s.", what)
    began = time.monotonic()
    yield
    if (seconds := time.monotonic() - began) >= _WORTH_SAYING:
        logger.info("%s took %s.", what, duration(seconds))


def duration(seconds: float) -> str:
    """A time as people say it: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
