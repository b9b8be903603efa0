import os
import re
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from departures import departure
from golden_data import GOLDEN_DIR, golden_cases

from library.data.latent_files import (
    Origin,
    Source,
    Wanted,
    cache_path,
    find_slot,
    read_slot,
    refuse_shared_names,
    write_slot,
)
from library.support.errors import UserError
from library.support.npz_files import ArchiveError

WANTED = Wanted(
    image=GOLDEN_DIR / "latents_sample_img_0150x0100_sd.npz",  # stands for an image: any file will do
    latent_size=(12, 20),
    mask_size=(96, 160),
    image_size=(150, 100),
    flip=False,
    alpha_mask=False,
    framing="160x107 default",
    precision="bfloat16",
    fingerprint=np.array([0.5, -1.0], dtype=np.float32),
)
ORIGIN = Origin(Source.of(WANTED.image), WANTED.framing, "float16", hidden_colours=False)


def why_unusable(file: Path, wanted: Wanted, skip_check: bool = False) -> str:
    slot, reason = find_slot(file, wanted, skip_check)
    assert (slot is None) == bool(reason)
    return reason


def _read(file: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    return read_slot(find_slot(file, wanted)[0], wanted.shapes)


def _arrays(wanted: Wanted = WANTED, value: float = 1.0) -> dict[str, np.ndarray]:
    return {
        **{key: np.full(shape, value, dtype=np.float32) for key, shape in wanted.shapes.items()},
        "original_size": np.array(wanted.image_size),
        "crop_ltrb": np.array([8.0, 0.0, 152.0, 96.0]),
        "vae_fingerprint": wanted.fingerprint,
        "made_from": np.array(ORIGIN.text()),
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
        image=file,
        latent_size=(height // 8, width // 8),
        mask_size=(height, width),
        image_size=(width, height),
        flip=case["flip_aug"],
        alpha_mask=case["alpha_mask"],
        framing="",
        precision="float32",
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
    read = _read(file, wanted)
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
    read = _read(file, wanted)
    assert set(read) == {"latents", "latents_flipped", "alpha_mask"}
    assert all((array == 0.25).all() and array.dtype == np.float32 for array in read.values())
    assert [path.name for path in tmp_path.iterdir()] == ["image.npz"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"latents": np.full((4, 12, 20), np.nan)}, "NaN or infinite"),
        ({"latents": np.where(np.arange(960) == 7, np.inf, 0).reshape(4, 12, 20)}, "NaN or infinite"),
        (
            {"latents": np.full((4, 12, 20), 1e300)},
            "NaN or infinite",
        ),  # and it is not in the float32 that is trained on
        ({"original_size": np.array([100, 150])}, "of another image"),
        ({"made_from": np.array(replace(ORIGIN, framing="160x108 default").text())}, "of another image"),
        ({"made_from": np.array(replace(ORIGIN, hidden_colours=True).text())}, "of another image"),
        ({"made_from": np.array("160x107 default 1234")}, "of another version"),
        ({"made_from": np.array("{}")}, "of another version"),
        ({"made_from": np.array("[" * 3000)}, "of another version"),
        ({"made_from": np.array(replace(ORIGIN, precision="int8").text())}, "of another version"),
        ({"made_from": np.array(replace(ORIGIN, framing=3).text())}, "of another version"),
        ({"made_from": np.array(replace(ORIGIN, source=Source(1, 2.5, "x")).text())}, "of another version"),
        ({"made_from": np.zeros(3)}, "unreadable"),
        ({"vae_fingerprint": np.array(["a", "b"])}, "unreadable"),
        ({"vae_fingerprint": np.array([0.5, -1.2], dtype=np.float32)}, "of another VAE"),
        ({"vae_fingerprint": np.array([0.5], dtype=np.float32)}, "of another VAE"),
        ({"vae_fingerprint": np.array([0.501, -1.001], dtype=np.float32)}, ""),
    ],
)
def test_contents_are_checked_unless_the_check_is_skipped(tmp_path, change, why):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays() | change)
    assert why_unusable(file, WANTED) == why
    assert why_unusable(file, WANTED, skip_check=True) == ""


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_a_mask_must_be_finite_too(tmp_path, value):
    file, wanted = tmp_path / "image.npz", replace(WANTED, alpha_mask=True)
    arrays = _arrays(wanted)
    write_slot(file, wanted, arrays | {"alpha_mask": np.full(arrays["alpha_mask"].shape, value)})
    assert why_unusable(file, wanted) == "NaN or infinite"


def test_shapes_are_always_checked(tmp_path):
    file = tmp_path / "image.npz"
    np.savez(file, **_arrays() | {"latents": np.zeros((4, 20, 12))})
    assert why_unusable(file, WANTED) == why_unusable(file, WANTED, skip_check=True) == "of another size"


