"""training_data.py and batches.py: images of a dataset file as batches."""

import io
import pickle
import random
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import data_of, make_image, prompts
from departures import departure
from golden_data import golden_arrays, golden_cases
from PIL import Image

from library.data import loader, training_data
from library.data.captions import OBJECT_TEMPLATES, CaptionMoment
from library.data.config import load_dataset_configs
from library.data.images import normalized, read_image
from library.data.latent_cache import LatentCache
from library.data.loader import BatchLoader
from library.data.samples import SampleSource, sample_seeds
from library.data.training_data import TrainingData
from library.model.vae import FrozenVae
from library.options.options import DatasetOptions
from library.support.errors import UserError


class MeanVae(torch.nn.Module):
    """8x8 means of the channels and their sum; not random."""

    def encode(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        mean = torch.cat([pooled, pooled.sum(1, keepdim=True)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))


def _filled(data, *, to_disk=False):
    cache = LatentCache(suffix="_sd.npz", to_disk=to_disk, seed=1)
    cache.fill(data.latent_entries(), FrozenVae(MeanVae(), "cpu", torch.float32), batch_size=2)
    data.use_cache(cache)
    return cache


def _both_sides(data):
    """Samples of the first image, by whether they are mirrored."""
    source = SampleSource(data.table, data.prompts, seed=data.seed, cache=data.cache)
    samples = {}
    for position in range(30):
        sample = source.sample(0, CaptionMoment(epoch=1), position)
        samples[sample.flipped] = sample
        if len(samples) == 2:
            return samples
    raise AssertionError("all draws are on one side")


def _same(one, other):
    assert (one.keys, one.captions, one.seeds, one.weight) == (other.keys, other.captions, other.seeds, other.weight)
    for name in ("latents", "images", "masks", "loss_weights", "size_conditioning", "has_token"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right), name
    assert all(map(torch.equal, one.input_ids, other.input_ids))


# Golden cases


@pytest.mark.parametrize("case", golden_cases("dataset_item"))
def test_golden_dataset_item_as_a_batch(case, tmp_path):
    arrays, prefix = golden_arrays("dataset_item"), case["npz_prefix"]
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "image.png"
    file.write_bytes(arrays[prefix + "png"].tobytes())
    file.with_suffix(".txt").write_text("mychar")
    names = ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "resize_interpolation")
    values = {name: case[name] for name in names if name in case} | {"enable_bucket": case["bucket"]}
    subset = {"image_dir": str(file.parent), "alpha_mask": case.get("alpha_mask", False)}
    (batch,) = data_of(tmp_path, {**values, "subsets": [subset]}).loader()
    image = batch.images[0].float()
    assert batch.loss_weights.tolist() == [case["loss_weight"]]
    if departure("dataset_item", case):
        with Image.open(io.BytesIO(arrays[prefix + "png"].tobytes())) as picture:
            assert batch.size_conditioning[0, :2].tolist() == list(picture.size[::-1])
        assert list(image.shape[-2:]) == list(batch.size_conditioning[0, 4:])
        return
    assert list(image.shape) == case["image_shape_chw"]
    assert np.abs(image.numpy() - arrays[prefix + "image_u8_chw"]).max() <= 2
    if case["alpha_shape_hw"] is None:
        assert batch.masks is None
    else:
        assert list(batch.masks.shape) == [1, 1, *case["alpha_shape_hw"]]
        assert np.abs(batch.masks[0, 0].numpy() * 255 - arrays[prefix + "alpha_u8"]).max() <= 2


