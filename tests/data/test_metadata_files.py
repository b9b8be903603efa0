import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import configs_of, make_image, subset_of
from departures import departure
from golden_data import golden_cases
from option_effects import shows
from test_atomic_files import abandoned

from library.data.image_sets import load_image_set
from library.data.metadata_files import CACHE_NAME, read_metadata
from library.support.errors import UserError


def _our_caption(values: dict, subset: dict) -> str:
    """No tag is ever lost: tags follow the line that is used, or every line where any may be."""
    separator, tags = subset.get("caption_separator", ","), values.get("tags", "")
    lines = [line for line in values.get("caption", "").split("\n") if line.strip()]
    tags = separator.join(tags.split("\n"))
    if not tags:
        return values.get("caption", "")
    if not lines:
        return tags
    return "\n".join(line + separator + tags for line in (lines if subset.get("enable_wildcard") else lines[:1]))


@pytest.mark.parametrize("case", golden_cases("finetune_metadata"))
def test_golden_finetune_metadata(case, tmp_path):
    """The tag frequencies of the golden cases are statistics for files that this trainer does not write."""
    file = tmp_path / "meta.json"
    file.write_text(json.dumps(case["metadata"]))
    for name, values in case["metadata"].items():
        make_image(tmp_path / name, tuple(values.get("image_size", (32, 32))))
    values = {"metadata_file": str(file), "image_dir": str(tmp_path), **case["subset"]}
    departs = departure("finetune_metadata", case)
    if case["subset"].get("num_repeats", 1) < 1:
        assert departs
        with pytest.raises(UserError, match="num_repeats"):
            configs_of(tmp_path, {"resolution": 64, "subsets": [values]})
        return
    subset = subset_of(tmp_path, values)
    found = load_image_set(subset)
    captions = {path.rpartition("/")[2]: caption for path, caption in zip(found.paths, found.captions, strict=True)}
    if departs:
        assert captions == {name: _our_caption(entry, case["subset"]) for name, entry in case["metadata"].items()}
    else:
        assert captions == case["captions"]
    rules = subset.captions
    noted = read_metadata(str(file), separator=rules.separator, all_lines=rules.wildcard)
    assert {entry.key: entry.image_size and list(entry.image_size) for entry in noted} == case["image_size"]
    assert len(found) * subset.num_repeats == case["num_train_images"]


def _metadata_set(folder, content, **values):
    file = folder / values.pop("name", "meta.json")
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_image_set(subset_of(folder, {"metadata_file": str(file), "image_dir": str(folder), **values}))


