"""Logs: what a run writes on which step, where, and that no secret or path is in it."""

import json
import random
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from departures import departure
from golden_data import golden_cases
from option_effects import shows, train
from PIL import Image
from runs import TOKEN, arguments, write_dataset

from library.options.options import Options
from library.output import trackers

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ADDED = re.compile(r"vectors/.*|loss/(smoothed|\d+-\d+)|gradient_norm|steps_per_second|memory_gib|verdict")
REPORT = "--no_report=false"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), dataset="validation_split = 0.5", count=4)


class Recorder:
    """A tracker that keeps what it is told."""

    name = "tensorboard"

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        self.calls, self.pictures, self.config, self.finished = [], [], None, False

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        self.calls.append([sorted(values), step])

    def log_images(self, values, step, **_):
        self.pictures += [(name, images.shape, step) for name, images in values.items()]

    def finish(self):
        self.finished = True


@pytest.fixture
def recorders(monkeypatch):
    """Every tracker that a run makes, in place of TensorBoard's."""
    made = []

    def make(*args, **kwargs):
        made.append(Recorder(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(trackers, "TensorBoardTracker", make)
    return made


def reference(calls):
    """The calls without what sd-scripts does not log, which comes in calls of its own."""
    return [call for call in calls if not call[0] or not all(map(ADDED.fullmatch, call[0]))]


def on_one_axis(calls):
    """The golden's calls as they are with optimizer steps throughout: one a step, and none that hold nothing."""
    kept, step = [], 0
    for names, at in calls:
        if names == ["loss/epoch"]:
            kept.append([names, step])
        elif names and at > step:
            step = at
            kept.append([sorted(names), at])
    return kept


@pytest.mark.parametrize("case", golden_cases("run_schedule"))
def test_golden_log_calls(case, tmp_path, tiny_sd1, recorders):
    if any(flag.startswith("--optimizer_type=Prodigy") for flag in case["argv"]):
        pytest.importorskip("prodigyopt")
    data = write_dataset(tmp_path, count=case["images"], subset=f"num_repeats = {case['num_repeats']}")
    data.write_text(data.read_text().replace("batch_size = 2", f"batch_size = {case['batch_size']}"))
    # When images are drawn and files are saved is another test's business.
    flags = [flag for flag in case["argv"] if not flag.startswith(("--sample", "--save"))]
    argv = arguments("sd1", tiny_sd1, data, tmp_path / "out", f"--logging_dir={tmp_path / 'logs'}", *flags)
    train("sd1", argv, tmp_path / "out")
    (recorder,) = recorders
    wanted = case["log_calls"]
    assert reference(recorder.calls) == (on_one_axis(wanted) if departure("run_schedule", case) else wanted)
    assert recorder.finished


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@shows("logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_config")
def test_tensorboard(dataset, tmp_path, tiny_sd1):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w 64 --h 64 --s 1\n")
    logs = tmp_path / "logs"
    flags = [f"--logging_dir={logs}", "--log_prefix=run-", "--log_tracker_name=words", "--log_config"]
    flags += [
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=2",
        "--max_train_steps=2",
        "--wandb_api_key=hidden",
    ]
    outcome = train("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path / "out", *flags), tmp_path / "out")
    (run,) = logs.iterdir()
    assert run.name.startswith("run-20")
    found = events(run / "words")
    names = [name for name in found.Tags()["scalars"] if not ADDED.fullmatch(name)]
    assert names == ["loss", "lr", "loss/epoch", "loss/validation"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(outcome.losses, start=1)
    ]
    assert [event.value for event in found.Scalars("lr")] == pytest.approx(outcome.rates)
    assert found.Scalars("loss/epoch")[0].value == pytest.approx(outcome.losses[0])
    assert [event.step for event in found.Images("sample_0")] == [2]
    (config,) = run.rglob("hparams.yml")
    text = config.read_text()
    assert "learning_rate: 0.01" in text
    for private in ("hidden", str(tmp_path), str(tiny_sd1), "output_dir", "logging_dir", "pretrained"):
        assert private not in text
    assert "--wandb_api_key has no effect without --log_with wandb" in outcome.said


@shows("wandb_run_name", "wandb_api_key", "log_tracker_config")
def test_wandb(dataset, tmp_path, tiny_sd1, monkeypatch):
    """Through accelerate's own tracker, with a stand-in for the package: its servers are out of reach."""
    said = {"login": [], "init": [], "log": [], "finish": 0}
    wandb = ModuleType("wandb")
    wandb.__spec__ = SimpleNamespace(name="wandb")
    run = SimpleNamespace(
        log=lambda values, step, **_: said["log"].append((sorted(values), step)),
        finish=lambda: said.update(finish=said["finish"] + 1),
    )
    wandb.login = lambda key: said["login"].append(key)
    wandb.init = lambda **given: said["init"].append(given) or run
    wandb.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    flags = [
        "--log_with=wandb",
        "--wandb_run_name=first",
        "--wandb_api_key=hidden",
        f"--logging_dir={tmp_path / 'logs'}",
    ]
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", "--max_train_steps=1", *flags)
    assert "hidden" not in train("sd1", argv, tmp_path / "out").said
    assert said["login"] == ["hidden"]
    assert said["init"] == [{"project": "textual_inversion", "name": "first"}]
    assert reference(said["log"]) == [(["loss", "lr"], 1), (["loss/epoch"], 1), (["loss/validation"], 1)]
    assert said["finish"] == 1
    settings = tmp_path / "trackers.toml"
    settings.write_text("[wandb]\ntags = ['a']\n")
    outcome = train("sd1", [*argv, f"--log_tracker_config={settings}"], tmp_path / "out")
    assert said["init"][1] == {"project": "textual_inversion", "tags": ["a"]}
    assert "--wandb_run_name is not used" in outcome.said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--log_with=tensorboard"], "--log_with tensorboard needs --logging_dir"),
        (["--log_with=all"], "needs"),
        (
            ["--logging_dir=logs", "--log_tracker_config=nowhere.toml"],
            "--log_tracker_config nowhere.toml does not exist",
        ),
        (["--logging_dir=logs", "--log_tracker_config={broken}"], "is not valid TOML"),
        (["--logging_dir=logs", "--log_tracker_config={strange}"], "holds project; it may hold the tables"),
    ],
)
def test_mistakes(flags, sentence, dataset, tmp_path, tiny_sd1, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"broken": tmp_path / "broken.toml", "strange": tmp_path / "strange.toml"}
    files["broken"].write_text("[wandb\n")
    files["strange"].write_text("project = 'x'\n")
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", *(flag.format(**files) for flag in flags))
    assert sentence in train("sd1", argv, tmp_path / "out", code=1).said
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(name, dataset, tmp_path, tiny_sd1, monkeypatch):
    find_spec = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda each: None if each == name else find_spec(each))
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", "--log_with=all", "--logging_dir=logs")
    assert f"Logging to {name} needs its package: pip install {name}." in train("sd1", argv, tmp_path, code=1).said


