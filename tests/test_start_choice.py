"""``--init_word=auto`` through the real scripts: the word with the lowest loss is chosen, and all else is as ever."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from option_effects import shows
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  # a fixture
from safetensors import safe_open
from safetensors.torch import load_file

from library import start_choice
from library.model.vae import FrozenVae
from library.output.trackers import measured
from library.training.denoising import DenoisingTask

GIVEN = ["--init_word_candidates", "girl", "painting,dog", "boat"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    file = write_dataset(tmp_path_factory.mktemp("data"), subset="num_repeats = 8", count=4)
    file.write_text(file.read_text().replace("batch_size = 2", "batch_size = 16"))
    return file


@pytest.fixture(autouse=True)
def _half_the_time(monkeypatch):
    """So that a run of few steps has the time to try words: two for each step."""
    monkeypatch.setattr("library.start_choice._SHARE", 0.5)


def command(family, model, dataset, folder, *more):
    return arguments(family, model, dataset, folder, "--max_train_steps=3", "--num_vectors_per_token=2", *more)


def lines(folder):
    return list(map(json.loads, (folder / f"{TOKEN}_metrics.jsonl").read_text().splitlines()))


@torch.no_grad()
def loss_from(training, word):
    """The mean loss of vectors that start from a word, over the first 16 samples of the fixed batches."""
    setup, job = training.setup, training.job
    tables = [embedding.table.weight for embedding in setup.prompt_encoder.embeddings]
    (ids,) = {tokenizer.encode(word, add_special_tokens=False)[0] for tokenizer in job.word.prompts.tokenizers}
    losses = []
    with setup.rows.holding([table[[ids, ids]].float() for table in tables]):
        for batch in job.data.concept().fixed_batches(16, held_out=False):
            losses += setup.task.losses(batch).tolist()
    return sum(losses[:16]) / 16


@shows("init_word", "init_word_candidates")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_word_with_the_lowest_loss_is_the_start(family, dataset, tmp_path, request, trainers):  # noqa: F811
    model = request.getfixturevalue(f"tiny_{family}")
    chosen, named = tmp_path / "chosen", tmp_path / "named"
    auto = command(family, model, dataset, chosen, "--init_word=auto", *GIVEN, "--no_report=false")
    assert run(family, auto) == 0
    ranking = next(line for line in lines(chosen) if "start_words" in line)["start_words"]
    assert len(ranking) >= 2
    assert all(one[1] <= other[1] for one, other in pairwise(ranking))
    for word, loss in ranking:
        assert loss == pytest.approx(loss_from(trainers[0], word), abs=2e-5)
    best = ranking[0][0]
    assert all(loss_from(trainers[0], word) >= ranking[0][1] - 2e-5 for word, _ in ranking)
    with safe_open(chosen / f"{TOKEN}.safetensors", "pt") as file:
        assert file.metadata()["ti.init_word"] == best
    page = (chosen / f"{TOKEN}.html").read_text()
    assert f"from the word &quot;{best}&quot;" in page
    assert "Words that were tried as a start" in page
    assert f"--init_word={best}" in page
    assert run(family, command(family, model, dataset, named, f"--init_word={best}")) == 0
    one, two = (load_file(folder / f"{TOKEN}.safetensors") for folder in (chosen, named))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resumed_run_keeps_its_word(dataset, tiny_sd1, tmp_path, capsys, trainers):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    auto = ["--init_word=auto", "--save_state"]
    assert run("sd1", command("sd1", tiny_sd1, dataset, whole, *auto)) == 0
    assert run("sd1", command("sd1", tiny_sd1, dataset, parts, *auto, "--save_every_n_steps=1")) == 0
    capsys.readouterr()
    state = parts / f"{TOKEN}-step00000001-state"
    again = command("sd1", tiny_sd1, dataset, parts, *auto, f"--resume={state}")
    assert run("sd1", again) == 0
    said = capsys.readouterr().err
    assert "words are tried" not in said
    assert "has no effect on a resumed run" not in said
    one, two = (load_file(folder / f"{TOKEN}.safetensors")["emb_params"] for folder in (whole, parts))
    assert torch.equal(one, two)
    with safe_open(parts / f"{TOKEN}.safetensors", "pt") as file:
        assert file.metadata()["ti.init_word"] not in ("auto", "")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--max_train_steps=1"], "the run is too short to try 4 words"),
        (["--init_word_candidates", "girl", "qwertyuiop"], '--init_word_candidates "qwertyuiop" is '),
        (["--init_word_candidates", "girl", "Auto"], '"auto" asks for the choice and cannot be chosen'),
        (["--weights=old.pt"], "and those of --weights have one"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_a_model_is_loaded(more, sentence, dataset, tiny_sd1, tmp_path, capsys):
    assert run("sd1", command("sd1", tiny_sd1, dataset, tmp_path, "--init_word=auto", *more)) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert "Loading the text encoder" not in said


def test_only_samples_with_the_token_judge_and_images_are_encoded_once(tiny_sd1, tmp_path, monkeypatch, capsys):
    """But for one image the token is in one of four lines; "Girl" and "girl" are the same to the models."""
    file = write_dataset(tmp_path, subset="num_repeats = 8\nenable_wildcard = true", count=4)
    file.write_text(file.read_text().replace("batch_size = 2", "batch_size = 16"))
    for caption in sorted((tmp_path / "images").glob("*.txt"))[1:]:
        caption.write_text(f"a photo of {TOKEN}\na photo\nan image\na picture\n")
    seen, encoded = [], []
    losses, encode = DenoisingTask.losses, FrozenVae.encode
    monkeypatch.setattr(DenoisingTask, "losses", lambda task, batch, **more: seen.append(batch) or losses(task, batch))
    monkeypatch.setattr(FrozenVae, "encode", lambda vae, *given, **more: encoded.append(1) or encode(vae, *given))
    more = ["--init_word=auto", "--cache_latents=false", "--init_word_candidates", "girl", "Girl", "dog"]
    assert run("sd1", command("sd1", tiny_sd1, file, tmp_path / "out", *more, "--max_train_steps=3")) == 0
    tried = seen[:-3]
    assert sum(map(len, tried)) % 4 == 0
    assert all(batch.has_token.all() for batch in tried)
    assert len(encoded) < len(tried)
    said = capsys.readouterr().err
    assert "Girl" not in said
    assert re.search(r"Trying words: 100%.*? (\d+)/\1 ", said)


@pytest.mark.parametrize("words", ["all", "some"])
def test_a_word_whose_loss_is_no_number_is_not_chosen(words, dataset, tiny_sd1, tmp_path, monkeypatch, capsys):
    loss = start_choice._Trial._loss
    bad = {"girl", "painting"} if words == "some" else None
    monkeypatch.setattr(
        start_choice._Trial,
        "_loss",
        lambda trial, word, batches: math.nan if bad is None or word in bad else loss(trial, word, batches),
    )
    argv = command("sd1", tiny_sd1, dataset, tmp_path, "--init_word=auto", *GIVEN, "--max_train_steps=2")
    assert run("sd1", argv) == (1 if words == "all" else 0)
    said = capsys.readouterr().err
    assert ("the loss is NaN or infinite, whatever word" in said) == (words == "all")
    assert " nan" not in said


def test_words_that_no_model_knows_end_the_run_with_a_sentence(dataset, tiny_sd1, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("library.start_choice.usable_ids", lambda *_: None)
    assert run("sd1", command("sd1", tiny_sd1, dataset, tmp_path, "--init_word=auto")) == 1
    assert "the model knows none of the words" in capsys.readouterr().err


def test_a_dataset_class_names_its_word(tiny_sd1, tmp_path, capsys):
    argv = arguments("sd1", tiny_sd1, None, tmp_path, "--dataset_class=mine.Images", "--init_word=auto")
    assert run("sd1", argv) == 1
    assert "only your --dataset_class knows them" in capsys.readouterr().err


def test_trackers_get_the_ranking_as_text():
    assert measured({"step": 0, "start_words": [["robot", 0.05], ["doll", 0.061]]}) == {
        "start_words": "robot (0.0500), doll (0.0610)"
    }
