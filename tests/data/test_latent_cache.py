import logging
import os
import shutil
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from departures import departure
from diffusers import AutoencoderKL
from golden_data import golden_cases
from PIL import Image
from test_atomic_files import abandoned

from library.data import latent_cache as latents
from library.data.buckets import BucketChooser, BucketRules, size_conditioning_crop
from library.data.images import Framing, frame_image, to_tensor
from library.data.latent_cache import LatentCache
from library.data.latent_entry import LatentEntry
from library.model import vae as frozen_vae
from library.model.vae import FrozenVae, vae_fingerprint
from library.support.errors import UserError


class PoolingVae(torch.nn.Module):
    """8x8 means of the three channels, and their mean; nothing random. Notes the shapes of its batches."""

    def __init__(self, spoil=lambda values: values):
        super().__init__()
        self.spoil, self.shapes = spoil, []

    def encode(self, images: torch.Tensor):
        self.shapes.append(tuple(images.shape))
        pooled = torch.nn.functional.avg_pool2d(images.float(), 8)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1).to(images.dtype)
        mean = self.spoil(mean)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))

    @property
    def encoded(self) -> int:
        return sum(shape[0] for shape in self.shapes)


def _tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )


def _image(file: Path, size: tuple[int, int] = (96, 64), mode: str = "RGB", seed: int = 0) -> Path:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(file)
    return file


def _entry(file: Path, bucket: tuple[int, int] = (64, 64), **changes) -> LatentEntry:
    with Image.open(file) as image:
        size = image.size
    placement = BucketChooser(BucketRules(bucket)).place(*size)
    framing = Framing(placement.resized, bucket, changes.pop("interpolation", None))
    return LatentEntry(file, size, framing, size_conditioning_crop(bucket, size), **changes)


def _images(folder: Path, count: int = 5, **options) -> list[LatentEntry]:
    return [_entry(_image(folder / f"image_{i}.png", seed=i), **options) for i in range(count)]


def _encoder(vae=None, dtype=torch.float32) -> FrozenVae:
    return FrozenVae(vae or PoolingVae(), "cpu", dtype)


def _cache(to_disk: bool = True, **options) -> LatentCache:
    return LatentCache(**{"suffix": "_sd.npz", "to_disk": to_disk, "seed": 7} | options)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def _described(tensor: torch.Tensor | None) -> dict | None:
    return None if tensor is None else {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}


# Golden cases


@pytest.mark.parametrize("case", golden_cases("latents_cache"))
def test_golden_latents_cache(case, tmp_path):
    file = _image(tmp_path / "img.png", tuple(case["image_wh"]), "RGBA" if case["alpha_mask"] else "RGB")
    entry = _entry(file, tuple(case["bucket_reso"]), flip=case["flip_aug"], alpha_mask=case["alpha_mask"])
    cache = _cache(case["to_disk"], suffix="_sdxl.npz" if case["sdxl"] else "_sd.npz")
    cache.fill([entry], _encoder(dtype=_dtype(case["vae_dtype"])))
    if not case["to_disk"]:
        kept, expected = cache.memory[entry], case["memory"]
        assert _described(kept.latents) == expected["latents"]
        assert _described(kept.flipped) == expected["latents_flipped"]
        assert _described(kept.alpha_mask) == expected["alpha_mask"]
        assert list(entry.image_size) == expected["latents_original_size"]
        assert list(entry.crop_ltrb) == expected["latents_crop_ltrb"]
        return
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["img.png", case["file"]])
    ending = "_{1}x{2}".format(*case["keys"]["latents"]["shape"]) if departure("latents_cache", case) else ""
    with np.load(tmp_path / case["file"]) as arrays:
        held = {key: {"dtype": str(arrays[key].dtype), "shape": list(arrays[key].shape)} for key in arrays}
        assert {key: held.get(key + ending) for key in case["keys"]} == case["keys"]
        assert len(held) == len(case["keys"]) + 2
        assert held.keys() > {f"vae_fingerprint{ending}", f"made_from{ending}"}
        assert arrays["original_size" + ending].tolist() == case["original_size"]
        assert arrays["crop_ltrb" + ending].tolist() == case["crop_ltrb"]


# What is encoded