def test_a_tracker_that_cannot_begin_is_a_sentence(dataset, tmp_path, tiny_sd1, recorders, monkeypatch):
    def refused(recorder):
        raise RuntimeError("No API key configured.\nTraceback of its own")

    monkeypatch.setattr(Recorder, "start", refused)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--logging_dir={tmp_path / 'logs'}")
    said = train("sd1", argv, tmp_path / "out", code=1).said
    assert "error: Logging to tensorboard cannot begin: No API key configured. Put that right" in said


def test_a_tracker_changes_nothing_that_is_random(dataset, tmp_path, tiny_sd1, recorders, monkeypatch):
    states = []
    monkeypatch.setattr(Recorder, "start", lambda _: random.seed(7) or states.append(random.getstate()))
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--logging_dir={tmp_path / 'logs'}")
    train("sd1", argv, tmp_path / "out")
    assert random.getstate() != states[0]


# ---- what comes besides sd-scripts' values


@pytest.fixture
def watched_run(dataset, tmp_path, tiny_sd1):
    """The command line of a run of four steps with everything to look at."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    flags = [f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--sample_at_first", "--max_train_steps=4"]
    flags += ["--num_vectors_per_token=2", "--save_every_n_steps=2", REPORT]
    return arguments("sd1", tiny_sd1, dataset, tmp_path / "out", *flags)


def noted(folder: Path) -> list[dict]:
    """The lines of the metrics file of a run."""
    text = (folder / f"{TOKEN}_metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[1:]]


def wanted_values(folder: Path) -> dict[str, dict[int, float | str]]:
    """What a log must hold besides sd-scripts' values, by name and step: what the metrics file says."""
    wanted: dict[str, dict[int, float | str]] = {}
    for line in noted(folder):
        for name, value in line.items():
            if name.startswith(("moved/", "cosine/", "norm/")):
                wanted.setdefault(f"vectors/{name}", {})[line["step"]] = value
            elif re.fullmatch(r"gradient_norm|memory_gib|steps_per_second|loss/\d.*", name):
                wanted.setdefault(name, {})[line["step"]] = value
        for label, words in line.get("nearest", {}).items():
            text = ", ".join(f"{word} ({cosine:.2f})" for word, cosine in words)
            wanted.setdefault(f"vectors/nearest/{label}", {})[line["step"]] = text
        if "verdict" in line:
            wanted["verdict"] = {line["step"]: f"{line['verdict']}: {line['reason']}"}
    assert {"vectors/norm/mychar", "vectors/norm/mychar1", "vectors/nearest/mychar", "verdict"} <= wanted.keys()
    assert len(wanted["vectors/cosine/mychar1"]) == 4
    return wanted


