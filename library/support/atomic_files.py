"""Files and folders that appear whole or not at all, and never in the place of what must be kept."""

import errno
import io
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from library.support.errors import UserError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # --help does without Pillow
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

# The names of what is not finished: the final one, the process, and more where nobody is to guess it.
_TEMPORARY = re.compile(r"\.(.+)\.(\d+)(-[0-9a-f]{8})?\.tmp")
_SECONDS_OF_A_WRITE = 600  # at most, whatever the disk


def write_atomically(path: Path, content: bytes, *, keep_old: bool = False) -> Path | None:
    """Put ``content`` in place at once: a reader, a crash or a full disk never meets half a file.

    The folder is made if need be. With ``keep_old`` what stands in the place moves to the next free number when the new
    file is complete, which is said, and its new path is returned. Raises :class:`UserError` when the system refuses.
    """
    with _completed(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_through(temporary, content)
        kept = _make_room(path) if keep_old else None
        temporary.replace(path)
    return kept


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> Path | None:
    """Make ``folder`` with these files in it at once, as :func:`write_atomically` does with a file.

    What stands in the place is always kept: it moves to the next free number, and its new path is returned.
    """
    with _completed(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            _write_through(temporary / name, content)
        kept = _make_room(folder)
        temporary.rename(folder)
    return kept


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; where that is cut short, no part of it is left under its name."""
    temporary = _beside(folder)
    folder.rename(temporary)
    shutil.rmtree(temporary)


@contextmanager
def _completed(path: Path) -> Iterator[Path]:
    """Within a ``with``: a place beside ``path`` to make it in; nothing is left there. Raises UserError for OSError."""
    temporary = _beside(path)
    try:
        yield temporary
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        remove_quietly(temporary)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make_room(path: Path) -> Path | None:
    """Give what is at ``path`` the next free number: ``mychar-1.safetensors``; None where there is nothing."""
    if not os.path.lexists(path):
        return None
    ending = "" if path.is_dir() else path.suffix
    stem = path.name.removesuffix(ending)
    free = next(new for number in count(1) if not os.path.lexists(new := path.with_name(f"{stem}-{number}{ending}")))
    move_away(path, free)
    return free


def move_away(path: Path, kept: Path) -> None:
    """Give a file or a folder of another run, whose name is needed, the name ``kept``, and say so."""
    path.rename(kept)
    logger.warning("%s of an earlier run was kept: it is now %s.", path, kept.name)


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror or error}. Check the folder and the disk.")


def sweep(folder: Path, name: str) -> None:
    """Remove what killed processes left unfinished in ``folder``, of files whose names begin with ``name``."""
    ours = re.compile(rf"{re.escape(name)}(?![A-Za-z0-9])")
    for path, found in _abandoned(folder):
        if ours.match(found[1]):
            remove_quietly(path)


def sweep_replacements(files: Collection[Path]) -> None:
    """Remove what killed processes left of a :func:`replacement` of one of these files.

    What has changed a short while ago stays: other machines, whose processes have numbers of their own, may be writing
    to a folder that they share with this one.
    """
    for folder in {file.parent for file in files}:
        for path, found in _abandoned(folder):
            if found[3] and folder / found[1] in files and not path.is_dir() and _is_old(path):
                remove_quietly(path)


def _abandoned(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Temporary files and folders whose process is gone, each with the parts of its name."""
    for path in list(folder.glob(".*.tmp")):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_at_work(int(found[2])):
            yield path, found


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > _SECONDS_OF_A_WRITE
    except OSError:  # somebody else has removed it
        return False


def _is_at_work(process: int) -> bool:
    """Whether another process of this number runs; our own has begun nothing yet where this is asked."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where there is no asking: the signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def write_png(path: Path, picture: "Image", notes: "PngInfo | None" = None, *, keep_old: bool = False) -> Path | None:
    """Write an image, with notes in the file if there are any; see :func:`write_atomically`."""
    content = io.BytesIO()
    picture.save(content, format="png", pnginfo=notes)
    return write_atomically(path, content.getvalue(), keep_old=keep_old)


def remove_quietly(path: Path) -> None:
    """Remove a file or a folder if it is there and the system allows it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
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
        remove_quietly(temporary)