@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_are_those_of_the_framed_image_and_of_its_mirror_image(tmp_path, to_disk):
    entry = _entry(_image(tmp_path / "image.png", (150, 100), "RGBA"), (128, 64), flip=True, alpha_mask=True)
    cache = _cache(to_disk)
    cache.fill([entry], _encoder())
    picture = frame_image(entry.path, entry.framing, alpha=True)
    pooled = torch.nn.functional.avg_pool2d(to_tensor(picture.pixels)[None], 8)[0]
    loaded = cache.load(entry)
    assert torch.allclose(loaded.latents[:3], pooled, atol=1e-6)
    assert torch.allclose(loaded.flipped, loaded.latents.flip(-1), atol=1e-6)
    assert np.array_equal(loaded.alpha_mask.numpy(), picture.alpha)
    assert loaded.latents.dtype == loaded.flipped.dtype == loaded.alpha_mask.dtype == torch.float32


@pytest.mark.parametrize("to_disk", [False, True])
def test_neither_batch_size_nor_processes_nor_order_change_the_latents(tmp_path, to_disk):
    entries = _images(tmp_path, 5, flip=True)
    encoder, caches = _encoder(_tiny_vae()), []
    for batch_size, processes, listed in ((1, 1, entries), (3, 1, entries[::-1]), (2, 2, entries)):
        cache = _cache(to_disk)
        for index in range(processes):
            cache.fill(listed, encoder, batch_size=batch_size, process_index=index, num_processes=processes)
        caches.append([cache.load(entry) for entry in entries])
        for file in tmp_path.glob("*.npz"):
            file.unlink()
    for other in caches[1:]:
        for one, two in zip(caches[0], other, strict=True):
            assert torch.allclose(one.latents, two.latents, atol=1e-5)
            assert torch.allclose(one.flipped, two.flipped, atol=1e-5)
    latents = torch.stack([one.latents for one in caches[0]])
    assert (latents[0] - latents[1]).abs().mean() > 0.01


