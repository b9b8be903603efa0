import io
import logging
import random
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from departures import departure
from golden_data import golden_arrays, golden_cases
from PIL import ExifTags, Image, PngImagePlugin, features

from library.data import images
from library.data.buckets import BucketChooser, BucketRules
from library.data.images import (
    Cut,
    Face,
    Framing,
    face_in_name,
    flip,
    frame_image,
    frame_mask,
    image_size,
    read_image,
    to_tensor,
)
from library.data.resizing import resize
from library.support.errors import UserError
from tests.limits import outcome, outcome_in_locked

FORMATS = ["png", "jpg", "webp", "bmp", *(["avif"] if features.check("avif") else [])]


def _noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(_noise(4, 4)).resize((width, height), Image.Resampling.BILINEAR)


def _expected_pixels(file, alpha: bool) -> np.ndarray:
    """Our own rules for a file, written without the code under test: upright, on white, 16 bits scaled."""
    image = Image.open(file)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image).astype(float) / 257).astype(np.uint8))
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    if not alpha:
        share = pixels[:, :, 3:] / 255
        pixels = (pixels[:, :, :3] * share + 255 * (1 - share)).round()
    turns = {1: 0, 3: 2, 6: 3, 8: 1}  # the goldens' files are turned, not mirrored
    return np.rot90(pixels, turns[orientation])


# Golden cases


@pytest.mark.parametrize("case", golden_cases("load_image"))
def test_golden_load_image(case, tmp_path):
    arrays = golden_arrays("load_image")
    file = tmp_path / case["file"]
    file.write_bytes(arrays[case["npz_key"].split("_")[0] + "_file"].tobytes())
    pixels = read_image(file, alpha=case["alpha"])
    if departure("load_image", case):
        expected = _expected_pixels(file, case["alpha"])
        assert image_size(file) == (expected.shape[1], expected.shape[0])
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).max() <= 1
        return
    assert np.array_equal(pixels, arrays[case["npz_key"]])
    assert list(pixels.shape) == case["shape"]
    assert list(image_size(file)) == case.get("header_size_wh", [case["shape"][1], case["shape"][0]])
    if "tensor_min_max_shape" in case:
        tensor = to_tensor(pixels)
        assert [tensor.min().item(), tensor.max().item()] == pytest.approx(case["tensor_min_max_shape"][:2], abs=1e-6)
        assert list(tensor.shape) == case["tensor_min_max_shape"][2]