@pytest.mark.parametrize("case", golden_cases("sdxl_conditioning"))
def test_golden_sdxl_conditioning(case, tmp_path):
    make_image(tmp_path / "images" / "a.png", tuple(case["image_wh"]), "mychar")
    names = ("resolution", "bucket_reso_steps", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso")
    values = {name: case[name] for name in names} | {"enable_bucket": True}
    data = data_of(tmp_path, {**values, "subsets": [{"image_dir": str(tmp_path / "images"), "flip_aug": True}]})
    assert list(data.table[0].bucket) == case["bucket_reso"]
    assert data.table.resized().tolist() == [case["resized_size"]]
    if case["source"] != "image":
        _filled(data, to_disk=case["source"] == "disk")
    samples = _both_sides(data)
    for flipped, name in ((False, "not_flipped"), (True, "flipped")):
        expected = case[name]["original_sizes_hw"] + case[name]["crop_top_lefts"] + case[name]["target_sizes_hw"]
        assert list(samples[flipped].size_conditioning) == expected


# The same batches however they are loaded

EVERYTHING = {"shuffle_caption": True, "flip_aug": True, "color_aug": True, "random_crop": True, "num_repeats": 3}


@pytest.fixture
def varied(tmp_path):
    """Three shapes, tags, everything random that there is."""
    for number, size in enumerate([(60, 40), (40, 60), (50, 50), (64, 41), (52, 49)]):
        make_image(tmp_path / "a" / f"{number}.png", size, f"mychar, red, blue, green, yellow, {number}")
    buckets = {"enable_bucket": True, "min_bucket_reso": 16, "bucket_reso_steps": 8}
    subset = {"image_dir": str(tmp_path / "a"), **EVERYTHING}
    return data_of(tmp_path, {"resolution": 32, "batch_size": 2, **buckets, "subsets": [subset]}, words=prompts(2))


def test_any_number_of_workers_gives_the_same_batches(varied):
    alone = varied.loader()
    parallel = varied.loader(workers=2, persistent=True)
    for epoch in (1, 2):
        alone.set_epoch(epoch, 0)
        parallel.set_epoch(epoch, 0)
        for one, other in zip(alone, parallel, strict=True):
            _same(one, other)


def test_any_number_of_processes_draws_the_same_samples(varied):
    seen = {}
    for processes in (1, 2, 3):
        loaders = [varied.loader(process_index=i, num_processes=processes) for i in range(processes)]
        assert {len(loader) for loader in loaders} == {-(-varied.order.num_batches // processes)}
        batches = [batch for round_of in zip(*loaders, strict=True) for batch in round_of if len(batch)]
        seen[processes] = [(batch.keys, batch.captions, batch.seeds, batch.images.sum().item()) for batch in batches]
    assert seen[1] == seen[2] == seen[3]


def test_epochs_differ_and_come_again(varied):
    loader = varied.loader()
    texts = {}
    for epoch in (1, 2, 1):
        loader.set_epoch(epoch, 0)
        found = [(batch.captions, batch.seeds) for batch in loader]
        assert texts.setdefault(epoch, found) == found
    assert texts[1] != texts[2]


def test_repeats_of_a_image_are_drawn_independently(varied):
    batches = list(varied.loader())
    captions = [caption for batch in batches for caption in batch.captions]
    assert len(set(captions)) > len(captions) * 0.8
    seeds = [seed for batch in batches for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds) == 15


def test_global_generators_stay_alone(varied):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    list(varied.loader(workers=1))
    list(varied.loader())
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_seeds_of_samples():
    seeds = [sample_seeds(seed, epoch, position) for seed in (-1, 0, 2**40) for epoch in (1, 2) for position in (0, 1)]
    flat = [number for three in seeds for number in three]
    assert len(set(flat)) == len(flat)
    assert all(0 <= number < 2**63 for number in flat)
    assert sample_seeds(1, 2, 3) == sample_seeds(1, 2, 3)


def test_more_workers_than_batches_or_cores_are_not_started(varied, monkeypatch):
    monkeypatch.setattr(loader, "usable_cores", lambda: 1)
    assert varied.loader(workers=8)._loader.num_workers == 1
    monkeypatch.setattr(loader, "usable_cores", lambda: 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch counts the cores as well
        assert varied.loader(workers=800)._loader.num_workers == varied.order.num_batches


def test_persistent_workers_without_workers_are_no_error(varied):
    assert len(list(varied.loader(workers=0, persistent=True))) == varied.order.num_batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_is_gone_is_one_sentence_from_any_process(varied, workers):
    Path(varied.table[2].path).unlink()
    with pytest.raises(UserError) as error:
        list(varied.loader(workers=workers))
    assert str(error.value) == f"The image {varied.table[2].path} does not exist."


def test_a_source_can_be_sent_to_another_process(varied):
    source = SampleSource(varied.table, varied.prompts, seed=1)
    copy = pickle.loads(pickle.dumps(source))
    ref = next(iter(varied.loader().sampler))
    _same(copy[ref], source[ref])


# What is in a batch


def _one_folder(tmp_path, captions, *, size=(48, 32), mode="RGB", dataset=None, words=None, **subset):
    for number, caption in enumerate(captions):
        make_image(tmp_path / "a" / f"{number}.png", size, caption, mode)
    values = {"resolution": 32, "batch_size": 4, **(dataset or {})}
    options = {"masked_loss": True} if "conditioning_data_dir" in subset else {}
    values["subsets"] = [{"image_dir": str(tmp_path / "a"), **subset}]
    return data_of(tmp_path, values, words=words, **options)


def test_pixels_are_those_of_the_file_cut_to_the_bucket(tmp_path):
    data = _one_folder(tmp_path, ["mychar"], size=(32, 32))
    (batch,) = data.loader()
    pixels = read_image(tmp_path / "a" / "0.png").transpose(2, 0, 1)
    assert torch.equal(batch.images[0], torch.from_numpy(pixels))  # a quarter of what floats would take to the GPU
    assert (batch.latents, batch.masks) == (None, None)
    assert batch.keys == [str(tmp_path / "a" / "0.png")]


def test_a_image_of_another_size_is_not_trained_with_the_old_numbers(tmp_path):
    data = _one_folder(tmp_path, ["mychar"], size=(32, 32))
    list(data.loader())
    make_image(tmp_path / "a" / "0.png", (48, 40))
    with pytest.raises(UserError, match=r"0\.png had 32x32 pixels when this run began and now has 48x40"):
        list(data.loader(workers=1))


def test_names_and_folders_do_not_count_but_captions_and_contents_do(tmp_path):
    def both(folder):
        subset = {"image_dir": str(tmp_path / folder / "a")}
        data = data_of(tmp_path, {"resolution": 32, "subsets": [subset]})
        plain = data.fingerprint, data.contents
        del data.contents
        _filled(data)
        return *plain, data.contents

    _one_folder(tmp_path / "first", ["mychar", "mychar two"])
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    for file in sorted((tmp_path / "moved" / "a").iterdir()):
        file.rename(file.with_name(f"renamed {file.name}"))
    assert both("first") == both("moved")
    first = both("first")
    make_image(tmp_path / "first" / "a" / "1.png", (48, 32), mode="RGBA")
    fingerprint, contents, cached = both("first")
    assert fingerprint == first[0]
    assert contents != first[1]
    assert cached != first[2]
    (tmp_path / "moved" / "a" / "renamed 0.txt").write_text("mychar, other")
    assert both("moved")[0] != first[0]


@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_stand_in_for_pixels(tmp_path, to_disk):
    data = _one_folder(tmp_path, ["mychar"] * 3, flip_aug=True)
    images = {sample.flipped: sample.image for sample in (_both_sides(data)[side] for side in (False, True))}
    _filled(data, to_disk=to_disk)
    for side, sample in _both_sides(data).items():
        expected = torch.nn.functional.avg_pool2d(normalized(images[side]), 8)
        assert sample.image is None
        assert torch.allclose(sample.latents[:3], expected, atol=1e-6)
    (batch,) = data.loader()
    assert batch.images is None
    assert (batch.latents.shape, batch.latents.dtype) == ((3, 4, 4, 4), torch.float32)


def test_cached_images_draw_the_captions_of_uncached_ones(tmp_path):
    data = _one_folder(tmp_path, ["mychar, a, b, c, d"] * 3, shuffle_caption=True, flip_aug=True)
    (before,) = data.loader()
    _filled(data)
    (after,) = data.loader(workers=1)
    assert (before.captions, before.seeds, before.keys) == (after.captions, after.seeds, after.keys)


def test_ids_per_encoder_and_presence_of_the_word(tmp_path):
    words = prompts(2, encoders=2, limit=150)
    data = _one_folder(tmp_path, ["mychar, x", "MyChar", "mychars", "x " * 149 + "mychar"], words=words)
    (batch,) = data.loader()
    assert [tuple(ids.shape) for ids in batch.input_ids] == [(4, 2, 77)] * 2
    found = dict(zip(batch.captions, batch.has_token.tolist(), strict=True))
    assert found == {
        "mychar mychar1, x": True,
        "mychar mychar1": True,
        "mychars": False,
        "x " * 149 + "mychar mychar1": True,  # its second vector is cut off
    }
    row = batch.captions.index("mychar mychar1")
    assert batch.input_ids[1][row, 0, :4].tolist() == [49406, 49408, 49409, 49407]


def test_a_word_that_is_cut_off_is_not_present(tmp_path):
    (batch,) = _one_folder(tmp_path, ["x " * 75 + "mychar"]).loader()
    assert batch.has_token.tolist() == [False]


def test_templates_replace_captions(tmp_path):
    make_image(tmp_path / "a" / "0.png", (32, 32), "a caption")
    values = {"resolution": 32, "subsets": [{"image_dir": str(tmp_path / "a"), "num_repeats": 20}]}
    data = data_of(tmp_path, values, words=prompts(2), templates=OBJECT_TEMPLATES)
    captions = [batch.captions[0] for batch in data.loader()]
    assert set(captions) <= {template.format("mychar mychar1") for template in OBJECT_TEMPLATES}
    assert len(set(captions)) > 5


def test_warm_up_follows_the_step(tmp_path):
    rules = {"token_warmup_step": 4, "token_warmup_min": 1, "keep_tokens": 1}
    data = _one_folder(tmp_path, ["mychar, a, b, c, d, e"], dataset={"batch_size": 1}, num_repeats=12, **rules)
    loader = data.loader(accumulation=2)
    loader.set_epoch(1, 1)
    assert [len(batch.captions[0].split(", ")) for batch in loader] == [3, 3, 4, 4, 5, 5, 6, 6, 6, 6, 6, 6]


def test_a_warm_up_given_as_a_share_needs_the_number_of_steps(tmp_path):
    data = _one_folder(tmp_path, ["mychar, a, b, c, d, e"], keep_tokens=1, token_warmup_step=0.5)
    assert [batch.captions for batch in data.loader(max_steps=100)] == [["mychar, a"]]
    assert [batch.captions for batch in data.loader(max_steps=1)] == [["mychar, a, b, c, d, e"]]


def test_regularisation_images_have_the_prior_weight(tmp_path):
    make_image(tmp_path / "a" / "0.png", (32, 32), "mychar")
    make_image(tmp_path / "reg" / "0.png", (32, 32), "girl")
    subsets = [{"image_dir": str(tmp_path / "a")}, {"image_dir": str(tmp_path / "reg"), "is_reg": True}]
    data = data_of(tmp_path, {"resolution": 32, "batch_size": 2, "subsets": subsets}, prior_loss_weight=0.25)
    (batch,) = data.loader()
    assert dict(zip(batch.captions, batch.loss_weights.tolist(), strict=True)) == {"mychar": 1.0, "girl": 0.25}


def test_datasets_of_several_resolutions_share_an_epoch(tmp_path):
    make_image(tmp_path / "a" / "0.png", (64, 64), "mychar")
    make_image(tmp_path / "b" / "0.png", (64, 64), "mychar")
    sizes = [
        {
            "resolution": side,
            "batch_size": side // 16,
            "subsets": [{"image_dir": str(tmp_path / name), "num_repeats": 4}],
        }
        for side, name in ((32, "a"), (64, "b"))
    ]
    data = data_of(tmp_path, *sizes)
    assert sorted(tuple(batch.images.shape) for batch in data.loader()) == [(2, 3, 32, 32)] * 2 + [(4, 3, 64, 64)]
    assert data.resolution == (64, 64)
    assert len(data.latent_entries()) == 2


def test_folder_flags(tmp_path):
    make_image(tmp_path / "train" / "3_mychar girl" / "0.png")
    own = make_image(tmp_path / "train" / "1_mychar" / "0.png", caption="a .txt does not outvote the folder's name")
    own.with_suffix(".caption").write_text("mychar, own caption")
    make_image(tmp_path / "reg" / "1_girl" / "0.png")
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution=(32, 32)
    )
    data = TrainingData(load_dataset_configs(options, bucket_step=64), prompts())
    captions = sorted(caption for batch in data.loader() for caption in batch.captions)
    assert captions == ["girl"] * 4 + ["mychar girl"] * 3 + ["mychar, own caption"]


def test_a_metadata_file_for_the_train_folder(tmp_path):
    make_image(tmp_path / "train" / "0.png", (48, 32))
    (tmp_path / "meta.json").write_text('{"0.png": {"caption": "mychar", "tags": "one, two"}}')
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"),
        in_json=str(tmp_path / "meta.json"),
        resolution=(32, 32),
        dataset_repeats=2,
    )
    data = TrainingData(load_dataset_configs(options, bucket_step=64), prompts())
    assert [batch.captions for batch in data.loader()] == [["mychar,one, two"]] * 2


# Masks


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 1), ("spawn", 0), ("forkserver", 0)])
def test_workers_read_masks_where_they_need_not_be_sent_the_latents(start_method, workers, tmp_path, monkeypatch):
    """torch sends each tensor as an open file: Python 3.14 starts no worker with more than some 250 of them."""
    make_image(tmp_path / "masks" / "0.png", (48, 32))
    data = _one_folder(tmp_path, ["mychar"], conditioning_data_dir=str(tmp_path / "masks"))
    _filled(data)
    monkeypatch.setattr(training_data.multiprocessing, "get_start_method", lambda: start_method)
    assert data.loader(workers=1)._loader.num_workers == workers