def test_the_posterior_is_sampled_with_the_seed_and_each_image_has_its_own_noise(tmp_path):
    class Spread(PoolingVae):
        def encode(self, images):
            shape = (len(images), 4, images.shape[2] // 8, images.shape[3] // 8)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.zeros(shape), std=torch.full(shape, 2.0)))

    entries = _images(tmp_path, 2, flip=True, bucket=(256, 256))
    drawn = {}
    for seed in (1, 2):
        cache = _cache(False, seed=seed)
        cache.fill(entries, _encoder(Spread()))
        drawn[seed] = [x for entry in entries for x in (cache.load(entry).latents, cache.load(entry).flipped)]
    everything = torch.stack(drawn[1] + drawn[2])
    assert everything.std().item() == pytest.approx(2, rel=0.03)
    correlation = torch.corrcoef(everything.flatten(1))
    assert (correlation - torch.eye(8)).abs().max() < 0.1


def test_images_are_encoded_bucket_by_bucket_in_batches(tmp_path):
    small, large = _images(tmp_path / "a", 5), _images(tmp_path / "b", 3, bucket=(128, 64))
    mixed = [large[0], *small[:3], large[1], *small[3:], large[2]]
    vae = PoolingVae()
    _cache(False).fill(mixed, _encoder(vae), batch_size=2)
    assert vae.shapes == [(n, 3, 64, 64) for n in (2, 2, 1)] + [(n, 3, 64, 128) for n in (2, 1)]


def test_flipped_latents_are_encoded_only_where_asked_for(tmp_path):
    entries = [*_images(tmp_path / "a", 2), *_images(tmp_path / "b", 2, flip=True)]
    vae, cache = PoolingVae(), _cache(False)
    cache.fill(entries, _encoder(vae), batch_size=4)
    assert vae.encoded == 6
    assert [cache.load(entry).flipped is None for entry in entries] == [True, True, False, False]


def test_a_memory_cache_keeps_no_batch_alive_and_is_filled_once(tmp_path):
    entries, vae, cache = _images(tmp_path, 4, flip=True), PoolingVae(), _cache(False)
    cache.fill(entries, _encoder(vae, torch.bfloat16), batch_size=4)
    kept = cache.memory[entries[0]]
    assert kept.latents.untyped_storage().nbytes() == kept.flipped.untyped_storage().nbytes() == 4 * 8 * 8 * 2
    report = cache.fill(entries, _encoder(vae, torch.bfloat16))
    assert (report.reused, report.encoded, vae.encoded) == (4, 0, 8)
    assert not list(tmp_path.glob("*.npz"))


def test_images_on_disk_are_not_kept_in_memory(tmp_path):
    cache = _cache()
    cache.fill(_images(tmp_path), _encoder())
    assert cache.memory == {}


# The disk cache


def test_a_second_run_reuses_everything_and_says_so(tmp_path, caplog):
    entries = _images(tmp_path, 3, flip=True, alpha_mask=True)
    with caplog.at_level(logging.INFO):
        first = _cache().fill(entries, _encoder())
        vae = PoolingVae()
        second = _cache().fill(entries, _encoder(vae))
    assert (first.reused, first.encoded, first.reasons) == (0, 3, {"new": 3})
    assert (second.reused, second.encoded, vae.encoded) == (3, 0, 0)
    assert "Latents: 0 reused, 3 encoded (3 new)." in caplog.text
    assert "Latents: 3 reused, 0 encoded." in caplog.text


def test_a_cache_that_was_cut_off_is_finished(tmp_path):
    entries = _images(tmp_path, 4)

    def stop_at_third(values):
        if vae.encoded > 2:
            raise KeyboardInterrupt
        return values

    vae = PoolingVae(stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        _cache().fill(entries, _encoder(vae))
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert not list(tmp_path.glob("*.tmp"))
    report = _cache().fill(entries, _encoder())
    assert (report.reused, report.encoded) == (2, 2)


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept there")
def test_what_killed_runs_left_beside_the_images_is_swept(tmp_path):
    """Each process sweeps what is left of its own share, also where all is cached."""
    entries = _images(tmp_path, 2)
    for cached in (False, True):
        left = [abandoned(_cache().file(entry), age=3600) for entry in entries]
        _cache().fill(entries, _encoder(), num_processes=2)
        assert [path.exists() for path in left] == [False, True], cached
        _cache().fill(entries, _encoder(), process_index=1, num_processes=2)
        assert [path.exists() for path in left] == [False, False], cached


def test_another_resolution_makes_latents_beside_the_old_ones(tmp_path):
    first, running = _entry(_image(tmp_path / "image.png")), _cache()
    running.fill([first], _encoder())
    before = running.load(first).latents
    for skip_check in (False, True):
        bucket = (128, 64) if skip_check else (64, 128)
        entry, cache = _entry(tmp_path / "image.png", bucket), _cache(skip_check=skip_check)
        assert cache.fill([entry], _encoder()).reasons == {"of another size": 1}
        assert cache.load(entry).latents.shape == (4, bucket[1] // 8, bucket[0] // 8)
        # A run that caches the same image meanwhile goes on with what is its own.
        assert torch.equal(running.load(first).latents, before)
    assert _cache().fill([first], _encoder()).reused == 1


def test_latents_that_another_run_replaced_meanwhile_are_not_trained_on(tmp_path):
    entry, cache = _images(tmp_path, 1)[0], _cache()
    cache.fill([entry], _encoder(_tiny_vae(0)))
    cache.load(entry)
    _cache().fill([entry], _encoder(_tiny_vae(1)))
    with pytest.raises(UserError, match=r"image_0_0096x0064_sd\.npz.*replaced.*written anew"):
        cache.load(entry)


def test_an_old_style_file_that_appears_meanwhile_is_not_read(tmp_path):
    entry, cache = _images(tmp_path, 1)[0], _cache()
    cache.fill([entry], _encoder())
    before = cache.load(entry).latents
    np.savez(tmp_path / "image_0.npz", latents=np.ones((4, 8, 8), dtype=np.float32))
    assert torch.equal(cache.load(entry).latents, before)


def test_what_other_processes_cached_is_looked_at(tmp_path):
    entries, encoder = _images(tmp_path, 5, flip=True), _encoder()
    one, other = _cache(), _cache()

    def the_other():
        other.fill(entries, encoder, process_index=1, num_processes=2, wait=lambda: None)

    one.fill(entries, encoder, num_processes=2, wait=the_other)
    for cache in (one, other):
        assert [cache.load(entry).latents.shape for entry in entries] == [(4, 8, 8)] * 5
    (tmp_path / "image_1_0096x0064_sd.npz").unlink()
    with pytest.raises(UserError, match=r"image_1_0096x0064_sd\.npz, which another process has made, is missing"):
        _cache().fill(entries, encoder, num_processes=2, wait=lambda: None)


def test_a_higher_precision_makes_the_latents_anew(tmp_path):
    entries = _images(tmp_path, 2)
    _cache().fill(entries, _encoder(_tiny_vae(), torch.bfloat16))
    assert _cache(skip_check=True).fill(entries, _encoder(_tiny_vae())).encoded == 0
    assert _cache().fill(entries, _encoder(_tiny_vae())).reasons == {"in a coarser precision": 2}
    for dtype in (torch.float32, torch.bfloat16):
        assert _cache().fill(entries, _encoder(_tiny_vae(), dtype)).encoded == 0


def test_latents_in_the_precision_of_the_run_will_do_where_the_vae_works_in_a_finer_one(tmp_path):
    """A bf16 run on a CPU encodes in float32, and takes what a GPU has cached in bf16."""
    cached, new = _images(tmp_path, 2)
    _cache().fill([cached], _encoder(_tiny_vae(), torch.bfloat16))
    report = _cache(precision=torch.bfloat16).fill([cached, new], _encoder(_tiny_vae()))
    assert (report.reused, report.encoded) == (1, 1)
    assert _cache().fill([cached, new], _encoder(_tiny_vae())).reasons == {"in a coarser precision": 1}


def test_images_are_read_by_as_many_threads_as_there_are_cores(tmp_path, monkeypatch):
    meeting, read = threading.Barrier(3), latents._read

    def read_together(entry):
        meeting.wait(timeout=60)  # raises BrokenBarrierError unless three threads come
        return read(entry)

    monkeypatch.setattr(latents, "usable_cores", lambda: 3)
    monkeypatch.setattr(latents, "_read", read_together)
    filters = warnings.filters[:]
    assert _cache(to_disk=False).fill(_images(tmp_path, 6), _encoder()).encoded == 6
    assert warnings.filters == filters


def test_a_bitmap_edited_to_the_same_length_is_encoded_anew_and_a_copied_folder_is_not(tmp_path):
    entry = _entry(_image(tmp_path / "a" / "image.bmp"))
    _cache().fill([entry], _encoder())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "image.bmp", (10**9, 10**9))
    assert _cache().fill([_entry(tmp_path / "b" / "image.bmp")], _encoder()).encoded == 0
    _image(entry.path, seed=1)
    assert _cache().fill([entry], _encoder()).reasons == {"of another image": 1}


@pytest.mark.parametrize("to_disk", [False, True])
def test_neither_folder_nor_name_decides_the_noise_but_the_content(tmp_path, to_disk):
    drawn, digests = [], []
    for name, seed in (("a/one.png", 0), ("b/c/two.png", 0), ("a/three.png", 1)):
        entry, cache = _entry(_image(tmp_path / name, seed=seed), flip=True), _cache(to_disk)
        cache.fill([entry], _encoder(_tiny_vae()))
        drawn.append(cache.load(entry))
        digests.append(cache.digest([entry]))
    assert torch.equal(drawn[0].latents, drawn[1].latents)
    assert torch.equal(drawn[0].flipped, drawn[1].flipped)
    assert not torch.equal(drawn[0].latents, drawn[2].latents)
    assert digests[0] == digests[1] != digests[2]


def test_a_digest_is_the_same_in_memory_and_on_disk_and_where_the_file_was_found(tmp_path):
    entries = _images(tmp_path, 2, flip=True, alpha_mask=True)
    caches = [_cache(False), _cache(), _cache()]
    for cache in caches:
        cache.fill(entries, _encoder(_tiny_vae(), torch.bfloat16))
    assert len({cache.digest(entries) for cache in caches}) == 1
    assert caches[0].digest(entries) != caches[0].digest(entries[:1])


def test_an_image_that_changed_its_size_since_it_was_found_is_an_error(tmp_path):
    entry = _images(tmp_path, 1)[0]
    _image(entry.path, (64, 64))
    with pytest.raises(UserError, match=r"image_0\.png had 96x64 pixels when this run began and now has 64x64"):
        _cache().fill([entry], _encoder())


def test_a_link_is_refused_before_anything_is_encoded(tmp_path):
    entries, vae = _images(tmp_path, 2), PoolingVae()
    (tmp_path / "image_1_0096x0064_sd.npz").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"image_1_0096x0064_sd\.npz.*symbolic link"):
        _cache().fill(entries, _encoder(vae))
    assert vae.encoded == 0
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_takes_nothing_is_found_before_anything_is_encoded(tmp_path, monkeypatch):
    entries, vae = _images(tmp_path, 2), PoolingVae()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"folder is not writable.*--cache_latents_to_disk"):
        _cache().fill(entries, _encoder(vae))
    assert vae.encoded == 0


