"""What each option about images, captions and caches does, through the real script; most need no model."""

import itertools
import json
import random
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from option_effects import Bench, captions_of, epoch_of, plan, shows
from PIL import Image
from runs import TOKEN, arguments, write_dataset

from library.data import loader as loader_module
from library.embedding import prompt_encoder
from library.model.vae import FrozenVae


class Scene:
    """A folder of images of the test's own; :meth:`plan` runs the script on it up to the trainer."""

    def __init__(self, folder, model):
        self.folder, self.model, self.images = folder, model, folder / "images"

    def picture(self, name, size=(64, 64), caption=TOKEN):
        return make_image(self.images / name, size, caption)

    def arguments(self, *more, data=None):
        file = self.folder / "data.toml"
        file.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{self.images.as_posix()}'\n")
        given = [f"--dataset_config={file}"] if data is None else data
        argv = arguments("sd1", self.model, None, self.folder / "out", *given)
        return [*argv, "--cache_latents=false", "--resolution=64", *more]

    def plan(self, *more, data=None, code=0):
        return plan("sd1", self.arguments(*more, data=data), code=code)

    def image(self, *more):
        """The first image as the model sees it, uint8 [H, W, 3]."""
        return pixels(epoch_of(self.plan(*more))[0].images[0])


def make_image(file, size=(64, 64), caption=None):
    """Write a coloured image that depends on its name, and its caption beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.frombytes("RGB", (3, 3), random.Random(file.name).randbytes(27))
    coarse.resize(size, Image.Resampling.BILINEAR).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


def pixels(image):
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def scene(tmp_path, tiny_sd1):
    return Scene(tmp_path, tiny_sd1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1):
    return Bench({"sd1": tiny_sd1}, write_dataset(tmp_path_factory.mktemp("data"), count=2))


# ---- where the images come from


@shows("dataset_config", "train_data_dir", "reg_data_dir", "prior_loss_weight", "in_json")
def test_sources(scene):
    scene.picture("a.png")
    in_file = scene.plan().job.data
    assert [(in_file.table[i].path, in_file.table[i].caption) for i in range(len(in_file.table))] == [
        ((scene.images / "a.png").as_posix(), TOKEN)
    ]

    make_image(scene.folder / "train" / f"3_{TOKEN} hat" / "b.png", (64, 64))
    make_image(scene.folder / "reg" / "1_hat" / "c.png", (64, 64))
    folders = [f"--train_data_dir={scene.folder / 'train'}"]
    assert captions_of(scene.plan(data=folders)) == [f"{TOKEN} hat"] * 3
    with_regularisation = [*folders, f"--reg_data_dir={scene.folder / 'reg'}", "--prior_loss_weight=0.25"]
    batches = epoch_of(scene.plan(data=with_regularisation))
    weights = sorted((batch.captions[0], batch.loss_weights.item()) for batch in batches)
    assert weights == [("hat", 0.25)] * 3 + [(f"{TOKEN} hat", 1.0)] * 3

    (scene.folder / "captions.json").write_text(json.dumps({"a": {"caption": f"{TOKEN} waving", "tags": "sun"}}))
    listed = [f"--train_data_dir={scene.images}", f"--in_json={scene.folder / 'captions.json'}"]
    assert captions_of(scene.plan(data=listed)) == [f"{TOKEN} waving,sun"]


MY_DATA = """
import torch

