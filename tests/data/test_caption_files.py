import pytest
from datasets import make_image, subset_of
from departures import departure
from golden_data import golden_cases

from library.data.caption_files import caption_extensions, caption_name, read_caption
from library.data.image_sets import load_image_set
from library.support.errors import UserError


def _bytes(case: dict, name: str) -> bytes:
    """Golden contents that are no text, which are errors or begin with a byte order mark, are given in hexadecimal."""
    content = case["files"][name]
    try:
        data = bytes.fromhex(content)
    except ValueError:
        return content.encode()
    binary = data[:1] >= b"\x80" and ("error" in case or data.startswith(b"\xef\xbb\xbf"))
    return data if binary else content.encode()


def _our_caption(case: dict, image: str) -> str:
    """Our rules in plain words: own name, then the face detector's; .caption, then .txt; lines that are not blank."""
    subset, stem = case["subset"], image.rpartition(".")[0]
    extension = subset.get("caption_extension")
    extensions = [".caption"] if subset.get("class_tokens") else [".caption", ".txt"]
    extensions = ["." + extension.lstrip(".")] if extension else extensions
    stems = [stem, "_".join(stem.split("_")[:-4])] if stem.count("_") >= 4 else [stem]
    found = [name + ext for name in stems for ext in extensions if name + ext in case["files"]]
    text = _bytes(case, found[0]).decode("utf-8-sig") if found else ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    chosen = "\n".join(lines if subset.get("enable_wildcard") else lines[:1])
    return chosen or subset.get("class_tokens", "")


@pytest.mark.parametrize("case", golden_cases("caption_files"))
def test_golden_caption_files(case, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in case["files"]:
        (folder / name).write_bytes(_bytes(case, name))
    for name in case["images"]:
        make_image(folder / name)
    subset = subset_of(tmp_path, {"image_dir": str(folder), **case["subset"]})
    departs = departure("caption_files", case)
    if "error" in case and not departs:
        with pytest.raises(UserError, match=next(iter(case["files"]))):
            load_image_set(subset)
        return
    found = load_image_set(subset)
    captions = {path.rpartition("/")[2]: caption for path, caption in zip(found.paths, found.captions, strict=True)}
    if departs:
        assert captions == {name: _our_caption(case, name) for name in case["images"]}
        return
    assert captions == case["captions"]
    assert len(found) * subset.num_repeats == case["num_train_images"]


@pytest.mark.parametrize(("given", "tried"), [("txt", (".txt",)), (".cap", (".cap",)), (None, (".caption", ".txt"))])
def test_extensions(given, tried):
    assert caption_extensions(given) == tried


def test_txt_files_do_not_outvote_class_tokens(tmp_path, caplog):
    """A regularisation folder "girl" whose images have tags beside them, which happen to hold the token."""
    for name in "ab":
        make_image(tmp_path / "images" / f"{name}.png", caption="mychar, girl")
    make_image(tmp_path / "images" / "c.png").with_suffix(".caption").write_text("own")
    subset = {"image_dir": str(tmp_path / "images"), "class_tokens": "girl", "is_reg": True}
    assert load_image_set(subset_of(tmp_path, subset)).captions == ["girl", "girl", "own"]
    assert 'the class tokens "girl" are the caption, and 2 files beside the images are not read' in caplog.text
    assert "a.txt, b.txt" in caplog.text
    caplog.clear()
    assert load_image_set(subset_of(tmp_path, {**subset, "cache_info": True})).captions == ["girl", "girl", "own"]
    read = load_image_set(subset_of(tmp_path, {**subset, "caption_extension": ".txt"}))
    assert read.captions == ["mychar, girl", "mychar, girl", "girl"]
    caplog.clear()
    load_image_set(subset_of(tmp_path, {**subset, "caption_extension": ".txt"}))
    assert load_image_set(subset_of(tmp_path, {**subset, "class_tokens": ""})).captions[0] == "mychar, girl"
    assert "not read" not in caplog.text


@pytest.mark.parametrize(
    ("image", "files", "expected"),
    [
        ("a.png", {"a.txt"}, "a.txt"),
        ("a.png", {"a.txt", "a.caption"}, "a.caption"),
        ("a.b.png", {"a.txt", "a.b.txt"}, "a.b.txt"),
        ("a.b.png", {"a.txt"}, None),
        ("im_1_2_3_4.png", {"im.txt"}, "im.txt"),
        ("im_1_2_3_4.png", {"im.caption", "im_1_2_3_4.txt"}, "im_1_2_3_4.txt"),
        ("long_im_1_2_3_4.png", {"long_im.txt"}, "long_im.txt"),
        ("im_1_2_3.png", {"im.txt"}, None),
    ],
)
def test_name_of_the_caption_file(image, files, expected):
    assert caption_name(image, caption_extensions(None), files) == expected


def test_face_numbers_are_looked_for_in_the_file_name_only(tmp_path):
    """The folder's name ends as a face detector's file would."""
    picture = make_image(tmp_path / "q_15_a_b_c" / "x.png")
    (tmp_path / "q.txt").write_text("a caption outside of the folder")
    assert load_image_set(subset_of(tmp_path, {"image_dir": str(picture.parent)})).captions == [""]


@pytest.mark.parametrize("all_lines", [False, True])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"\n \n  one  \r\n\r\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\rtwo", ["one", "two"]),
        (b"", []),
        (b"\xef\xbb\xbf\n\n", []),
        ("まい mychar\u2028x, é".encode(), ["まい mychar\u2028x, é"]),
    ],
)
def test_lines(tmp_path, content, lines, all_lines):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert read_caption(str(file), all_lines=all_lines) == "\n".join(lines if all_lines else lines[:1])


def test_a_file_that_is_no_text_or_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("mychar".encode("utf-16"))
    with pytest.raises(UserError, match=r'a\.txt" is not UTF-8 text'):
        read_caption(str(file), all_lines=False)
    with pytest.raises(UserError, match="cannot be read"):
        read_caption(str(tmp_path), all_lines=False)
