"""Files of text, TOML and JSON: every way in which one can be broken is a sentence, at once."""

import json
import os
import time
from pathlib import Path

import pytest
from dataset_files import dataset_options
from datasets import prompts

from library.data.caption_files import read_caption
from library.data.config import load_dataset_configs
from library.data.metadata_files import read_metadata
from library.model.identity import read_config
from library.options.config_file import read_config_file
from library.options.options import LoggingOptions, declared_options
from library.output.sample_prompts import read_sample_prompts
from library.output.trackers import check_trackers
from library.support.errors import UserError
from library.support.text_files import LONGEST_LINE, parse_json, parse_toml, read_text
from tests.limits import outcome

MANY = 1_000_000


def refusal(make) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        make()
    assert time.monotonic() - started < 5
    str(caught.value).encode("utf-8")  # a message can be printed and logged anywhere
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def trackers_of(path: Path) -> None:
    check_trackers(LoggingOptions(log_with="tensorboard", logging_dir=str(path.parent), log_tracker_config=str(path)))


def dataset_of(path: Path) -> None:
    load_dataset_configs(dataset_options(dataset_config=path, resolution=(64, 64)), bucket_step=64)


TOML_READERS = {
    "config file": lambda path: read_config_file(path, dict(declared_options())),
    "dataset": dataset_of,
    "prompts": read_sample_prompts,
    "trackers": trackers_of,
}
JSON_READERS = {
    "dataset": dataset_of,
    "prompts": read_sample_prompts,
    "metadata": lambda path: read_metadata(str(path), separator=", ", all_lines=False),
    "model": read_config,
}
BROKEN_TOML = {
    "brackets": "a = " + "[" * MANY,
    "brackets at the start": "[" * MANY,
    "tables": "a = " + "{a=" * MANY,
    "dots": "a." * MANY + "a = 1",
    "dots of a heading": "[" + "a." * MANY + "a]",
    "dots of a quoted key": '"=".' + "a." * MANY + "a = 1",
    "dots within braces": 'a = {b = """\n\'""", ' + "a." * MANY + "a = 1, c = 'd'}",
    "digits": "seed = " + "9" * 5000,
    "hexadecimal digits": "seed = 0x" + "f" * 5000,
    "twice": "seed = 1\nseed = 2",
    "surrogate": 'output_name = "\\ud800"',
    "NUL": 'output_name = "a\0"',
}
BROKEN_JSON = {
    "brackets": "[" * MANY,
    "objects": '{"a":' * MANY,
    "nested": "[" * 100 + "]" * 100,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "many digits": '{"a": ' + "9" * 4000 + "}",
    "twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "nothing": "",
    "a number": "1",
    "a text": '"a"',
    "null": "null",
}


@pytest.mark.parametrize("reader", TOML_READERS)
@pytest.mark.parametrize("broken", BROKEN_TOML)
def test_broken_toml(reader, broken, tmp_path):
    path = tmp_path / "file.toml"
    path.write_text(BROKEN_TOML[broken])
    assert str(path) in refusal(lambda: TOML_READERS[reader](path))


def test_dots_that_make_no_key():
    dots = "a." * 5000
    text = f'# {dots}\na = "{dots} \\" {dots}" # {dots}\nb = \'{dots}\'\nc = """\n{dots}\n" {dots}"""\n'
    text += f"d.e.f = [{'1.5, ' * 5000}]"
    content = parse_toml(text, "The file")
    assert content["a"] == f'{dots} " {dots}'
    assert (content["b"], content["c"]) == (dots, f'{dots}\n" {dots}')
    assert len(content["d"]["e"]["f"]) == 5000


@pytest.mark.parametrize("text", ['"""', "'", '"\\"', '\\"""', "a", " ", "a.", "a .", "#"])
def test_signs_without_end_take_no_time(text):
    found = outcome(lambda: parse_toml(text * MANY, "The file"))
    assert found.sound, found


