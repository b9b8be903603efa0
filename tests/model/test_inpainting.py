"""--train_inpainting: nine channels, worked out here and by diffusers; runs that learn, go on, show and refuse."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import make_image
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from diffusers import UNet2DConditionModel as DiffusersUNet
from option_effects import Bench, epoch_of, plan, shows
from PIL import Image
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from test_base_model import open_model
from test_trainer import load_as_printed, model_of
from tiny_models import FAMILIES, build_pipeline, save_folder, save_single_file

from library.data.images import normalized
from library.data.preview import SHEET_NAME
from library.data.random_masks import preview_mask
from library.model import vae as frozen_vae
from library.model.inpainting import surroundings
from library.model.vae import FrozenVae
from library.output import learning_report
from library.output.sample_prompts import SamplePrompt
from library.output.sample_scene import check_scene, scene
from library.output.samplers import make_sampler
from library.support.errors import UserError
from library.training.diffusion import NoiseSchedule

PIXELS = "--cache_latents=false"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny inpainting models by family."""
    return {family: save_folder(family, tmp_path_factory.mktemp(family), channels=9) for family in FAMILIES}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), count=2, caption=f"a photo of {TOKEN}")


@pytest.fixture(scope="module")
def bench(models, dataset):
    """Short runs on the tiny inpainting models."""
    return Bench(models, dataset)


@pytest.fixture
def seen(monkeypatch):
    """All that a U-Net is given while the test runs."""
    given = []
    original = DiffusersUNet.forward

    def recorded(unet, sample, *args, **details):
        given.append(sample.detach().clone())
        return original(unet, sample, *args, **details)

    monkeypatch.setattr(DiffusersUNet, "forward", recorded)
    return given


def posterior(folder, images, seeds):
    """One draw each from the posterior of diffusers' own VAE, unscaled, and the scale."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        found = vae.encode(images).latent_dist
    noise = [torch.randn(found.mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return found.mean + found.std * torch.stack(noise), vae.config.scaling_factor


# ---- nine channels


@shows("train_inpainting")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_channels_are_those_made_by_hand(family, bench, models, seen):
    outcome = bench(PIXELS, "--train_inpainting", "--noise_offset=0.1", family=family, steps=2)
    assert len(seen) == 2
    for given, (batch,), draw in zip(seen, outcome.batches, outcome.draws, strict=True):
        assert given.shape == (2, 9, 8, 8)
        assert set(batch.holes.unique().tolist()) == {0, 1}
        images = normalized(batch.images)
        latents, scale = posterior(models[family], images, [seed ^ 1 << 62 for seed in batch.seeds])
        # Hidden is 1, and mid-grey in the image; each place of the latents has the mask of its upper left pixel.
        visible = torch.where(batch.holes.bool(), torch.zeros(()), images)
        around, _ = posterior(models[family], visible, [seed ^ 1 << 61 for seed in batch.seeds])
        noisy = NoiseSchedule.create().add_noise(latents * scale, draw.input_noise, draw.timesteps)
        expected = torch.cat([noisy, batch.holes[:, :, ::8, ::8], around * scale], dim=1)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(outcome.batches[0][0].holes, outcome.batches[1][0].holes)
    assert outcome.files == [f"{TOKEN}.safetensors"]


def test_only_what_is_hidden_is_missing(models):
    vae = AutoencoderKL.from_pretrained(models["sd1"], subfolder="vae")
    frozen = FrozenVae(vae, "cpu", torch.float32)
    images, holes = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
    holes[1, :, :8] = 1
    makers = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1, 2)]
    found = surroundings(frozen, 0.5, images, holes, makers[:2])
    whole = frozen.encode(images, makers[2:]) * 0.5
    assert found[:, 0].tolist() == [[[0, 0], [0, 0]], [[1, 1], [0, 0]]]
    assert torch.equal(found[0, 1:], whole[0])
    assert (found[1, 1:] - whole[1]).abs().max() > 1e-3


def inpainting_pipeline(family, folder, embedding):
    kind = StableDiffusionXLInpaintPipeline if family == "sdxl" else StableDiffusionInpaintPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    load_as_printed(pipe, family, embedding)
    pipe.scheduler = make_sampler("ddim", v_prediction=family == "sd2", zero_terminal_snr=False)
    return pipe


def filled_in(pipe, folder, prompt):
    """The image of diffusers' pipeline, given the same noise and the same draw of what is around the hole."""
    image, hole = scene(prompt)
    around, scale = posterior(folder, (image * (1 - hole))[None], [prompt.seed ^ 1 << 63])
    picture = pipe(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        image=image[None],
        mask_image=hole[None],
        masked_image_latents=around * scale,
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.seed)),
        width=64,
        height=64,
        strength=1.0,
        num_inference_steps=prompt.steps,
        guidance_scale=prompt.scale,
        output_type="np",
    ).images[0]
    return (picture * 255).round()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_what_diffusers_paints(family, models, dataset, tmp_path, trainers):  # noqa: F811
    argv = arguments(family, models[family], dataset, tmp_path / "out", PIXELS, "--train_inpainting")
    assert run(family, argv) == 0
    pipe = inpainting_pipeline(family, models[family], tmp_path / "out" / f"{TOKEN}.safetensors")
    image = str(make_image(tmp_path / "scene.png", (64, 64)))
    prompt = SamplePrompt(f"a {TOKEN} here", "dark", 64, 64, steps=3, scale=5.0, seed=3, image=image)
    wanted = [prompt, replace(prompt, scale=1.0), replace(prompt, image=None)]
    pictures = [filled_in(pipe, models[family], each) for each in wanted]
    for drawn, picture in zip(trainers[0].setup.pipeline.draw(wanted), pictures, strict=True):
        assert np.abs(drawn - picture).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 2