def test_alpha_masks_are_ones_where_there_are_none(tmp_path):
    transparent = Image.new("RGBA", (32, 32), (9, 9, 9, 255))
    transparent.paste((9, 9, 9, 51), (0, 0, 8, 32))
    make_image(tmp_path / "a" / "0.png", (32, 32), "mychar")
    transparent.save(tmp_path / "a" / "1.png")
    make_image(tmp_path / "b" / "2.png", (32, 32), "mychar")
    subsets = [{"image_dir": str(tmp_path / "a"), "alpha_mask": True}, {"image_dir": str(tmp_path / "b")}]
    (batch,) = data_of(tmp_path, {"resolution": 32, "batch_size": 4, "subsets": subsets}).loader()
    masks = {key[-5]: mask for key, mask in zip(batch.keys, batch.masks, strict=True)}
    assert batch.masks.shape == (3, 1, 32, 32)
    assert masks["0"].min() == masks["2"].min() == 1
    assert torch.allclose(masks["1"][0, :, :8], torch.full((32, 8), 0.2))
    assert masks["1"][0, :, 8:].min() == 1


@pytest.mark.parametrize("cached", [False, True])
def test_masks_are_cut_and_mirrored_as_their_images(tmp_path, cached):
    """Image and mask are the same file, so what is cut of them must be the same as well."""
    (tmp_path / "masks").mkdir()
    for number in range(3):
        shade = Image.linear_gradient("L").rotate(90).resize((90 + number, 50))
        for file in (
            make_image(tmp_path / "a" / f"{number}.png", caption="mychar"),
            tmp_path / "masks" / f"{number}.png",
        ):
            shade.convert("RGB").save(file)
    values = {"resolution": 40, "batch_size": 2, "flip_aug": True, "random_crop": not cached, "num_repeats": 4}
    subset = {"image_dir": str(tmp_path / "a"), "conditioning_data_dir": str(tmp_path / "masks")}
    data = data_of(tmp_path, {**values, "subsets": [subset]}, masked_loss=True)
    pixels = list(data.loader())
    if cached:
        _filled(data)
    for batch, with_pixels in zip(data.loader(), pixels, strict=True):
        assert torch.allclose(batch.masks[:, 0], with_pixels.images[:, 0] / 255, atol=1e-3)
    left = torch.stack([mask[0, :, 0].mean() for batch in pixels for mask in batch.masks])
    assert left.min() < 0.4 < 0.6 < left.max()


