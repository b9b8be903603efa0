"""The proof that the trainer teaches: the quickstart's models learn the character, and diffusers draws it.

Full length for the quickstart itself, over three seeds; fewer steps and looser bounds for everything else.
"""

import shutil
import statistics
from functools import cache
from pathlib import Path

import concept_judge
import measures
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from concept_judge import captions_with, check_miniatures, draw, judge, open_pipeline
from diffusers import UNet2DConditionModel
from runs import SCRIPTS, trainers  # noqa: F401  (a fixture)
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
INIT_WORD = "star"
GREEN = "mychar on a green background"
WITHOUT_THE_WORD = ["a photo of a red circle on a blue background", "a painting in the style of red and white stripes"]
pytestmark = pytest.mark.slow


def train(model: str, folder: Path, *more: str) -> Path:
    """Run the quickstart of a model with further options; the embedding file."""
    script = SCRIPTS[{"sd": "sd1", "sdxl": "sdxl"}[model]]
    given = [f"--config_file={ROOT / 'configs' / 'quickstart' / model}.toml", f"--output_dir={folder}"]
    AcceleratorState._reset_state(True)  # accelerate keeps the precision of a process's first run
    assert script.main([*given, *more]) == 0
    return folder / "mychar.safetensors"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """The paths in the quickstart's files are relative to it."""
    monkeypatch.chdir(ROOT)


@cache
def of_the_init_word(model: str, word: str = INIT_WORD) -> concept_judge.Verdict:
    return judge(draw(open_pipeline(model), captions_with(word)))


def of_the_new_word(model: str, embedding: Path) -> concept_judge.Verdict:
    return judge(draw(open_pipeline(model, embedding), captions_with("mychar")))


def good_compositions(model: str, embedding: Path) -> int:
    """Of 8 images, those whose background is green and whose concept is as near as it has to be."""
    pictures = draw(open_pipeline(model, embedding), [GREEN] * 8)
    near_enough = 0.5 * of_the_init_word(model).distance
    return sum(
        measures.read_plain(picture).background == "green" and judge([picture]).distance <= near_enough
        for picture in pictures
    )


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_miniatures_draw_what_the_character_is_made_of(model):
    """``check_miniatures.py`` asks the same of 256 prompts for robots, and of 256 for plain objects."""
    robots = check_miniatures.robot_prompts(128, seed=0)
    robots = [each for each in robots if each[2].head == "star" or each[2].body == "moon"][:48]
    pictures = check_miniatures.generate(
        open_pipeline(model), [prompt for prompt, _, _ in robots], list(range(len(robots)))
    )
    seen = [
        (measures.read_robot(picture, *colours), want)
        for picture, (_, colours, want) in zip(pictures, robots, strict=True)
    ]
    for part, shape in (("head", "star"), ("body", "moon"), ("eyes", None)):
        assert statistics.mean(check_miniatures.right(seen, part, shape)) >= 0.9, (part, shape)


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_quickstart_teaches_the_word(model, tmp_path):
    files = [train(model, tmp_path / str(seed), f"--seed={seed}", "--learning_report=false") for seed in (1, 2, 3)]
    verdicts = [of_the_new_word(model, file) for file in files]
    distance = statistics.median(verdict.distance for verdict in verdicts)
    overlap = statistics.median(verdict.iou for verdict in verdicts)
    init = of_the_init_word(model)
    assert distance <= 0.4 * init.distance
    assert overlap >= 2 * init.iou
    plain = open_pipeline(model)
    word, best = concept_judge.best_known_word(plain)
    assert distance <= 0.7 * best, word
    assert statistics.median(good_compositions(model, file) for file in files) >= 6
    for before, after in zip(
        draw(plain, WITHOUT_THE_WORD), draw(open_pipeline(model, files[0]), WITHOUT_THE_WORD), strict=True
    ):
        np.testing.assert_array_equal(before, after)


