"""One optimizer step: what its loss is the mean of, and a step that cannot teach."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from option_effects import train
from runs import arguments, write_dataset
from waits import SimulatedDevice

from library.model.vae import FrozenVae
from library.output.trackers import RunLog
from library.training.denoising import DenoisingTask
from library.training.optimizer_step import Learner


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_sd1):
    """Four photographs, of which two lack the token, in batches of one."""
    folder = tmp_path_factory.mktemp("data")
    data = write_dataset(folder, count=4)
    for number in (2, 4):
        (folder / "images" / f"photo_{number}.txt").write_text("a photo")
    data.write_text(data.read_text().replace("batch_size = 2", "batch_size = 1"))

    def build(out, *more: str) -> list[str]:
        return arguments("sd1", tiny_sd1, data, out, "--max_train_steps=4", *more)

    return build


def test_a_step_without_the_token_has_no_loss(command, tmp_path, monkeypatch):
    """Nothing is logged for it and no plateau sees it, but it counts."""
    logged, values = [], RunLog.values

    def record(log, numbers, step):
        logged.append((sorted(numbers), step))
        values(log, numbers, step)

    monkeypatch.setattr(RunLog, "values", record)
    outcome = train("sd1", command(tmp_path, "--lr_scheduler=linear"), tmp_path)
    taught = [bool(batches[0].has_token.any()) for batches in outcome.batches]
    assert sorted(taught) == [False, False, True, True]
    assert [loss is not None for loss in outcome.losses] == taught
    steps = [number for number, each in enumerate(taught, start=1) if each]
    of_steps = [(names, step) for step in steps for names in (["loss", "lr"], ["loss/smoothed"])]
    assert logged == [*of_steps, (["loss/epoch"], 4)]
    assert outcome.setup.progress.step == 4
    # By the step, so that the rate has come down at the end.
    assert outcome.rates == [pytest.approx(0.01 * (1 - number / 4)) for number in range(4)]
    for before, after, learned in zip(outcome.rows[:-1], outcome.rows[1:], taught[1:], strict=True):
        assert torch.equal(before[0], after[0]) != learned


@pytest.mark.parametrize("how", ["accumulated", "in one batch"])
def test_the_loss_is_the_mean_of_what_taught(how, command, tmp_path):
    more = ["--gradient_accumulation_steps=4", "--max_train_steps=1"]
    if how == "in one batch":
        argv = command(tmp_path)
        file = tmp_path / "dataset.toml"
        (given,) = (argument.partition("=")[2] for argument in argv if argument.startswith("--dataset_config"))
        file.write_text(Path(given).read_text().replace("batch_size = 1", "batch_size = 4"))
        more = [f"--dataset_config={file}", "--max_train_steps=1"]
    outcome = train("sd1", command(tmp_path / "out", *more), tmp_path / "out")
    batches = outcome.batches[0]
    tried = iter(outcome.judged)
    losses = [next(tried).losses[batch.has_token] for batch in batches if batch.has_token.any()]
    assert sum(len(batch) for batch in batches) == 4
    assert torch.cat(losses).shape == (2,)
    assert outcome.losses == [pytest.approx(torch.cat(losses).mean().item())]


@pytest.mark.parametrize("more", [[], ["--optimizer_args", "warmup_init=True"]])
def test_adafactors_own_rate_does_not_move_where_nothing_teaches(more, command, tmp_path):
    """It counts the steps that it makes, and knows of none where the first one teaches nothing."""
    outcome = train("sd1", command(tmp_path, "--optimizer_type=Adafactor", "--seed=4", *more), tmp_path)
    taught = [loss is not None for loss in outcome.losses]
    assert not taught[0]
    assert any(taught)
    (state,) = outcome.setup.learner.choice.optimizer.state.values()
    assert state["step"] == sum(taught)


def test_a_plateau_is_not_seen_where_nothing_teaches(command, tmp_path):
    """A loss of 0 would be the best of all, and the rate would fall for ever after."""
    more = ["--lr_scheduler=reduce_lr_on_plateau", "--lr_scheduler_args", "patience=99"]
    outcome = train("sd1", command(tmp_path, *more), tmp_path)
    best = outcome.setup.learner.schedule.scheduler.best
    assert best == min(loss for loss in outcome.losses if loss is not None) > 0


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_accumulation_steps=2"],
        ["--gradient_accumulation_steps=2", "--mixed_precision=bf16", "--cache_latents=false"],
        ["--cache_text_encoder_outputs", "--noise_offset=0.1", "--ip_noise_gamma=0.1", "--min_snr_gamma=5"],
        ["--gradient_checkpointing", "--preserve_embedding_norm", "--fp8_base"],
        ["--normalize_sample_gradients", "--gradient_accumulation_steps=2"],
    ],
    ids=["cached", "uncached", "prompts cached", "checkpointing", "normalized"],
)
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
def test_a_step_waits_for_the_device_once(more, scaler, command, tmp_path, monkeypatch):
    """And a batch never, from the third step on: what is read before is kept."""
    counted, step = [], Learner.step

    def watched(learner, batches, task):
        if scaler and learner.accelerator.scaler is None:
            learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            for optimizer in learner.accelerator._optimizers:
                optimizer.scaler = learner.accelerator.scaler
        modules = [task.unet, *task.prompt_encoder.text_encoders, *([task.vae.vae] if task.vae else [])]
        held = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
        states = [value for state in learner.choice.optimizer.state.values() for value in state.values()]
        held += [*learner.rows.parameters(), *(value for value in states if value.ndim), *vars(task.schedule).values()]
        device = SimulatedDevice(held)
        with device.watched():
            loss = step(learner, batches, task)
        counted.append((device.waits, device.strays))
        return loss

    monkeypatch.setattr(Learner, "step", watched)
    assert train("sd1", command(tmp_path, "--max_train_steps=5", *more), tmp_path).setup.progress.step == 5
    assert [strays for _, strays in counted[2:]] == [[]] * 3
    assert [waits for waits, _ in counted[2:]] == [["cpu"]] * 3


@pytest.mark.usefixtures("bfloat16_cpu")  # others encode in float32
@pytest.mark.parametrize("overflowing", ["half", "always"])
def test_a_vae_that_overflows_is_noticed_without_waiting_for_it(overflowing, command, tmp_path, monkeypatch):
    """The step is done again, looking at each batch; its result is that of a training that always looks."""
    posterior, losses, done = FrozenVae._posterior, DenoisingTask.losses, []

    def overflow(vae, images):
        mean, spread = posterior(vae, images)
        third = len(done) > 1 and (vae.dtype != torch.float32 or overflowing == "always")
        return mean * (torch.inf if third else 1), spread

    def looking(task, batch, **details):
        done.append(batch)
        return losses(task, batch)

    def counting(task, batch, **details):
        done.append(batch)
        return losses(task, batch, **details)

    outcomes = []
    for name, version in (("as it is", counting), ("always", looking)):
        done.clear()
        argv = command(tmp_path / name, "--cache_latents=false", "--mixed_precision=bf16", "--max_train_steps=8")
        patches = [patch.object(FrozenVae, "_posterior", overflow), patch.object(DenoisingTask, "losses", version)]
        outcomes.append(train("sd1", argv, tmp_path / name, *patches, code=int(overflowing == "always")))
    for outcome in outcomes:
        assert outcome.said.count("The VAE overflows in torch.bfloat16; it works in float32 from here on.") == 1
        assert ("even in float32" in outcome.said) == (overflowing == "always")
    for ours, theirs in zip(*(outcome.rows for outcome in outcomes), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_the_simulated_device_notices_what_waits():
    there = torch.ones(3)
    device = SimulatedDevice([there])
    with device.watched():
        twice = there * 2
        assert twice.sum() == 6
        twice[twice > 1].cpu()
        twice + torch.ones(3)
        torch.ones(3)[torch.ones(3) > 0].tolist()
    assert device.waits == ["_local_scalar_dense", "index", "cpu"]
    assert device.strays == ["add of [[3], [3]]"]