# ---- runs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls(family, bench, monkeypatch):
    """With the same masks, noise and timesteps at every step it has nothing else to do, even with a random U-Net.

    That an inpainting model teaches a word is shown in test_quickstart_learning.py.
    """
    monkeypatch.setattr("library.data.samples.sample_seeds", lambda *_: (1, 2, 3))
    more = ["--train_inpainting", "--num_vectors_per_token=4", "--optimizer_type=AdamW"]
    outcome = bench(PIXELS, *more, family=family, steps=6)
    assert len({batch.holes.sum().item() for (batch,) in outcome.batches}) == 1
    assert outcome.losses[-1] < outcome.losses[0] - 1e-4


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_folders_hold_the_model(family, form, models, tmp_path):
    path = models[family]
    if form == "file":
        path = save_single_file(family, tmp_path / "model.safetensors", channels=9)
    model = open_model(path, family)
    assert model.inpainting
    unet, wanted = model.unet(torch.float32, inpainting=True), build_pipeline(family, channels=9).unet.state_dict()
    assert unet.config.in_channels == 9
    assert unet.state_dict().keys() == wanted.keys()
    assert [name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, wanted[name])] == []


def test_a_resumed_run_ends_in_the_same_bits(models, dataset, tmp_path, capsys):
    def argv(folder, *more):
        states = ["--save_every_n_steps=1", "--save_state", "--max_train_steps=4", "--train_inpainting", PIXELS]
        return arguments("sd1", models["sd1"], dataset, tmp_path / folder, *states, *more)

    assert run("sd1", argv("whole")) == 0
    capsys.readouterr()
    for step in (1, 3):
        state = tmp_path / "whole" / f"{TOKEN}-step{step:08d}-state"
        assert run("sd1", argv(f"from {step}", f"--resume={state}", "--max_data_loader_n_workers=1")) == 0
        assert "will not reproduce" not in capsys.readouterr().err
        whole, resumed = (load_file(tmp_path / name / f"{TOKEN}.safetensors") for name in ("whole", f"from {step}"))
        assert torch.equal(whole["emb_params"], resumed["emb_params"])


