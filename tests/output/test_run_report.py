"""The report through the real scripts: what it notes, how it goes on, and that nothing about it touches a training."""

import json
import re

import pytest
import torch
from option_effects import shows, train
from page_checks import checked
from PIL import Image
from runs import TOKEN, arguments, run, write_dataset
from safetensors.torch import load_file
from test_learning_report import few_small_steps

from library.output import learning_report, run_report
from library.output.html_report import HtmlReport
from library.output.metrics_file import MetricsFile
from library.output.run_facts import RunFacts
from library.training.denoising import DenoisingTask

METRICS, PAGE, USAGE = f"{TOKEN}_metrics.jsonl", f"{TOKEN}.html", f"{TOKEN}_usage.txt"
RESULT = f"{TOKEN}.safetensors"
# What differs between two runs that are alike in all else.
CLOCK = ("seconds", "steps_per_second", "memory_gib")
REPORT = "--no_report=false"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), dataset="validation_split = 0.25", count=4)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a photo of {TOKEN} --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n")
    return [f"--sample_prompts={file}", "--sample_every_n_steps=2", "--sample_at_first"]


def lines(folder, name: str = METRICS) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()][1:]


def without_clock(found: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in found]


def values(found: list[dict], name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in found if name in line}


def page(folder):
    return checked((folder / PAGE).read_text(encoding="utf-8"))


def verdict_of(folder) -> dict:
    return lines(folder)[-1]


@shows("no_report")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_a_run_notes(family, dataset, tmp_path, request, prompts):
    argv = arguments(family, request.getfixturevalue(f"tiny_{family}"), dataset, tmp_path / "out", *prompts)
    argv += ["--max_train_steps=4", "--save_every_n_steps=2", "--num_vectors_per_token=2"]
    outcome = train(family, [*argv, REPORT], tmp_path / "out")
    found = lines(outcome.folder)
    assert values(found, "loss") == pytest.approx(dict(enumerate(outcome.losses, start=1)), rel=1e-5)
    assert values(found, "lr") == pytest.approx(dict(enumerate(outcome.rates, start=1)), rel=1e-5)
    keys = ["emb_params"] if family == "sd1" else ["clip_l", "clip_g"]
    for place, key in enumerate(keys):
        for number, name in enumerate((TOKEN, f"{TOKEN}1")):
            label = name if len(keys) == 1 else f"{key}/{name}"
            wanted = {step: rows[place][number].norm().item() for step, rows in enumerate(outcome.rows, start=1)}
            assert values(found, f"norm/{label}") == pytest.approx(wanted, rel=1e-5)
            start = outcome.setup.starts[place][number]
            moved = {
                step: 100 * ((rows[place][number] - start).norm() / start.norm()).item()
                for step, rows in enumerate(outcome.rows, start=1)
            }
            assert values(found, f"moved/{label}") == pytest.approx(moved, rel=1e-4)
    # Losses by band are those that the loss function gave.
    judged = outcome.judged[0]
    wanted = {}
    for timestep, loss in zip(judged.timesteps.tolist(), judged.losses.tolist(), strict=True):
        wanted.setdefault(f"loss/{timestep // 250 * 250}-{timestep // 250 * 250 + 249}", []).append(loss)
    first = next(line for line in found if "loss" in line)
    bands = {name: value for name, value in first.items() if re.fullmatch(r"loss/\d.*", name)}
    assert bands == pytest.approx({name: sum(all) / len(all) for name, all in wanted.items()}, rel=1e-5)
    assert set(values(found, "loss/validation")) == {2, 4}
    assert set(values(found, "samples")) == {0, 2, 4}
    assert all((outcome.folder / "sample" / name).is_file() for name in values(found, "samples")[4].values())
    assert set(values(found, "nearest")) == {0, 2, 4}
    assert values(found, "nearest")[0][label][0] == ["girl", 1.0]
    assert len(page(outcome.folder).all("img")) == 3 + 3 * 2

    plain = train(family, [*argv[: -len(prompts)], *prompts, f"--output_dir={tmp_path / 'plain'}"], tmp_path / "plain")
    assert not {METRICS, PAGE, USAGE} & set(plain.files)
    assert "How to use" in plain.out
    assert "How to use" not in outcome.out
    assert "How to use" in (outcome.folder / USAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [[], ["--cache_latents=false", "--optimizer_type=AdamWScheduleFree"]])