def test_another_vae_makes_the_latents_anew_unless_the_check_is_skipped(tmp_path):
    entries = _images(tmp_path, 2)
    _cache().fill(entries, _encoder(_tiny_vae(0)))
    assert _cache().fill(entries, _encoder(_tiny_vae(0), torch.bfloat16)).encoded == 0
    assert _cache(skip_check=True).fill(entries, _encoder(_tiny_vae(1))).encoded == 0
    assert _cache().fill(entries, _encoder(_tiny_vae(1))).reasons == {"of another VAE": 2}
    assert _cache().fill(entries, _encoder(_tiny_vae(1))).encoded == 0


def test_latents_that_are_not_finite_are_made_anew(tmp_path):
    entry = _images(tmp_path, 1)[0]
    np.savez(tmp_path / "image_0_0096x0064_sd.npz", latents=np.full((4, 8, 8), np.nan, dtype=np.float32))
    cache = _cache()
    assert cache.fill([entry], _encoder()).reasons == {"NaN or infinite": 1}
    assert torch.isfinite(cache.load(entry).latents).all()


def test_a_retouched_image_and_another_interpolation_are_encoded_anew(tmp_path):
    entry = _images(tmp_path, 1)[0]
    _cache().fill([entry], _encoder())
    assert _cache().fill([_entry(entry.path, interpolation="bicubic")], _encoder()).encoded == 1
    Image.new("RGB", (96, 64)).save(entry.path)
    assert _cache().fill([_entry(entry.path, interpolation="bicubic")], _encoder()).reasons == {"of another image": 1}


