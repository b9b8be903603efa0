"""Logs: what a run writes on which step, where, and that no secret or path is in it."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from departures import departure
from golden_data import golden_cases
from option_effects import shows, train
from runs import TOKEN, arguments, write_dataset

from library.options.options import Options
from library.output import trackers

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


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
    assert recorder.calls == (on_one_axis(wanted) if departure("run_schedule", case) else wanted)
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
    assert found.Tags()["scalars"] == ["loss", "lr", "loss/epoch", "loss/validation"]
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
    assert said["log"] == [(["loss", "lr"], 1), (["loss/epoch"], 1), (["loss/validation"], 1)]
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


def test_a_missing_package_is_named(dataset, tmp_path, tiny_sd1, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", "--log_with=wandb")
    assert "Logging to wandb needs its package: pip install wandb" in train("sd1", argv, tmp_path, code=1).said


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
