"""Files that readers may ask for more than they hold."""

import io
import os
from pathlib import Path


class BoundedFile(io.BufferedReader):
    """A file opened for reading, of which no read makes room for more than the whole.

    Python makes room for all that it is asked for, and a damaged image can ask for gigabytes.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises OSError as ``open`` does."""
        super().__init__(io.FileIO(path))
        self._length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """As every file's."""
        return super().read(size if size is None or size < 0 else min(size, self._length))