def test_lines_of_json(tmp_path):
    first, second = make_image(tmp_path / "a.png"), make_image(tmp_path / "sub" / "b.png", (40, 20))
    lines = [
        {"image_path": "a.png", "caption": "one", "tags": "x"},
        {"image_path": str(second), "caption": "tw\u2028o"},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    found = _metadata_set(tmp_path, content, name="meta.JSONL")
    assert found.paths == [str(first), str(second)]
    assert found.captions == ["one,x", "tw\u2028o"]
    assert found.sizes.tolist() == [[32, 32], [40, 20]]


def test_keys_may_lack_their_extension(tmp_path):
    picture = make_image(tmp_path / "a.v2.png")
    assert _metadata_set(tmp_path, {"a.v2": {"caption": "x"}}).paths == [str(picture)]


def test_the_file_knows_its_size_better(tmp_path, caplog):
    make_image(tmp_path / "a.png", (40, 20))
    with caplog.at_level(logging.WARNING):
        found = _metadata_set(tmp_path, {"a.png": {"caption": "x", "image_size": [300, 200]}})
    assert found.sizes.tolist() == [[40, 20]]
    assert "a.png" in caplog.text


@pytest.mark.parametrize("size", ['"width": 300, "height": 200', '"image_size": [300, 200], "width": 40, "height": 20'])
def test_width_and_height_are_a_noted_size(tmp_path, caplog, size):
    make_image(tmp_path / "a.png", (40, 20))
    line = '{"image_path": "a.png", "caption": "x", %s}' % size  # noqa: UP031 - braces
    assert _metadata_set(tmp_path, line, name="meta.jsonl").sizes.tolist() == [[40, 20]]
    assert "lists a wrong size for 1 image;" in caplog.text
    (entry,) = read_metadata(str(tmp_path / "meta.jsonl"), separator=",", all_lines=False)
    assert entry.image_size == (300, 200)


def test_tags_alone_are_the_caption_with_wildcards_too(tmp_path):
    make_image(tmp_path / "a.png")
    assert _metadata_set(tmp_path, {"a.png": {"tags": "red, mychar"}}, enable_wildcard=True).captions == ["red, mychar"]


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        ("{", ["meta.json", "not valid JSON", "line 1"]),
        ("[]", ["meta.json", "list"]),
        ({"a.png": "x"}, ['"a.png"', "object"]),
        ({"a.png": {"caption": ["x"]}}, ['"a.png"', '"caption"', "['x']"]),
        ({"a.png": {"tags": 3}}, ['"a.png"', '"tags"', "3"]),
        ({"a.png": {"image_size": [3]}}, ['"a.png"', '"image_size"', "[3]", "[width, height]"]),
        ({"a.png": {"width": 3}}, ['"a.png"', '"width and height"', "[3, None]", "[width, height]"]),
        ({"gone.png": {"caption": "x"}}, ["1 of 1", "gone.png", "image_dir"]),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(tmp_path, content, phrases):
    make_image(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        _metadata_set(tmp_path, content)
    assert all(phrase in str(error.value) for phrase in phrases), error.value


@pytest.mark.parametrize(("line", "phrases"), [("{", ["Line 2", "JSON"]), ("{}", ["Line 2", "image_path"])])
def test_a_broken_line_is_named(tmp_path, line, phrases):
    make_image(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        _metadata_set(tmp_path, '{"image_path": "a.png"}\n' + line, name="meta.jsonl")
    assert all(phrase in str(error.value) for phrase in phrases), error.value


def test_relative_keys_need_a_folder(tmp_path):
    file = tmp_path / "meta.json"
    file.write_text('{"a.png": {"caption": "x"}}')
    with pytest.raises(UserError, match=r"a\.png.*image_dir"):
        load_image_set(subset_of(tmp_path, {"metadata_file": str(file)}))


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        ("[" * 100_000, ["meta.json", "levels deep"]),
        ('{"a.png": {"image_size": [' + "9" * 5000 + ", 1]}}", ["meta.json", "digits"]),
        (r'{"a.png": {"caption": "x\ud800"}}', ["meta.json", "not valid Unicode"]),
        (r'{"a\ud800.png": {"caption": "x"}}', ["meta.json", "not valid Unicode"]),
        (r'{"a\u0000.png": {"caption": "x"}}', ["meta.json", "cannot be a path"]),
        ({"a.png": {"image_size": [2**31, 1]}}, ['"a.png"', '"image_size"', "[width, height]"]),
    ],
)
def test_nonsense_is_an_error_too(tmp_path, content, phrases):
    make_image(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        _metadata_set(tmp_path, content)
    assert all(phrase in str(error.value) for phrase in phrases), error.value


@pytest.fixture
def outside(tmp_path):
    """An image outside the image folder, and a link into its folder that the image folder holds."""
    picture = make_image(tmp_path / "outside" / "0.png")
    make_image(tmp_path / "images" / "inside.png")
    (tmp_path / "images" / "link").symlink_to(picture.parent)
    return picture


@shows("allow_outside_images")
@pytest.mark.parametrize("key", ["../outside/0.png", "../outside/0", "link/0.png", "link/../outside/0.png", None])
def test_images_outside_the_image_folder_need_an_option(tmp_path, outside, key):
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({key or str(outside): {"caption": "x"}, "inside.png": {"caption": "y"}}))
    values = {"metadata_file": str(file), "image_dir": str(tmp_path / "images")}
    with pytest.raises(UserError, match=r"lists 1 of 2 images outside .*0.*--allow_outside_images"):
        load_image_set(subset_of(tmp_path, values))
    found = load_image_set(subset_of(tmp_path, values, allow_outside_images=True))
    assert outside.samefile(found.paths[0])


def test_a_dataset_file_cannot_allow_them(tmp_path):
    with pytest.raises(UserError, match="give --allow_outside_images on the command line"):
        subset_of(tmp_path, {"metadata_file": "m", "image_dir": "d", "allow_outside_images": True})


def test_absolute_paths_without_an_image_folder_are_outside_of_nothing(tmp_path, outside):
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({str(outside): {"caption": "x"}}))
    assert load_image_set(subset_of(tmp_path, {"metadata_file": str(file)})).paths == [str(outside)]