def test_tensorboard_gets_all_that_is_measured(watched_run, tmp_path):
    train("sd1", [*watched_run, f"--logging_dir={tmp_path / 'logs'}"], tmp_path / "out")
    (run,) = (tmp_path / "logs").iterdir()
    found = events(run / trackers.PROJECT)
    for name, by_step in wanted_values(tmp_path / "out").items():
        if isinstance(next(iter(by_step.values())), str):
            texts = found.Tensors(f"{name}/text_summary")
            # Words are noted once more where a step's file is the result, too.
            got = {event.step: event.tensor_proto.string_val[0].decode() for event in texts}
            assert got == by_step, name
        else:
            got = {event.step: event.value for event in found.Scalars(name)}
            assert got == pytest.approx(by_step, rel=1e-5), name
    losses = [event.value for event in found.Scalars("loss")]
    smooth = [event.value for event in found.Scalars("loss/smoothed")]
    keep, mean, weight, wanted = 1 - 2 / 5, 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        wanted.append(mean / weight)
    assert smooth == pytest.approx(wanted, rel=1e-5)
    for name in ("sample_0", "sample_1", "samples"):
        assert [event.step for event in found.Images(name)] == [0, 2, 4]
    grid = found.Images("samples")[-1]
    assert (grid.width, grid.height) == Image.open(tmp_path / "out" / "sample" / f"{TOKEN}_grid.png").size


def wandb_records(file: Path):
    """The records of a run's file, which is a log in LevelDB's form: parts of records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a part
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + length > len(content):  # not written to its end yet
            return
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def whole_run(file: Path) -> list:
    """The records of a run that has ended: wandb's own process writes them, and on a busy machine it lags behind."""
    for _ in range(600):
        records = list(wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.2)
    raise AssertionError(f"no end in {file}: {[record.WhichOneof('record_type') for record in records]}")


