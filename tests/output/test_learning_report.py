"""--learning_report: the same measure before and after, on any run, and the files that show it."""

import json

import numpy as np
import pytest
import torch
from option_effects import shows
from PIL import Image
from runs import TOKEN, arguments, run, write_dataset
from test_trainer import model_of

from library.model.vae import FrozenVae
from library.output import learning_report
from library.output.learning_report import LearningReport, Measured, comparison_sheet
from library.output.verdict import Verdict
from library.support.errors import UserError


@pytest.fixture(autouse=True)
def _few_small_steps(monkeypatch):
    few_small_steps(monkeypatch)


def few_small_steps(monkeypatch):
    """The images of the tiny models say nothing anyway, nor do many of them or many samples of their loss."""
    monkeypatch.setattr(learning_report, "PICTURES", 4)
    monkeypatch.setattr(learning_report, "_STEPS", 2)
    monkeypatch.setattr(learning_report, "_LOSS_SAMPLES", 4)


def reported(family, tmp_path, model, *more, dataset="", caption=f"a photo of {TOKEN} (new)"):
    """Run a training with a report; returns what its JSON file holds."""
    data = write_dataset(tmp_path, dataset=dataset, caption=caption)
    argv = arguments(family, model, data, tmp_path / "out", "--learning_report", *more)
    assert run(family, argv) == 0
    return numbers_in(tmp_path / "out")


def numbers_in(folder) -> dict:
    """What the report in ``folder`` says, but for the run that made it."""
    found = json.loads((folder / f"{TOKEN}_report.json").read_text())
    assert found.pop("run")
    return found


@shows("learning_report")
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_is_written(family, tmp_path, request, capsys, monkeypatch):
    monkeypatch.setattr(learning_report, "PICTURES", 8)  # as many as the sheet shows of each
    found = reported(family, tmp_path, model_of(family, request), "--num_vectors_per_token=2")
    assert found["before"]["prompt_word"] == '"girl"'
    assert found["after"]["prompt_word"] == f'"{TOKEN}"'
    assert found["loss_on_held_out_pictures"] is False
    for name in ("loss", "distance"):
        assert found["before"][name] > 0
        assert found["after"][name] > 0
        assert found["before"][name] != found["after"][name]
    printed = capsys.readouterr().out
    assert "What the token learned (8 images each, drawn from the same noise):" in printed
    assert f"{found['after']['distance']:.2f}" in printed
    assert f"{found['after']['loss']:.5f}" in printed
    with Image.open(tmp_path / "out" / f"{TOKEN}_report.png") as sheet:
        assert sheet.size == (8 * 128, 3 * (128 + 20))


def test_a_word_that_learned_nothing_is_its_init_word(tmp_path, tiny_sd1):
    """With one vector that stays where it began, the two words are the same to the last digits."""
    found = reported("sd1", tmp_path, tiny_sd1, "--learning_rate=1e-12")
    assert found["after"]["loss"] == pytest.approx(found["before"]["loss"], rel=1e-6)
    assert found["after"]["distance"] == pytest.approx(found["before"]["distance"], rel=1e-4)


def test_without_an_init_word_the_start_is_compared(tmp_path, tiny_sd1):
    found = reported("sd1", tmp_path, tiny_sd1, "--init_word=", "--learning_rate=1e-12")
    assert found["before"]["prompt_word"] == "the start"
    assert found["after"]["loss"] == pytest.approx(found["before"]["loss"], rel=1e-6)
    weights = tmp_path / "out" / f"{TOKEN}.safetensors"
    again = reported("sd1", tmp_path, tiny_sd1, f"--weights={weights}", "--learning_rate=1")
    assert again["before"]["prompt_word"] == "the start"
    assert again["before"]["loss"] == pytest.approx(found["after"]["loss"], rel=1e-3)
    assert again["after"]["loss"] != pytest.approx(again["before"]["loss"], rel=1e-5)


def test_held_out_images_are_used_for_the_loss(tmp_path, tiny_sd1):
    assert reported("sd1", tmp_path, tiny_sd1, dataset="validation_split = 0.5")["loss_on_held_out_pictures"] is True


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_sd1):
    """The report of a run that moves the vectors far, made once."""
    with pytest.MonkeyPatch.context() as patch:
        few_small_steps(patch)
        return reported("sd1", tmp_path_factory.mktemp("plain"), tiny_sd1, "--learning_rate=1")


@pytest.mark.parametrize("strange", ["mychar_(x)", "[V", "my\\"])
def test_a_word_with_brackets_is_replaced_like_any_other(strange, plain, tmp_path, tiny_sd1):
    """What is drawn and measured with the init word does not depend on what the token is called."""
    more = (f"--token_string={strange}", f"--output_name={TOKEN}", "--learning_rate=1")
    found = reported("sd1", tmp_path, tiny_sd1, *more, caption=f"a photo of {strange} (new)")
    assert found["before"] == plain["before"]
    assert found["after"]["prompt_word"] == f'"{strange}"'
    assert found["after"]["distance"] != found["before"]["distance"]


