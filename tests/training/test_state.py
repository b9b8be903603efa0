"""--save_state and --resume: a run that was interrupted ends in the very bits of one that was not."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from option_effects import shows
from PIL import Image
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  (a fixture)
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import model_of
from torch.optim.lr_scheduler import LambdaLR

from library import run as run_module
from library.options.options import OptimizerOptions, Options, TokenOptions
from library.output.results import Results
from library.output.saving import Saving
from library.support.errors import UserError
from library.training import state as training_state
from library.training.denoising import DenoisingTask
from library.training.optimizer_step import Learner
from library.training.save_schedule import CheckpointNames
from library.training.state import FILE, TrainingState, random_states, set_random_states
from tests.limits import outcome_in_locked

RESULT = f"{TOKEN}.safetensors"
STATES = {step: f"{TOKEN}-step{step:08d}-state" for step in range(1, 9)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five photographs in batches of two: an epoch is three batches, the last of one image. Much is random."""
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        count=5,
        subset="shuffle_caption = true\ncaption_tag_dropout_rate = 0.3\nflip_aug = true\ntoken_warmup_step = 0.8",
        caption=f"{TOKEN}, red, green, blue, small",
    )


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory, tiny_sd1):
    """The folder of an undisturbed run of seven steps, made once, with what each of them left. Do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    more = ["--num_vectors_per_token=2", "--max_train_steps=7", "--save_every_n_steps=1", "--save_state"]
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, folder, *more)) == 0
    return folder


@pytest.fixture
def command(dataset, tmp_path, tiny_sd1):
    def build(folder: str, *more: str, family: str = "sd1", model=tiny_sd1) -> list[str]:
        given = arguments(family, model, dataset, tmp_path / folder, "--max_train_steps=7", *more)
        return [*given, "--num_vectors_per_token=2"]

    return build


def tensors(folder, name: str = RESULT) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key])


@shows("save_state", "resume")
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_resumed_run_ends_in_the_same_bits(family, command, tmp_path, request, capsys):
    model = model_of(family, request)
    more = ["--save_every_n_steps=1", "--save_state", "--noise_offset=0.1", "--lr_scheduler=cosine"]
    assert run(family, command("whole", *more, family=family, model=model)) == 0
    whole, said = tmp_path / "whole", capsys.readouterr().out
    # In the middle of an epoch, at its end, and shortly before the end of the run.
    for step in (1, 3, 6):
        folder = tmp_path / f"from {step}"
        argv = command(folder.name, *more, f"--resume={whole / STATES[step]}", family=family, model=model)
        assert run(family, argv) == 0
        spoken = capsys.readouterr()
        assert f"Resuming after step {step} of 7" in spoken.err
        assert_same(tensors(folder), tensors(whole))
        later = {f"{TOKEN}-step{number:08d}.safetensors" for number in range(step + 1, 8)}
        assert {path.name for path in folder.iterdir() if path.is_file()} == {RESULT, *later}
        for name in later:
            assert_same(tensors(folder, name), tensors(whole, name))
        # How far the vectors moved is told from the very beginning.
        assert table(spoken.out) == table(said)
    rows = tensors(whole, f"{TOKEN}-step00000006.safetensors")
    assert any(not torch.equal(rows[key], value) for key, value in tensors(whole).items())


def table(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(TOKEN)]


# Those that keep something of their own: moments in 8 bits, averages, estimates, steps.
OPTIMIZERS = {
    "AdamW8bit": [],
    "Lion": [],
    "Adafactor": [],
    "Prodigy": ["--learning_rate=1"],
    "DAdaptAdam": ["--learning_rate=1"],
    "AdamWScheduleFree": ["--optimizer_args", "warmup_steps=2"],
    "SGDNesterov": ["--lr_scheduler=reduce_lr_on_plateau", "--lr_scheduler_args", "patience=0"],
    "AdamW": ["--learning_rate=5e-2:2,1e-2:4,1e-3", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2"],
    "PagedAdamW32bit": ["--lr_scheduler_type=CyclicLR", "--lr_scheduler_args", "base_lr=1e-3", "max_lr=1e-2"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_an_optimizer_and_a_schedule_keep(name, command, tmp_path, trainers):  # noqa: F811
    more = ["--save_state", f"--optimizer_type={name}", *OPTIMIZERS[name]]
    assert run("sd1", command("whole", "--save_every_n_steps=4", *more)) == 0
    assert run("sd1", command("rest", *more, f"--resume={tmp_path / 'whole' / STATES[4]}")) == 0
    assert_same(tensors(tmp_path / "rest"), tensors(tmp_path / "whole"))
    whole, rest = trainers
    assert whole.setup.learner.rates() == rest.setup.learner.rates()
    assert not torch.equal(whole.setup.starts[0], tensors(tmp_path / "whole")["emb_params"])


def test_stopped_and_resumed_again_and_again(command, tmp_path, monkeypatch):
    """Each time in a step after the last state; the average that is saved never gets into what is trained."""
    more = ["--optimizer_type=AdamWScheduleFree", *OPTIMIZERS["AdamWScheduleFree"], "--save_state_on_train_end"]
    assert run("sd1", command("whole", *more)) == 0
    update = Learner._update_rows
    cut = command("cut", *more, "--save_every_n_steps=1", "--save_state")
    for number, step in enumerate((3, 4, 6)):  # at an epoch's end, at a beginning, at an end again

        def interrupted(learner, *given, last=step):
            update(learner, *given)
            if learner.progress.step == last - 1:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "_update_rows", interrupted)
            assert run("sd1", [*cut, "--resume=latest"] if number else cut) == 143
        assert (tmp_path / "cut" / STATES[step - 1]).is_dir()
        assert not (tmp_path / "cut" / STATES[step]).exists()
    assert run("sd1", [*cut, "--resume=latest"]) == 0
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    cut, whole = (TrainingState.read(tmp_path / name / f"{TOKEN}-state") for name in ("cut", "whole"))
    assert_equal(cut.learner, whole.learner)
    averaged = tensors(tmp_path / "whole")["emb_params"]
    assert not torch.equal(whole.learner["rows"][0], averaged)


def assert_equal(one: object, other: object) -> None:
    """Tensors within dictionaries and lists are the same bits, and all else is equal."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def test_accumulation_epochs_and_norms(command, tmp_path, capsys):
    """Steps of two batches and of one; the states are those of epochs."""
    more = ["--gradient_accumulation_steps=2", "--max_train_epochs=4", "--save_every_n_epochs=1"]
    more += ["--preserve_embedding_norm", "--normalize_sample_gradients"]
    assert run("sd1", command("whole", *more, "--save_state", "--save_last_n_epochs_state=2")) == 0
    whole = tmp_path / "whole"
    assert sorted(path.name for path in whole.glob("*-state")) == [f"{TOKEN}-{n:06d}-state" for n in (2, 3)] + [
        f"{TOKEN}-state"
    ]
    assert run("sd1", command("rest", *more, f"--resume={whole / f'{TOKEN}-000002-state'}")) == 0
    assert "Resuming after step 4 of 8" in capsys.readouterr().err
    assert_same(tensors(tmp_path / "rest"), tensors(whole))


