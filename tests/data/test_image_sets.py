import logging
import os

import pytest
from datasets import configs_of, make_image, subset_of
from PIL import Image

from library.data.config import load_dataset_configs
from library.data.image_sets import balanced_repeats, held_out, list_images, load_image_set, load_image_sets
from library.options.options import DatasetOptions
from library.support.errors import UserError


def _sets(folder, *subsets, **options):
    return load_image_sets(configs_of(folder, {"resolution": 64, "subsets": list(subsets)}, **options)[0])


def test_any_letter_case_sorted_not_recursive_no_hidden_files(tmp_path):
    for name in ("b.PNG", "a.Png", "c.jpeg", "d.JpG", "e.webp", "f.BMP", "._a.png", "sub/g.png"):
        make_image(tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert list_images(str(tmp_path)) == ["a.Png", "b.PNG", "c.jpeg", "d.JpG", "e.webp", "f.BMP"]


def test_links_to_images_are_images(tmp_path):
    make_image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images" / "folder.png").symlink_to(tmp_path / "elsewhere")
    assert list_images(str(tmp_path / "images")) == ["link.png"]


def test_a_link_to_nothing_is_named(tmp_path):
    make_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"b\.png is a link to a file that does not exist"):
        load_image_set(subset_of(tmp_path, {"image_dir": str(tmp_path / "images")}))


def test_columns(tmp_path):
    make_image(tmp_path / "images" / "b.png", (40, 30), "two mychar")
    make_image(tmp_path / "images" / "a.png", (20, 10))
    (found,) = _sets(tmp_path, {"image_dir": str(tmp_path / "images")})
    assert found.paths == [str(tmp_path / "images" / name) for name in ("a.png", "b.png")]
    assert found.captions == ["", "two mychar"]
    assert found.sizes.tolist() == [[20, 10], [40, 30]]
    assert found.uncaptioned == [found.paths[0]]


def test_sizes_are_those_of_the_upright_image(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg", exif=tags)
    (found,) = _sets(tmp_path, {"image_dir": str(tmp_path / "images")})
    assert found.sizes.tolist() == [[30, 40]]


def _folder(tmp_path, kind):
    folder = tmp_path / "images"
    if kind != "missing":
        folder.mkdir()
    if kind == "file":
        folder.rmdir()
        folder.write_text("x")
    if kind == "nested":
        make_image(folder / "10_cat" / "a.png")
    if kind == "zero bytes":
        (folder / "a.png").touch()
    if kind == "no image":
        (folder / "a.png").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("kind", "phrases"),
    [
        ("missing", ["images", "does not exist", "image_dir"]),
        ("file", ["images", "is a file"]),
        ("empty", ["images", "no images", ".png"]),
        ("nested", ["images", "10_cat", "not searched"]),
        ("zero bytes", ["a.png", "empty"]),
        ("no image", ["a.png", "not an image"]),
    ],
)
def test_a_folder_without_good_images_is_an_error(tmp_path, kind, phrases):
    with pytest.raises(UserError) as error:
        _sets(tmp_path, {"image_dir": str(_folder(tmp_path, kind))})
    assert all(phrase in str(error.value) for phrase in phrases), error.value


def test_an_empty_folder_among_others_is_an_error_too(tmp_path):
    make_image(tmp_path / "good" / "a.png")
    (tmp_path / "bad").mkdir()
    with pytest.raises(UserError, match="bad"):
        _sets(tmp_path, {"image_dir": str(tmp_path / "good")}, {"image_dir": str(tmp_path / "bad")})


def test_a_folder_listed_twice_counts_once_however_it_is_spelled(tmp_path, caplog):
    folder = make_image(tmp_path / "images" / "a.png").parent
    (tmp_path / "link").symlink_to(folder)
    spellings = [str(folder), f"{folder}/", str(tmp_path / "link"), os.path.relpath(folder)]
    with caplog.at_level(logging.WARNING):
        sets = _sets(tmp_path, *({"image_dir": name} for name in spellings))
    assert [len(found) for found in sets] == [1]
    assert len(caplog.records) == 3


