"""Targets that are images: damaged in their structure, with lengths and checksums that are right again."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from fuzz.mutations import Poke, poked, pokes
from fuzz.running import Target
from library.data.buckets import BucketChooser, BucketRules
from library.data.images import Framing, check_resized, frame_image, image_size, read_image

Chunk = tuple[bytes, bytes]

_MODES = {
    "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "jpg": ("RGB", "L", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "P", "1", "RGBA"),
    "avif": ("RGB", "RGBA"),
}
_PNG = b"\x89PNG\r\n\x1a\n"
_RULES = BucketRules((512, 512), enabled=True)


def _picture(mode: str, size: tuple[int, int] = (20, 12)) -> Image.Image:
    if mode == "I;16":
        return Image.frombytes(mode, size, bytes(i * 37 % 256 for i in range(2 * size[0] * size[1])))
    return Image.radial_gradient("L").resize(size).convert("RGBA").convert(mode)


def _exif(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "maker"
    exif.get_ifd(34665)[40962] = 5
    return exif.tobytes()


def _saved(mode: str, kind: str, **details: Any) -> bytes:
    file = io.BytesIO()
    _picture(mode).save(file, {"jpg": "jpeg"}.get(kind, kind), **details)
    return file.getvalue()


def _bases(kind: str) -> list[bytes]:
    plain = [_saved(mode, kind) for mode in _MODES[kind]]
    if kind == "bmp":
        return plain
    more = [_saved(_MODES[kind][0], kind, exif=_exif())]
    if kind == "webp":
        more += [_saved("RGBA", kind, lossless=True), _saved("RGB", kind, lossless=True, exif=_exif())]
        more.append(_saved("RGBA", kind, save_all=True, append_images=[_picture("RGBA")]))
    if kind == "jpg":
        more += [_saved("RGB", kind, progressive=True), _saved("RGB", kind, comment=b"note", dpi=(72, 72))]
    if kind == "png":
        palette = _picture("P")
        file = io.BytesIO()
        palette.save(file, "png", transparency=3)
        more += [file.getvalue(), _saved("RGB", kind, save_all=True, append_images=[_picture("RGB")])]
    return plain + more


# Each format as a list of chunks (what it is called, what is in it), and back with lengths and sums made right.


def png_chunks(data: bytes) -> list[Chunk]:
    """The chunks after the signature."""
    found, place = [], len(_PNG)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    return found


def png_file(chunks: Sequence[Chunk]) -> bytes:
    """A PNG file with the right lengths and sums."""
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return _PNG + b"".join(parts)


def riff_chunks(data: bytes) -> list[Chunk]:
    """The chunks of a WebP file."""
    found, place = [], 12
    while place + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, place + 4)
        found.append((data[place : place + 4], data[place + 8 : place + 8 + length]))
        place += 8 + length + length % 2
    return found


def riff_file(chunks: Sequence[Chunk]) -> bytes:
    """A WebP file with the right lengths."""
    parts = [name + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for name, c in chunks]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_chunks(data: bytes) -> list[Chunk]:
    """The segments after the start marker; the last one begins with the scan and holds all the rest."""
    found, place = [], 2
    while data[place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, place + 2)
        found.append((data[place : place + 2], data[place + 4 : place + 2 + length]))
        place += 2 + length
    return [*found, (b"", data[place:])]


def jpeg_file(chunks: Sequence[Chunk]) -> bytes:
    """A JPEG file with the right lengths of its segments."""
    parts = [name + struct.pack(">H", min(len(c) + 2, 0xFFFF)) + c if name else c for name, c in chunks]
    return b"\xff\xd8" + b"".join(parts)


def box_chunks(data: bytes) -> list[Chunk]:
    """The outer boxes of an AVIF file."""
    found, place = [], 0
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + length]))
        place += max(length, 8)
    return found


def box_file(chunks: Sequence[Chunk]) -> bytes:
    """An AVIF file with the right lengths of its outer boxes."""
    return b"".join(struct.pack(">I", len(c) + 8) + name + c for name, c in chunks)


FORMS: dict[str, tuple[Callable[[bytes], list[Chunk]], Callable[[Sequence[Chunk]], bytes]]] = {
    "png": (png_chunks, png_file),
    "webp": (riff_chunks, riff_file),
    "jpg": (jpeg_chunks, jpeg_file),
    "bmp": (lambda data: [(b"", data[:14]), (b"", data[14:54]), (b"", data[54:])], lambda c: b"".join(d for _, d in c)),
    "avif": (box_chunks, box_file),
}
BASES = {kind: _bases(kind) for kind in _MODES}
_NAMES = {
    "png": (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL"),
    "webp": (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP", b"XMP "),
    "jpg": tuple(bytes((0xFF, mark)) for mark in (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE)),
    "bmp": (b"",),
    "avif": (b"ftyp", b"meta", b"mdat", b"iloc", b"free"),
}


def _swollen(content: bytes) -> bytes:
    """What a compressed text or profile of 64 MB looks like."""
    return content[:4] + b"\0\0" + zlib.compress(bytes(2**26), 1)


def _changed(kind: str, chunks: list[Chunk], changes: Sequence[tuple[str, int, Any]]) -> list[Chunk]:
    for what, place, value in changes:
        if not chunks:
            return chunks
        index = place % len(chunks)
        name, content = chunks[index]
        if what == "poke":
            chunks[index] = name, poked(content, value)
        elif what == "unpacked" and name == b"IDAT":
            with suppress(zlib.error):  # it may be damaged already
                chunks[index] = name, zlib.compress(poked(zlib.decompress(content), value))
        elif what == "drop":
            del chunks[index]
        elif what == "repeat":
            chunks[index:index] = [chunks[index]] * (value[0][2] % 4 if value else 1)
        elif what == "swap":
            chunks[index], chunks[0] = chunks[0], chunks[index]
        elif what == "rename":
            names = _NAMES[kind]
            chunks[index] = names[len(value) % len(names)], content
        elif what == "swell":
            chunks[index] = name, _swollen(content)
        elif what == "exif":
            marks = {"png": b"eXIf", "webp": b"EXIF", "jpg": b"\xff\xe1"}
            exif = poked(_exif(place % 12).removeprefix(b"Exif\0\0" if kind == "png" else b""), value)
            chunks[index:index] = [(marks[kind], exif)] if kind in marks else []
    return chunks


def _recipes(kind: str) -> st.SearchStrategy:
    doings = ("poke",) * 8 + ("unpacked", "drop", "repeat", "swap", "rename", "exif", "exif", "exif")
    change = st.tuples(st.sampled_from(doings), st.integers(0, 50), pokes(2))
    return st.tuples(
        st.integers(0, len(BASES[kind]) - 1), st.lists(change, max_size=3), st.one_of(st.just([]), pokes(1))
    )


def _look_at(file: Path, alpha: bool) -> tuple[int, int]:
    """All that a run does with an image; its size and its pixels must agree."""
    width, height = size = image_size(file)
    assert width > 0, size
    assert height > 0, size
    placement = BucketChooser(_RULES).place(width, height)
    check_resized(file, size, placement.resized, placement.bucket)
    framed = frame_image(file, Framing(placement.resized, placement.bucket), alpha=alpha)
    assert framed.pixels.shape == (placement.bucket[1], placement.bucket[0], 3)
    if width * height < 2**22:
        pixels = read_image(file, alpha=alpha)
        assert pixels.shape[:2] == (height, width), (pixels.shape, size)
    return size


def _image_files(kind: str):
    def prepare(folder: Path):
        read, write = FORMS[kind]
        file = folder / f"input.{kind}"

        def act(recipe: tuple[int, list, list[Poke]]):
            number, changes, last = recipe
            if number < 0:
                content = _GIANTS[-1 - number]()
            else:
                content = poked(write(_changed(kind, read(BASES[kind][number]), changes)), last)
            file.write_bytes(content)
            return _look_at(file, alpha=len(changes) % 2 == 1)

        return act

    return prepare


def zeros_png(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG of that size, all of it 0, without compressing gigabytes: one block of zeros, repeated."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    total = height * (1 + (width * channels * depth + 7) // 8)
    block = 2**20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = packer.compress(bytes(total % block)) + packer.flush()
    sum_of_zeros = (total % 65521) << 16 | 1
    data = b"\x78\xda" + piece * (total // block) + last + struct.pack(">I", sum_of_zeros)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_file([(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")])


# Recipes with a negative number stand for these.
_GIANTS = (
    lambda: zeros_png(30000, 1, 8, 2),
    lambda: zeros_png(1, 30000, 8, 6),
    lambda: zeros_png(13000, 13000, 8, 6),
    lambda: zeros_png(13000, 13000, 16, 2),
    lambda: zeros_png(13000, 13000, 16, 6),
    lambda: zeros_png(13000, 13000, 16, 0),
    lambda: zeros_png(2**31 - 1, 1, 1, 0),
    lambda: zeros_png(60_000, 1000, 8, 0),
)
_WEBP_WITHOUT_SIZE = tuple((number, [("poke", 0, [("u16", 6, 0), ("u16", 8, 0)])], []) for number in range(5))
_SEEDS = {
    "png": (*((-1 - number, [], []) for number in range(len(_GIANTS))), (0, [("swell", 1, [])], [])),
    "webp": (*_WEBP_WITHOUT_SIZE, *((number, [("poke", 0, [("u24", 4, 0xFFFFFF)])], []) for number in range(5))),
    "jpg": tuple((0, [("poke", place, [("u16b", 1, 65535), ("u16b", 3, 65535)])], []) for place in range(6)),
    "bmp": tuple((0, [("poke", 1, [("u32", place, number)])], []) for place in (4, 8) for number in (0, 2**31, 30000)),
    "avif": (),
}
_QUICK = {"png": 200, "jpg": 300, "webp": 300, "bmp": 300, "avif": 100}

TARGETS = tuple(
    Target(f"image.{kind}", _image_files(kind), _recipes(kind), (0, [], []), _SEEDS[kind], _QUICK[kind])
    for kind in _MODES
)