@shows("save_last_n_steps_state", "save_last_n_epochs_state")
def test_which_states_stay(command, tmp_path):
    more = ["--save_every_n_steps=1", "--save_last_n_steps_state=2", "--save_every_n_epochs=1", "--save_state"]
    assert run("sd1", command("out", *more, "--save_last_n_epochs_state=1")) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*-state"))
    assert found == sorted([f"{TOKEN}-000002-state", *(STATES[step] for step in (5, 6, 7)), f"{TOKEN}-state"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 7 + 2 + 1


def test_what_is_due_at_the_end_of_an_epoch_is_not_forgotten(command, tmp_path, capsys):
    """The state of step 3 is saved before the end of the epoch is dealt with, that of the epoch after it."""
    more = ["--save_every_n_steps=3", "--save_every_n_epochs=1", "--save_state"]
    assert run("sd1", command("whole", *more)) == 0
    for state, wanted in ((STATES[3], True), (f"{TOKEN}-000001-state", False)):
        folder = tmp_path / state
        assert run("sd1", command(folder.name, *more, f"--resume={tmp_path / 'whole' / state}")) == 0
        assert (folder / f"{TOKEN}-000001.safetensors").exists() == wanted
        assert (folder / f"{TOKEN}-000002.safetensors").exists()
        assert_same(tensors(folder), tensors(tmp_path / "whole"))


@shows("save_state_on_train_end")
def test_a_finished_run_can_be_made_longer(command, tmp_path, capsys):
    assert run("sd1", command("short", "--max_train_steps=4", "--save_state_on_train_end")) == 0
    assert sorted(path.name for path in (tmp_path / "short").iterdir()) == sorted([RESULT, f"{TOKEN}-state"])
    state = tmp_path / "short" / f"{TOKEN}-state"
    assert sorted(path.name for path in state.iterdir()) == ["README.txt", FILE]
    assert sum(path.stat().st_size for path in state.iterdir()) < 100_000
    assert run("sd1", command("again", "--max_train_steps=3", f"--resume={state}")) == 1
    assert "the state was saved at step 4, and the run has 3 steps in all" in capsys.readouterr().err
    assert run("sd1", command("longer", f"--resume={state}")) == 0
    # The token warm-up is a share of the whole run, so captions differ; all else is the same run.
    assert tensors(tmp_path / "longer")["emb_params"].isfinite().all()
    assert not torch.equal(tensors(tmp_path / "longer")["emb_params"], tensors(tmp_path / "short")["emb_params"])


def test_a_seed_that_was_drawn_is_in_the_state(command, tmp_path):
    unseeded = command("whole", "--save_every_n_steps=4", "--save_state")
    unseeded.remove("--seed=1")
    assert run("sd1", unseeded) == 0
    rest = command("rest", f"--resume={tmp_path / 'whole' / STATES[4]}")
    rest.remove("--seed=1")
    assert run("sd1", rest) == 0
    assert_same(tensors(tmp_path / "rest"), tensors(tmp_path / "whole"))


def test_the_scaler_of_fp16_goes_on_too(command, tmp_path, trainers, monkeypatch):  # noqa: F811
    """fp16 needs a GPU; its gradient scaler works on the CPU as well."""
    begin = run_module.train_and_save

    def with_scaler(job):
        job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return begin(job)

    monkeypatch.setattr(run_module, "train_and_save", with_scaler)
    assert run("sd1", command("whole", "--save_every_n_steps=4", "--save_state")) == 0
    assert run("sd1", command("rest", f"--resume={tmp_path / 'whole' / STATES[4]}")) == 0
    assert_same(tensors(tmp_path / "rest"), tensors(tmp_path / "whole"))
    state = TrainingState.read(tmp_path / "whole" / STATES[4])
    assert state.learner["scaler"]["scale"] == 16.0


def test_an_interrupted_run_goes_on_from_its_last_state(whole, command, tmp_path, monkeypatch, capsys):
    save = Saving.save

    def interrupted(saving, progress, name):
        if progress.step == 4 and "step00000004" in name and not (tmp_path / "cut" / name).exists():
            (tmp_path / "cut" / name).touch()
            raise KeyboardInterrupt
        return save(saving, progress, name)

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "save", interrupted)
        assert run("sd1", command("cut", "--save_every_n_steps=2", "--save_state")) == 130
    assert "The vectors of step 4 are kept in" in capsys.readouterr().err
    assert run("sd1", command("cut", f"--resume={tmp_path / 'cut' / STATES[2]}")) == 0
    assert_same(tensors(tmp_path / "cut"), tensors(whole))


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory, tiny_sd1):
    """The folder of a short run with a state at its end, made once. Do not write into it."""
    folder = tmp_path_factory.mktemp("first")
    more = ["--num_vectors_per_token=2", "--max_train_steps=2", "--save_state"]
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, folder, *more)) == 0
    return folder