def test_a_image_of_two_metadata_files_counts_once_with_the_last_caption(tmp_path, caplog):
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "b.png")
    (tmp_path / "1.json").write_text('{"a.png": {"caption": "first"}, "b.png": {"caption": "b"}}')
    (tmp_path / "2.json").write_text('{"a.png": {"caption": "second"}}')
    with caplog.at_level(logging.WARNING):
        sets = _sets(
            tmp_path, *({"metadata_file": str(tmp_path / f"{i}.json"), "image_dir": str(tmp_path)} for i in (1, 2))
        )
    assert [found.captions for found in sets] == [["b"], ["second"]]
    assert "1.json" in caplog.text


# Masks


@pytest.fixture
def masked(tmp_path):
    """Two folders with an image each, and one folder with both masks."""
    for name, size in (("a", (40, 20)), ("b", (20, 40))):
        make_image(tmp_path / name / f"{name}.png", size, "mychar")
        make_image(tmp_path / "masks" / f"{name}.jpg", size)
    return tmp_path


def _masked_sets(root, *names, **more):
    subsets = [{"image_dir": str(root / name), **more} for name in names]
    return _sets(root, *subsets, masked_loss=True, conditioning_data_dir=str(root / "masks"))


def test_subsets_may_share_a_mask_folder(masked):
    sets = _masked_sets(masked, "a", "b")
    assert [found.masks for found in sets] == [[str(masked / "masks" / f"{name}.jpg")] for name in ("a", "b")]


def test_a_mask_that_is_missing_is_an_error(masked):
    (masked / "masks" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"masks.*no mask.*b\.png"):
        _masked_sets(masked, "a", "b")


def test_a_mask_without_a_image_is_an_error(masked):
    with pytest.raises(UserError, match=r"masks.*no image.*b\.jpg"):
        _masked_sets(masked, "a")


def test_a_missing_mask_folder_is_an_error(masked):
    (masked / "masks").rename(masked / "other")
    with pytest.raises(UserError, match=r"masks\" does not exist. Check conditioning_data_dir"):
        _masked_sets(masked, "a", "b")


def test_two_masks_for_one_image_are_an_error(masked):
    make_image(masked / "masks" / "a.png", (40, 20))
    with pytest.raises(UserError, match=r"two masks of one name: a\.jpg and a\.png"):
        _masked_sets(masked, "a", "b")


def test_a_mask_of_another_size_is_an_error(masked):
    make_image(masked / "masks" / "b.jpg", (40, 20))
    with pytest.raises(UserError, match=r"b\.jpg.*40x20.*b\.png.*20x40"):
        _masked_sets(masked, "a", "b")


# Regularisation and validation


@pytest.mark.parametrize(
    ("total", "counts", "expected"),
    [
        (30, [1] * 5, [6] * 5),
        (3, [1] * 5, [1, 1, 1, 0, 0]),
        (1, [5], [5]),
        (7, [2, 2, 2], [3, 2, 2]),
        (4, [], []),
        (8, [3, 1, 1], [4, 2, 2]),
    ],
)
def test_regularisation_images_fill_up_to_the_others(total, counts, expected):
    assert balanced_repeats(total, counts) == expected


def test_held_out_images_are_those_of_sd_scripts():
    """The end of the list as Python's own generator shuffles it, for the seed given."""
    assert held_out(10, 0.3, 42) == [0, 1, 4]
    assert held_out(10, 0.3, 42) != held_out(10, 0.3, 43)


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.15, 2), (3, 0.5, 2), (4, 1.0, 4), (5, 0.01, 0)])
def test_as_many_are_held_out_as_the_share_says(count, share, held):
    assert len(held_out(count, share, 1)) == held


