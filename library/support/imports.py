"""How the large libraries are imported: what no training needs is left out, and no time is lost on the way."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within a ``with``: the large libraries are imported without bitsandbytes and without a search for garbage.

    diffusers' quantizers import bitsandbytes, and that imports torch's compiler: a fourth of the time that all imports
    take, for models that were saved in 8 bits, which none here is. The 8-bit optimizers import it themselves, later.
    The half million objects that imports make stay until the process ends. Python would go through them over and over
    while they are made, for another fourth of the time, and at each of its searches afterwards.
    """
    searching, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with _without_bitsandbytes():
            yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if searching:
            gc.enable()


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    from diffusers.utils import import_utils

    found = getattr(import_utils, "_bitsandbytes_available", False)
    import_utils._bitsandbytes_available = False
    try:
        yield
    finally:
        import_utils._bitsandbytes_available = found