@pytest.fixture
def state(first, tmp_path):
    """The state of a short run, each test's own."""
    shutil.copytree(first, tmp_path / "first")
    return tmp_path / "first" / f"{TOKEN}-state"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--token_string=other"], "--token_string was mychar when the state of --resume was saved, and is other"),
        (["--num_vectors_per_token=3"], "--num_vectors_per_token was 2"),
        (["--optimizer_type=SGD"], "The optimizer was torch.optim.adamw.AdamW() when"),
        (["--optimizer_args", "betas=0.5,0.9"], "and is torch.optim.adamw.AdamW(betas=(0.5, 0.9))"),
    ],
)
def test_what_must_be_as_it_was(more, sentence, state, command, trainers, capsys):  # noqa: F811
    trainers.clear()
    assert run("sd1", [*command("out", f"--resume={state}"), *more]) == 1
    assert sentence in capsys.readouterr().err
    assert trainers == []


def test_what_makes_it_another_run_is_said(state, command, capsys):
    assert run("sd1", command("out", f"--resume={state}", "--seed=2", "--noise_offset=0.1", "--max_grad_norm=0.5")) == 0
    said = capsys.readouterr().err
    assert "will not reproduce the original run exactly" in said
    assert (
        "--max_grad_norm was 1.0 in the saved state and is now 0.5; --noise_offset was not given in the saved state"
        in said
    )
    assert "--seed was 1 and is 2." in said
    assert run("sd1", command("more", f"--resume={state}", "--optimizer_type=adamw", "--save_every_n_steps=5")) == 0
    assert "will not reproduce the original" not in capsys.readouterr().err