def test_masks_do_not_depend_on_who_draws_them(models, dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", models["sd1"], dataset, tmp_path, PIXELS, "--train_inpainting")
    planned = plan("sd1", argv)
    alone, helped = epoch_of(planned), epoch_of(planned, workers=1)
    assert [torch.equal(a.holes, b.holes) for a, b in zip(alone, helped, strict=True)] == [True] * len(alone)
    other = epoch_of(plan("sd1", [*argv, "--seed=2"]))
    assert not torch.equal(alone[0].holes, other[0].holes)
    # What else chance decides is what it was without masks.
    plain = epoch_of(plan("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, PIXELS)))
    assert [batch.seeds for batch in plain] == [batch.seeds for batch in alone]
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, alone, strict=True))
    assert plain[0].holes is None


def test_an_ordinary_model_is_widened_and_learns_what_it_always_learns(tiny_sd1, dataset, tmp_path, capsys):
    found = []
    for more in ([], ["--train_inpainting"]):
        folder = tmp_path / f"{len(more)}"
        assert run("sd1", arguments("sd1", tiny_sd1, dataset, folder, PIXELS, *more)) == 0
        warned = "is no inpainting model" in capsys.readouterr().err
        assert warned == bool(more)
        found.append(load_file(folder / f"{TOKEN}.safetensors")["emb_params"])
    # The sums of the first layer are made in another order, and Adam makes much of what a small gradient differs by.
    torch.testing.assert_close(*found, rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_unet_answers_as_before_whatever_is_around(family, request):
    model = open_model(model_of(family, request), family)
    plain, wide = model.unet(torch.float32), model.unet(torch.float32, inpainting=True)
    assert wide.config.in_channels == wide.conv_in.weight.shape[1] == 9
    noisy = torch.randn(2, 9, 8, 8)
    torch.testing.assert_close(wide.conv_in(noisy), plain.conv_in(noisy[:, :4]))
    assert wide.conv_in.weight[:, 4:].abs().max() == 0


def test_the_learning_report_paints_whole_images(bench, monkeypatch, seen):
    monkeypatch.setattr(learning_report, "_STEPS", 1)
    monkeypatch.setattr(learning_report, "_LOSS_SAMPLES", 4)
    outcome = bench(PIXELS, "--train_inpainting", "--learning_report")
    assert f"{TOKEN}_report.png" in outcome.files
    drawn = [given for given in seen if (given[:, 4] == 1).all()]
    assert sum(map(len, drawn)) == 2 * 2 * learning_report.PICTURES  # with guidance, with both words


def test_an_encoder_that_overflows_on_a_sample_is_as_it_was_afterwards(models):
    """Else a sample would decide in what precision the training images are encoded from then on."""
    vae = FrozenVae(AutoencoderKL.from_pretrained(models["sd1"], subfolder="vae"), "cpu", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in vae.vae.state_dict().items()}
    frozen_vae._moved(vae.vae, vae.device, torch.bfloat16)
    with vae.left_as_it_is():
        vae._widen()
        vae.dtype = torch.float32
        assert vae.encode(torch.zeros(1, 3, 32, 32), [torch.Generator()]).dtype == torch.float32
    assert vae.dtype == torch.bfloat16
    assert vae.encode(torch.zeros(1, 3, 32, 32), [torch.Generator()]).dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.vae.state_dict().items())


# ---- what is refused


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_option_an_inpainting_model_is_refused(family, models, dataset, tmp_path):
    argv = arguments(family, models[family], dataset, tmp_path / "out")
    for more in ([], ["--debug_dataset"]):
        refused = plan(family, [*argv, *more], code=1)
        assert "is an inpainting model (its U-Net takes 9 channels, not 4). Add --train_inpainting" in refused.said
        assert refused.job is None
    assert not (tmp_path / "out").exists()


def datasets_with(tmp_path, *keys, general=""):
    """A dataset file with [general] and as many datasets as keys."""
    write_dataset(tmp_path, caption=TOKEN, count=2)
    folder = (tmp_path / "images").as_posix()
    file = tmp_path / "several.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    file.write_text(f"[general]\nresolution = 64\n{general}\n" + "".join(f"[[datasets]]\n{k}\n{subset}" for k in keys))
    return file


@pytest.mark.parametrize("cache", ["--cache_latents", "--cache_latents_to_disk"])
def test_latents_cannot_be_cached(cache, models, dataset, tmp_path):
    said = plan("sd1", arguments("sd1", models["sd1"], dataset, tmp_path, "--train_inpainting", cache), code=1).said
    assert "--train_inpainting hides another part of each image every time" in said
    assert "Leave out --cache_latents and --cache_latents_to_disk." in said
    file = datasets_with(tmp_path, "train_inpainting = true")
    said = plan("sd1", arguments("sd1", models["sd1"], file, tmp_path, cache), code=1).said
    assert "[[datasets]] number 1: train_inpainting hides another part" in said


@pytest.mark.parametrize(
    ("keys", "general", "flags", "on"),
    [
        (["train_inpainting = true", "train_inpainting = true"], "", [], True),
        (["", ""], "train_inpainting = true", [], True),
        (["", ""], "", ["--train_inpainting"], True),
        (["train_inpainting = true", ""], "", [], None),
        (["train_inpainting = false", ""], "train_inpainting = true", [], None),
        (["train_inpainting = false"], "", ["--train_inpainting"], None),
        (["train_inpainting = true"], "", ["--train_inpainting=false"], True),
    ],
)
def test_the_key_of_a_dataset_is_as_good_as_the_option(keys, general, flags, on, models, tmp_path):
    file = datasets_with(tmp_path, *keys, general=general)
    argv = arguments("sd1", models["sd1"], file, tmp_path, PIXELS, *flags)
    planned = plan("sd1", argv, code=1 if on is None else 0)
    if on is None:
        assert "train_inpainting is off here, but it is on elsewhere" in planned.said
    else:
        assert planned.job.options.dataset.train_inpainting  # what states record
        assert all(batch.holes is not None for batch in epoch_of(planned))


# ---- what is shown


def test_the_contact_sheet_shows_what_is_hidden(models, tmp_path):
    make_image(tmp_path / "images" / "0.png", (64, 64), TOKEN)
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n")
    argv = arguments("sd1", models["sd1"], file, tmp_path / "out", PIXELS, "--train_inpainting", "--debug_dataset")
    shown = plan("sd1", argv)
    (batch,) = epoch_of(plan("sd1", [word for word in argv if word != "--debug_dataset"]))
    hole, image = batch.holes[0, 0].bool().numpy(), batch.images[0].permute(1, 2, 0).numpy().astype(float)
    assert f", {hole.mean():.0%} hidden" in shown.out
    with Image.open(tmp_path / "out" / SHEET_NAME) as sheet:
        pixels = np.asarray(sheet)[10:328:5, 10:328:5].astype(float)  # a tile holds five times the size
    assert np.abs(pixels[~hole] - image[~hole]).max() < 1
    assert np.abs(pixels[hole] - (image[hole] + np.array([255, 0, 0])) / 2).max() < 1


def test_the_scene_of_a_prompt(tmp_path):
    make_image(tmp_path / "wide.png", (128, 64))
    mask = np.zeros((64, 128), dtype=np.uint8)
    mask[:, 64:], mask[:8] = 255, 128  # what is as light as dark counts as white
    Image.fromarray(mask).save(tmp_path / "mask.png")
    prompt = SamplePrompt("x", width=64, height=64, seed=5, image=str(tmp_path / "wide.png"))
    image, hole = scene(prompt)
    with Image.open(tmp_path / "wide.png") as whole:
        middle = np.asarray(whole)[:, 32:96]
    assert np.array_equal(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), middle)
    assert np.array_equal(hole[0].bool().numpy(), preview_mask((64, 64), random.Random(5)))
    _, given = scene(replace(prompt, mask_image=str(tmp_path / "mask.png")))
    assert np.array_equal(given[0].numpy(), mask[:, 32:96] >= 128)
    nothing, everything = scene(replace(prompt, image=None))
    assert (nothing == 0).all()
    assert (everything == 1).all()


