"""``--average_last``: the result is the mean of the last vectors, and nothing else of a run changes."""

import json

import pytest
import torch
from option_effects import plan, shows
from runs import TOKEN, arguments, run
from safetensors import safe_open
from safetensors.torch import load_file
from test_early_stopping import Seconds
from test_processes import one_run

import train_textual_inversion
from library.embedding.tokenizer import typical_norm
from library.output import learning_report
from library.output.saving import Saving
from library.training.state import FILE, TrainingState, packed
from library.training.tail_average import TailAverage

RESULT = f"{TOKEN}.safetensors"
STEPS = 7
EACH = ["--num_vectors_per_token=2", "--save_every_n_steps=1"]
THIRD = [*EACH, "--average_last=0.33"]  # 2.3 of 7 steps: the last three


@pytest.fixture
def command(dataset, tmp_path, tiny_sd1):
    def build(folder: str, *more: str) -> list[str]:
        given = arguments("sd1", tiny_sd1, dataset, tmp_path / folder, f"--max_train_steps={STEPS}", *THIRD)
        return [*given, "--save_state", *more]

    return build


def checkpoint(step: int) -> str:
    return f"{TOKEN}-step{step:08d}.safetensors"


def state_of(folder, step: int):
    return folder / f"{TOKEN}-step{step:08d}-state"


def mean_of(folder, steps) -> dict[str, torch.Tensor]:
    """The mean of the vectors in the files of these steps, by name."""
    files = [load_file(folder / checkpoint(step)) for step in steps]
    return {key: torch.stack([file[key].double() for file in files]).mean(0) for key in files[0]}


def assert_is_mean(folder, steps) -> None:
    result, expected = load_file(folder / RESULT), mean_of(folder, steps)
    assert result.keys() == expected.keys()
    for key, mean in expected.items():
        assert (result[key] - mean).abs().max() < 1e-6
        assert (load_file(folder / checkpoint(STEPS))[key] - mean).abs().max() > 1e-4


@shows("average_last")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_result_is_the_mean_of_the_last_steps_and_all_else_is_as_ever(family, bench):
    plain = bench(*EACH, family=family, steps=STEPS)
    done = bench(*THIRD, "--no_report=false", family=family, steps=STEPS)
    assert_is_mean(done.folder, [5, 6, 7])
    assert done.losses == plain.losses
    for step in range(1, STEPS + 1):
        one, two = done.tensors(checkpoint(step)), plain.tensors(checkpoint(step))
        assert all(torch.equal(one[key], two[key]) for key in two)
        assert "ti.chosen" not in done.metadata(checkpoint(step))
    chosen = "the mean of those of the last 3 steps (--average_last=0.33)"
    told = done.metadata()
    assert (told["ti.average_last"], told["ti.chosen"], told["ti.steps"]) == ("0.33", chosen, str(STEPS))
    assert f"The vectors of the result are {chosen}." in done.err
    assert f"vectors        {chosen}" in done.out
    assert f"The vectors of the result are {chosen}." in (done.folder / f"{TOKEN}.html").read_text()
    lines = map(json.loads, (done.folder / f"{TOKEN}_metrics.jsonl").read_text().splitlines())
    (last,) = [line for line in lines if "result" in line]
    assert (last["step"], last["result_step"], last["chosen"]) == (STEPS, STEPS, chosen)


@pytest.mark.parametrize(("share", "steps"), [("1", range(1, 8)), ("0.5", range(4, 8)), ("0.15", [6, 7])])
def test_the_share_is_rounded_up(share, steps, bench):
    done = bench(*EACH, f"--average_last={share}", "--gradient_accumulation_steps=2", steps=STEPS)
    assert_is_mean(done.folder, steps)


def test_what_a_binary_fraction_adds_to_a_share_makes_no_step():
    assert 0.07 * 100 > 7
    assert TailAverage(0.07, 100, None).begin == 93


def test_of_one_step_it_is_the_last_vectors(bench):
    done = bench(*EACH, "--average_last=0.01", steps=STEPS)
    assert torch.equal(done.tensors()["emb_params"], done.tensors(checkpoint(STEPS))["emb_params"])


