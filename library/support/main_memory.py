"""The main memory of this process, given back where the C library would keep it for later.

glibc takes blocks of up to 32 MB, as most of a model's weights are, out of one heap. A place that becomes free there is
soon held by something small, and the next large block makes the heap grow: gigabytes while weights come and go.
"""

import ctypes
import gc
from contextlib import suppress

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_LARGE = 2**20
# Windows has no CDLL(None), and only glibc the functions.
_ELSEWHERE = (OSError, AttributeError, TypeError)


def give_back() -> None:
    """Return what was freed to the system."""
    gc.collect()
    with suppress(*_ELSEWHERE):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """From now on return every freed block of a megabyte or more to the system at once, for a little time each."""
    with suppress(*_ELSEWHERE):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