@pytest.mark.parametrize("limit", [[100, 80], 90])
def test_images_up_to_an_area_are_left_out_with_their_captions_and_masks(tmp_path, caplog, limit):
    for name, size in {"a": (100, 80), "b": (120, 80), "c": (80, 100)}.items():
        make_image(tmp_path / "images" / f"{name}.png", size, caption=name)
        make_image(tmp_path / "masks" / f"{name}.png", size)
    subset = {"image_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "masks")}
    dataset = {"resolution": 64, "skip_image_resolution": limit, "subsets": [subset]}
    (found,) = load_image_sets(configs_of(tmp_path, dataset, masked_loss=True)[0])
    assert (found.captions, found.sizes.tolist()) == (["b"], [[120, 80]])
    assert found.masks == [str(tmp_path / "masks" / "b.png")]
    assert "leaves out 2 of 3 images" in caplog.text
    assert "a.png, " in caplog.text
    with pytest.raises(UserError, match="skip_image_resolution leaves out every image"):
        load_image_sets(configs_of(tmp_path, dataset | {"skip_image_resolution": [120, 80]}, masked_loss=True)[0])


def test_a_subset_whose_images_are_all_left_out_is_no_error_while_another_has_some(tmp_path):
    for folder, size in {"small": (32, 32), "large": (64, 64)}.items():
        make_image(tmp_path / folder / "a.png", size)
    subsets = [{"image_dir": str(tmp_path / folder)} for folder in ("small", "large")]
    config = configs_of(tmp_path, {"resolution": 64, "subsets": subsets}, skip_image_resolution=(32, 32))[0]
    assert [found.sizes.tolist() for found in load_image_sets(config)] == [[[64, 64]]]


@pytest.mark.parametrize("flag", ["train_data_dir", "reg_data_dir"])
def test_an_empty_sub_folder_of_a_folder_flag_is_skipped(tmp_path, caplog, flag):
    make_image(tmp_path / "train" / "2_mychar" / "a.png", (64, 64))
    make_image(tmp_path / "reg" / "1_girl" / "b.png", (64, 64))
    empty = tmp_path / flag.removesuffix("_data_dir") / "3_empty"
    empty.mkdir()
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution=(64, 64)
    )
    (config,) = load_dataset_configs(options, bucket_step=64)
    assert [len(found) for found in load_image_sets(config)] == [1, 1]
    assert f'"{empty}" holds no images' in caplog.text
    assert "skipped" in caplog.text


def test_nothing_but_empty_sub_folders_is_an_error(tmp_path):
    for name in ("1_a", "2_b"):
        (tmp_path / name).mkdir()
    (config,) = load_dataset_configs(DatasetOptions(train_data_dir=str(tmp_path), resolution=(64, 64)), bucket_step=64)
    with pytest.raises(UserError, match=r"1_a.* holds no images"):
        load_image_sets(config)


def test_an_empty_folder_that_a_file_names_is_an_error(tmp_path):
    make_image(tmp_path / "full" / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.* holds no images"):
        _sets(tmp_path, {"image_dir": str(tmp_path / "full")}, {"image_dir": str(tmp_path / "empty")})


def test_images_of_formats_that_are_not_read_are_said(tmp_path, caplog):
    images = tmp_path / "images"
    make_image(images / "a.png")
    for name in ("a.HEIC", "b.gif", ".hidden.tif", "c.txt"):
        (images / name).write_bytes(b"")
    (found,) = _sets(tmp_path, {"image_dir": str(images)})
    assert len(found) == 1
    assert f'The folder "{images}" has 2 images in formats that are not read, which are left out: a.HEIC, b.gif.' in (
        caplog.text
    )


def test_a_link_to_itself_is_named_only_if_it_is_an_image(tmp_path, caplog):
    make_image(tmp_path / "a.png", caption="mychar")
    (tmp_path / "notes").symlink_to(tmp_path / "notes")
    assert [*load_image_set(subset_of(tmp_path, {"image_dir": str(tmp_path)})).paths] == [str(tmp_path / "a.png")]
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png cannot be read: Too many levels of symbolic links"):
        load_image_set(subset_of(tmp_path, {"image_dir": str(tmp_path)}))