@pytest.mark.parametrize("cached", ["--cache_latents_to_disk", "--cache_latents", "--cache_latents=false"])
def test_a_moved_folder_changes_nothing_and_an_edited_image_is_said(cached, command, dataset, tmp_path, capsys):
    def moved(name):
        shutil.copytree(dataset.parent / "images", tmp_path / name / "images")
        file = tmp_path / name / "dataset.toml"
        file.write_text(dataset.read_text().replace(dataset.parent.as_posix(), file.parent.as_posix()))
        return f"--dataset_config={file}"

    whole = [cached, "--save_state", "--save_every_n_steps=1", "--max_train_steps=2"]
    assert run("sd1", command("whole", *whole, moved("here"))) == 0
    state = f"--resume={tmp_path / 'whole' / STATES[1]}"
    there = moved("there")
    for file in (tmp_path / "there" / "images").glob("*.npz"):
        file.unlink()
    assert run("sd1", command("rest", cached, "--max_train_steps=2", there, state)) == 0
    assert "exactly" not in capsys.readouterr().err
    assert_same(tensors(tmp_path / "rest"), tensors(tmp_path / "whole"))
    edited = min((tmp_path / "there" / "images").glob("*.png"))
    with Image.open(edited) as picture:
        picture.rotate(180).save(edited)
    whole = (tmp_path / "whole" / RESULT).read_bytes()
    assert run("sd1", command("whole", cached, "--max_train_steps=2", there, state)) == 0
    assert "will not reproduce the original run exactly" in capsys.readouterr().err
    # It is another run then, and replaces nothing.
    assert (tmp_path / "whole" / f"{TOKEN}-1.safetensors").read_bytes() == whole


def test_other_images_and_another_length_are_said(command, dataset, tmp_path, capsys):
    more = ["--save_state_on_train_end", "--lr_scheduler=cosine"]
    assert run("sd1", command("first", *more, "--max_train_steps=2")) == 0
    file = tmp_path / "other.toml"
    file.write_text(dataset.read_text().replace("flip_aug = true", "flip_aug = false"))
    state = tmp_path / "first" / f"{TOKEN}-state"
    capsys.readouterr()
    assert run("sd1", command("out", *more, f"--resume={state}", f"--dataset_config={file}")) == 0
    said = capsys.readouterr().err
    assert "the images, their captions or their settings are not the same; the schedule was over 2 steps and is" in said