def test_caches_of_sd_scripts_are_used_old_names_too(tmp_path):
    entries = _images(tmp_path, 2)
    values = np.arange(256, dtype=np.float32).reshape(4, 8, 8)
    np.savez(tmp_path / "image_0_0096x0064_sd.npz", latents=values, original_size=[96, 64], crop_ltrb=np.zeros(4))
    np.savez(tmp_path / "image_1.npz", latents=values + 1)
    vae, cache = PoolingVae(), _cache()
    report = cache.fill(entries, _encoder(vae))
    assert (report.reused, report.unrecorded, vae.encoded) == (2, 2, 0)
    assert "2 of those reused do not record image, VAE and precision, and are trusted." in str(report)
    assert np.array_equal(cache.load(entries[0]).latents, values)
    assert np.array_equal(cache.load(entries[1]).latents, values + 1)


def test_a_file_that_cannot_be_read_is_made_anew_with_a_warning(tmp_path, caplog):
    entries = _images(tmp_path, 2)
    _cache().fill(entries, _encoder())
    file = tmp_path / "image_1_0096x0064_sd.npz"
    file.write_bytes(file.read_bytes()[:300])
    report = _cache().fill(entries, _encoder())
    assert (report.reused, report.encoded) == (1, 1)
    assert any(str(entries[1].path) in message for message in caplog.messages)
    assert _cache().fill(entries, _encoder()).reused == 2