@pytest.mark.parametrize("key", ["latents_flipped", "alpha_mask"])
def test_a_missing_variant_or_one_of_another_size_is_noticed(tmp_path, key):
    file, wanted = tmp_path / "image.npz", replace(WANTED, flip=True, alpha_mask=True)
    arrays = _arrays(wanted)
    np.savez(file, **{name: array for name, array in arrays.items() if name != key})
    assert why_unusable(file, wanted) == why_unusable(file, wanted, skip_check=True) == "incomplete"
    np.savez(file, **arrays | {key: arrays[key][..., 1:]})
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
    write_slot(file, WANTED, _arrays(WANTED, 1.0))
    write_slot(file, other, _arrays(other, 2.0))
    assert why_unusable(file, WANTED) == why_unusable(file, other) == ""
    assert _read(file, WANTED)["latents"].max() == 1
    assert _read(file, other)["latents"].min() == 2
    with np.load(file) as arrays:
        assert {"latents_12x20", "latents_24x40", "crop_ltrb_12x20"} <= set(arrays)


def test_a_plain_slot_is_read_until_one_of_the_same_size_is_written(tmp_path):
    """It would else stay for ever, and be what older programs train on."""
    file = tmp_path / "image.npz"
    np.savez(file, **_arrays(WANTED, 1.0), note=np.array("kept"))
    assert _read(file, WANTED)["latents"].max() == 1
    write_slot(file, WANTED, _arrays(WANTED, 2.0))
    assert _read(file, WANTED)["latents"].min() == 2
    with np.load(file) as arrays:
        assert set(arrays) == {f"{key}_12x20" for key in _arrays()} | {"note"}


def test_a_plain_slot_of_another_size_stays(tmp_path):
    file, other = tmp_path / "image.npz", replace(WANTED, latent_size=(24, 40), mask_size=(192, 320))
    np.savez(file, **_arrays(WANTED, 1.0))
    assert why_unusable(file, other) == "of another size"
    write_slot(file, other, _arrays(other, 2.0))
    assert _read(file, WANTED)["latents"].max() == 1
    assert _read(file, other)["latents"].min() == 2