@pytest.mark.parametrize("folder", ["images", None])
def test_paths_from_the_working_folder_as_full_path_writes_them(tmp_path, outside, monkeypatch, folder):
    """sd-scripts' ``merge_captions_to_metadata.py images meta.json --full_path``."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "meta.json"
    file.write_text('{"images/inside.png": {"caption": "x"}}')
    values = {"metadata_file": str(file)} | ({"image_dir": folder} if folder else {})
    assert load_image_set(subset_of(tmp_path, values)).paths == ["images/inside.png"]


def test_paths_from_the_working_folder_may_not_lead_outside_either(tmp_path, outside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "meta.json"
    file.write_text('{"outside/0.png": {"caption": "x"}}')
    with pytest.raises(UserError, match="--allow_outside_images"):
        load_image_set(subset_of(tmp_path, {"metadata_file": str(file), "image_dir": "images"}))


def test_what_is_not_there_is_not_called_outside(tmp_path):
    """Absolute paths of another machine: to allow them would not help."""
    with pytest.raises(UserError, match=r"lists 1 of 1 .* not exist: /elsewhere/a\.png"):
        _metadata_set(tmp_path, {"/elsewhere/a.png": {"caption": "x"}})


def test_an_image_folder_that_is_a_link_holds_the_images_of_its_target(tmp_path, outside):
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({"0.png": {"caption": "x"}, str(outside): {"caption": "y"}}))
    values = {"metadata_file": str(file), "image_dir": str(tmp_path / "images" / "link")}
    assert len(load_image_set(subset_of(tmp_path, values))) == 2


# metadata_cache.json


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        make_image(tmp_path / "images" / f"{name}.png", caption=f"caption {name}")
    return tmp_path / "images"


def _cached_set(folder, **values):
    return load_image_set(subset_of(folder.parent, {"image_dir": str(folder), "cache_info": True, **values}))


def test_cache_has_sd_scripts_layout_and_spares_reading(folder, monkeypatch):
    before = _cached_set(folder)
    entries = json.loads((folder / CACHE_NAME).read_text(encoding="utf-8"))
    assert list(entries) == [str(folder / f"{name}.png") for name in ("a", "b", "c")]
    assert {key: entries[str(folder / "a.png")][key] for key in ("caption", "resolution")} == {
        "caption": "caption a",
        "resolution": [32, 32],
    }
    monkeypatch.setattr("library.data.image_sets.image_size", lambda _: pytest.fail("an image was opened"))
    monkeypatch.setattr("library.data.image_sets.read_caption", lambda *_, **__: pytest.fail("a caption was read"))
    again = _cached_set(folder)
    assert (again.paths, again.captions, again.sizes.tolist()) == (before.paths, before.captions, before.sizes.tolist())


def test_cache_follows_the_files(folder):
    _cached_set(folder)
    (folder / "a.txt").write_text("changed caption")
    make_image(folder / "b.png", (64, 48))
    (folder / "c.png").unlink()
    make_image(folder / "d.png", (16, 8), caption="new")
    found = _cached_set(folder)
    assert found.captions == ["changed caption", "caption b", "new"]
    assert found.sizes.tolist() == [[32, 32], [64, 48], [16, 8]]
    assert len(json.loads((folder / CACHE_NAME).read_text())) == 3


def test_cache_notices_a_change_of_equal_length(folder):
    _cached_set(folder)
    (folder / "a.txt").write_text("caption z")
    os.utime(folder / "a.txt", ns=(1, 1))
    assert _cached_set(folder).captions[0] == "caption z"


def test_cache_is_not_used_for_other_lines(folder):
    (folder / "a.txt").write_text("one\ntwo")
    assert _cached_set(folder).captions[0] == "one"
    assert _cached_set(folder, enable_wildcard=True).captions[0] == "one\ntwo"


def test_cache_of_sd_scripts_gives_captions_that_no_file_has(folder):
    (folder / "b.txt").unlink()
    noted = {"caption": "noted", "resolution": [999, 999]}
    (folder / CACHE_NAME).write_text(json.dumps({str(folder / f"{name}.png"): noted for name in ("a", "b")}))
    found = _cached_set(folder)
    assert found.captions == ["caption a", "noted", "caption c"]
    assert found.sizes.tolist() == [[32, 32]] * 3
    assert _cached_set(folder).captions == found.captions


def test_a_noted_caption_outlives_a_change_of_the_image_but_not_its_caption_file(folder):
    (folder / "b.txt").unlink()
    noted = {"caption": "noted", "resolution": [32, 32]}
    (folder / CACHE_NAME).write_text(json.dumps({str(folder / "b.png"): noted}))
    assert _cached_set(folder).captions == ["caption a", "noted", "caption c"]
    make_image(folder / "b.png", (64, 48))
    (folder / "c.txt").unlink()
    assert _cached_set(folder).captions == ["caption a", "noted", ""]


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_no_utf8_is_noted_too(folder, monkeypatch):
    (folder / "a.png").rename(folder / os.fsdecode(b"\xff.png"))
    before = _cached_set(folder)
    monkeypatch.setattr("library.data.image_sets.image_size", lambda _: pytest.fail("an image was opened"))
    assert _cached_set(folder).paths == before.paths


def test_class_tokens_are_not_noted_as_captions(folder):
    (folder / "b.txt").unlink()
    assert _cached_set(folder, class_tokens="one class").captions[1] == "one class"
    assert _cached_set(folder, class_tokens="another").captions[1] == "another"


@pytest.mark.parametrize("content", ["{", "[1]", '{"x": 3}', "[" * 100_000, '{"x": ' + "9" * 5000 + "}", '"\\ud800"'])
def test_a_broken_cache_costs_time_only(folder, content):
    (folder / CACHE_NAME).write_text(content)
    assert _cached_set(folder).captions == ["caption a", "caption b", "caption c"]
    assert len(json.loads((folder / CACHE_NAME).read_text())) == 3


@pytest.mark.parametrize(
    "entry",
    [
        {"resolution": ["32", "32"]},
        {"resolution": [0, 32]},
        {"resolution": [-1, 32]},
        {"resolution": [32.5, 32]},
        {"resolution": [True, 32]},
        {"resolution": [2**31, 32]},
        {"resolution": [10**30, 32]},
        {"resolution": [[], {}]},
        {"resolution": {"a": 1, "b": 2}},
        {"caption": 3},
        {"caption": "\ud800"},
        {"stamp": []},
        {"stamp": [[]]},
        {"stamp": {}},
        {"stamp": "x"},
    ],
)
def test_nonsense_in_an_entry_costs_time_only(folder, entry):
    (folder / "c.txt").unlink()
    _cached_set(folder)
    entries = json.loads((folder / CACHE_NAME).read_text())
    (folder / CACHE_NAME).write_text(json.dumps({key: values | entry for key, values in entries.items()}))
    found = _cached_set(folder)
    assert found.captions[:2] == ["caption a", "caption b"]
    assert found.sizes.tolist() == [[32, 32]] * 3
    assert all(caption.encode() is not None for caption in found.captions)


def test_a_cache_that_would_fill_the_memory_is_not_read(folder, monkeypatch, caplog):
    _cached_set(folder)
    monkeypatch.setattr("library.data.metadata_files._LARGEST_CACHE", 10)
    with caplog.at_level(logging.WARNING):
        assert len(_cached_set(folder)) == 3
    assert "far too large" in caplog.text


@pytest.mark.parametrize("method", ["open", "unlink"])
def test_a_folder_that_takes_nothing_costs_time_only(folder, monkeypatch, caplog, method):
    original = getattr(Path, method)

    def refused(self, *args, **kwargs):
        if self.suffix == ".tmp":
            raise OSError(30, "Read-only file system")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, refused)
    monkeypatch.setattr(Path, "replace", refused)
    with caplog.at_level(logging.WARNING):
        assert len(_cached_set(folder)) == 3
    assert "cannot be written" in caplog.text


def test_the_cache_is_not_written_through_a_link(folder, tmp_path, caplog):
    target = tmp_path / "precious"
    target.write_text("{}")
    (folder / CACHE_NAME).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        assert len(_cached_set(folder)) == 3
    assert "symbolic link" in caplog.text
    assert target.read_text() == "{}"


def test_no_partial_file_stays(folder, monkeypatch, caplog):
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with caplog.at_level(logging.WARNING):
        assert len(_cached_set(folder)) == 3
    assert "disk full" in caplog.text
    assert sorted(path.suffix for path in folder.iterdir()) == [".png"] * 3 + [".txt"] * 3


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept there")
def test_what_killed_runs_left_is_swept(folder, tmp_path):
    for known in (False, True):
        left = abandoned(folder / CACHE_NAME, age=3600)
        load_image_set(replace(subset_of(tmp_path, {"image_dir": str(folder), "cache_info": True}), read_only=True))
        assert left.exists(), known
        _cached_set(folder)
        assert not left.exists(), known