def test_training_is_the_same_to_the_bit(flags, dataset, tmp_path, tiny_sd1, prompts):
    if flags:
        pytest.importorskip("schedulefree")
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=4", "--num_vectors_per_token=2", *flags)
    argv += ["--save_every_n_steps=2", *prompts]
    bits = {}
    for name, more in (("with", [REPORT]), ("without", [])):
        outcome = train("sd1", [*argv, *more, f"--output_dir={tmp_path / name}"], tmp_path / name)
        bits[name] = [[rows[0].numpy().tobytes() for rows in outcome.rows], outcome.losses, outcome.rates]
        files = sorted(file for file in outcome.folder.glob("*.safetensors"))
        bits[name] += [[{key: t.numpy().tobytes() for key, t in load_file(file).items()} for file in files]]
        samples = sorted(outcome.folder.glob(f"sample/{TOKEN}_[e0-9]*.png"))
        # Not the files, which name the embedding's by its hash: that tells the options in its metadata.
        bits[name] += [[Image.open(file).tobytes() for file in samples]]
    assert bits["with"] == bits["without"]


@shows("log_every_n_steps")
def test_every_n_th_step_holds_the_mean_since_the_last(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=7", "--log_every_n_steps=3", REPORT)
    outcome = train("sd1", argv, tmp_path)
    losses = outcome.losses
    wanted = {3: sum(losses[:3]) / 3, 6: sum(losses[3:6]) / 3, 7: losses[6]}
    assert values(lines(tmp_path), "loss") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("every", "place"), [(1, "same"), (2, "other")])
def test_a_resumed_run_goes_on_with_the_same_lines(every, place, dataset, tmp_path, tiny_sd1):
    """In its own folder, where later lines stand already, and in another one; nothing is doubled, nothing missing."""
    more = [f"--log_every_n_steps={every}", "--save_every_n_steps=1", "--save_state", "--max_train_steps=4", REPORT]
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "whole", *more)
    assert run("sd1", argv) == 0
    whole, text = lines(tmp_path / "whole"), (tmp_path / "whole" / PAGE).read_text(encoding="utf-8")
    for step in (1, 2):  # in an epoch, and at its end, where validation is still to come
        folder = tmp_path / ("whole" if place == "same" else f"from{step}")
        state = tmp_path / "whole" / f"{TOKEN}-step{step:08d}-state"
        assert run("sd1", [*argv, f"--output_dir={folder}", f"--resume={state}"]) == 0
        assert without_clock(lines(folder)) == without_clock(whole)
        assert "meta http-equiv" not in (folder / PAGE).read_text(encoding="utf-8")
        if place == "same":
            assert not list(folder.glob("*-1*"))
    assert len(page(tmp_path / "whole").all("svg")) == len(checked(text).all("svg"))


@pytest.mark.parametrize("state", [f"{TOKEN}-step00000002-state", f"{TOKEN}-state"])
def test_a_run_that_is_killed_after_its_last_state_is_reported_when_it_is_resumed(
    state, dataset, tmp_path, tiny_sd1, prompts, monkeypatch, capsys
):
    few_small_steps(monkeypatch)
    more = [*prompts, "--learning_report", "--save_state", "--save_every_n_steps=2", REPORT]
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", *more)
    assert run("sd1", argv) == 0
    folder, closing = tmp_path / "out", closing_words(capsys.readouterr().out)
    wanted = {path: path.read_bytes() for path in folder.glob(f"{TOKEN}*") if path.is_file()}
    noted, shown = lines(folder), page(folder)
    for path in wanted:
        if path.name in (RESULT, USAGE, f"{TOKEN}_report.json", f"{TOKEN}_report.png"):
            path.unlink()
    (folder / METRICS).write_bytes(b"".join(wanted[folder / METRICS].splitlines(keepends=True)[:-2]))
    assert "result" in noted[-2]
    (folder / PAGE).write_bytes(b"<html>" + wanted[folder / PAGE])
    assert run("sd1", [*argv, f"--resume={folder / state}"]) == 0
    assert {path for path in folder.glob(f"{TOKEN}*") if path.is_file()} == wanted.keys()
    for name in (f"{TOKEN}_report.json", f"{TOKEN}_report.png", USAGE):
        assert (folder / name).read_bytes() == wanted[folder / name], name
    assert without_clock(lines(folder)) == without_clock(noted)
    assert closing_words(capsys.readouterr().out) == closing
    again = page(folder)
    assert "meta http-equiv" not in (folder / PAGE).read_text(encoding="utf-8")
    assert [len(again.all(tag)) for tag in ("svg", "img", "td")] == [
        len(shown.all(tag)) for tag in ("svg", "img", "td")
    ]
    assert verdict_of(folder)["reason"][1:] in " ".join(again.text.split())


def closing_words(said: str) -> list[str]:
    """What is said at a run's end, without its time."""
    return [line for line in said.splitlines() if not re.match(r" *time\b", line)]