@pytest.mark.parametrize("reader", JSON_READERS)
@pytest.mark.parametrize("broken", BROKEN_JSON)
def test_broken_json(reader, broken, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(BROKEN_JSON[broken])
    assert str(path) in refusal(lambda: JSON_READERS[reader](path))


@pytest.mark.parametrize(
    ("reader", "ending"), [*((r, "toml") for r in TOML_READERS), *((r, "json") for r in JSON_READERS)]
)
def test_broken_files(reader, ending, tmp_path):
    read = (TOML_READERS if ending == "toml" else JSON_READERS)[reader]
    path = tmp_path / f"file.{ending}"
    if reader != "model":  # a model folder may lack any of them
        assert "does not exist" in refusal(lambda: read(path))
        path.mkdir()
        assert "is a folder, not a file" in refusal(lambda: read(path))
        path.rmdir()
        os.mkfifo(path)
        assert "is not a regular file" in refusal(lambda: read(path))
        path.unlink()
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refusal(lambda: read(path))
    with path.open("wb") as file:
        file.truncate(2**40)  # a checkpoint given by mistake; the file is empty on the disk
    assert "1,099,511,627,776 bytes" in refusal(lambda: read(path))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have(name):
    assert "name" in refusal(lambda: read_text(name, f"The file {name!r}"))


@pytest.mark.parametrize(
    ("reader", "content"),
    [
        ("dataset", {"datasets": [{"subsets": [{"image_dir": "a", "class_tokens": "a\ud800"}]}]}),
        ("dataset", {"datasets": [{"subsets": [{"image_dir": "a\ud800"}]}]}),
        ("prompts", ["mychar \udcff"]),
        ("prompts", [{"prompt": "mychar", "negative_prompt": "\ud800"}]),
        ("metadata", {"a.png": {"caption": "mychar \ud800"}}),
        ("metadata", {"a.png": {"caption": "of a file name \udcff"}}),
        ("metadata", {"a\ud800.png": {"caption": "mychar"}}),
        ("model", {"_class_name": "\ud800"}),
    ],
)
def test_lone_surrogates(reader, content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    assert "not valid Unicode" in refusal(lambda: JSON_READERS[reader](path))


def test_keys_of_file_names_that_are_not_utf8(tmp_path):
    """Python writes such names with surrogates of its own, and reads them back."""
    (tmp_path / "a.json").write_text(json.dumps({"a\udcff.png": {"caption": "mychar"}}))
    (entry,) = read_metadata(str(tmp_path / "a.json"), separator=", ", all_lines=False)
    assert os.fsencode(entry.key) == b"a\xff.png"


def test_what_is_not_broken():
    assert parse_json('{"a": [{"b": "\\ud83d\\ude00"}], "c": 18446744073709551615}', "It") == {
        "a": [{"b": "😀"}],
        "c": 2**64 - 1,
    }
    line = "caption_prefix = '" + "(a:1.1), " * 1000 + "'"
    assert parse_toml(f'{line}\n[x]\ny.z = """{"a. " * 500}"""', "It")["x"]["y"]["z"].startswith("a. ")


def test_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt", "It") == "a\nb\nc\n"


def test_a_caption_that_is_no_caption(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)
    message = refusal(lambda: read_caption(str(tmp_path / "a.txt"), all_lines=False))
    assert "a.txt" in message
    assert "bytes" in message


@pytest.mark.parametrize("content", ["[" * MANY, '{"a":' * MANY, "a b" * MANY, "(a" * MANY])
def test_a_line_that_is_no_prompt_and_no_caption(content, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(content)
    assert f"{len(content):,} characters" in refusal(lambda: read_sample_prompts(file))
    assert f"{len(content):,} characters" in refusal(lambda: prompts().repaired(content))


def test_lines_may_be_long_and_many(tmp_path):
    content = "\n".join(["a" * LONGEST_LINE] * 3)
    (tmp_path / "a.txt").write_text(content)
    assert [prompt.prompt for prompt in read_sample_prompts(tmp_path / "a.txt")] == content.split("\n")
    assert prompts().repaired(content) == content