def test_mask_images_win_over_transparency(tmp_path):
    for folder, shade in (("a", 0), ("masks", 255)):
        make_image(tmp_path / folder / "0.png", caption="mychar")
        Image.new("RGBA", (32, 32), (shade, shade, shade, 0 if folder == "a" else 255)).save(
            tmp_path / folder / "0.png"
        )
    metadata = tmp_path / "meta.json"
    metadata.write_text('{"0.png": {"caption": "mychar"}}')
    (tmp_path / "masks" / "0.txt").unlink()
    subset = {"metadata_file": str(metadata), "image_dir": str(tmp_path / "a"), "alpha_mask": True}
    masks = {"conditioning_data_dir": str(tmp_path / "masks"), "masked_loss": True}
    (batch,) = data_of(tmp_path, {"resolution": 32, "subsets": [subset]}, **masks).loader()
    assert batch.masks.min() == 1


# Batches as objects


def test_an_empty_batch_keeps_processes_in_step(tmp_path):
    data = _one_folder(tmp_path, ["mychar"], words=prompts(encoders=2))
    (batch,) = data.loader(process_index=1, num_processes=2)
    assert (len(batch), batch.weight, batch.latents, batch.images, batch.masks) == (0, 0.0, None, None, None)
    assert [ids.shape for ids in batch.input_ids] == [(0, 1, 77)] * 2
    assert (batch.has_token.shape, batch.loss_weights.shape, batch.size_conditioning.shape) == ((0,), (0,), (0, 6))