@pytest.mark.parametrize("case", golden_cases("dataset_item"))
def test_golden_dataset_item(case, tmp_path):
    arrays = golden_arrays("dataset_item")
    file = tmp_path / "image.png"
    file.write_bytes(arrays[case["npz_prefix"] + "png"].tobytes())
    rules = BucketRules(
        tuple(case["resolution"]),
        case["bucket"],
        case["min_bucket_reso"],
        case["max_bucket_reso"],
        case["bucket_reso_steps"],
    )
    placement = BucketChooser(rules).place(*image_size(file))
    framing = Framing(placement.resized, placement.bucket, case.get("resize_interpolation"))
    alpha = case.get("alpha_mask", False)
    picture = frame_image(file, framing, alpha=alpha)
    if departure("dataset_item", case):
        width, height = placement.bucket
        left, top = [(a - b) // 2 for a, b in zip(placement.resized, placement.bucket, strict=True)]
        whole = resize(_expected_pixels(file, alpha).astype(np.uint8), placement.resized, framing.interpolation)
        assert np.abs(picture.pixels - whole[top:, left:][:height, :width, :3].astype(int)).max() <= 2
        return
    assert list(placement.bucket) == case["bucket_reso"]
    expected = arrays[case["npz_prefix"] + "image_u8_chw"]
    assert list(to_tensor(picture.pixels).shape) == case["image_shape_chw"]
    assert str(to_tensor(picture.pixels).dtype) == case["image_dtype"]
    assert np.abs(picture.pixels.transpose(2, 0, 1).astype(int) - expected).max() <= 2
    if not case["alpha_shape_hw"]:
        assert picture.alpha is None
        return
    assert list(picture.alpha.shape) == case["alpha_shape_hw"]
    assert np.abs(picture.alpha * 255 - arrays[case["npz_prefix"] + "alpha_u8"]).max() <= 2


@pytest.mark.parametrize("case", golden_cases("face_crop"))
def test_golden_face_crop(case):
    width, height = case["image_wh"]
    y, x = np.mgrid[:height, :width]
    image = np.stack([x // 2, y // 2, 0 * x], axis=2).astype(np.uint8)
    framing = Framing((0, 0), tuple(case["resolution"]), face_crop_range=tuple(case["face_crop_aug_range"]))
    picture = frame_image(image, framing, rng=random.Random(0), face=Face(*case["face_cx_cy_w_h"]))
    assert list(picture.pixels.shape) == case["out_shape"]
    assert np.abs(picture.pixels[0, 0, :2].astype(int) - case["top_left_pixel(x//2,y//2)"]).max() <= 1


# Reading


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("letters", [str.lower, str.upper, str.title])
def test_every_format_is_read_in_any_letter_case(tmp_path, extension, letters):
    file = tmp_path / f"image.{letters(extension)}"
    picture = _smooth(33, 20)
    picture.save(file, format={"jpg": "JPEG"}.get(extension, extension.upper()), quality=95)
    assert "." + extension in images.IMAGE_EXTENSIONS
    assert image_size(file) == (33, 20)
    assert np.abs(read_image(file).astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_exif_orientation_turns_size_and_pixels(tmp_path, orientation, extension):
    file = tmp_path / f"image.{extension}"
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # a white field at the top left
    # From upright to what the camera stores, for each orientation.
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright)
    stored = stored if undo is None else stored.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(file, exif=exif, quality=100)
    assert image_size(file) == (32, 16)
    assert np.abs(read_image(file).astype(int) - upright).max() < 40
    assert read_image(file, alpha=True).shape == (16, 32, 4)


def test_exif_values_that_mean_nothing_are_ignored(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 42
    _smooth(30, 20).save(tmp_path / "odd.jpg", exif=exif)
    _smooth(30, 20).save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*nonsense")
    assert image_size(tmp_path / "odd.jpg") == (30, 20)
    assert image_size(tmp_path / "broken.jpg") == (30, 20)
    assert read_image(tmp_path / "broken.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0nonsense"])
def test_a_image_with_damaged_exif_is_whole(tmp_path, extension, exif):
    file = tmp_path / f"a{extension}"
    _smooth(30, 20).save(file, exif=exif)
    assert image_size(file) == (30, 20)
    assert read_image(file).shape == (20, 30, 3)


@pytest.mark.parametrize("name", ["exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "progressive"])
def test_a_text_of_a_png_is_only_a_text(tmp_path, name):
    notes = PngImagePlugin.PngInfo()
    notes.add_text(name, "what some program wrote here")
    _smooth(30, 20).save(tmp_path / "a.png", pnginfo=notes)
    assert image_size(tmp_path / "a.png") == (30, 20)
    assert read_image(tmp_path / "a.png").shape == (20, 30, 3)


def test_a_png_with_metadata_is_not_decoded_to_learn_its_size(tmp_path):
    """XMP alone makes Pillow's own getexif() decode the image; a file without its pixels shows it."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    data = io.BytesIO()
    Image.fromarray(_noise(30, 20)).save(data, "PNG", pnginfo=info)
    file = tmp_path / "image.png"
    file.write_bytes(data.getvalue()[: data.getvalue().index(b"IDAT") + 10])
    assert image_size(file) == (30, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L with colour key", "RGB with colour key"])
def test_transparency_is_laid_on_white_unless_alpha_is_wanted(tmp_path, mode):
    file = tmp_path / "image.png"
    if "key" in mode:
        Image.new(mode.split()[0], (8, 6), 10 if mode[0] == "L" else (10, 10, 10)).save(
            file, transparency=10 if mode[0] == "L" else (10, 10, 10)
        )
    else:
        image = Image.new("RGBA", (8, 6), (10, 10, 10, 0))
        image.convert("LA").save(file) if mode == "LA" else image.save(file)
        if mode in ("P", "PA"):
            image.quantize(4).save(file)
    assert np.array_equal(read_image(file), np.full((6, 8, 3), 255))
    assert np.array_equal(read_image(file, alpha=True)[:, :, 3], np.zeros((6, 8)))


def test_half_transparent_colours_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (200, 0, 100, 51)).save(tmp_path / "image.png")
    assert np.abs(read_image(tmp_path / "image.png")[0, 0] - np.array([244, 204, 224])).max() <= 1
    assert read_image(tmp_path / "image.png", alpha=True)[0, 0].tolist() == [200, 0, 100, 51]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_image(tmp_path / "grey.png", alpha=True)[0, :, 3].tolist() == [255] * 4


def test_sixteen_bit_colours_are_scaled(tmp_path):
    # Pillow cannot write this: one row of two pixels, 16 bits per channel.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0, 32768, 65535, 257 * 10, 257 * 20, 257 * 30)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(data)
    assert np.abs(read_image(tmp_path / "deep.png")[0] - np.array([[0, 128, 255], [10, 20, 30]])).max() <= 1


def test_cmyk_and_black_and_white_images_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    Image.new("1", (8, 8), 1).save(tmp_path / "bw.png")
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[4, 4] - np.array([0, 255, 255])).max() <= 3
    assert np.array_equal(read_image(tmp_path / "bw.png"), np.full((8, 8, 3), 255))


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_of_an_animation_the_first_frame_is_used_and_it_is_said(tmp_path, caplog, extension):
    file = tmp_path / f"image.{extension}"
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue", "green")]
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    with caplog.at_level(logging.WARNING):
        assert image_size(file) == (16, 12)
    assert [record for record in caplog.messages if str(file) in record and "first frame" in record]
    assert read_image(file)[5, 5].tolist() == [255, 0, 0]


def test_a_still_image_says_nothing_nor_does_a_photo_with_its_preview(tmp_path, caplog):
    _smooth(9, 9).save(tmp_path / "image.webp")
    _smooth(9, 9).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[_smooth(3, 3)])
    assert image_size(tmp_path / "image.webp") == image_size(tmp_path / "phone.jpg") == (9, 9)
    assert read_image(tmp_path / "phone.jpg").shape == (9, 9, 3)
    assert not caplog.messages


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (7, 2000)])
@pytest.mark.parametrize("extension", ["png", "bmp", "jpg"])
def test_images_of_extreme_sizes_load_and_fit_a_bucket(tmp_path, size, extension):
    Image.new("RGB", size, (90, 90, 90)).save(tmp_path / f"image.{extension}")
    file = tmp_path / f"image.{extension}"
    assert image_size(file) == size
    placement = BucketChooser(BucketRules((64, 64), True, 64, 128, 64)).place(*size)
    picture = frame_image(file, Framing(placement.resized, placement.bucket))
    assert picture.pixels.shape == (placement.bucket[1], placement.bucket[0], 3)
    assert np.abs(picture.pixels.astype(int) - 90).max() <= 2


def test_more_pixels_than_pillow_allows_are_a_named_error_and_a_large_photo_is_silent(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    Image.new("RGB", (100, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(file) == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UserError, match=r"large\.png has more than"):
        image_size(file)


@pytest.mark.parametrize("read", [image_size, read_image])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello, I am a text", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123", "run `git lfs pull`"),
        (b"<!doctype html><html>", "it is a web page"),
        (None, "does not exist"),
        ("folder", "cannot be read"),
    ],
)
def test_what_is_no_image_is_an_error_that_names_the_file(tmp_path, read, content, said):
    for extension in ("png", "webp"):
        file = tmp_path / f"strange.{extension}"
        file.mkdir() if content == "folder" else content is None or file.write_bytes(content)
        with pytest.raises(UserError, match=rf"strange\.{extension}.*") as error:
            read(file)
        assert said in str(error.value)


@pytest.mark.parametrize("extension", FORMATS)
def test_a_truncated_image_is_an_error_that_names_the_file(tmp_path, extension):
    file = tmp_path / f"half.{extension}"
    Image.fromarray(_noise(64, 64)).save(file)
    data = file.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.95):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match="half"):
            read_image(file)


@pytest.mark.parametrize("extension", FORMATS)
def test_a_damaged_image_is_read_or_refused(tmp_path, extension):
    file = tmp_path / f"damaged.{extension}"
    _smooth(40, 40).save(file)
    data, rng = file.read_bytes(), random.Random(1)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        file.write_bytes(bytes(damaged))
        with suppress(UserError):
            image_size(file)
            assert read_image(file).ndim == 3


def test_webp_sizes_agree_with_pillow(tmp_path):
    file = tmp_path / "image.webp"
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, {"icc_profile": b"x" * 128}):
        for size, mode in (((1, 1), "RGB"), ((301, 17), "RGB"), ((300, 400), "RGBA")):
            Image.new(mode, size).save(file, **options)
            with Image.open(file) as opened:
                assert image_size(file) == opened.size == size


@pytest.mark.parametrize(
    "chunk",
    [
        b"VP8 " + bytes(10) + b"\0\0\5\0",
        b"VP8X" + bytes(8) + b"\xff\xff\xff\xff\xff\xff",
    ],
)
def test_a_webp_header_with_an_impossible_size_is_refused(tmp_path, chunk):
    file = tmp_path / "image.webp"
    file.write_bytes(b"RIFF\x20\0\0\0WEBP" + chunk + bytes(40))
    with pytest.raises(UserError, match=r"image\.webp"):
        image_size(file)


def test_a_image_that_may_not_be_read(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    _smooth(30, 20).save(folder / "a.png")
    for read in (image_size, read_image):
        found = outcome_in_locked(folder, lambda read=read: read(folder / "a.png"))
        assert found == ("error", f"The image {folder / 'a.png'} cannot be read: Permission denied.")


def test_a_image_must_have_the_size_that_was_noted(tmp_path):
    file = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _smooth(40, 20).save(file, exif=exif)
    assert frame_image(file, Framing((20, 40), (20, 40)), size=image_size(file)).pixels.shape == (40, 20, 3)
    with pytest.raises(UserError, match=r"image\.jpg had 40x20 pixels when this run began and now has 20x40"):
        frame_image(file, Framing((40, 20), (40, 20)), size=(40, 20))


# Framing


def test_the_centre_is_cut_out_of_the_covering_size():
    image = _noise(40, 20)
    picture = frame_image(image, Framing((40, 20), (17, 20)))
    assert picture.cut == Cut((40, 20), 11, 0)
    assert np.array_equal(picture.pixels, image[:, 11:28])
    assert picture.alpha is None


def test_random_crops_reach_both_ends_and_repeat_with_the_seed():
    framing = Framing((40, 24), (36, 20), random_crop=True)
    image = _noise(40, 24)
    rng = random.Random(3)
    cuts = [frame_image(image, framing, rng=rng).cut for _ in range(300)]
    assert {cut.left for cut in cuts} == {cut.top for cut in cuts} == set(range(5))
    rng = random.Random(3)
    assert [frame_image(image, framing, rng=rng).cut for _ in range(300)] == cuts
    assert frame_image(image, framing).cut == framing.centre


def test_opaque_files_have_an_alpha_mask_of_ones_when_one_is_wanted(tmp_path):
    _smooth(10, 10).save(tmp_path / "image.png")
    picture = frame_image(tmp_path / "image.png", Framing((20, 20), (16, 16)), alpha=True)
    assert picture.alpha.dtype == np.float32
    assert np.array_equal(picture.alpha, np.ones((16, 16)))
    assert picture.pixels.shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("girl_100_90_30_40.png", Face(100, 90, 30, 40)),
        ("a_b_c_100_90_30_40.jpg", Face(100, 90, 30, 40)),
        ("100_90_30_40.png", None),
        ("girl_0_90_30_40.png", None),
        ("girl_a_90_30_40.png", None),
        ("girl_100_90_0_0.png", None),
        ("girl.png", None),
    ],
)
def test_faces_are_read_from_the_file_name_only(tmp_path, name, face):
    assert face_in_name(tmp_path / "x_1_2_3_4" / name) == face


def test_a_face_of_the_name_is_used_only_with_a_range_and_a_generator(tmp_path):
    file = tmp_path / "girl_20_20_30_30.png"
    Image.fromarray(_noise(200, 100)).save(file)
    plain = Framing((128, 64), (64, 64))
    faces = Framing((128, 64), (64, 64), face_crop_range=(1.0, 1.0))
    centre = Cut((128, 64), 32, 0)
    assert frame_image(file, plain, rng=random.Random(0)).cut == centre
    assert frame_image(file, faces).cut == centre
    assert frame_image(file, faces, rng=random.Random(0)).cut == Cut((200, 100), 0, 0)


def test_a_range_scales_the_face_within_it_and_moves_it_a_little():
    framing = Framing((0, 0), (100, 100), face_crop_range=(1.0, 2.0))
    face, rng = Face(500, 300, 100, 80), random.Random(0)
    cuts = [frame_image(_noise(800, 600), framing, rng=rng, face=face).cut for _ in range(30)]
    scales = [cut.resized[0] / 800 for cut in cuts]
    assert 0.5 <= min(scales) < 0.6
    assert 0.9 < max(scales) <= 1
    middles = [cut.left + 50 - 500 * scale for cut, scale in zip(cuts, scales, strict=True)]
    assert max(map(abs, middles)) <= 6
    assert len(set(middles)) > 5


def test_with_random_crop_the_face_wanders_and_the_window_stays_inside():
    framing = Framing((0, 0), (100, 60), random_crop=True, face_crop_range=(1.0, 1.0))
    face, rng = Face(150, 100, 100, 60), random.Random(0)
    cuts = [frame_image(_noise(300, 200), framing, rng=rng, face=face).cut for _ in range(200)]
    assert all(0 <= cut.left <= cut.resized[0] - 100 and 0 <= cut.top <= cut.resized[1] - 60 for cut in cuts)
    assert {0, cuts[0].resized[0] - 100} <= {cut.left for cut in cuts}


def test_a_image_smaller_than_the_resolution_is_enlarged_for_its_face_crop():
    framing = Framing((0, 0), (128, 128), face_crop_range=(0.5, 1.0))
    picture = frame_image(_noise(50, 33), framing, rng=random.Random(0), face=Face(10, 10, 20, 20))
    assert picture.pixels.shape == (128, 128, 3)
    assert picture.cut.resized == (194, 128)


# Masks


def test_a_mask_is_resized_and_cropped_as_its_image(tmp_path):
    """300x128 in a bucket of 128x64: resized to 150x64, 11 columns cut off, so 40 columns of mask leave 9 of 128."""
    mask = np.zeros((128, 300, 3), dtype=np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    framed = frame_mask(tmp_path / "mask.png", (300, 128), Framing((150, 64), (128, 64)))
    assert framed.shape == (64, 128)
    assert framed.dtype == np.float32
    assert framed.mean() == pytest.approx(0.07, abs=0.002)


def test_a_mask_follows_the_cut_of_its_image_and_uses_the_red_channel(tmp_path):
    values = _noise(40, 24)
    Image.fromarray(values).save(tmp_path / "mask.png")
    framing = Framing((40, 24), (36, 20), random_crop=True)
    picture = frame_image(values, framing, rng=random.Random(5))
    framed = frame_mask(tmp_path / "mask.png", (40, 24), framing, picture.cut)
    assert np.array_equal((framed * 255).round(), picture.pixels[:, :, 0])


def test_a_mask_of_another_size_is_an_error_that_names_both(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png has 30x20 pixels, but photo\.png has 20x30"):
        frame_mask(tmp_path / "mask.png", (20, 30), Framing((20, 30), (20, 30)), image_path="photo.png")


# Augmentation


def test_flip_mirrors_left_to_right():
    image = _noise(5, 3)
    assert np.array_equal(flip(image), image[:, ::-1])
    assert np.array_equal(flip(image[:, :, 0]), image[:, ::-1, 0])


def test_to_tensor_maps_0_to_minus_1_and_255_to_1():
    tensor = to_tensor(np.array([[[0, 127, 255]]], dtype=np.uint8))
    assert tensor.flatten().tolist() == pytest.approx([-1, -0.003921568, 1])


def test_more_pixels_than_a_process_should_hold_are_refused_with_the_size_that_works(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 5000)
    for extension, size in (("png", "70x70"), ("webp", "50x50")):
        Image.new("RGB", (100, 100)).save(tmp_path / f"a.{extension}")
        for read in (image_size, read_image):
            with pytest.raises(UserError, match=rf"a\.{extension} has 100x100 pixels.* at most {size}"):
                read(tmp_path / f"a.{extension}")


@pytest.mark.parametrize(
    ("mode", "subsampling", "needed"), [("RGB", 2, 10_000), ("RGB", 0, 11_112), ("CMYK", 0, 13_334)]
)
def test_progressive_images_count_by_what_their_decoder_holds(tmp_path, monkeypatch, mode, subsampling, needed):
    Image.new(mode, (100, 100)).save(tmp_path / "a.jpg", progressive=True, subsampling=subsampling)
    monkeypatch.setattr(images, "MOST_PIXELS", needed)
    assert read_image(tmp_path / "a.jpg").shape == (100, 100, 3)
    monkeypatch.setattr(images, "MOST_PIXELS", needed - 1)
    for read in (image_size, read_image):
        with pytest.raises(UserError, match="too much memory"):
            read(tmp_path / "a.jpg")


def test_what_would_grow_beyond_measure_is_refused():
    thin = BucketChooser(BucketRules((512, 512))).place(30000, 1)
    with pytest.raises(UserError, match=r"thin\.png has 30000x1 pixels.*15360000x512"):
        images.check_resized("thin.png", (30000, 1), thin.resized, thin.bucket)
    wide = BucketChooser(BucketRules((1024, 1024))).place(5000, 100)
    images.check_resized("wide.png", (5000, 100), wide.resized, wide.bucket)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("alpha", [False, True])
def test_strips_make_the_same_pixels(tmp_path, monkeypatch, mode, alpha):
    values = np.random.default_rng(1).integers(0, 256, (37, 23, 4)).astype(np.uint8)
    image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png", alpha=alpha)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 100)
    assert np.array_equal(read_image(tmp_path / "a.png", alpha=alpha), whole)


def test_a_chunk_that_claims_gigabytes_takes_none(tmp_path):
    """Python makes room for all that a file is asked for; Pillow asks for the rest of a chunk."""
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    content = bytearray(file.read_bytes())
    place = content.index(b"IDAT") - 4
    content[place : place + 4] = (2**31 - 1).to_bytes(4, "big")
    file.write_bytes(content)
    assert outcome(lambda: read_image(file), memory=2**28).kind in ("ok", "error")


def test_only_the_formats_that_are_named_are_tried(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is not an image in a format known here \(PNG, JPEG"):
        image_size(tmp_path / "a.png")


@pytest.mark.parametrize("extension", ["webp", "png"])
def test_a_path_that_no_file_can_have_is_a_sentence(extension):
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        image_size(f"a\0b.{extension}")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_text_named_transparency_is_no_transparency(tmp_path, mode, behind):
    image = _smooth(8, 8).convert(mode)
    image.save(tmp_path / "plain.png")
    content = (tmp_path / "plain.png").read_bytes()
    text = b"tEXttransparency\0some words"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    place = content.index(b"IEND" if behind else b"IDAT") - 4
    (tmp_path / "text.png").write_bytes(content[:place] + chunk + content[place:])
    for alpha in (False, True):
        assert np.array_equal(
            read_image(tmp_path / "text.png", alpha=alpha), read_image(tmp_path / "plain.png", alpha=alpha)
        )