STEPS = {"sd": 40, "sdxl": 60}
# By name: which model, how many times as long, init word, options, and what is asked of distance and overlap, as shares
# of the init word's. What does not depend on the family is tried with one of them.
CASES = {
    # One vector that says a figure of two parts takes longer.
    "1 vector": ("sd", 2, INIT_WORD, ["--num_vectors_per_token=1"], 0.75, 1.4),
    # Their sentences say less than the captions do, and seeds differ more.
    "object templates": ("sd", 2, "robot", ["--use_object_template"], 0.8, 1.1),
    "pixels": ("sdxl", 1, INIT_WORD, ["--cache_latents=false", "--optimizer_type=AdamW8bit"], 0.65, 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_short_training_teaches_it_too(case, tmp_path):
    model, longer, word, more, distance, overlap = CASES[case]
    more = [f"--max_train_steps={longer * STEPS[model]}", "--learning_report=false", f"--init_word={word}", *more]
    verdict, init = of_the_new_word(model, train(model, tmp_path, *more)), of_the_init_word(model, word)
    assert verdict.distance <= distance * init.distance
    assert verdict.iou >= overlap * init.iou


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_bfloat16_leads_where_float32_does(model, tmp_path, trainers):  # noqa: F811
    """From the same noise the vectors go the same way, and as far.

    By plain SGD, with gradients as they are: AdamW and equal weight let the smallest gradients, which are mostly
    rounding in bfloat16, count as much as the largest.
    """
    ends = {}
    for precision in ("no", "bf16"):
        more = [f"--mixed_precision={precision}", "--max_train_steps=8", "--learning_report=false", "--no_report"]
        more += ["--normalize_sample_gradients=false", "--optimizer_type=SGD", "--optimizer_args"]
        more += ["--learning_rate=1", "--lr_scheduler=constant"]
        ends[precision] = load_file(train(model, tmp_path / precision, *more))
    keys, starts = trainers[0].job.family.embedding_keys, trainers[0].setup.starts
    moved = {
        precision: [vectors[key] - start for key, start in zip(keys, starts, strict=True)]
        for precision, vectors in ends.items()
    }
    for whole, half in zip(moved["no"], moved["bf16"], strict=True):
        assert not torch.equal(whole, half)
        assert torch.cosine_similarity(whole.flatten(), half.flatten(), dim=0) > 0.95
    # SDXL's second text encoder is moved an eighth as far as the first, so it says less here.
    whole, half = (
        torch.cat([vectors.flatten() for vectors in moved[precision]]).norm() for precision in ("no", "bf16")
    )
    assert float(half) == pytest.approx(float(whole), rel=0.05)


def inpainting_model(model: str, folder: Path) -> Path:
    """The miniature with a U-Net of nine channels. It heeds the five more a little, and was not trained to."""
    shutil.copytree(ROOT / "configs" / "quickstart" / model, folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    narrow = unet.conv_in.weight.data
    noise = torch.randn(narrow.shape[0], 5, *narrow.shape[2:], generator=torch.Generator().manual_seed(1))
    wide = UNet2DConditionModel.from_config(unet.config, in_channels=9)
    wide.load_state_dict(unet.state_dict() | {"conv_in.weight": torch.cat([narrow, 0.1 * narrow.std() * noise], dim=1)})
    shutil.rmtree(folder / "unet")
    wide.save_pretrained(folder / "unet")
    return folder


def test_an_inpainting_model_teaches_the_word_too(tmp_path):
    """What it teaches is drawn by the ordinary miniature: their text encoders are the same."""
    model = "sd"
    folder = inpainting_model(model, tmp_path / "model")
    more = [f"--pretrained_model_name_or_path={folder}", "--train_inpainting", "--cache_latents=false"]
    more += [f"--max_train_steps={STEPS[model]}", "--learning_report=false"]
    verdict, init = of_the_new_word(model, train(model, tmp_path / "out", *more)), of_the_init_word(model)
    assert verdict.distance <= 0.65 * init.distance
    assert verdict.iou >= 1.5 * init.iou


def test_a_rate_that_is_far_too_low_teaches_nothing(tmp_path, capsys):
    """The negative control: the same measures do see that nothing was learned."""
    more = ["--max_train_steps=40", "--learning_rate=1e-6", "--num_vectors_per_token=1", "--learning_report=false"]
    verdict, init = of_the_new_word("sd", train("sd", tmp_path, *more)), of_the_init_word("sd")
    assert verdict.distance > 0.95 * init.distance
    assert verdict.iou < 1.1 * init.iou
    assert "THE EMBEDDING HAS HARDLY CHANGED" in capsys.readouterr().err
