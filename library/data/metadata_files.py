"""JSON files that stand in for caption files: fine-tuning metadata, and a folder's own ``metadata_cache.json``."""

import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from library.support.atomic_files import replacement, sweep_replacements
from library.support.errors import UserError
from library.support.text_files import LARGEST_METADATA, is_unicode, parse_json, read_text

logger = logging.getLogger(__name__)

CACHE_NAME = "metadata_cache.json"
# File names are bytes: one that is not UTF-8 comes and goes through Python in this way.
_ODD_NAMES = "surrogateescape"
NO_FILE = "-"  # the stamp of a caption file that is not there
# Hundreds of thousands of images take less; more would fill the memory before it is seen to be nonsense.
_LARGEST_CACHE = 100 * 2**20
_LONGEST_SIDE = 2**31 - 1
Entry = dict[str, Any]  # what a file says of an image


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One image of a metadata file: its key (a path), its caption with the tags, and its size if one is noted."""

    key: str
    caption: str
    image_size: tuple[int, int] | None


def read_metadata(path: str, *, separator: str, all_lines: bool) -> list[MetadataEntry]:
    """The images of a fine-tuning metadata file: a JSON object by image, or ``.jsonl`` with one image a line.

    Tags follow the caption after ``separator``, which is used as it is, without a space. Without ``all_lines`` only the
    caption's first line counts, so that is where the tags go; with it every line that is not blank gets them. Raises
    UserError naming the file, the place and the key.
    """
    entries = []
    for key, values, place in _raw_entries(path):
        caption = _text(values, "caption", place)
        tags = _text(values, "tags", place)
        entries.append(MetadataEntry(key, _join(caption, tags, separator, all_lines), _size(values, place)))
    return entries


def _raw_entries(path: str) -> Iterator[tuple[str, Entry, str]]:
    """Yield (key, values, place for messages) of every image in the file."""
    what = f'The metadata file "{path}"'
    text = read_text(path, what, largest=LARGEST_METADATA)
    if path.lower().endswith(".jsonl"):
        yield from _jsonl_entries(path, text)
        return
    content = parse_json(text, what, odd_names=True)
    if not isinstance(content, dict):
        raise UserError(
            f'{what} must hold one JSON object, {{"image": {{"caption": "…"}}, …}}, '
            f"but it holds a {type(content).__name__}."
        )
    for key, values in content.items():
        place = f'The entry "{key}" of the metadata file "{path}"'
        yield key, _object(values, place), place


def _jsonl_entries(path: str, text: str) -> Iterator[tuple[str, Entry, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f'Line {number} of the metadata file "{path}"'
        values = _object(parse_json(line, place, odd_names=True), place)
        key = _text(values, "image_path", place)
        if not key:
            raise UserError(f'{place} names no image. Give its "image_path".')
        yield key, values, place


def _object(values: object, place: str) -> Entry:
    if not isinstance(values, dict):
        raise UserError(f'{place} must be an object such as {{"caption": "…", "tags": "…"}}, not {values!r:.80}.')
    return values


def _text(values: Entry, key: str, place: str) -> str:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f'{place} has "{key}": {value!r:.80}, which is not a string. Write it as one string.')
    if value and not is_unicode(value, odd_names=key == "image_path"):
        raise UserError(f'{place} has "{key}": {value!r:.80}, which is not valid Unicode. Correct the text.')
    return value or ""


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that can be written as UTF-8."""
    return isinstance(value, str) and is_unicode(value)


def _is_size(size: object) -> TypeGuard[list[int]]:
    """Whether it is [width, height] in pixels."""
    sides = size if isinstance(size, list) and len(size) == 2 else [0]
    return all(type(side) is int and 0 < side <= _LONGEST_SIDE for side in sides)


def _size(values: Entry, place: str) -> tuple[int, int] | None:
    """What is noted as ``image_size``, or as ``width`` and ``height``."""
    name, size = "image_size", values.get("image_size")
    if size is None and ("width" in values or "height" in values):
        name, size = "width and height", [values.get("width"), values.get("height")]
    if size is None or size == [None, None]:
        return None
    if not _is_size(size):
        raise UserError(f'{place} has "{name}": {size!r:.80}. It must be [width, height] in pixels.')
    return (size[0], size[1])


def _join(caption: str, tags: str, separator: str, all_lines: bool) -> str:
    if not tags.strip():
        return caption
    tags = separator.join(tags.split("\n"))
    lines = [line for line in caption.split("\n") if line.strip()]
    if not lines:
        return tags
    return "\n".join(line + separator + tags for line in (lines if all_lines else lines[:1]))


class FolderCache:
    """``metadata_cache.json``: captions and sizes of a folder's images, so that the files need not be opened again.

    The layout is sd-scripts': ``{path: {"caption": str, "resolution": [width, height]}}``. Ours adds a ``stamp`` to
    each image: one text for the image and one for its caption file, of their size and time of change. An image
    whose stamp differs, or that has none, is read anew. ``whole`` notes that it was decoded to its end. A cache that
    cannot be read or written costs time only, so it is a warning.
    """

    def __init__(self, folder: str, *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(folder) / CACHE_NAME, read_only
        self._entries = self._load()

    def _load(self) -> Entry:
        try:
            if self.path.stat().st_size > _LARGEST_CACHE:
                raise ValueError("it is far too large")
            content = json.loads(self.path.read_text(encoding="utf-8", errors=_ODD_NAMES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning('The cache "%s" cannot be read (%s) and is made anew.', self.path, error)
            return {}
        return content if isinstance(content, dict) else {}

    def fresh(self, image_path: str, stamp: list[str]) -> tuple[str, tuple[int, int]] | None:
        """Caption and (width, height) noted for an image if its stamp still fits, else None."""
        entry = self._entries.get(image_path)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp:
            return None
        caption, size = entry.get("caption"), entry.get("resolution")
        return (caption, (size[0], size[1])) if _is_text(caption) and _is_size(size) else None

    def noted_caption(self, image_path: str) -> str:
        """The caption noted for an image that has no caption file, and had none when it was noted here."""
        entry = self._entries.get(image_path)
        if not isinstance(entry, dict) or not _is_text(entry.get("caption")):
            return ""
        stamp = entry.get("stamp")
        had_file = isinstance(stamp, list) and stamp[-1:] != [NO_FILE]
        return "" if had_file else entry["caption"]

    def noted_whole(self, image_path: str) -> bool:
        """Whether the image, if its stamp still fits, is known to be decodable."""
        entry = self._entries.get(image_path)
        return isinstance(entry, dict) and entry.get("whole") is True

    def note_whole(self, image_paths: Collection[str]) -> None:
        """Remember that these images can be decoded."""
        noted = {path: {**entry, "whole": True} for path, entry in self._entries.items() if path in image_paths}
        self.save(self._entries | noted)

    def save(self, entries: dict[str, Entry]) -> None:
        """Write the cache if it changed, in one piece: a run that is stopped leaves the old file or the new one."""
        if self.read_only:
            return
        sweep_replacements([self.path])
        if entries == self._entries:
            return
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        try:
            with replacement(self.path) as file:
                file.write(text.encode("utf-8", errors=_ODD_NAMES))
        except OSError as error:
            logger.warning('The cache "%s" cannot be written (%s).', self.path, error)
