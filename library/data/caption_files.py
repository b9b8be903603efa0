"""Captions beside the images: which file belongs to an image, and which of its lines count."""

# Paths are plain strings here: of very many, Path objects take several times the room and time.
# ruff: noqa: PTH122, PTH123

import os
from collections.abc import Collection, Sequence

from library.support.errors import UserError

# Tried in this order when no extension is asked for.
DEFAULT_EXTENSIONS = (".caption", ".txt")

LARGEST_CAPTION = 2**20  # bytes

# Face detectors name their cut-outs `name_cx_cy_w_h`; such an image may share the caption of `name`.
_FACE_PIECES = 4


def caption_extensions(extension: str | None, class_tokens: str | None = None) -> tuple[str, ...]:
    """The file extensions to look for: the given one, with a dot before it, or both usual ones when it is unset.

    Where class tokens stand in for captions, only ``.caption`` is, as in sd-scripts: .txt files that happen to lie
    there (tags of a regularisation set, licences) never outvote what was asked for.
    """
    if not extension:
        return DEFAULT_EXTENSIONS[:1] if class_tokens else DEFAULT_EXTENSIONS
    return (extension if extension.startswith(".") else f".{extension}",)


def caption_name(image_name: str, extensions: Sequence[str], present: Collection[str]) -> str | None:
    """The caption file of an image among the file names ``present`` in its folder, or None.

    The image's own name comes first; a name with at least five pieces joined by ``_`` is then tried without its last
    four (the numbers of a face detector). Only the file name counts, never the folder's.
    """
    stem = os.path.splitext(image_name)[0]
    for extension in extensions:
        if stem + extension in present:
            return stem + extension
    pieces = stem.split("_")
    if len(pieces) > _FACE_PIECES:
        shared = "_".join(pieces[:-_FACE_PIECES])
        return next((shared + extension for extension in extensions if shared + extension in present), None)
    return None


def read_caption(path: str, *, all_lines: bool) -> str:
    """The caption in a file: its first line that is not blank, or with ``all_lines`` all of these, joined by newlines.

    Lines are stripped and a byte order mark is taken off; a file without text gives "". Raises UserError, naming the
    file, when it cannot be read or is not UTF-8.
    """
    try:
        # Unbuffered: one system call per small file is what makes ten thousand of them quick.
        with open(path, "rb", buffering=0) as file:
            content = file.read(LARGEST_CAPTION + 1)
        if len(content) > LARGEST_CAPTION:
            raise UserError(
                f'The caption file "{path}" has more than {LARGEST_CAPTION:,} bytes, so it is not a caption. Remove it.'
            )
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f'The caption file "{path}" is not UTF-8 text (byte {error.start} cannot be decoded). '
            "Save it again as UTF-8 in a text editor."
        ) from error
    except OSError as error:
        raise UserError(f'The caption file "{path}" cannot be read: {error.strerror or error}.') from error
    # Not str.splitlines(), which also cuts at rare signs that may stand inside a caption.
    lines = [stripped for line in text.replace("\r", "\n").split("\n") if (stripped := line.strip())]
    if not lines:
        return ""
    return "\n".join(lines) if all_lines else lines[0]
