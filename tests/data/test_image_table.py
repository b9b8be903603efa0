"""image_table.py: repeats, buckets and what is known of each image, through the real loading."""

import logging

import numpy as np
import pytest
from datasets import configs_of, make_image
from golden_data import golden_cases

from library.data.image_table import load_tables
from library.support.errors import UserError


def _table(folder, *datasets, seed=1, **options):
    return load_tables(configs_of(folder, *datasets, **options), seed)[0]


def _folder(folder, count, size=(32, 32)):
    for number in range(count):
        make_image(folder / f"{number:02}.png", size)
    return str(folder)


@pytest.mark.parametrize("case", golden_cases("batches"))
def test_golden_batches(case, tmp_path):
    for number, size in enumerate(case["image_sizes"]):
        make_image(tmp_path / "images" / f"{number:02}.png", tuple(size))
    values = {"resolution": case["resolution"], "enable_bucket": True, "batch_size": case["batch_size"]}
    values |= {"min_bucket_reso": 64, "bucket_reso_steps": 64}
    subset = {"image_dir": str(tmp_path / "images"), "num_repeats": case["num_repeats"]}
    table = _table(tmp_path, {**values, "subsets": [subset]})
    found = {"x".join(map(str, each.bucket.size)): each.samples for each in table.in_buckets()}
    assert found == case["buckets"]
    for epoch in (1, 2):
        samples, ends = table.order(1).epoch(epoch)
        batches = np.split(samples, ends[:-1])
        assert len(batches) == case["batches"]
        assert sorted(map(len, batches)) == case["batch_sizes_multiset"]
        assert all(len({table[index].bucket for index in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("case", golden_cases("reg_balance"))
def test_golden_reg_balance(case, tmp_path):
    subsets = []
    for kind in ("train", "reg"):
        for number, (count, repeats) in enumerate(case[f"{kind}_subsets(images,num_repeats)"]):
            folder = _folder(tmp_path / f"{kind[0]}{number}", count)
            subsets.append({"image_dir": folder, "num_repeats": repeats, "is_reg": kind == "reg"})
    table = _table(tmp_path, {"resolution": 64, "batch_size": 2, "subsets": subsets})
    reg = [index for index in range(len(table)) if table[index].subset.is_reg]
    assert [[*table[index].path.split("/")[-2:], int(table[index].repeats)] for index in reg] == case["registered_reg"]
    train = [index for index in range(len(table)) if index not in reg]
    assert int(table.repeats()[train].sum()) == case["num_train_images"]
    assert int(table.repeats().sum()) == case["entries_in_bucket"]
    assert table.order(1).num_batches == case["dataset_len_batches_bs2_single_bucket"]
    given = [len(found) * found.subset.num_repeats for found in table.sets if found.subset.is_reg]
    assert sum(given) == case["num_reg_images"]


def test_more_regularisation_images_than_needed_is_a_warning(tmp_path, caplog):
    reg = {"image_dir": _folder(tmp_path / "reg", 5), "is_reg": True}
    with caplog.at_level(logging.WARNING):
        table = _table(tmp_path, {"resolution": 64, "subsets": [{"image_dir": _folder(tmp_path / "a", 2)}, reg]})
    assert len(table) == 4
    assert "3 of 5 regularisation images are not used" in caplog.text


def test_an_image_that_its_bucket_would_blow_up_is_refused(tmp_path):
    """Before a pixel of it is read: only its header is looked at."""
    make_image(tmp_path / "images" / "thin.png", (30000, 1))
    dataset = {"resolution": 512, "enable_bucket": True, "subsets": [{"image_dir": str(tmp_path / "images")}]}
    with pytest.raises(UserError, match=r"thin\.png.* has 30000x1 pixels"):
        _table(tmp_path, dataset)


def test_every_dataset_balances_on_its_own(tmp_path):
    folders = [_folder(tmp_path / name, count) for name, count in (("a", 3), ("reg", 2), ("b", 1))]
    subsets = [{"image_dir": folders[0]}, {"image_dir": folders[1], "is_reg": True}]
    table = _table(
        tmp_path, {"resolution": 64, "subsets": subsets}, {"resolution": 32, "subsets": [{"image_dir": folders[2]}]}
    )
    assert table.repeats().tolist() == [1, 1, 1, 2, 1, 1]
    assert [(bucket.dataset, bucket.size) for bucket in table.buckets] == [(0, (64, 64)), (1, (32, 32))]
    assert table[5].config.buckets.resolution == (32, 32)


def test_only_regularisation_images_are_nothing_to_train_on(tmp_path):
    reg = {"image_dir": _folder(tmp_path / "reg", 2), "is_reg": True}
    with pytest.raises(UserError, match="only regularisation"):
        _table(tmp_path, {"resolution": 64, "subsets": [reg]})


def test_what_is_known_of_a_image(tmp_path):
    picture = make_image(tmp_path / "images" / "a.png", (100, 60), "mychar")
    values = {"resolution": 64, "enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 16}
    subset = {"image_dir": str(picture.parent), "flip_aug": True, "resize_interpolation": "area"}
    table = _table(tmp_path, {**values, "resize_interpolation": "bilinear", "subsets": [subset]})
    assert (table[0].path, table[0].caption, table[0].mask_path) == (str(picture), "mychar", None)
    assert (table[0].image_size, table[0].bucket, table.resized().tolist()) == ((100, 60), (80, 48), [[80, 48]])
    entry = table[0].latent_entry
    assert (entry.path, entry.image_size, entry.flip, entry.alpha_mask) == (picture, (100, 60), True, False)
    assert (entry.framing.bucket, entry.framing.resized, entry.framing.interpolation) == ((80, 48), (80, 48), "area")


@pytest.mark.parametrize("enabled", [True, False])
def test_faces_choose_the_crop_only_without_buckets(tmp_path, enabled):
    values = {"resolution": 64, "enable_bucket": enabled, "min_bucket_reso": 64, "face_crop_aug_range": [2.0, 4.0]}
    table = _table(tmp_path, {**values, "subsets": [{"image_dir": _folder(tmp_path / "a", 1)}]})
    assert table[0].framing.face_crop_range == (None if enabled else (2.0, 4.0))


# Validation


def _split(folder, **values):
    subsets = [{"image_dir": _folder(folder / "a", 8)}, {"image_dir": _folder(folder / "reg", 3), "is_reg": True}]
    configs = configs_of(
        folder, {"resolution": 64, "flip_aug": True, "shuffle_caption": True, **values, "subsets": subsets}
    )
    return configs


def _paths(table):
    return {table[index].path for index in range(len(table))}


def test_validation_images_are_kept_out_of_training_and_come_once(tmp_path):
    configs = _split(tmp_path, validation_split=0.25, validation_seed=3, num_repeats=2)
    train, held = load_tables(configs, 1)
    assert len(held) == 2
    assert held.repeats().tolist() == [1, 1]
    assert not _paths(train) & _paths(held)
    assert len(_paths(train)) == 6 + 3
    assert int(train.repeats().sum()) == 6 * 2 * 2
    assert not any(path.startswith(str(tmp_path / "reg")) for path in _paths(held))
    assert not held[0].subset.flip_aug
    assert not held[0].subset.captions.shuffle
    assert train[0].subset.captions.shuffle


def test_captions_stay_with_their_images_when_cached_information_is_split(tmp_path):
    for number in range(8):
        make_image(tmp_path / "a" / f"{number}.png", caption=f"caption {number}")
    subset = {"image_dir": str(tmp_path / "a"), "cache_info": True}
    configs = configs_of(tmp_path, {"resolution": 64, "validation_split": 0.5, "subsets": [subset]})
    for _ in range(2):  # the second time from the cache
        for table in load_tables(configs, 1):
            for index in range(len(table)):
                assert table[index].caption == f"caption {table[index].path[-5]}"


def test_the_validation_seed_chooses_the_images_else_the_runs(tmp_path):
    fixed = _split(tmp_path, validation_split=0.25, validation_seed=3)
    assert _paths(load_tables(fixed, 1)[1]) == _paths(load_tables(fixed, 2)[1])
    free = _split(tmp_path, validation_split=0.25)
    assert len({frozenset(_paths(load_tables(free, seed)[1])) for seed in range(5)}) > 1


def test_a_split_that_keeps_all_images_is_an_error(tmp_path):
    with pytest.raises(UserError, match="validation_split"):
        load_tables(_split(tmp_path, validation_split=1.0), 1)


def test_a_split_that_keeps_no_image_is_a_warning(tmp_path, caplog):
    assert load_tables(_split(tmp_path, validation_split=0.05), 1)[1] is None
    assert "validation_split 0.05 of 8 images is less than half an image" in caplog.text
    assert caplog.text.count("validation_split") == 1  # not of the regularisation images, which are never split


def test_no_split_no_validation(tmp_path):
    assert load_tables(_split(tmp_path), 1)[1] is None


@pytest.mark.parametrize("regularisation", [[], [1]])
def test_an_epoch_has_an_end(tmp_path, regularisation):
    """Many repeats of many images would fill the memory with the order of an epoch."""
    subsets = [{"image_dir": _folder(tmp_path / "images", 3), "num_repeats": 1_000_000}]
    for repeats in regularisation:
        reg = {"image_dir": _folder(tmp_path / "reg", 1), "num_repeats": repeats, "is_reg": True, "class_tokens": "x"}
        subsets.append(reg)
    expected = "6,000,000" if regularisation else "3,000,000"
    with pytest.raises(UserError, match=rf"{expected} samples .* at most 2,000,000 .* num_repeats"):
        _table(tmp_path, {"resolution": 32, "subsets": subsets})
