"""Damaged and hostile headers, each told by its reason, by every reader of such files."""

import json

import pytest

from library.embedding.files import read_embedding
from library.model.weight_files import join_weights, open_weights
from library.support.errors import UserError
from library.support.safetensors_header import read_safetensors_header
from tests.limits import outcome

GOOD = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


def content(header, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(**changes) -> dict:
    return {"a": {**GOOD["a"], **changes}}


def without(key: str) -> dict:
    return {"a": {name: value for name, value in GOOD["a"].items() if name != key}}


DAMAGED = {
    "unknown type": (content(changed(dtype="F4")), 'the tensor "a" as F4, a data type'),
    "type of no name": (content(changed(dtype=3)), "no data type"),
    "type missing": (content(without("dtype")), "no data type"),
    "shape missing": (content(without("shape")), "no valid shape"),
    "place missing": (content(without("data_offsets")), "no valid place"),
    "entry of no kind": (content({"a": [1, 2]}), "neither type nor place"),
    "wrong length": (content(changed(shape=[5])), "disagree"),
    "empty shape": (content(changed(shape=[])), "disagree"),
    "negative shape": (content(changed(shape=[-4])), "no valid shape"),
    "fraction": (content(changed(shape=[4.0])), "no valid shape"),
    "truth as a number": (content(changed(shape=[True, 4])), "no valid shape"),
    "huge shape": (content(changed(shape=[2**62, 2**62])), "no valid shape"),
    "huge empty shape": (content(changed(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), b""), "no valid shape"),
    "many axes": (content(changed(shape=[4] + [1] * 99)), "no valid shape"),
    "huge number": (content(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "its header cannot be read"),
    "negative place": (content(changed(data_offsets=[-16, 0])), "no valid place"),
    "place backwards": (content(changed(data_offsets=[16, 0])), "disagree"),
    "one offset": (content(changed(data_offsets=[16])), "no valid place"),
    "overlap": (content({**GOOD, "b": changed(data_offsets=[8, 24])["a"]}, bytes(24)), "overlap or leave gaps"),
    "gap": (content({**GOOD, "b": changed(data_offsets=[20, 36])["a"]}, bytes(36)), "overlap or leave gaps"),
    "gap at the start": (content(changed(data_offsets=[4, 20]), bytes(20)), "overlap or leave gaps"),
    "rest": (content(GOOD, bytes(17)), "its header describes"),
    "no tensors": (content({}), "its header describes"),
    "cut off": (content(GOOD, bytes(15)), r"is cut off: \d+ of \d+ bytes"),
    "twice": (content(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', b"0"), "header cannot be read"),
    "not a number": (content(b'{"a":NaN}'), "its header cannot be read"),
    "half a character": (content({"\ud800": GOOD["a"]}), "a name that no tensor has"),
    "long name": (content({"a" * 2000: GOOD["a"]}), "a name that no tensor has"),
    "metadata of numbers": (content({"__metadata__": {"a": 1}, **GOOD}), "not made of strings"),
    "metadata in a list": (content({"__metadata__": ["a"], **GOOD}), "not made of strings"),
    "half a character in metadata": (content({"__metadata__": {"a": "\udfff"}, **GOOD}), "not made of strings"),
    "not UTF-8": (content(b'{"\xff":1}'), "its header cannot be read"),
    "deep": (content(b'{"a":' + b"[" * 200_000), "its header cannot be read"),
    "gigabytes of header": (content(GOOD, length=5 * 2**30), "cut off inside its header"),
    "all of 64 bits": (content(GOOD, length=2**64 - 1), "cut off inside its header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_named(case, tmp_path):
    data, said = DAMAGED[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    for read in (open_weights, read_embedding, read_safetensors_header, lambda path: join_weights([path])):
        with pytest.raises(UserError, match=said) as raised:
            read(file)
        assert str(file) in str(raised.value)


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {"a": "b"}}, {"__metadata__": None}])
def test_what_the_format_allows(metadata, tmp_path):
    header = {**metadata, "b": {"dtype": "F16", "shape": [0, 3], "data_offsets": [16, 16]}, **GOOD}
    (tmp_path / "x").write_bytes(content(header))
    assert open_weights(tmp_path / "x").read_all()["a"].tolist() == [0.0] * 4
    assert open_weights(tmp_path / "x").shapes["b"] == (0, 3)


def test_the_largest_header_that_is_parsed_fits_in_memory(tmp_path):
    """Small values in great number, which take 25 times the room that they take in the file."""
    text = b'{"a":[' + b"{}," * 8_300_000 + b"0]}"
    (tmp_path / "x").write_bytes(content(text))
    found = outcome(lambda: open_weights(tmp_path / "x"), seconds=20)
    assert found.kind == "error", found.detail
    (tmp_path / "x").write_bytes(content(text + b" " * 10_000_000))
    assert "it claims a header of" in outcome(lambda: open_weights(tmp_path / "x")).detail