def test_what_the_vectors_began_with_is_remembered(command, tmp_path):
    """The command of the first run goes on, and so does one that does not say it again."""
    assert run("sd1", command("word", "--max_train_steps=1")) == 0
    begun = [
        a for a in command("first", f"--weights={tmp_path / 'word' / RESULT}", "--save_state") if "--init_word" not in a
    ]
    assert run("sd1", [*begun, "--max_train_steps=2"]) == 0
    state = f"--resume={tmp_path / 'first' / f'{TOKEN}-state'}"
    assert run("sd1", [*begun, state, f"--output_dir={tmp_path / 'a'}"]) == 0
    assert run("sd1", [*(a for a in begun if "--weights" not in a), state, f"--output_dir={tmp_path / 'b'}"]) == 0
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    with safe_open(tmp_path / "b" / RESULT, "pt") as file:
        assert "ti.init_word" not in file.metadata()


class WithFunction(LambdaLR):
    """A schedule whose state holds a function."""

    def __init__(self, optimizer):
        self.curve = lambda step: 1.0
        super().__init__(optimizer, lambda step: 1.0)


class WithArray(LambdaLR):
    """A schedule whose state could be written, but not be read safely."""

    def __init__(self, optimizer):
        self.curve = np.ones(3)
        super().__init__(optimizer, lambda step: 1.0)


@pytest.mark.parametrize("kind", ["WithFunction", "WithArray"])
def test_a_schedule_that_no_state_can_hold_is_found_at_the_start(kind, command, tmp_path, capsys):
    more = [f"--lr_scheduler_type={__name__}.{kind}", "--max_train_steps=1"]
    assert run("sd1", command("without", *more)) == 0
    assert run("sd1", command("with", *more, "--save_state")) == 1
    assert "has state that cannot be saved" in capsys.readouterr().err
    assert not (tmp_path / "with").exists()


def test_a_state_that_cannot_be_written_does_not_cost_the_result(command, tmp_path, monkeypatch, capsys):
    def refuse(folder, contents):
        raise UserError(f"{folder} cannot be written.")

    monkeypatch.setattr(training_state, "write_folder", refuse)
    assert run("sd1", command("out", "--save_state", "--max_train_steps=1")) == 1
    assert f"{TOKEN}-state cannot be written" in capsys.readouterr().err
    assert (tmp_path / "out" / RESULT).is_file()


def test_another_base_is_refused(state, command, tiny_sd2, capsys):
    assert run("sd2", command("out", f"--resume={state}", family="sd2", model=tiny_sd2)) == 1
    assert "Give the model of the first run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", ["nothing", "file", "other", "cut", "flipped", "text", "code", "version", "table", "fields"]
)
def test_what_is_no_state(case, state, command, tmp_path, trainers, capsys):  # noqa: F811
    trainers.clear()
    folder, file = state, state / FILE
    if case == "nothing":
        folder, sentence = tmp_path / "nowhere", "does not exist"
    elif case == "file":
        folder, sentence = tmp_path / "first" / RESULT, "To start from an embedding file use --weights"
    elif case == "other":
        file.rename(state / "model.safetensors")
        sentence = f"holds no {FILE}"
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:3000])
        sentence = f"{FILE} is damaged"
    elif case == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        sentence = f"{FILE} is damaged"
    elif case == "text":
        file.write_text("hello")
        sentence = f"{FILE} is damaged"
    elif case == "fields":
        torch.save({"format": 1, "step": 1}, file)
        sentence = "written by another version"
    elif case == "code":
        torch.save({"format": 1, "step": print}, file)
        sentence = "holds objects that cannot be read safely"
    else:
        torch.save({"format": 99 if case == "version" else torch.ones(2)}, file)
        sentence = "written by another version"
    assert run("sd1", command("out", f"--resume={folder}")) == 1
    assert sentence in capsys.readouterr().err
    assert trainers == []