def test_a_mean_of_vectors_of_one_norm_has_that_norm(bench):
    done = bench(*THIRD, "--preserve_embedding_norm", steps=STEPS)
    norm = typical_norm(done.setup.prompt_encoder.embeddings[0].table.weight)
    result, mean = done.tensors()["emb_params"], mean_of(done.folder, [5, 6, 7])["emb_params"]
    assert result.norm(dim=1).tolist() == pytest.approx([norm] * 2, rel=1e-6)
    assert mean.norm(dim=1).max() < norm * (1 - 1e-5)
    assert torch.cosine_similarity(result.double(), mean).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_the_report_and_the_last_samples_use_it(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("library.output.sample_images.datetime", Seconds)
    for name, value in (("PICTURES", 2), ("_STEPS", 1), ("_LOSS_SAMPLES", 4)):
        monkeypatch.setattr(learning_report, name, value)
    measured, report = [], learning_report.LearningMeasure.report
    monkeypatch.setattr(
        learning_report.LearningMeasure,
        "report",
        lambda measure, *given: measured.append(measure.rows.rows[0].detach().clone()) or report(measure, *given),
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w 64 --h 64 --s 2 --d 1")
    drawn = [f"--sample_prompts={prompts}", "--sample_every_n_steps=7", "--no_report=false", "--learning_report"]
    done = bench(*THIRD, "--learning_rate=0.3", *drawn, steps=STEPS)
    assert torch.equal(measured[0], done.tensors()["emb_params"])
    before, after = sorted((done.folder / "sample").glob(f"{TOKEN}_000007_00_*.png"))
    assert before.read_bytes() != after.read_bytes()
    assert (done.folder / "sample" / f"{TOKEN}_grid.png").exists()


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_end_spoils_no_checkpoint(saved, command, tmp_path, monkeypatch):
    """The mean takes the place of no checkpoint, and where there is none it is kept as what it is."""

    def interrupted(saving, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(Saving, "finish", interrupted)
    more = ["--average_last=1"] if saved else ["--average_last=1", "--save_every_n_steps=100"]
    assert run("sd1", command("cut", *more)) == 130
    monkeypatch.undo()
    assert run("sd1", command("whole")) == 0
    kept = load_file(tmp_path / "cut" / checkpoint(STEPS))["emb_params"]
    last = load_file(tmp_path / "whole" / checkpoint(STEPS))["emb_params"]
    assert torch.equal(kept, last) == saved
    with safe_open(tmp_path / "cut" / checkpoint(STEPS), "pt") as file:
        assert ("ti.chosen" in file.metadata()) != saved


# ---- resuming


def test_a_resumed_run_has_the_same_mean(command, tmp_path):
    whole = tmp_path / "whole"
    assert run("sd1", command("whole")) == 0
    for step in (2, 4, 5, 6, 7):
        folder = tmp_path / f"from {step}"
        assert run("sd1", command(folder.name, f"--resume={state_of(whole, step)}")) == 0
        assert torch.equal(load_file(folder / RESULT)["emb_params"], load_file(whole / RESULT)["emb_params"])
        one, two = (TrainingState.read(each / f"{TOKEN}-state") for each in (folder, whole))
        assert torch.equal(one.learner["rows"][0], two.learner["rows"][0])
        assert torch.equal(one.averaging["mean"][0], two.averaging["mean"][0])
    assert TrainingState.read(state_of(whole, 4)).averaging is None


def test_a_mean_that_would_lack_steps_is_dropped(command, tmp_path, capsys):
    """Of a longer run its beginning has moved; a run without it, or an older version's, has none at all."""
    assert run("sd1", command("longer plain", "--max_train_steps=8", "--average_last=0.01")) == 0
    assert run("sd1", command("first")) == 0
    assert run("sd1", command("plain", "--average_last=0.01")) == 0
    content = torch.load(state_of(tmp_path / "plain", 6) / FILE, weights_only=False)
    assert content.pop("averaging") is None
    (state_of(tmp_path / "plain", 6) / FILE).write_bytes(packed(content))
    last = load_file(tmp_path / "longer plain" / RESULT)["emb_params"]
    for name in ("first", "plain"):
        capsys.readouterr()
        state = state_of(tmp_path / name, 6)
        assert run("sd1", command(f"{name} on", "--max_train_steps=8", f"--resume={state}")) == 0
        said = capsys.readouterr().err
        assert "--average_last is dropped, and the result will be the last vectors: the mean is to begin after" in said
        assert "after step 5, and the state of step 6 has none from there. Resume from a state of step 5 or" in said
        assert torch.equal(load_file(tmp_path / f"{name} on" / RESULT)["emb_params"], last)
    # From a state before the new beginning it is the mean of the longer run.
    assert run("sd1", command("in time", "--max_train_steps=9", f"--resume={state_of(tmp_path / 'first', 6)}")) == 0
    assert "is dropped" not in capsys.readouterr().err
    result, expected = load_file(tmp_path / "in time" / RESULT), mean_of(tmp_path / "in time", [7, 8, 9])
    assert (result["emb_params"] - expected["emb_params"]).abs().max() < 1e-6


# ---- several processes, and what is refused


def test_two_processes_have_one_mean(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "two", f"--max_train_steps={STEPS}", *THIRD)
    one_run(train_textual_inversion.__file__, argv, tmp_path)
    assert_is_mean(tmp_path / "two", [5, 6, 7])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--average_last=0"], "--average_last is 0.0; it must be above 0 and at most 1."),
        (["--average_last=1.5"], "--average_last is 1.5; it must be above 0 and at most 1."),
        (["--average_last=0.3", "--early_stopping"], "and --early_stopping may stop it before. Keep one of them."),
    ],
)
def test_what_makes_no_sense_is_refused(more, sentence, dataset, tiny_sd1, tmp_path):
    assert sentence in plan("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, *more), code=1).said


def test_an_optimizer_that_averages_is_refused(bench):
    done = bench("--average_last=0.3", "--optimizer_type=AdamWScheduleFree", code=1)
    assert "--average_last: AdamWScheduleFree saves an average of its own already. Leave one of them out." in done.said
    assert "Loading the text encoder" not in done.said