def test_moving_a_batch_leaves_what_is_looked_at_on_the_cpu(tmp_path):
    (batch,) = _one_folder(tmp_path, ["mychar"], mode="RGBA", alpha_mask=True, words=prompts(encoders=2)).loader()
    moved = batch.to("meta")
    tensors = [moved.images, moved.masks, moved.loss_weights, moved.size_conditioning]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in [*moved.input_ids, moved.has_token]} == {"cpu"}
    assert (moved.keys, moved.seeds, moved.latents) == (batch.keys, batch.seeds, None)


# Validation and prompts


@pytest.fixture
def split(tmp_path):
    captions = [f"mychar, a, b, {number}" for number in range(8)]
    rules = {"shuffle_caption": True, "flip_aug": True, "random_crop": True, "caption_dropout_rate": 0.5}
    return _one_folder(tmp_path, captions, dataset={"validation_split": 0.5, "batch_size": 3}, **rules)


def test_validation_is_the_same_every_time(split):
    assert split.validation_loader() is not None
    first, second = (list(split.validation_loader()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        _same(one, other)
    captions = [caption for batch in first for caption in batch.captions]
    assert len(captions) == 4
    assert all(caption.startswith("mychar, a, b, ") for caption in captions)


def test_validation_weights_make_the_mean_over_all_images(split):
    for processes in (1, 2):
        loaders = [split.validation_loader(process_index=i, num_processes=processes) for i in range(processes)]
        weights = [batch.weight for loader in loaders for batch in loader]
        assert sum(weights) / processes == pytest.approx(1)


def test_validation_images_are_cached_too(split):
    assert len(split.latent_entries()) == 8


def test_first_prompts_are_all_captions_once(split):
    """And the empty one, since captions are dropped at times."""
    found = {tuple(ids.flatten().tolist()) for (ids,) in split.first_prompts()}
    texts = [f"mychar, a, b, {number}" for number in range(8)] + [""]
    assert found == {tuple(split.prompts.encode(text)[0].flatten().tolist()) for text in texts}


def test_a_loader_is_given_what_it_is_made_for(varied):
    assert isinstance(varied.loader(), BatchLoader)
    assert varied.check().warnings == []


# ---- what a learning report asks for


def _taught_folder(tmp_path):
    """Three images that teach the word, in two buckets; one without the token and a regularisation image."""
    for number, size in enumerate([(64, 64), (64, 64), (128, 64)]):
        make_image(tmp_path / "taught" / f"{number}.png", size, f"mychar, {{red|blue}}, number {number}")
    make_image(tmp_path / "taught" / "other.png", (64, 64), "a cat")
    make_image(tmp_path / "reg" / "0.png", (64, 64), "mychar as regularisation")
    taught = {"image_dir": str(tmp_path / "taught"), "caption_extension": ".txt", "shuffle_caption": True}
    taught |= {"enable_wildcard": True, "caption_dropout_rate": 0.5}
    reg = {"image_dir": str(tmp_path / "reg"), "caption_extension": ".txt", "is_reg": True}
    return {
        "resolution": 64,
        "batch_size": 2,
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "bucket_reso_steps": 32,
        "subsets": [taught, reg],
    }


def test_the_concept_is_what_teaches_the_word(tmp_path):
    data = data_of(tmp_path, _taught_folder(tmp_path), words=prompts(2))
    pictures = data.concept().pictures(10)
    assert len(pictures) == 3
    sizes = sorted(
        data.table[index].bucket for index in range(len(data.table)) if "number" in data.table[index].caption
    )
    assert sorted((picture.shape[1], picture.shape[0]) for picture in pictures) == sizes
    assert len(data.concept().pictures(2)) == 2
    captions = data.concept().captions(9)
    assert len(captions) == 9
    assert all(caption.startswith("mychar mychar1, ") for caption, _ in captions)
    assert {caption[-1] for caption, _ in captions} == {"0", "1", "2"}
    assert {size for _, size in captions} == set(sizes)
    assert {word for word in ("red", "blue") if any(word in caption for caption, _ in captions)} == {"red", "blue"}
    assert data.concept().captions(9) == captions


def test_templates_teach_with_every_image_but_regularisation(tmp_path):
    data = data_of(tmp_path, _taught_folder(tmp_path), templates=OBJECT_TEMPLATES)
    assert len(data.concept().pictures(10)) == 4
    captions = [caption for caption, _ in data.concept().captions(16)]
    assert len(set(captions)) > 4
    assert all("mychar" in caption for caption in captions)


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_fixed_batches_are_the_same_at_every_call(validation, tmp_path):
    table = _taught_folder(tmp_path) | {"validation_split": validation}
    data = data_of(tmp_path, table)
    first, second = (list(data.concept().fixed_batches(13, held_out=validation > 0)) for _ in range(2))
    assert 13 <= sum(map(len, first)) < 15
    assert all(batch.has_token.all() for batch in first)
    assert {len(re.findall("red|blue", caption)) for batch in first for caption in batch.captions} == {
        1
    }  # none dropped
    for one, other in zip(first, second, strict=True):
        _same(one, other)
    seeds = [seed for batch in first for seed in batch.seeds]
    assert len(set(seeds)) == len(seeds)
    loader = data.loader()
    trained = {
        seed for epoch in (1, 2, 3) for _ in [loader.set_epoch(epoch, 0)] for batch in loader for seed in batch.seeds
    }
    assert not trained & set(seeds)
    if validation:
        held = {data.validation_table[index].path for index in range(len(data.validation_table))}
        assert {key for batch in first for key in batch.keys} <= held


def test_a_word_that_a_wildcard_may_leave_out_is_searched_for(tmp_path):
    for number in range(40):
        make_image(tmp_path / "p" / f"{number:02d}.png", (64, 64), f"{{a girl|a girl|mychar}} number {number}")
    subset = {"image_dir": str(tmp_path / "p"), "caption_extension": ".txt", "enable_wildcard": True}
    data = data_of(tmp_path, {"resolution": 64, "subsets": [subset]})
    assert len(data.concept().pictures(100)) == 40
    captions = [caption for caption, _ in data.concept().captions(16)]
    # From all over the images.
    assert captions == [f"mychar number {number * 40 // 16}" for number in range(16)]
    shares = [bool(held) for batch in data.concept().fixed_batches(128, held_out=False) for held in batch.has_token]
    assert len(shares) == 128
    assert 0.2 < sum(shares) / len(shares) < 0.5


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"keep_tokens_separator": "|||", "shuffle_caption": True}, "mychar, small, red;blue"),
        ({"caption_separator": ";", "shuffle_caption": True}, "mychar ||| small, red; blue"),
        ({"caption_separator": ";", "caption_tag_dropout_rate": 1.0}, "mychar ||| small, red; blue"),
        ({"caption_separator": ";"}, "mychar ||| small, red;blue"),
    ],
)
def test_calm_captions_are_joined_as_in_the_training(more, wanted, tmp_path):
    make_image(tmp_path / "p" / "0.png", (64, 64), "mychar ||| small, red;blue")
    subset = {"image_dir": str(tmp_path / "p"), "caption_extension": ".txt", **more}
    data = data_of(tmp_path, {"resolution": 64, "subsets": [subset]})
    (caption, _) = data.concept().captions(1)[0]
    assert caption == wanted
    assert [batch.captions for batch in data.concept().fixed_batches(1, held_out=False)] == [[wanted]]


def test_there_are_no_fixed_batches_without_the_word(tmp_path):
    for number in range(4):
        make_image(tmp_path / "p" / f"{number}.png", (64, 64), "a cat")
    make_image(tmp_path / "taught" / "0.png", (64, 64), "mychar")
    plain = {"resolution": 64, "validation_split": 0.5, "subsets": [{"image_dir": str(tmp_path / "p")}]}
    taught = {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "taught")}]}
    data = data_of(tmp_path, plain, taught, caption_extension=".txt")
    assert list(data.concept().fixed_batches(5, held_out=True)) == []
    assert sum(map(len, data.concept().fixed_batches(5, held_out=False))) == 5


def test_a_word_that_no_deterministic_caption_keeps_is_said(tmp_path):
    caption = ", ".join(["cat"] * 60 + ["mychar"])
    make_image(tmp_path / "p" / "0.png", (64, 64), caption)
    data = data_of(
        tmp_path, {"resolution": 64, "subsets": [{"image_dir": str(tmp_path / "p"), "shuffle_caption": True}]}
    )
    with pytest.raises(UserError, match="within the length limit when its tags are not shuffled"):
        data.concept().captions(16)
