"""Files that appear whole or not at all."""

import errno
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` in place at once: a reader, a crash or a full disk never meets half a file.

    The folder is made if need be. Raises :class:`UserError` when the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Check --output_dir.") from error
    finally:
        _remove_quietly(temporary)


def write_png(path: Path, picture: Image, notes: PngInfo | None = None) -> None:
    """Write a picture, with notes in the file if there are any; see :func:`write_atomically`."""
    content = io.BytesIO()
    picture.save(content, format="png", pnginfo=notes)
    write_atomically(path, content.getvalue())


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # The folder itself could not be made or entered; that has been reported already.
        return


@contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """Within a ``with``: a new file that takes the place of ``path`` at its end, if all went well.

    Raises OSError, also where ``path`` is a symbolic link: what is behind one is not the caller's to write.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, and nothing is written through one", str(path))
    # Unforeseeable, and new ("x"): a link that waits under the name is not followed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as file:
            yield file
        temporary.replace(path)
    finally:
        _remove_quietly(temporary)