def test_an_image_so_thin_that_it_would_fill_the_memory_is_refused(tmp_path):
    Image.new("RGB", (2, 20000)).save(tmp_path / "thin.png")
    prompt = SamplePrompt("x", width=512, height=512, image=str(tmp_path / "thin.png"))
    for use in (check_scene, scene):
        with pytest.raises(
            UserError, match=r"thin\.png has 2x20000 pixels, a shape that has to be scaled to 512x5120000"
        ):
            use(prompt)


def sampled(bench, tmp_path, lines, *more, **details):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines) + "\n")
    return bench(PIXELS, f"--sample_prompts={file}", "--sample_at_first", *more, **details)


def test_samples_are_painted_into_images(bench, tmp_path, seen):
    make_image(tmp_path / "a b.png", (80, 64))
    mask = np.zeros((64, 80), dtype=np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    line = f"{TOKEN} --w 64 --h 64 --s 1 --d 3"
    lines = [
        f"{line} --i {tmp_path / 'a b.png'}",
        line,
        f"{line} --m {tmp_path / 'mask.png'} --i {tmp_path / 'a b.png'} ",
    ]
    outcome = sampled(bench, tmp_path, lines, "--train_inpainting")
    assert (
        f'The sample prompt number 2, "{TOKEN}", is left out: an inpainting model draws into an image' in outcome.said
    )
    assert [file.name.split("_")[2] for file in sorted((outcome.folder / "sample").iterdir())] == ["00", "02"]
    free, masked = (given[0, 4] for given in seen[:2])
    assert 0 < free.mean() < 0.5
    assert masked.tolist() == [[1] * 8] * 4 + [[0] * 8] * 4


def test_what_cannot_be_drawn_is_said_before_a_model_is_loaded(bench, tmp_path):
    make_image(tmp_path / "a.png", (80, 64))
    make_image(tmp_path / "small.png", (40, 32))
    for flags, sentence in [
        ("--i nowhere.png", f'The sample prompt "{TOKEN}": The image nowhere.png does not exist.'),
        (f"--i {tmp_path / 'a.png'} --m {tmp_path / 'small.png'}", "has 40x32 pixels, but"),
    ]:
        outcome = sampled(bench, tmp_path, [f"{TOKEN} {flags}"], "--train_inpainting", code=1)
        assert sentence in outcome.said
        assert outcome.job is None


def test_images_that_do_nothing_are_said(tiny_sd1, bench, tmp_path, dataset):
    ordinary = Bench({"sd1": tiny_sd1}, dataset)
    line = f"{TOKEN} --w 64 --h 64 --s 1 --d 3"
    outcome = sampled(ordinary, tmp_path, [f"{line} --i nowhere.png"])
    assert "images (--i) and masks (--m) have no effect without --train_inpainting" in outcome.said
    assert len(list((outcome.folder / "sample").iterdir())) == 1