def test_wandb_offline(watched_run, tmp_path, monkeypatch):
    """The package itself, without its servers; what it wrote is read back."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))  # restored afterwards: --logging_dir sets it
    flags = ["--log_with=all", f"--logging_dir={tmp_path / 'logs'}", "--wandb_run_name=first", "--log_config"]
    outcome = train("sd1", [*watched_run, *flags], tmp_path / "out")
    (file,) = (tmp_path / "logs").rglob("offline-run-*/*.wandb")
    rows: dict[int, dict] = {}
    config, project, name = {}, None, None
    for record in whole_run(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(row["_step"], {}).update(row)
        elif kind == "run":
            project, name = record.run.project, record.run.display_name
        if kind in ("run", "config"):
            update = record.config.update if kind == "config" else record.run.config.update
            config |= {item.key: json.loads(item.value_json) for item in update if item.key}
    assert (project, name) == (trackers.PROJECT, "first")
    assert config["learning_rate"] == 0.01
    assert "output_dir" not in config
    assert {step: row["loss"] for step, row in rows.items() if "loss" in row} == pytest.approx(
        dict(enumerate(outcome.losses, start=1))
    )
    for name, by_step in wanted_values(tmp_path / "out").items():
        got = {step: row[name] for step, row in rows.items() if name in row}
        same = got == by_step if isinstance(next(iter(by_step.values())), str) else None
        assert same or got == pytest.approx(by_step, rel=1e-5), name
    assert set(rows) == {0, 1, 2, 3, 4}
    for step in (0, 2, 4):
        for name in ("sample_0", "sample_1", "samples"):
            assert rows[step][f"{name}/_type"] == "images/separated"
            (picture,) = rows[step][f"{name}/filenames"]
            assert Image.open(file.parent / "files" / picture).size[0] >= 64
    assert (tmp_path / "out" / f"{TOKEN}.safetensors").is_file()


def test_training_is_the_same_to_the_bit_with_everything_that_watches(watched_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logs = [f"--logging_dir={tmp_path / 'logs'}", *(["--log_with=all"] if find_spec("wandb") else [])]
    plain = [flag for flag in watched_run if not flag.startswith("--sample")]
    bits = []
    for name, argv in (("all", [*watched_run, *logs]), ("none", [*plain, "--no_report"])):
        outcome = train("sd1", [*argv, f"--output_dir={tmp_path / name}"], tmp_path / name)
        files = sorted(outcome.folder.glob("*.safetensors"))
        tensors = [[tensor.numpy().tobytes() for tensor in outcome.tensors(file.name).values()] for file in files]
        rows = [rows[0].numpy().tobytes() for rows in outcome.rows]
        bits.append([rows, outcome.losses, outcome.rates, [file.name for file in files], tensors, random.getstate()])
    assert bits[0] == bits[1]
    assert len(bits[0][3]) == 3


@pytest.mark.parametrize("name", ["log_prefix", "log_tracker_name", "log_tracker_config"])
def test_settings_without_a_log_are_said(name, tmp_path, tiny_sd1, dataset):
    said = train("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path, f"--{name}=x"), tmp_path).said
    assert f"--{name} has no effect without --logging_dir or --log_with." in said


def test_a_run_that_is_stopped_closes_its_log(dataset, tmp_path, tiny_sd1, recorders, monkeypatch):
    monkeypatch.setattr(trackers.RunLog, "after_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--logging_dir={tmp_path / 'logs'}")
    train("sd1", argv, tmp_path / "out", code=None)
    assert recorders[0].finished


def test_a_log_that_fails_costs_no_training(dataset, tmp_path, tiny_sd1, recorders, monkeypatch):
    def full(recorder, values, step):
        recorder.calls.append(step)
        if step == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "log", full)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", "--max_train_steps=4")
    outcome = train("sd1", [*argv, f"--logging_dir={tmp_path / 'logs'}"], tmp_path / "out")
    assert outcome.said.count("The log of tensorboard ends here; the training goes on. OSError: [Errno 28]") == 1
    assert recorders[0].calls[-1] == 2
    assert outcome.files == [f"{TOKEN}.safetensors"]


def test_loggable_options_are_plain_values():
    values = trackers.loggable(Options())
    json.dumps(values)
    assert values["max_train_steps"] == 1600
    assert all(isinstance(value, bool | int | float | str) for value in values.values())
