"""The SHA-256 of a large file, computed beside other work."""

import hashlib
import logging
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import BinaryIO

from library.support.phase import phase

logger = logging.getLogger(__name__)

_SILENT = 1.0  # seconds to wait without a word
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000  # bytes


def legacy_hash(content: BinaryIO) -> str:
    """The old short hash of web UIs, of 64 KB from 1 MB on: quickly made, but not every file has its own."""
    content.seek(_LEGACY_START)
    return hashlib.sha256(content.read(_LEGACY_LENGTH)).hexdigest()[:8]


class FileHash:
    """The SHA-256 of a file; reading it takes one or two seconds per GB, and much more from a slow disk."""

    def __init__(self, path: Path) -> None:
        """Nothing is read before :meth:`begin` or :meth:`get`."""
        self.path = path
        self._found: Future[str | None] = Future()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Read the file in a thread, if that has not begun yet; the end of the process does not wait for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="file hash", daemon=True)
            self._thread.start()

    def get(self, *, wait: bool = True) -> str | None:
        """The hash in hexadecimal; None where the file cannot be read, and without ``wait`` while it is not known."""
        if not wait and not self._found.done():
            return None
        self.begin()
        if not wait_for([self._found], timeout=_SILENT).done:
            with phase(f"Waiting for the SHA-256 of {self.path.name}"):
                return self._found.result()
        return self._found.result()

    def _read(self) -> None:
        found = None
        try:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except Exception as error:  # no training is lost for a hash
            logger.warning("The SHA-256 of %s is missing in what is saved: it cannot be read (%s).", self.path, error)
        finally:
            self._found.set_result(found)