def test_a_slot_is_renewed_in_its_place(tmp_path):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays(WANTED, 1.0))
    write_slot(file, WANTED, _arrays(WANTED, 2.0))
    assert _read(file, WANTED)["latents"].min() == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "image.npz"
    write_slot(file, WANTED, _arrays(WANTED, 1.0))

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(UserError, match=r"image\.npz cannot be written: No space left.*--cache_latents_to_disk"):
        write_slot(file, WANTED, _arrays(WANTED, 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["image.npz"]
    assert _read(file, WANTED)["latents"].max() == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}.*Permission denied"):
        write_slot(tmp_path / "image.npz", WANTED, _arrays())


# What a file says it was made from


@pytest.mark.parametrize(
    ("made_in", "asked_for", "why"),
    [
        ("bfloat16", "float16", "in a coarser precision"),
        ("bfloat16", "float32", "in a coarser precision"),
        ("float16", "float32", "in a coarser precision"),
        ("float16", "bfloat16", ""),
        ("float32", "bfloat16", ""),
        ("float32", "float32", ""),
    ],
)
def test_latents_of_a_coarser_precision_will_not_do(tmp_path, made_in, asked_for, why):
    file, wanted = tmp_path / "image.npz", replace(WANTED, precision=asked_for)
    write_slot(file, wanted, _arrays() | {"made_from": np.array(replace(ORIGIN, precision=made_in).text())})
    assert why_unusable(file, wanted) == why
    assert why_unusable(file, wanted, skip_check=True) == ""


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "image.bmp"
    file.write_bytes(b"some pixels")
    os.utime(file, ns=(10**18, 10**18))
    return file


def _of(image: Path) -> tuple[Wanted, dict[str, np.ndarray]]:
    return replace(WANTED, image=image), _arrays() | {
        "made_from": np.array(replace(ORIGIN, source=Source.of(image)).text())
    }


def test_an_image_edited_to_the_same_length_is_noticed(tmp_path, image):
    file, (wanted, arrays) = tmp_path / "image.npz", _of(image)
    write_slot(file, wanted, arrays)
    image.write_bytes(b"same pixels")
    assert why_unusable(file, wanted) == "of another image"


def test_a_copied_image_is_the_same_and_one_that_was_not_touched_is_not_read(tmp_path, image, monkeypatch):
    file, (wanted, arrays) = tmp_path / "image.npz", _of(image)
    write_slot(file, wanted, arrays)
    os.utime(image, ns=(2 * 10**18, 2 * 10**18))
    assert why_unusable(file, wanted) == ""
    os.utime(image, ns=(10**18, 10**18))
    monkeypatch.setattr("library.data.latent_files.content_hash", lambda _: pytest.fail("the image was read"))
    assert why_unusable(file, wanted) == ""
    image.write_bytes(b"more than some pixels")
    assert why_unusable(file, wanted) == "of another image"


def test_the_time_of_an_image_that_has_just_changed_says_nothing(tmp_path, image):
    """Clocks of file systems are coarse: it may change again at the same time."""
    image.write_bytes(b"some pixels")
    time = image.stat().st_mtime_ns
    file, (wanted, arrays) = tmp_path / "image.npz", _of(image)
    write_slot(file, wanted, arrays)
    image.write_bytes(b"same pixels")
    os.utime(image, ns=(time, time))
    assert why_unusable(file, wanted) == "of another image"


# What is read is what was found


def test_what_was_written_anew_meanwhile_is_not_read(tmp_path):
    file = tmp_path / "image.npz"
    slot = write_slot(file, WANTED, _arrays(WANTED, 1.0))
    assert find_slot(file, WANTED)[0] == slot
    assert read_slot(slot, WANTED.shapes)["latents"].max() == 1
    write_slot(file, WANTED, _arrays(WANTED, 2.0))
    with pytest.raises(ArchiveError, match="written anew"):
        read_slot(slot, WANTED.shapes)
    with pytest.raises(FileNotFoundError):
        read_slot(replace(slot, path=tmp_path / "gone.npz"), WANTED.shapes)


def test_latents_of_another_size_get_a_slot_of_their_own_and_disturb_nobody(tmp_path):
    file, other = tmp_path / "image.npz", replace(WANTED, latent_size=(24, 40), mask_size=(192, 320))
    slot = write_slot(file, WANTED, _arrays(WANTED, 1.0))
    write_slot(file, other, _arrays(other, 2.0))
    assert read_slot(slot, WANTED.shapes)["latents"].max() == 1
    assert why_unusable(file, WANTED) == why_unusable(file, other) == ""


# Damage and malice


def _member(file: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in _arrays().items():
            if key != name:
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
        archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("name", ["latents", "vae_fingerprint", "made_from", "original_size"])
@pytest.mark.parametrize(
    "content",
    [
        b"no header",
        b"\x93NUMPY\x01\x00\x10\x00{'shape': (4, 12",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"[" * 9000,
        b"\x93NUMPY\x09\x00" + b"x" * 200,
    ],
)
def test_a_member_with_a_damaged_header_makes_the_file_unreadable(tmp_path, name, content):
    file = tmp_path / "image.npz"
    _member(file, name, content)
    assert why_unusable(file, WANTED) == "unreadable"
    write_slot(file, WANTED, _arrays())
    assert why_unusable(file, WANTED) == ""


def _header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("name", ["latents", "vae_fingerprint", "made_from", "original_size"])
@pytest.mark.parametrize("shape", ["(4, 12, 20)", "(4000000, 1200000)", "()"])
def test_sizes_are_known_before_anything_is_unpacked(tmp_path, name, shape):
    """Thirty megabytes that take 30 kB on the disk, under each of the names."""
    file = tmp_path / "image.npz"
    _member(file, name, _header(shape) + bytes(30 * 10**6))
    tracemalloc.start()
    try:
        assert why_unusable(file, WANTED) in ("unreadable", "of another size", "of another VAE")
        write_slot(file, WANTED, _arrays())
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    finally:
        tracemalloc.stop()
    assert why_unusable(file, WANTED) == ""


def test_stored_by_columns_and_in_other_bytes(tmp_path):
    file, values = tmp_path / "image.npz", np.arange(960, dtype=">f8").reshape(4, 12, 20)
    np.savez(file, latents=np.asfortranarray(values))
    assert np.array_equal(_read(file, WANTED)["latents"], values)


# Links


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    target, file = tmp_path / "precious", tmp_path / "image.npz"
    target.write_bytes(b"mine")
    file.symlink_to(target)
    with pytest.raises(UserError, match=r"image\.npz cannot be written.*symbolic link"):
        write_slot(file, WANTED, _arrays())
    file.unlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / f".image.npz.{os.getpid()}-guessed.tmp").symlink_to(target)
    with pytest.raises(UserError, match="File exists"):
        write_slot(file, WANTED, _arrays())
    assert target.read_bytes() == b"mine"


def test_images_that_would_share_a_cache_are_refused(monkeypatch):
    same, by_case = [Path("a.png"), Path("a.jpg")], [Path("A.png"), Path("a.jpg")]
    with pytest.raises(UserError, match=r"a\.png and a\.jpg would share one latent cache"):
        refuse_shared_names(same)
    monkeypatch.setattr("sys.platform", "linux")
    refuse_shared_names(by_case)
    for platform in ("win32", "darwin"):
        monkeypatch.setattr("sys.platform", platform)
        with pytest.raises(UserError, match=r"A\.png and a\.jpg would share"):
            refuse_shared_names(by_case)
