"""Ways to damage trees of values, texts and bytes. A recipe is a small value that ``repr`` shows in full."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Edit = tuple[str, int, int, Any]
Splice = tuple[int, int, str]
Poke = tuple[str, int, int]

# Values that were never meant where they are put.
HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 255, 512, 4096, 65535, 10**6, 10**8, 10**10, 10**19, -(10**19)),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**300),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "\t", "\n", "a", "true", "0", "1", "512", "9" * 40, "nan", "inf", "1e999", "%", "%s", "{}", "{"),
    *("\ud800", "a\udfff", "\ufeff", "ﬁne ａrt “mychar”", "mychar", "a" * 5000, "../outside", "images", "/", "//", "."),
    *("None", "é" * 100, "🙂", "\U00100000", "|", ",", "(", "[[", ":", "\\", "'", '"', "~", "C:\\a\\b"),
    *([], [[]], {}, {"a": 1}, [1, 2], [1], [0, 0], [-1, -1], [512, 512], [1.0, 2.0], ["a", "b"], [None], [{}]),
    [[[[[[[[]]]]]]]],
    {"a": {"a": {"a": {"a": {}}}}},
)
# Texts that were never meant to stand in a file.
FRAGMENTS = (
    *('"', "'", "{", "}", "[", "]", "(", ")", "[" * 3000, '{"a":' * 3000, "{" * 3000, "(" * 200, "9" * 5000, "-", "+"),
    *("1e999", "\0", "\ufeff", "\ud800", "\\ud800", "\\udc00", "\\u0000", "\\", "\n", "\r", "\n\n", "#", "=", ",", "."),
    *("true", "nan", "NaN", "Infinity", "-Infinity", "null", "0x", "1979-05-27T07:32:00Z", "12:00:00", '"""', "'''"),
    *("[[datasets]]", "[general]", "[a]", "a.b.c = 1", "{a|b}", "{{", "}}", "|", "mychar", "mychar1", "(a:1.5)", ":9)"),
    *(" --w 64", " --d 1", " --s", " --n", " --l 1e9", "&amp;", "&#99999999;", "“", "ﬁ", "Ａ", "🙂", "é", "\u202e"),
    *("<|endoftext|>", "<|startoftext|>", "\x1b[2J", "\x85", "\u2028", "a" * 3000, " " * 3000, "mychar, " * 200),
)
# Numbers that files of bytes hold in places where sizes and kinds are told.
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 24, 32, 127, 128, 255, 256, 1000, 30000, 0x3FFF, 0x4000, 0x7FFF, 0x8000, 0xFFFF)
NUMBERS += (0x10000, 10**6, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)

_PLACES = st.integers(0, 9999)
_WIDTHS = {"u8": 1, "u16": 2, "u24": 3, "u32": 4, "u64": 8}
_MOST_COPIED = 60  # nodes; copies of copies grow fast

values = st.one_of(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), st.integers(), st.floats(), st.text(max_size=6))
numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(0, 2**32 - 1), st.integers(0, 64))


def edits(known: Sequence[str], *, most: int = 4) -> st.SearchStrategy[list[Edit]]:
    """Changes for :func:`edited`; ``known`` are keys that mean something in the file."""
    keys = st.sampled_from([*known, "", "a", "\ud800", "__metadata__", "x" * 300])
    kinds = st.sampled_from(("set", "set", "set", "drop", "copy"))
    return st.lists(
        st.one_of(
            st.tuples(kinds, _PLACES, _PLACES, values),
            st.tuples(st.just("add"), _PLACES, st.just(0), st.tuples(keys, values)),
            st.tuples(st.just("rename"), _PLACES, st.just(0), keys),
        ),
        max_size=most,
    )


def splices(most: int = 1) -> st.SearchStrategy[list[Splice]]:
    """Changes for :func:`spliced`."""
    pieces = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4))
    return st.lists(st.tuples(_PLACES, st.sampled_from((0, 0, 1, 3, 20, 9999)), pieces), max_size=most)


def pokes(most: int = 3) -> st.SearchStrategy[list[Poke]]:
    """Changes for :func:`poked`."""
    kinds = ("u8", "u8", "u16", "u16b", "u24", "u32", "u32b", "u64", "insert", "remove", "cut", "repeat")
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(-40, 9999), numbers), max_size=most)


def edited(tree: Any, changes: Sequence[Edit]) -> Any:
    """A copy of a tree of dicts and lists with values set, dropped, copied, added and renamed."""
    root = [copy.deepcopy(tree)]
    for kind, place, other, value in changes:
        slots = _slots(root)
        if kind == "add":  # only a table or a list can take more
            slots = [slot for slot in slots if isinstance(slot[0][slot[1]], dict | list)] or slots
        holder, key = slots[place % len(slots)]
        if kind == "set":
            holder[key] = copy.deepcopy(value)
        elif kind == "copy":
            source, name = slots[other % len(slots)]
            if len(_slots([source[name]])) <= _MOST_COPIED:
                holder[key] = copy.deepcopy(source[name])
        elif kind == "drop" and holder is not root:
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[value] = holder.pop(key)
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key][value[0]] = copy.deepcopy(value[1])
        elif kind == "add" and isinstance(holder[key], list):
            holder[key].append(copy.deepcopy(value[1]))
    return root[0]


def _slots(root: list) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``root``, in order."""
    found, waiting = [], [root]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def spliced(text: str, changes: Sequence[Splice]) -> str:
    """The text with pieces put in, over some of its characters."""
    for place, length, piece in changes:
        start = place % (len(text) + 1)
        text = text[:start] + piece + text[start + length :]
    return text


def encoded(text: str) -> bytes:
    """UTF-8, or nearly: lone surrogates become bytes that are none."""
    return text.encode("utf-8", "surrogatepass")


def poked(content: bytes, changes: Sequence[Poke]) -> bytes:
    """The bytes with numbers written over them, pieces inserted, removed or repeated; negative places count back."""
    data = bytearray(content)
    for kind, place, number in changes:
        start = place % (len(data) + 1)
        if kind == "insert":
            data[start:start] = number.to_bytes(8, "little")
        elif kind == "remove":
            del data[start : start + number % 64 + 1]
        elif kind == "cut":
            del data[start:]
        elif kind == "repeat":
            data[start:start] = data[start : start + number % 64 + 1]
        else:
            width = _WIDTHS[kind.removesuffix("b")]
            order = "big" if kind.endswith("b") else "little"
            data[start : start + width] = (number % 256**width).to_bytes(width, order)
    return bytes(data)


def json_text(tree: Any) -> str:
    """JSON, with NaN and Infinity where they are, and lone surrogates as escapes."""
    return json.dumps(tree)


def toml_text(tree: dict[str, Any]) -> str:
    """TOML with headers for tables and lists of tables, as far as the tree is one; what TOML lacks becomes a text."""
    return "\n".join(_toml_lines(tree, ())) + "\n"


def _toml_lines(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    below, lines = [], []
    for key, value in table.items():
        name = ".".join(map(_toml_key, (*path, key)))
        if isinstance(value, dict):
            below += [f"[{name}]", *_toml_lines(value, (*path, key))]
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for item in value:
                below += [f"[[{name}]]", *_toml_lines(item, (*path, key))]
        else:
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    return [*lines, *below]


def _toml_key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if value is None:
        return '"None"'
    if isinstance(value, float):
        return repr(value)  # 1e+30, inf and nan are TOML's too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