def test_the_report_of_an_earlier_run_is_kept_with_its_embedding(dataset, tmp_path, tiny_sd1, capsys):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, REPORT)
    assert run("sd1", argv) == 0
    before = {name: (tmp_path / name).read_bytes() for name in (PAGE, METRICS, USAGE, f"{TOKEN}.safetensors")}
    assert run("sd1", [*argv, "--seed=2"]) == 0
    for name, content in before.items():
        assert (tmp_path / name.replace(TOKEN, f"{TOKEN}-1", 1)).read_bytes() == content
        assert (tmp_path / name).read_bytes() != content or name == USAGE
    assert f"{PAGE} of an earlier run was kept: it is now {TOKEN}-1.html." in capsys.readouterr().err


def test_one_verdict_everywhere(dataset, tmp_path, tiny_sd1, monkeypatch):
    monkeypatch.setattr(learning_report, "_STEPS", 2)
    monkeypatch.setattr(learning_report, "PICTURES", 4)
    monkeypatch.setattr(learning_report, "_LOSS_SAMPLES", 8)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--learning_report", "--save_state_on_train_end", REPORT)
    outcome = train("sd1", argv, tmp_path)
    written = json.loads((tmp_path / f"{TOKEN}_report.json").read_text())
    noted = verdict_of(tmp_path)
    assert (noted["verdict"], noted["reason"]) == (written["verdict"], written["reason"])
    assert f"{written['verdict']}: {written['reason']}" in " ".join(outcome.out.split())
    shown = " ".join(page(tmp_path).text.split())
    assert written["verdict"] in shown
    assert written["reason"][1:] in shown
    last = outcome.out.rstrip().splitlines()[-8:]
    for place in (f"{TOKEN}.safetensors", PAGE, f"{TOKEN}_report.png", USAGE, f"--resume={tmp_path / TOKEN}-state"):
        assert any(line.endswith(place) for line in last), place
    assert len([image for image in page(tmp_path).all("img") if image.get("class") == "sheet"]) == 1


VERDICTS = [
    (["--learning_rate=50"], "TOO FAR"),
    (["--learning_rate=1e-7"], "HARDLY CHANGED"),
    ([], "UNCLEAR"),
]


@pytest.mark.parametrize(("flags", "word"), VERDICTS, ids=[word for _, word in VERDICTS])
def test_verdicts_of_runs(flags, word, dataset, tmp_path, tiny_sd1):
    outcome = train("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, REPORT, *flags), tmp_path)
    assert verdict_of(tmp_path)["verdict"] == word
    assert f"\n{word}: " in outcome.out
    warned = "--learning_rate=50 is very high for AdamW: a single step can move a coordinate by 50" in outcome.err
    assert warned == (word == "TOO FAR")
    assert ("At step 1 the norm of mychar is" in outcome.err) == (word == "TOO FAR")
    assert ("is very low for AdamW" in outcome.err) == (word == "HARDLY CHANGED")


def test_vectors_that_go_astray_are_said_without_a_report_too(dataset, tmp_path, tiny_sd1):
    outcome = train("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, "--learning_rate=50"), tmp_path)
    assert outcome.err.count("times that of a usual word") == 1
    assert "\nTOO FAR: " in outcome.out
    assert outcome.files == [f"{TOKEN}.safetensors"]


# ---- what may go wrong


def same_result(argv, tmp_path, name) -> bool:
    """Whether a run with a report that fails gives what one without gives."""
    assert run("sd1", [*argv, f"--output_dir={tmp_path / 'plain'}", "--no_report"]) == 0
    plain, other = (load_file(tmp_path / folder / f"{TOKEN}.safetensors")["emb_params"] for folder in ("plain", name))
    return torch.equal(plain, other)


def test_a_full_disk_is_said_once_and_ends_nothing(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "append", full)
    monkeypatch.setattr(run_report, "write_atomically", full)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "full", "--save_every_n_steps=1", "--max_train_steps=4")
    assert run("sd1", [*argv, REPORT]) == 0
    said = capsys.readouterr()
    assert said.err.count("No space left on device") == 1
    assert "The report of the run cannot be written; the training goes on." in said.err
    assert "UNCLEAR: " in said.out
    assert same_result(argv, tmp_path, "full")


def test_a_metrics_file_that_is_lost_is_said_once(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    """The system itself refuses, in the middle of the run; the page goes on with what there is."""
    begin = MetricsFile.begin.__func__

    def lost(cls, path, *args):
        begin(cls, path, *args)
        path.unlink()
        path.mkdir()
        return cls(path, args[0])

    monkeypatch.setattr(MetricsFile, "begin", classmethod(lost))
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "lost", "--max_train_steps=3", REPORT)
    assert run("sd1", argv) == 0
    assert capsys.readouterr().err.count("Is a directory") == 1


def test_a_page_that_cannot_be_drawn_ends_nothing(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    monkeypatch.setattr(HtmlReport, "page", lambda *_: 1 / 0)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "broken", "--save_every_n_steps=1", "--max_train_steps=3")
    assert run("sd1", [*argv, REPORT]) == 0
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1
    assert len(values(lines(tmp_path / "broken"), "loss")) >= 1
    assert same_result(argv, tmp_path, "broken")


def test_facts_that_cannot_be_gathered_end_nothing(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    monkeypatch.setattr(RunFacts, "gather", lambda *_: 1 / 0)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "none", "--save_every_n_steps=1")
    assert run("sd1", [*argv, REPORT]) == 0
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1
    assert same_result(argv, tmp_path, "none")


def test_a_run_that_ends_early_says_so_on_its_page(dataset, tmp_path, tiny_sd1, monkeypatch):
    original, calls = DenoisingTask.losses, []

    def losses(task, batch, **details):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(task, batch, **details)

    monkeypatch.setattr(DenoisingTask, "losses", losses)
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, "--max_train_steps=5", REPORT)) == 130
    found = page(tmp_path)
    assert "ENDED EARLY" in found.text
    assert "ended at step 2 of 5" in found.text
    assert not [meta for meta in found.all("meta") if meta.get("http-equiv")]
    assert (tmp_path / f"{TOKEN}-step00000002.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_is_stopped_while_it_is_judged_leaves_a_page_at_rest(dataset, tmp_path, tiny_sd1, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_report.LearningMeasure, "report", interrupted)
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, "--learning_report", REPORT)) == 130
    found = page(tmp_path)
    assert "The run ended at step 2 of 2, before the result was judged." in found.text
    assert not [meta for meta in found.all("meta") if meta.get("http-equiv")]
    assert (tmp_path / f"{TOKEN}.safetensors").is_file()


