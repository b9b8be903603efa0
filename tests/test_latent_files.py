import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from departures import departure
from golden_data import GOLDEN_DIR, golden_cases

from library.errors import UserError
from library.latent_files import Wanted, cache_path, read_slot, same_vae, why_unusable, write_slot

WANTED = Wanted(
    latent_size=(12, 20),
    mask_size=(96, 160),
    image_size=(150, 100),
    flip=False,
    alpha_mask=False,
    made_from=("160x107 default 1234",),
    fingerprint=np.array([0.5, -1.0], dtype=np.float32),
)


def _arrays(wanted: Wanted = WANTED, value: float = 1.0) -> dict[str, np.ndarray]:
    return {
        **{key: np.full(shape, value, dtype=np.float32) for key, shape in wanted.shapes.items()},
        "original_size": np.array(wanted.image_size),
        "crop_ltrb": np.array([8.0, 0.0, 152.0, 96.0]),
        "vae_fingerprint": wanted.fingerprint,
        "made_from": np.array(wanted.made_from[0]),
    }


@pytest.mark.parametrize("case", golden_cases("latents_names"))
def test_golden_names(case, tmp_path):
    image = tmp_path / Path(case["image"]).name
    if case["old_style_npz_exists"]:
        image.with_suffix(".npz").touch()
    suffix = "_sd.npz" if case["sd(not sdxl)"] else "_sdxl.npz"
    path = cache_path(image, tuple(case["image_size_wh"]), suffix)
    assert suffix == case["cache_suffix"]
    assert path == tmp_path / Path(case["npz"]).name
    size = re.fullmatch(rf".*_(\d{{4,}})x(\d{{4,}}){re.escape(suffix)}", path.name)
    assert (size and [int(side) for side in size.groups()]) == case["size_parsed_back"]


@pytest.mark.parametrize("case", golden_cases("latents_validity"))
def test_golden_validity(case, tmp_path):
    file = tmp_path / "image_sd.npz"
    width, height = case["bucket_reso"]
    wanted = Wanted(
        latent_size=(height // 8, width // 8),
        mask_size=(height, width),
        image_size=(width, height),
        flip=case["flip_aug"],
        alpha_mask=case["alpha_mask"],
        made_from=("",),
        fingerprint=np.zeros(3, dtype=np.float32),
    )
    contents = {
        "latents": np.zeros(case["npz_latents_shape"] or ()),
        "latents_flipped": np.zeros(case["npz_latents_shape"] or ()),
        "alpha_mask": np.ones((height, width)),
        "original_size": np.array([width, height]),
        "crop_ltrb": np.zeros(4),
    }
    if case["exists"]:
        np.savez(file, **{key: contents.get(key, np.zeros(())) for key in case["npz_keys"]})
    usable = not why_unusable(file, wanted, case["skip_cache_check"])
    assert usable == (case["valid"] and not departure("latents_validity", case))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("alpha_mask", [False, True])
def test_golden_a_file_of_sd_scripts_is_usable_and_read(flip, alpha_mask):
    file = GOLDEN_DIR / "latents_sample_img_0150x0100_sd.npz"
    wanted = replace(WANTED, flip=flip, alpha_mask=alpha_mask)
    assert why_unusable(file, wanted) == ""
    read = read_slot(file, wanted)
    with np.load(file) as arrays:
        assert set(read) == {"latents"} | ({"latents_flipped"} if flip else set()) | (
            {"alpha_mask"} if alpha_mask else set()
        )
        assert all(np.array_equal(read[key], arrays[key]) for key in read)


def test_what_was_written_is_usable_and_read_back(tmp_path):
    wanted = replace(WANTED, flip=True, alpha_mask=True)
    file = tmp_path / "image.npz"
    write_slot(file, wanted, _arrays(wanted, 0.25))
    assert why_unusable(file, wanted) == ""
    read = read_slot(file, wanted)
    assert set(read) == {"latents", "latents_flipped", "alpha_mask"}
    assert all((array == 0.25).all() and array.dtype == np.float32 for array in read.values())
    assert [path.name for path in tmp_path.iterdir()] == ["image.npz"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"latents": np.zeros((4, 20, 12))}, "of another size"),
        ({"latents": np.full((4, 12, 20), np.nan)}, "not finite"),
        ({"latents": np.where(np.arange(960) == 7, np.inf, 0).reshape(4, 12, 20)}, "not finite"),
        ({"original_size": np.array([100, 150])}, "of another picture"),
        ({"made_from": np.array("160x107 default 1235")}, "of another picture"),
        ({"vae_fingerprint": np.array([0.5, -1.2], dtype=np.float32)}, "of another VAE"),
        ({"vae_fingerprint": np.array([0.5], dtype=np.float32)}, "of another VAE"),
        ({"vae_fingerprint": np.array([0.501, -1.001], dtype=np.float32)}, ""),
    ],
)
def test_contents_are_checked_unless_the_check_is_skipped_but_shapes_always(tmp_path, change, why):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays() | change)
    assert why_unusable(file, WANTED) == why
    assert why_unusable(file, WANTED, skip_check=True) == (why if why == "of another size" else "")