class Mine:
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.resolution = resolution

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"captions": ["mychar of mine"], "latents": torch.full((1, 4, 8, 8), float(index))}
"""


@shows("dataset_class")
def test_dataset_class(tmp_path, bench, monkeypatch):
    (tmp_path / "data_of_mine.py").write_text(MY_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "data_of_mine", raising=False)
    done = bench("--dataset_class=data_of_mine.Mine", "--resolution=64", dataset=None, steps=3)
    assert done.job.data.dataset.resolution == "64,64"
    assert sorted(batch.latents.mean().item() for (batch,) in done.batches) == [0, 1, 2]
    assert all(batch.captions == [f"{TOKEN} of mine"] for (batch,) in done.batches)
    assert done.files == [f"{TOKEN}.safetensors"]


@shows("dataset_repeats", "train_batch_size")
def test_how_many(scene):
    for name in "abc":
        scene.picture(f"{name}.png")
    assert [len(batch) for batch in epoch_of(scene.plan())] == [1, 1, 1]
    batches = epoch_of(scene.plan("--dataset_repeats=2", "--train_batch_size=4"))
    assert sorted(len(batch) for batch in batches) == [2, 4]
    assert sorted(key[-5] for batch in batches for key in batch.keys) == list("aabbcc")


# ---- captions

FOUR = f"{TOKEN}, hat, sun, sea"
CAPTIONS = {
    # option: (caption file, flags, what the model reads)
    "caption_prefix": ("hat", [f"--caption_prefix={TOKEN},"], f"{TOKEN}, hat"),
    "caption_suffix": (TOKEN, ["--caption_suffix=in a park"], f"{TOKEN} in a park"),
    "caption_separator": (
        f"sun;{TOKEN};hat",
        ["--caption_separator=;", "--shuffle_caption", "--keep_tokens=3"],
        f"sun; {TOKEN}; hat",
    ),
    "secondary_separator": (f"{TOKEN}, red;;;hat", ["--secondary_separator=;;;"], f"{TOKEN}, red,hat"),
    "keep_tokens_separator": (
        f"sun, {TOKEN} ||| hat",
        ["--keep_tokens_separator=|||", "--shuffle_caption"],
        f"sun, {TOKEN}, hat",
    ),
    "enable_wildcard": (TOKEN + " {in a hat|in a hat}", ["--enable_wildcard"], f"{TOKEN} in a hat"),
    "caption_dropout_rate": (FOUR, ["--caption_dropout_rate=1"], TOKEN),
    "caption_tag_dropout_rate": (FOUR, ["--caption_tag_dropout_rate=1"], TOKEN),
    "token_warmup_step": (FOUR, ["--token_warmup_step=10"], TOKEN),
    "token_warmup_min": (FOUR, ["--token_warmup_step=10", "--token_warmup_min=2"], f"{TOKEN}, hat"),
}


@shows(*CAPTIONS)
@pytest.mark.parametrize("option", CAPTIONS)
def test_captions(scene, option):
    caption, flags, read = CAPTIONS[option]
    scene.picture("a.png", caption=caption)
    assert captions_of(scene.plan(*flags)) == [read]
    without = [flag for flag in flags if not flag.startswith(f"--{option}")]
    if option == "caption_prefix":
        scene.plan(code=1)  # no caption holds the token
    else:
        assert captions_of(scene.plan(*without)) != [read]


@shows("caption_dropout_every_n_epochs", "token_warmup_step")
def test_captions_change_with_time(scene):
    scene.picture("a.png", caption=FOUR)
    planned = scene.plan("--caption_dropout_every_n_epochs=2")
    assert [captions_of(planned, epoch) for epoch in (1, 2, 3, 4)] == [[FOUR], [TOKEN], [FOUR], [TOKEN]]
    for steps in ("10", "0.5"):  # half of 20 steps
        planned = scene.plan(f"--token_warmup_step={steps}", "--max_train_steps=20")
        counts = [len(captions_of(planned, 1, step)[0].split(",")) for step in (0, 4, 7, 9, 10)]
        assert counts == [1, 2, 3, 3, 4]


@shows("shuffle_caption", "keep_tokens")
def test_shuffling(scene):
    scene.picture("a.png", caption=f"sun, {TOKEN}, hat, sea, sky, red")

    def orders(*flags):
        planned = scene.plan(*flags)
        return [captions_of(planned, epoch)[0].split(", ") for epoch in range(1, 13)]

    assert len(set(map(tuple, orders()))) == 1
    free, kept = orders("--shuffle_caption"), orders("--shuffle_caption", "--keep_tokens=2")
    for order in (*free, *kept):
        assert sorted(order) == sorted(["sun", TOKEN, "hat", "sea", "sky", "red"])
    assert len({order[0] for order in free}) > 2
    assert {tuple(order[:2]) for order in kept} == {("sun", TOKEN)}
    assert len(set(map(tuple, kept))) > 4


@shows("caption_extension", "caption_extention")
def test_caption_files(scene):
    scene.picture("a.png", caption=f"{TOKEN} in txt")
    for ending in ("tags", "old", "caption"):
        (scene.images / f"a.{ending}").write_text(f"{TOKEN} in {ending}")
    assert captions_of(scene.plan()) == [f"{TOKEN} in caption"]
    assert captions_of(scene.plan("--caption_extension=.tags")) == [f"{TOKEN} in tags"]
    assert captions_of(scene.plan("--caption_extension=.tags", "--caption_extention=.old")) == [f"{TOKEN} in old"]


# ---- sizes


@shows(
    "resolution",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
)
def test_sizes(scene):
    buckets = ["--resolution=128", "--enable_bucket", "--min_bucket_reso=64"]
    for size, flags, shape in [
        ((300, 100), [], (64, 64)),
        ((300, 100), ["--resolution=128"], (128, 128)),
        ((300, 100), ["--resolution=192,64"], (64, 192)),
        ((300, 100), buckets, (64, 192)),
        ((300, 100), [*buckets, "--min_bucket_reso=128"], (128, 128)),
        ((300, 100), [*buckets, "--max_bucket_reso=128"], (64, 128)),
        ((270, 150), [*buckets, "--resolution=256"], (192, 320)),
        ((270, 150), [*buckets, "--resolution=256", "--bucket_reso_steps=128", "--min_bucket_reso=128"], (256, 256)),
        ((100, 80), buckets, (128, 128)),
        ((100, 80), [*buckets, "--bucket_no_upscale"], (64, 64)),
    ]:
        scene.picture("a.png", size)
        assert scene.image(*flags).shape == (*shape, 3), (size, flags)


@shows("bucket_no_upscale")
def test_small_images_are_not_enlarged(scene):
    file = scene.picture("a.png", (100, 80))
    image = scene.image("--resolution=128", "--enable_bucket", "--min_bucket_reso=64", "--bucket_no_upscale")
    assert np.array_equal(image, np.asarray(Image.open(file))[8:72, 18:82])


@shows("skip_image_resolution")
def test_small_images_are_left_out(scene):
    scene.picture("a.png", (100, 80))
    scene.picture("b.png", (120, 80))
    scene.picture("c.png", (81, 100))
    for flag, kept in [("100,80", 2), ("90", 1), ("96,100", 0), ("50", 3)]:
        outcome = scene.plan(f"--skip_image_resolution={flag}", code=0 if kept else 1)
        if kept:
            assert len(outcome.job.data.table) == kept
        else:
            assert "skip_image_resolution leaves out every image" in outcome.said


@shows("resize_interpolation")
def test_interpolation(scene):
    chessboard = Image.fromarray(np.indices((64, 64)).sum(axis=0).astype(np.uint8) // 7 % 2 * 255).convert("RGB")
    scene.picture("a.png")
    chessboard.save(scene.images / "a.png")
    assert set(scene.image("--resize_interpolation=nearest", "--resolution=128").flat) == {0, 255}
    assert len(set(scene.image("--resolution=128").flat)) > 20
    bilinear = scene.image("--resize_interpolation=bilinear", "--resolution=128")
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(chessboard).astype(np.float32)).permute(2, 0, 1)[None],
        scale_factor=2,
        mode="bilinear",
    )
    assert np.abs(bilinear - expected[0].permute(1, 2, 0).numpy()).max() <= 1


# ---- augmentation


def draws(planned, count=24):
    return [epoch_of(planned, epoch)[0] for epoch in range(1, count + 1)]


@shows("flip_aug")
def test_flip(scene):
    scene.picture("a.png", (96, 64))
    plain = scene.image()
    assert {batch.images.sum().item() for batch in draws(scene.plan())} == {
        draws(scene.plan(), 1)[0].images.sum().item()
    }
    flipped = [np.array_equal(pixels(batch.images[0]), plain[:, ::-1]) for batch in draws(scene.plan("--flip_aug"))]
    kept = [np.array_equal(pixels(batch.images[0]), plain) for batch in draws(scene.plan("--flip_aug"))]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 6 <= sum(flipped) <= 18


@shows("color_aug")
def test_colour(scene):
    scene.picture("a.png")
    plain = scene.image().astype(int)
    varied = [pixels(batch.images[0]) for batch in draws(scene.plan("--color_aug"), 40)]
    changed = [image for image in varied if not np.array_equal(image, plain)]
    assert 5 <= len(changed) <= 25  # a third of the draws
    assert all(image.shape == plain.shape for image in changed)
    assert max(np.abs(image - plain).mean() for image in changed) < 40


@shows("random_crop")
def test_random_crop(scene):
    file = scene.picture("a.png", (96, 64))
    whole = np.asarray(Image.open(file))
    lefts = set()
    for batch in draws(scene.plan("--random_crop")):
        image = pixels(batch.images[0])
        lefts.add(next(left for left in range(33) if np.array_equal(image, whole[:, left : left + 64])))
    assert len(lefts) > 8
    assert np.array_equal(scene.image(), whole[:, 16:80])


@shows("face_crop_aug_range")
def test_face_crop(scene):
    scene.images.mkdir()
    face = Image.new("RGB", (200, 120), "white")
    face.paste("black", (80, 40, 120, 80))
    face.save(scene.images / "a_100_60_40_40.png")
    (scene.images / "a_100_60_40_40.txt").write_text(TOKEN)

    def share(*flags):
        return 1 - scene.image(*flags).mean() / 255

    assert share() == pytest.approx((40 / 120) ** 2, abs=0.01)
    assert share("--face_crop_aug_range=2.0,2.0") == pytest.approx(1 / 4, abs=0.01)


# ---- masks


def half_transparent(scene):
    image = np.full((64, 64, 4), 100, dtype=np.uint8)
    image[:, :32, 3], image[:, 32:, 3] = 255, 0
    scene.images.mkdir(exist_ok=True)
    Image.fromarray(image).save(scene.images / "a.png")
    (scene.images / "a.txt").write_text(TOKEN)


@shows("alpha_mask")
def test_alpha_mask(scene):
    half_transparent(scene)
    (plain,) = epoch_of(scene.plan())
    assert plain.masks is None
    assert (pixels(plain.images[0])[:, 32:] == 255).all()
    (masked,) = epoch_of(scene.plan("--alpha_mask"))
    expected = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], dim=1)
    assert torch.equal(masked.masks[0, 0], expected)
    assert (pixels(masked.images[0]) == 100).all()


@shows("masked_loss", "conditioning_data_dir")
def test_mask_images(scene):
    half_transparent(scene)
    masks = scene.folder / "masks"
    masks.mkdir()
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:16], mask[16:32] = 255, 51
    Image.fromarray(mask).save(masks / "a.png")
    assert "no masks" in scene.plan("--masked_loss", code=1).said
    idle = scene.plan(f"--conditioning_data_dir={masks}")
    assert "--conditioning_data_dir does nothing" in idle.said
    assert epoch_of(idle)[0].masks is None
    both = scene.plan("--masked_loss", f"--conditioning_data_dir={masks}")
    assert torch.allclose(epoch_of(both)[0].masks[0, 0], torch.from_numpy(mask / 255.0).float())


@shows("masked_loss", "alpha_mask")
@pytest.mark.parametrize("cached", ["true", "false"])
def test_masks_reach_the_loss(scene, bench, cached):
    half_transparent(scene)
    scene.arguments()
    flags = ["--resolution=64", f"--cache_latents={cached}"]
    masked = bench("--alpha_mask", "--masked_loss", *flags, dataset=scene.folder / "data.toml")
    (judged,) = masked.judged
    error = (judged.prediction - judged.target) ** 2
    assert error.shape == (1, 4, 8, 8)
    assert masked.losses[0] == pytest.approx(error[..., :4].sum().item() / error.numel(), rel=1e-5)


# ---- reading


@shows("cache_info")
def test_folder_cache(scene):
    scene.picture("a.png", (70, 66), caption=f"{TOKEN} first")
    scene.plan()
    noted = scene.images / "metadata_cache.json"
    assert not noted.exists()
    scene.plan("--cache_info")
    assert "70" in noted.read_text()
    assert f"{TOKEN} first" in noted.read_text()
    (scene.images / "a.txt").write_text(f"{TOKEN} second time")
    assert captions_of(scene.plan("--cache_info")) == [f"{TOKEN} second time"]


@shows("debug_dataset")
def test_debug_dataset(scene):
    scene.picture("a.png", caption=f"{TOKEN} in a hat")
    shown = scene.plan("--debug_dataset")
    assert shown.job is None
    assert f"{TOKEN} in a hat" in shown.out
    assert "[49408]" in shown.out
    assert [file.name for file in (scene.folder / "out").iterdir()] == ["debug_dataset.png"]


@shows("max_data_loader_n_workers", "persistent_data_loader_workers")
def test_workers(bench, monkeypatch):
    loaders = []
    original = loader_module.DataLoader

    def recorded(*args, **details):
        loaders.append(details)
        return original(*args, **details)

    monkeypatch.setattr(loader_module, "DataLoader", recorded)
    monkeypatch.setattr(loader_module, "usable_cores", lambda: 4)
    pixels = ["--train_batch_size=1", "--cache_latents=false"]
    with_workers = bench(*pixels, "--max_data_loader_n_workers=1", "--persistent_data_loader_workers", steps=2)
    assert (loaders[0]["num_workers"], loaders[0]["persistent_workers"]) == (1, True)
    without = bench(*pixels, steps=2)
    assert (loaders[1]["num_workers"], loaders[1]["persistent_workers"]) == (0, False)
    assert torch.equal(with_workers.rows[1][0], without.rows[1][0])
    bench("--max_data_loader_n_workers=1")
    assert loaders[2]["num_workers"] == 0  # the latents are in memory
    bench("--max_data_loader_n_workers=1", "--cache_latents_to_disk")
    assert (loaders[3]["num_workers"], loaders[3]["persistent_workers"]) == (1, True)


# ---- caches


@pytest.fixture
def encoded(monkeypatch):
    """Names and batch sizes of everything that the VAE encodes."""
    calls = []
    original = FrozenVae.encode

    def recorded(self, images, generators, names=(), **details):
        calls.append(len(images))
        return original(self, images, generators, names, **details)

    monkeypatch.setattr(FrozenVae, "encode", recorded)
    return calls


@shows("cache_latents", "vae_batch_size")
def test_latent_cache(bench, encoded):
    live = bench("--cache_latents=false", steps=3)
    assert encoded == [2, 2, 2]
    assert live.batches[0][0].latents is None
    assert live.setup.task.vae is not None
    encoded.clear()
    cached = bench(steps=3)
    assert encoded == [1, 1]
    assert cached.batches[0][0].images is None
    assert cached.setup.task.vae is None
    encoded.clear()
    assert torch.allclose(bench("--vae_batch_size=2").batches[0][0].latents, cached.batches[0][0].latents, atol=1e-5)
    assert encoded == [2]


@shows("cache_latents_to_disk", "skip_cache_check")
def test_latent_files(scene, bench, encoded):
    file = scene.picture("a.png", (80, 64))
    scene.arguments()

    def again(*more):
        encoded.clear()
        bench("--cache_latents_to_disk", "--resolution=64", *more, dataset=scene.folder / "data.toml")
        return sum(encoded)

    assert again() == 1
    assert (scene.images / "a_0080x0064_sd.npz").is_file()
    assert again() == 0
    Image.open(file).rotate(180).save(file, optimize=False, compress_level=0)
    assert again("--skip_cache_check") == 0
    assert again() == 1


@shows("cache_text_encoder_outputs")
def test_cached_prompts(tmp_path, bench):
    make_image(tmp_path / "images" / "a.png", (64, 64), f"a {TOKEN} with a hat")
    make_image(tmp_path / "reg" / "b.png", (64, 64), "a hat")
    file = tmp_path / "data.toml"
    file.write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'images').as_posix()}'\n"
        f"[[datasets.subsets]]\nis_reg = true\nimage_dir = '{(tmp_path / 'reg').as_posix()}'\n"
    )
    plain = bench(dataset=file, steps=3)
    with patch.object(prompt_encoder, "_on_cpu", wraps=prompt_encoder._on_cpu) as moved:
        cached = bench("--cache_text_encoder_outputs", dataset=file, steps=3)
    assert moved.call_count == 1  # on a GPU very many captions would fill its memory
    assert len(cached.batches[0][0]) == 2
    assert "1 captions without the token are cached, 1 captions with it stay live" in cached.said
    assert "cached, " not in plain.said
    for ours, theirs in zip(
        itertools.chain(cached.rows, [[torch.tensor(cached.losses)]]),
        itertools.chain(plain.rows, [[torch.tensor(plain.losses)]]),
        strict=True,
    ):
        assert (ours[0] - theirs[0]).abs().max() < 1e-6
    assert cached.losses != [pytest.approx(0)] * 3