def test_the_metrics_are_read_once_where_images_were_drawn(dataset, tmp_path, tiny_sd1, prompts, monkeypatch):
    read, after_samples, seen = MetricsFile.lines, run_report.RunReport.after_samples, []
    monkeypatch.setattr(MetricsFile, "lines", lambda file: seen.append(1) or read(file))

    def counting(report, *told):
        before = len(seen)
        after_samples(report, *told)
        assert len(seen) == before + 1

    monkeypatch.setattr(run_report.RunReport, "after_samples", counting)
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path / "out", REPORT, *prompts)) == 0
    assert seen


def test_what_a_run_is_stands_before_its_first_step(dataset, tmp_path, tiny_sd1):
    """A resumed one says how long it will take, by what the metrics say of its speed."""
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, REPORT, "--num_vectors_per_token=2", "--save_state")
    argv += ["--max_train_steps=4", "--save_every_n_steps=2"]
    said = train("sd1", argv, tmp_path).err
    block = said[said.index("This run:") : said.index("steps: ")]
    waits = ("Loading PyTorch", "Loading the text encoder.", "Loading the VAE.", "Latents: ", "Loading the U-Net.")
    places = [said.index(wait) for wait in (*waits, "This run:")]
    assert places == sorted(places)
    rows = dict(re.findall(r"^  (\w+(?: \w+)*)  +(.+)$", block, re.MULTILINE))
    assert rows["token"] == f'{TOKEN}, 2 vectors, from the word "girl"'
    assert re.match(r"the CPU with \d+ threads? in float32, with PyTorch \d", rows["device"])
    assert rows["plan"].startswith("4 steps in 2 epochs of 2 batches")
    assert "AdamW" in rows["optimizer"]
    assert rows["embedding"] == str(tmp_path / f"{TOKEN}.safetensors")
    assert rows["report"].startswith(str(tmp_path / PAGE))
    assert "time" not in rows
    resumed = train("sd1", [*argv, f"--resume={tmp_path / TOKEN}-step00000002-state"], tmp_path).err
    assert re.search(r"^  time +about \d+ s, as fast as before$", resumed, re.MULTILINE)


def test_a_folder_of_the_user_s_own_in_the_place_is_kept(dataset, tmp_path, tiny_sd1):
    (tmp_path / PAGE).write_text("mine")
    (tmp_path / METRICS).write_text("mine too")
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, REPORT)) == 0
    assert (tmp_path / f"{TOKEN}-1.html").read_text() == "mine"
    assert (tmp_path / f"{TOKEN}-1_metrics.jsonl").read_text() == "mine too"


def test_a_caption_with_a_script_is_text(tmp_path, tiny_sd1):
    data = write_dataset(tmp_path, caption=f"{TOKEN}, <script>alert(1)</script> & more", count=2)
    assert run("sd1", arguments("sd1", tiny_sd1, data, tmp_path / "out", REPORT)) == 0
    assert page(tmp_path / "out").text.count("<script>alert(1)</script> & more") == 2


def test_no_secret_and_no_other_path_s_content_is_written(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path, "--wandb_api_key=very-hidden", REPORT)
    assert run("sd1", argv) == 0
    for name in (PAGE, METRICS, USAGE):
        assert "very-hidden" not in (tmp_path / name).read_text(encoding="utf-8")
