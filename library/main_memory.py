"""The main memory of this process, given back where the C library would keep it for later."""

import ctypes
import gc
from contextlib import suppress


def give_back() -> None:
    """Return what was freed to the system.

    glibc keeps freed blocks of up to 32 MB, and most of a model's tensors are smaller. Elsewhere this does nothing more
    than collect what refers to itself.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # Windows has no CDLL(None), macOS no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