def caption_images(tmp_path, captions, dataset=""):
    """A dataset file of images with these captions."""
    file = write_dataset(tmp_path, count=len(captions), dataset=dataset, caption="")
    pictures = sorted((tmp_path / "images").glob("*.txt"))
    for picture, caption in zip(pictures, captions, strict=True):
        picture.write_text(caption)
    return file


def test_only_captions_that_hold_the_word_count(tmp_path, tiny_sd1):
    found = []
    for name, captions in (("a", [TOKEN, f"new {TOKEN}"]), ("b", [TOKEN, f"new {TOKEN}", "a cat", "a dog"])):
        data = caption_images(tmp_path / name, captions)
        argv = arguments("sd1", tiny_sd1, data, tmp_path / name, "--learning_report", "--learning_rate=1e-12")
        assert run("sd1", argv) == 0
        found.append(numbers_in(tmp_path / name))
    assert found[0] == found[1]


def test_without_a_held_out_caption_the_training_is_measured(tmp_path, tiny_sd1, capsys):
    data = caption_images(tmp_path, [TOKEN] * 2)
    caption_images(tmp_path / "more", ["a cat"] * 4)
    folder = (tmp_path / "more" / "images").as_posix()
    held = f"[[datasets]]\nresolution = 64\nvalidation_split = 0.5\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    data.write_text(data.read_text() + held)
    argv = arguments("sd1", tiny_sd1, data, tmp_path / "out", "--learning_report")
    assert run("sd1", argv) == 0
    found = json.loads((tmp_path / "out" / f"{TOKEN}_report.json").read_text())
    assert found["loss_on_held_out_pictures"] is False
    assert found["after"]["loss"] > 0
    assert "No held-out caption holds the token" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_still_printed(tmp_path, tiny_sd1, monkeypatch, capsys):
    def full_disk(path, *_, **__):
        raise UserError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(learning_report, "write_png", full_disk)
    data = write_dataset(tmp_path, caption=TOKEN)
    assert run("sd1", arguments("sd1", tiny_sd1, data, tmp_path / "out", "--learning_report")) == 0
    said = capsys.readouterr()
    assert "What the token learned" in said.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{TOKEN}.safetensors"]
    assert f"{TOKEN}_report.png cannot be written" in said.err


def test_the_report_of_another_run_is_kept(tmp_path, caplog):
    """It may belong to a result in another format, which nothing moves."""
    picture = np.zeros((8, 8, 3), np.uint8)
    measured = Measured("a", 1.0, 1.0, [picture])
    report = LearningReport(measured, measured, [picture], held_out=False)
    (tmp_path / "a_report.json").write_text("[]")  # of whatever program
    for run_id in ("first", "first", "second"):
        report.write(tmp_path / "a", run_id, Verdict("UNCLEAR", "why"))
    runs = [json.loads((tmp_path / f"a_report{number}.json").read_text()) for number in ("", "-1", "-2")]
    assert runs[1] == []
    assert (runs[0]["verdict"], runs[0]["reason"]) == ("UNCLEAR", "why")
    assert [runs[0]["run"], runs[2]["run"]] == ["second", "first"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a_report-1.png", "a_report.png"]
    assert "a_report.png of an earlier run was kept: it is now a_report-1.png." in caplog.text


def test_no_distance_of_spoiled_images(tmp_path, tiny_sd1, monkeypatch, capsys):
    decode = FrozenVae.decode
    monkeypatch.setattr(FrozenVae, "decode", lambda vae, latents: decode(vae, latents) * torch.nan)
    data = write_dataset(tmp_path, caption=TOKEN)
    assert run("sd1", arguments("sd1", tiny_sd1, data, tmp_path / "out", "--learning_report")) == 0
    said = capsys.readouterr()
    assert "What the token learned" not in said.out
    assert "The learning report could not be made; the embedding is complete without it. The image of" in said.err
    assert (tmp_path / "out" / f"{TOKEN}.safetensors").is_file()


def test_templates_and_pixels(tmp_path, tiny_sd1):
    found = reported("sd1", tmp_path, tiny_sd1, "--use_style_template", "--cache_latents=false", caption=None)
    assert found["after"]["distance"] > 0


def test_the_same_report_twice(plain, tmp_path, tiny_sd1):
    assert reported("sd1", tmp_path, tiny_sd1, "--learning_rate=1") == plain


def test_a_dataset_of_the_users_own_has_no_images_to_compare_with(tmp_path, tiny_sd1, capsys):
    argv = arguments("sd1", tiny_sd1, None, tmp_path, "--learning_report", "--dataset_class=mine.Data")
    assert run("sd1", argv) == 1
    assert "--learning_report compares with the training images" in capsys.readouterr().err


def test_the_sheet_keeps_proportions_and_scales_small_and_large_images():
    red = np.zeros((64, 128, 3), np.uint8)
    red[..., 0] = 255
    sheet = np.asarray(comparison_sheet([("a", [red] * 9), ("b", [red.repeat(8, 0).repeat(8, 1)])]))
    assert sheet.shape == (2 * (256 + 20), 8 * 256, 3)
    filled = (sheet == (255, 0, 0)).all(axis=2)
    assert filled[:276].sum() == 8 * 252 * 126  # the ninth is left out
    assert filled[276:].sum() == 252 * 126