@pytest.mark.parametrize("key", ["latents_flipped", "alpha_mask"])
def test_a_missing_variant_or_one_of_another_size_is_noticed(tmp_path, key):
    file, wanted = tmp_path / "image.npz", replace(WANTED, flip=True, alpha_mask=True)
    arrays = _arrays(wanted)
    write_slot(file, wanted, {name: array for name, array in arrays.items() if name != key})
    assert why_unusable(file, wanted) == why_unusable(file, wanted, skip_check=True) == "incomplete"
    write_slot(file, wanted, arrays | {key: arrays[key][..., 1:]})
    assert why_unusable(file, wanted) == why_unusable(file, wanted, skip_check=True) == "of another size"


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 only a beginning", "truncated", "one array"])
def test_an_unreadable_file_is_told_from_a_missing_one_and_written_over(tmp_path, content):
    file = tmp_path / "image.npz"
    assert why_unusable(file, WANTED) == "new"
    if content == "truncated":
        write_slot(file, WANTED, _arrays())
        content = file.read_bytes()[:-100]
    if content == "one array":
        np.save(tmp_path / "bare.npy", np.zeros(3))
        content = (tmp_path / "bare.npy").read_bytes()
    file.write_bytes(content)
    assert why_unusable(file, WANTED) == why_unusable(file, WANTED, skip_check=True) == "unreadable"
    write_slot(file, WANTED, _arrays())
    assert why_unusable(file, WANTED) == ""


def test_damaged_bytes_are_noticed(tmp_path):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays())
    data = bytearray(file.read_bytes())
    data[1000:1100] = b"\0" * 100
    file.write_bytes(data)
    assert why_unusable(file, WANTED) == "unreadable"


def test_other_arrays_of_the_file_stay_and_stale_ones_of_the_slot_go(tmp_path):
    file, flipped = tmp_path / "image.npz", replace(WANTED, flip=True)
    np.savez(file, latents_64x64=np.ones(3), note=np.array("kept"))
    write_slot(file, flipped, _arrays(flipped))
    write_slot(file, WANTED, _arrays())
    with np.load(file) as arrays:
        assert str(arrays["note"]) == "kept"
        assert arrays["latents_64x64"].tolist() == [1, 1, 1]
        assert "latents_flipped" not in arrays


def test_slots_of_several_sizes_live_side_by_side(tmp_path):
    file, other = tmp_path / "image.npz", replace(WANTED, latent_size=(24, 40), mask_size=(192, 320))
    write_slot(file, WANTED, _arrays(WANTED, 1.0), shared=True)
    write_slot(file, other, _arrays(other, 2.0), shared=True)
    assert why_unusable(file, WANTED) == why_unusable(file, other) == ""
    assert read_slot(file, WANTED)["latents"].max() == 1
    assert read_slot(file, other)["latents"].min() == 2
    with np.load(file) as arrays:
        assert {"latents_12x20", "latents_24x40", "crop_ltrb_12x20"} <= set(arrays)


def test_a_slot_of_its_own_size_is_renewed_in_its_place(tmp_path):
    """A run that needs one size only must not leave a stale slot that the next reader would prefer."""
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays(WANTED, 1.0), shared=True)
    write_slot(file, WANTED, _arrays(WANTED, 2.0))
    assert read_slot(file, WANTED)["latents"].min() == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays(WANTED, 1.0))

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(UserError, match=r"cannot be written there: No space left.*--cache_latents_to_disk"):
        write_slot(file, WANTED, _arrays(WANTED, 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["image.npz"]
    assert read_slot(file, WANTED)["latents"].max() == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}.*Permission denied"):
        write_slot(tmp_path / "image.npz", WANTED, _arrays())


def test_fingerprints_are_compared_with_a_tolerance():
    one = np.array([1.0, 2.0], dtype=np.float32)
    assert same_vae(one, one + 0.005)
    assert not same_vae(one, one + 0.05)
    assert not same_vae(one, one[:1])