def test_a_state_holds_no_secret(command, tmp_path):
    more = ["--wandb_api_key=very-secret", "--huggingface_token=very-secret", "--save_state"]
    assert run("sd1", command("out", *more, "--max_train_steps=1")) == 0
    file = tmp_path / "out" / f"{TOKEN}-state" / FILE
    assert b"very-secret" not in file.read_bytes()
    kept = TrainingState.read(file.parent).options
    assert kept["token_string"] == TOKEN
    assert "wandb_api_key" not in kept
    json.dumps(kept)


def test_random_states_come_back():
    before = random_states()
    drawn = random.random(), np.random.rand(), torch.rand(1)
    set_random_states(before)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


def test_options_that_a_state_does_not_know_are_no_difference():
    state = TrainingState(1, 9, True, 1, "d", {}, [], {}, [], [{}])
    state.check(Options())
    assert state.changes(Options(), 9, "d", 1) == []
    assert state.changes(Options(), 10, "e", 2) == [
        "the images, their captions or their settings are not the same",
        "the state was saved with 1 process, now 2",
    ]


def test_vectors_of_an_epochs_last_step_are_of_that_epoch(command, tmp_path, monkeypatch, capsys):
    """Interrupted in the first step of the second epoch."""
    losses = DenoisingTask.losses

    def interrupted(task, batch, **details):
        if list((tmp_path / "out").glob("*000001.safetensors")):
            raise KeyboardInterrupt
        return losses(task, batch, **details)

    monkeypatch.setattr(DenoisingTask, "losses", interrupted)
    assert run("sd1", command("out", "--save_every_n_epochs=1")) == 130
    assert "The vectors of step 3 are kept in" in capsys.readouterr().err
    for name in ("000001", "step00000003"):
        with safe_open(tmp_path / "out" / f"{TOKEN}-{name}.safetensors", "pt") as file:
            assert (file.metadata()["ti.steps"], file.metadata()["ti.epoch"]) == ("3", "1")


def test_a_second_interruption_does_not_stop_the_rescue(command, tmp_path, monkeypatch, capsys):
    losses, write, written = DenoisingTask.losses, Results.write, []

    def interrupted(task, batch, **details):
        if len(list((tmp_path / "out").glob("*step00000002*"))):
            raise KeyboardInterrupt
        return losses(task, batch, **details)

    def again(results, *arguments, **options):
        if written:  # the first is the checkpoint, the second the rescue
            signal.raise_signal(signal.SIGINT)
        write(results, *arguments, **options)
        written.append(arguments)

    monkeypatch.setattr(DenoisingTask, "losses", interrupted)
    monkeypatch.setattr(Results, "write", again)
    assert run("sd1", command("out", "--save_every_n_steps=2")) == 130
    assert "The vectors of step 2 are kept in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(written) == 2


# ---- a state that is the run's last, other rates, the newest state


