"""What is imported for a training, and what of the large libraries is left out because no training needs it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within a ``with``: diffusers is imported as if bitsandbytes were not there.

    Its quantizers import it, and it imports torch's compiler: a fourth of the time that all imports take, for models
    that were saved in 8 bits, which none here is. The 8-bit optimizers import it themselves, later.
    """
    from diffusers.utils import import_utils

    found = getattr(import_utils, "_bitsandbytes_available", False)
    import_utils._bitsandbytes_available = False
    try:
        yield
    finally:
        import_utils._bitsandbytes_available = found