def test_a_file_of_another_program_is_never_overwritten(tmp_path, monkeypatch):
    """``<image>.npz`` may be anything: what is no archive, or too large for a cache, was replaced."""
    entries = _images(tmp_path, 1)
    file = tmp_path / "image_0.npz"
    file.write_bytes(b"poses")
    with pytest.raises(UserError, match=r"image_0\.npz stands where .* Move it"):
        _cache().fill(entries, _encoder())
    assert file.read_bytes() == b"poses"
    np.savez(file, poses=np.zeros(4))
    with monkeypatch.context() as patch:
        patch.setattr("library.support.npz_files.LARGEST_FILE", 100)
        with pytest.raises(UserError, match="Move it"):
            _cache().fill(entries, _encoder())
    assert _cache().fill(entries, _encoder()).encoded == 1
    assert set(np.load(file)) >= {"poses", "latents_8x8"}
    file.write_bytes(b"")
    assert _cache().fill(entries, _encoder()).encoded == 1


def test_an_alpha_mask_in_the_file_counts_only_if_asked_for(tmp_path):
    entry = _entry(_image(tmp_path / "image.png", mode="RGBA"), alpha_mask=True)
    assert [_cache().fill([entry], _encoder()).encoded for _ in range(2)] == [1, 0]
    plain, cache = _entry(entry.path), _cache()
    # The colours under the transparent places were encoded, so the latents cannot serve a run that lays them on white.
    assert cache.fill([plain], _encoder()).encoded == 1
    assert cache.load(plain).alpha_mask is None
    assert cache.fill([entry], _encoder()).reasons == {"incomplete": 1}
    assert cache.load(entry).alpha_mask.min() < 1


def test_an_opaque_image_is_not_encoded_anew_when_alpha_masks_are_switched_off(tmp_path):
    entry = _entry(_image(tmp_path / "image.png"), alpha_mask=True)
    _cache().fill([entry], _encoder())
    plain, cache = _entry(entry.path), _cache()
    assert cache.fill([plain], _encoder()).encoded == 0
    assert cache.load(plain).alpha_mask is None


@pytest.mark.parametrize("sizes", [((96, 64), (96, 64)), ((96, 64), (64, 64))])
def test_two_images_with_one_name_are_refused_on_disk_only(tmp_path, sizes):
    files = [_image(tmp_path / f"a.{ext}", size) for ext, size in zip(("png", "jpg"), sizes, strict=True)]
    entries = [_entry(file) for file in files]
    with pytest.raises(UserError, match=r"a\.png and .*a\.jpg.*--cache_latents_to_disk"):
        _cache().fill(entries, _encoder())
    _cache(False).fill(entries, _encoder())
    assert not list(tmp_path.glob("*.npz"))


def test_one_image_in_several_resolutions_shares_a_file(tmp_path):
    file = _image(tmp_path / "image.png")
    entries, vae, cache = [_entry(file), _entry(file, (128, 64))], PoolingVae(), _cache()
    for _ in range(2):
        cache.fill(entries, _encoder(vae))
        assert [cache.load(entry).latents.shape[2] for entry in entries] == [8, 16]
    assert vae.encoded == 2
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_one_image_with_and_without_flipping_is_encoded_with_it(tmp_path):
    file = _image(tmp_path / "image.png")
    entries, cache = [_entry(file), _entry(file, flip=True)], _cache()
    for listed in (entries, entries[::-1]):
        cache.fill(listed, _encoder())
        assert cache.load(entries[0]).flipped is None
        assert cache.load(entries[1]).flipped is not None
    with pytest.raises(UserError, match=r"image\.png is used twice"):
        cache.fill([entries[0], _entry(file, interpolation="box")], _encoder())


def test_processes_share_the_files_on_disk_and_each_fills_its_own_memory(tmp_path):
    entries = _images(tmp_path, 5)
    counts = [_cache().fill(entries, _encoder(), process_index=i, num_processes=2).encoded for i in range(2)]
    assert counts == [3, 2]
    counts = [_cache(False).fill(entries, _encoder(), process_index=i, num_processes=2).encoded for i in range(2)]
    assert counts == [5, 5]