def test_a_state_that_is_the_last_writes_the_result(command, tmp_path, capsys):
    """The run was killed after its last state: both that of the last step and that of the end lead to the result."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TOKEN} --w 64 --h 64 --s 1\n")
    more = ["--save_every_n_steps=7", "--save_state", f"--sample_prompts={prompts}", "--sample_every_n_steps=7"]
    assert run("sd1", command("whole", *more)) == 0
    whole = tmp_path / "whole"
    drawn = [path.name for path in (whole / "sample").iterdir()]
    for state in (STATES[7], f"{TOKEN}-state"):
        (whole / RESULT).rename(whole / "wanted.safetensors")
        assert run("sd1", command("whole", *more, f"--resume={whole / state}")) == 0
        assert_same(tensors(whole), tensors(whole, "wanted.safetensors"))
        assert record(whole)["ti.epoch"] == record(whole, "wanted.safetensors")["ti.epoch"] == "3"
        assert [path.name for path in (whole / "sample").iterdir()] == drawn
        (whole / "sample" / drawn[0]).unlink()  # what is missing is drawn from the state
        if state == STATES[7]:
            assert run("sd1", command("whole", *more, f"--resume={whole / state}")) == 0
            (again,) = (whole / "sample").iterdir()
            drawn = [again.name]
    assert "was kept" not in capsys.readouterr().err


def record(folder, name: str = RESULT) -> dict[str, str]:
    with safe_open(folder / name, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion"])
def test_a_resumed_run_may_learn_at_another_rate(optimizer, command, tmp_path, capsys):
    more = [f"--optimizer_type={optimizer}", "--save_state", "--save_every_n_steps=2"]
    assert run("sd1", command("staged", *more, "--learning_rate=1e-2:4,2e-3")) == 0
    assert run("sd1", command("first", *more, "--learning_rate=1e-2")) == 0
    state = tmp_path / "first" / STATES[4]
    capsys.readouterr()
    assert run("sd1", command("out", *more, "--learning_rate=2e-3", f"--resume={state}")) == 0
    assert "--learning_rate was 0.01 in the saved state and is now 0.002" in capsys.readouterr().err
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "staged"))
    said = "after step 4: --learning_rate was 0.01 in the saved state and is now 0.002"
    assert record(tmp_path / "out")["ti.resumed"] == said
    later = TrainingState.read(tmp_path / "out" / STATES[6])
    assert later.resumed == said
    assert later.run != TrainingState.read(state).run


def test_a_resumed_run_may_follow_another_schedule(command, tmp_path, trainers):  # noqa: F811
    assert run("sd1", command("first", "--save_state", "--save_every_n_steps=4")) == 0
    flags = ["--lr_scheduler=linear", f"--resume={tmp_path / 'first' / STATES[4]}"]
    assert run("sd1", command("out", *flags)) == 0
    whole, resumed = trainers
    assert whole.setup.learner.rates() == {"lr": 0.01}
    assert resumed.setup.learner.rates() == {"lr": 0.0}  # seven steps of seven
    assert "--lr_scheduler was constant" in record(tmp_path / "out")["ti.resumed"]


def test_what_the_vectors_began_with_cannot_be_changed_any_more(state, command, tmp_path, capsys):
    assert run("sd1", command("out", f"--resume={state}", "--init_word=dog", "--max_train_steps=3")) == 0
    assert "--init_word has no effect on a resumed run: the vectors are those of the state, which began with girl" in (
        capsys.readouterr().err
    )
    assert record(tmp_path / "out")["ti.init_word"] == "girl"


def test_another_checkpoint_is_refused(state):
    kept = TrainingState.read(state)
    for base in (None, kept.base):
        kept.check_base(base)
    one = replace(kept, base="1234")
    one.check_base(None)
    with pytest.raises(UserError, match="is another model than the one of the saved state"):
        one.check_base("5678")


def test_the_same_optimizer_may_be_asked_for_in_another_way(state):
    kept = TrainingState.read(state)
    same = replace(
        Options(), optimizer=OptimizerOptions(optimizer_type="torch.optim.AdamW", learning_rate=((0.1, None),))
    )
    kept.check(replace(same, token=TokenOptions(token_string=TOKEN, num_vectors_per_token=2)))


@pytest.mark.parametrize("arguments", [None, [1], ["no argument"]])
def test_a_module_that_only_the_state_names_is_not_imported(arguments, tmp_path, monkeypatch):
    """Whoever made the state would choose what runs here."""
    (tmp_path / "surprise.py").write_text("raise SystemExit('this has run')")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"optimizer_type": "surprise.Optimizer", "optimizer_args": arguments}
    kept = replace(small_state(), options={"init_word": None, "weights": None, **options})
    with pytest.raises(UserError, match=r"The optimizer was surprise.Optimizer.* and is torch.optim.adamw.AdamW\(\)"):
        kept.check(Options())
    monkeypatch.setitem(kept.options, "optimizer_type", "AdamW")
    if arguments:
        with pytest.raises(UserError, match="The optimizer was AdamW"):
            kept.check(Options())


def small_state(run: str = "") -> TrainingState:
    """A state of one vector with nothing in its optimizer."""
    rows = [torch.ones(1, 4)]
    optimizer = {"state": {}, "param_groups": [{"params": [0]}]}
    learner = {"rows": rows, "optimizer": optimizer, "schedule": {}, "scaler": {}, "taught": True}
    options = {"init_word": None, "weights": None}
    return TrainingState(1, 9, True, 1, "d", options, rows, learner, [], [random_states()], run)


def saved(folder, name: str, moment: int) -> Path:
    small_state(name).write(folder / name)
    os.utime(folder / name / FILE, (moment, moment))
    return folder / name


def test_the_newest_whole_state(tmp_path, caplog):
    names = CheckpointNames("n", "safetensors")
    with pytest.raises(UserError, match="holds no state of n that can be used"):
        TrainingState.latest(tmp_path, names)
    for moment, name in enumerate(["n-step00000009-state", "n-state", "n-000002-state", "n-step00000003-state"]):
        saved(tmp_path, name, moment)
    for name in ("n2-state", "n-state-1", "nn-000001-state", "n-step3-state"):
        saved(tmp_path, name, 99)
    newest = tmp_path / "n-step00000003-state"
    assert TrainingState.latest(tmp_path, names) == newest
    (newest / FILE).write_bytes((newest / FILE).read_bytes()[:100])
    assert TrainingState.latest(tmp_path, names) == tmp_path / "n-000002-state"
    assert "n-step00000003-state/state.pt is damaged" in caplog.text


def test_a_state_that_may_not_be_read(tmp_path):
    folder = tmp_path / "locked" / "mychar-state"
    small_state().write(folder)
    found = outcome_in_locked(folder.parent, lambda: TrainingState.read(folder))
    assert found == ("error", f"--resume: {folder / FILE} cannot be read: Permission denied.")
    found = outcome_in_locked(folder.parent, lambda: TrainingState.latest(folder.parent, CheckpointNames("a", "pt")))
    assert found == ("error", f"--resume=latest: {folder.parent} cannot be read: Permission denied.")


def test_resume_latest(whole, command, tmp_path, capsys):
    more = ["--save_every_n_steps=1", "--save_state"]
    assert run("sd1", command("out", *more, "--resume=latest")) == 1
    assert "holds no state of mychar" in capsys.readouterr().err
    shutil.copytree(whole, tmp_path / "out", dirs_exist_ok=True)
    wanted = tensors(whole)
    shutil.rmtree(tmp_path / "out" / STATES[7])
    shutil.rmtree(tmp_path / "out" / f"{TOKEN}-state")
    (tmp_path / "out" / RESULT).unlink()
    assert run("sd1", command("out", *more, "--resume=latest")) == 0
    assert "Resuming after step 6 of 7" in capsys.readouterr().err
    assert_same(tensors(tmp_path / "out"), wanted)
    assert not list((tmp_path / "out").glob("*-1*"))


# ---- what stands in the place of a state


def test_a_state_of_the_same_run_is_replaced_and_any_other_is_kept(tmp_path):
    one = small_state("one")
    folder = tmp_path / "n-state"
    assert one.write(folder) is None
    assert replace(one, step=2).write(folder) is None
    assert TrainingState.read(folder).step == 2
    assert replace(one, run="two").write(folder) == tmp_path / "n-state-1"
    assert TrainingState.read(tmp_path / "n-state-1").step == 2
    (folder / FILE).unlink()
    (folder / "mine").touch()
    assert one.write(folder) == tmp_path / "n-state-2"
    assert sorted(path.name for path in (tmp_path / "n-state-2").iterdir()) == ["README.txt", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n-state", "n-state-1", "n-state-2"]


def test_a_state_that_fails_leaves_no_folder_of_its_name(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="n-state cannot be written: No space left on device"):
        small_state().write(tmp_path / "n-state")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_optimizers_step_counts_it(whole, command, tmp_path, monkeypatch, capsys):
    """What is kept under the name of a step is what that step has made."""
    update, updates = Learner._update_rows, []

    def interrupted(learner, *more):
        update(learner, *more)
        updates.append(learner)
        if len(updates) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Learner, "_update_rows", interrupted)
    assert run("sd1", command("out")) == 143
    assert "The vectors of step 3 are kept in" in capsys.readouterr().err
    name = f"{TOKEN}-step00000003.safetensors"
    assert_same(tensors(tmp_path / "out", name), tensors(whole, name))