def test_a_cache_file_that_vanishes_during_the_run_is_named(tmp_path):
    entry, cache = _images(tmp_path, 1)[0], _cache()
    cache.fill([entry], _encoder())
    cache.file(entry).unlink()
    with pytest.raises(UserError, match=r"image_0_0096x0064_sd\.npz"):
        cache.load(entry)


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_damaged_image_is_named(tmp_path, content):
    entries = _images(tmp_path, 3)
    entries[1].path.write_bytes(content)
    with pytest.raises(UserError, match=r"image_1\.png"):
        _cache().fill(entries, _encoder())


# The VAE


def test_encoding_is_unscaled_in_the_dtype_asked_for_and_gives_no_gradient():
    vae, images = _tiny_vae(), torch.rand(2, 3, 64, 32) * 2 - 1
    expected = vae.encode(images).latent_dist
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = _encoder(vae).encode(images, generators)
    noise = torch.stack([torch.randn((4, 8, 4), generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(latents, expected.mean + expected.std * noise, atol=1e-5)
    assert not latents.requires_grad
    half = _encoder(vae, torch.bfloat16).encode(images, [torch.Generator().manual_seed(i) for i in range(2)])
    assert half.dtype == torch.bfloat16
    assert (half.float() - latents).abs().mean() < 0.05


def test_an_overflow_in_half_precision_is_said_and_encoded_in_float32(tmp_path, caplog):
    def overflow(values: torch.Tensor) -> torch.Tensor:
        return values * float("inf") if values.dtype == torch.float16 else values

    entries, cache = _images(tmp_path, 2), _cache()
    encoder = _encoder(PoolingVae(overflow), torch.float16)
    cache.fill(entries, encoder)
    assert encoder.dtype == torch.float32
    assert len([message for message in caplog.messages if "float32" in message]) == 1
    reference = _cache(False)
    reference.fill(entries, _encoder())
    assert torch.equal(cache.load(entries[0]).latents, reference.load(entries[0]).latents)


def test_a_real_vae_that_overflows_inside_goes_on_in_float32():
    vae = _tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(20_000)
    encoder = _encoder(vae, torch.float16)
    for _ in range(2):
        latents = encoder.encode(torch.ones(1, 3, 16, 16), [torch.Generator()])
        assert torch.isfinite(latents).all()
        assert latents.dtype == vae.dtype == torch.float32


def _rounded_by_half() -> AutoencoderKL:
    """A VAE that fp16 rounds; its file is float32."""
    vae = _tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(20_001)
        vae.decoder.conv_in.weight.fill_(60_001)
    return vae


def test_after_an_overflow_the_weights_are_those_of_the_file():
    image = torch.ones(1, 3, 16, 16)
    whole = FrozenVae(_rounded_by_half(), "cpu", torch.float32)
    wanted = whole.encode(image, [torch.Generator().manual_seed(0)])
    half = FrozenVae(_rounded_by_half(), "cpu", torch.float16, load=lambda dtype: _rounded_by_half().to(dtype))
    module = half.vae
    assert torch.equal(half.encode(image, [torch.Generator().manual_seed(0)]), wanted)
    assert half.vae is module
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_after_an_overflow_in_drawing_it_draws_with_the_weights_of_the_file_and_trains_as_before():
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    half = FrozenVae(_rounded_by_half(), "cpu", torch.float16, load=lambda dtype: _rounded_by_half().to(dtype))
    before = [parameter.clone() for parameter in half.vae.parameters()]
    assert torch.equal(half.decode(latents), FrozenVae(_rounded_by_half(), "cpu", torch.float32).decode(latents))
    assert half.dtype == torch.float16
    assert all(torch.equal(one, other) for one, other in zip(before, half.vae.parameters(), strict=True))


def test_values_that_are_not_finite_in_float32_are_an_error_that_names_the_image(tmp_path):
    def spoil_second(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:1], values[1:2] * float("nan"), values[2:]])

    with pytest.raises(UserError, match=r"image_1\.png.*float32") as error:
        _cache().fill(_images(tmp_path, 3), _encoder(PoolingVae(spoil_second), torch.bfloat16), batch_size=3)
    assert "image_0" not in str(error.value)
    assert not list(tmp_path.glob("*.npz"))


def test_the_fingerprint_tells_vaes_apart_but_not_precisions():
    one = vae_fingerprint(_tiny_vae(0))
    assert one.dtype == np.float32
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        assert np.abs(vae_fingerprint(convert(_tiny_vae(0))) - one).max() < 0.005
    assert np.abs(vae_fingerprint(_tiny_vae(1)) - one).max() > 0.5
    tuned = _tiny_vae(0)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    assert np.abs(vae_fingerprint(tuned) - one).max() > 0.05


def test_a_change_of_the_decoder_alone_leaves_the_fingerprint():
    tuned = _tiny_vae(0)
    torch.nn.init.normal_(tuned.decoder.conv_in.weight)
    assert np.array_equal(vae_fingerprint(tuned), vae_fingerprint(_tiny_vae(0)))


def test_the_vae_works_elsewhere_for_a_while_and_comes_back():
    encoder, seen = _encoder(), []
    encoder.vae = SimpleNamespace(device=lambda: None)
    with patch("library.model.vae._moved", lambda vae, device, dtype: seen.append((str(device), dtype))):
        with encoder.on("meta"):
            assert encoder.device == torch.device("meta")
            with encoder.on("meta"):
                pass
        with pytest.raises(KeyError), encoder.on("meta"):
            raise KeyError
    assert seen == [("meta", torch.float32), ("cpu", torch.float32)] * 2
    assert encoder.device == torch.device("cpu")


def test_memory_that_runs_out_on_the_way_leaves_the_vae_where_it_was(monkeypatch):
    """Weights move one by one: some have moved already."""
    half = FrozenVae(_tiny_vae(0), "cpu", torch.bfloat16)
    half.decoding_dtype = torch.float32
    before = {name: value.clone() for name, value in half.vae.named_parameters()}
    moved, moves = frozen_vae._moved, []

    def full(vae, device, dtype):
        moves.append(device)
        if len(moves) == 1:
            moved(vae.decoder, torch.device(device) if str(device) != "meta" else torch.device("cpu"), torch.float32)
            raise torch.OutOfMemoryError
        return moved(vae, device, dtype)

    monkeypatch.setattr(frozen_vae, "_moved", full)
    with pytest.raises(torch.OutOfMemoryError):
        half.decode(torch.zeros(1, 4, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in half.vae.named_parameters())
    moves.clear()
    with pytest.raises(torch.OutOfMemoryError), half.on("meta"):
        raise AssertionError
    assert half.device == torch.device("cpu")
    assert all(torch.equal(value, before[name]) for name, value in half.vae.named_parameters())
    assert torch.isfinite(half.decode(torch.zeros(1, 4, 4, 4))).all()


def test_decoding_is_the_vaes_own_and_survives_an_overflow(caplog):
    vae = _tiny_vae(0)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = vae.decode(latents).sample
    torch.testing.assert_close(FrozenVae(vae, "cpu", torch.float32).decode(latents), wanted)
    half = FrozenVae(_tiny_vae(0), "cpu", torch.float16)
    torch.nn.init.constant_(half.vae.decoder.conv_in.weight, 6e4)
    weights = [parameter.clone() for parameter in half.vae.parameters()]
    image, generators = torch.rand(1, 3, 32, 32) * 2 - 1, lambda: [torch.Generator().manual_seed(0)]
    encoded = half.encode(image, generators())
    drawn = half.decode(latents)
    assert torch.isfinite(drawn).all()
    assert torch.equal(half.decode(latents), drawn)
    assert caplog.text.count("The VAE overflows in torch.float16; it draws in float32 from here on.") == 1
    # What is trained on stays the same.
    assert half.dtype == torch.float16
    assert all(torch.equal(one, other) for one, other in zip(weights, half.vae.parameters(), strict=True))
    assert torch.equal(half.encode(image, generators()), encoded)


def test_a_vae_that_encodes_in_float32_decodes_in_it_too():
    half = FrozenVae(_tiny_vae(0), "cpu", torch.float16)
    torch.nn.init.constant_(half.vae.encoder.conv_in.weight, 6e4)
    half.encode(torch.ones(1, 3, 32, 32), [torch.Generator().manual_seed(0)])
    assert (half.dtype, half.decoding_dtype) == (torch.float32, torch.float32)
    half.decode(torch.zeros(1, 4, 4, 4))
    assert {parameter.dtype for parameter in half.vae.parameters()} == {torch.float32}
