"""What each option about noise, loss, optimizer, schedule and length does, through the real script."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from option_effects import Bench, plan, shows
from runs import TOKEN, arguments, write_dataset

from library.embedding.tokenizer import TrainableRows
from library.setup import optimizer_and_rates

ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
SGD = ["--optimizer_type=SGD", "--learning_rate=1"]
NEAR = ["--max_timestep=300"]  # where the signal is stronger than the noise
V = "--v_parameterization"


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1, tiny_sdxl):
    models = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}
    return Bench(models, write_dataset(tmp_path_factory.mktemp("data"), count=2))


def moved(outcome, encoder=0):
    """How far the first step moved the rows of an encoder."""
    return outcome.rows[0][encoder] - outcome.setup.starts[encoder]


# ---- noise


class Redraw:
    """The random numbers of one sample of a run's first batch, in the documented order: noise first."""

    def __init__(self, outcome, index):
        (batch,) = outcome.batches[0]
        self.generator = torch.Generator().manual_seed(batch.seeds[index])
        self.latents = batch.latents[index : index + 1] * 0.18215
        self.noise = self.normal(8, 8)
        self.drawn = outcome.draws[0].noise[index : index + 1]
        self.added = outcome.draws[0].input_noise[index : index + 1]
        self.timestep = outcome.draws[0].timesteps[index : index + 1]

    def normal(self, height, width):
        return torch.randn(1, 4, height, width, generator=self.generator)

    def uniform(self):
        return torch.rand(1, generator=self.generator)


def redrawn(outcome):
    return [Redraw(outcome, index) for index in range(2)]


@shows("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
def test_noise_offset(bench):
    for sample in redrawn(bench.plain()):
        assert torch.equal(sample.drawn, sample.noise)
    for sample in redrawn(bench("--noise_offset=0.5")):
        assert torch.allclose(sample.drawn, sample.noise + 0.5 * sample.normal(1, 1))
    for sample in redrawn(bench("--noise_offset=0.5", "--noise_offset_random_strength")):
        strength = 0.5 * sample.uniform()
        assert torch.allclose(sample.drawn, sample.noise + strength * sample.normal(1, 1))
    for sample in redrawn(bench("--noise_offset=0.5", "--adaptive_noise_scale=2")):
        strength = 0.5 + 2 * sample.latents.mean(dim=(2, 3), keepdim=True).abs()
        assert (strength - 0.5).min() > 0
        assert torch.allclose(sample.drawn, sample.noise + strength * sample.normal(1, 1), atol=1e-5)


@shows("multires_noise_iterations", "multires_noise_discount")
def test_pyramid_noise(bench):
    for sample in redrawn(bench("--multires_noise_iterations=1")):
        both = sample.noise + sample.normal(8, 8)
        assert torch.allclose(sample.drawn, both / both.std(), atol=1e-6)
    means = []
    for discount in (0.0, 0.9):
        samples = redrawn(bench("--multires_noise_iterations=6", f"--multires_noise_discount={discount}"))
        assert all(sample.drawn.std() == pytest.approx(1, abs=1e-5) for sample in samples)
        means.append(sum(sample.drawn.mean(dim=(2, 3)).square().sum().item() for sample in samples))
    assert means[1] > 3 * means[0]  # coarse noise shifts whole channels
    flat, single = (
        redrawn(bench("--multires_noise_iterations=6", "--multires_noise_discount=0"))[0],
        redrawn(bench("--multires_noise_iterations=1"))[0],
    )
    assert torch.allclose(flat.drawn, single.drawn)


@shows("ip_noise_gamma", "ip_noise_gamma_random_strength")
def test_input_perturbation(bench):
    for flags, random_strength in ([], False), (["--ip_noise_gamma_random_strength"], True):
        outcome = bench("--ip_noise_gamma=0.5", *flags)
        assert torch.equal(outcome.judged[0].target, bench.plain().judged[0].target)
        assert outcome.losses != bench.plain().losses
        for sample in redrawn(outcome):
            torch.randint(0, 1000, (1,), generator=sample.generator)  # the timestep
            gamma = 0.5 * sample.uniform() if random_strength else 0.5
            assert torch.allclose(sample.added, sample.noise + gamma * sample.normal(8, 8))


@shows("min_timestep", "max_timestep")
def test_timesteps(bench):
    assert bench("--min_timestep=10", "--max_timestep=11").draws[0].timesteps.tolist() == [10, 10]
    high = bench("--min_timestep=900", steps=4)
    low = bench("--max_timestep=100", steps=4)
    assert all(900 <= t < 1000 for draw in high.draws for t in draw.timesteps)
    assert all(0 <= t < 100 for draw in low.draws for t in draw.timesteps)
    assert low.metadata()["modelspec.timestep_range"] == "0,100"


@shows("v_parameterization", "zero_terminal_snr")
def test_v_prediction(bench):
    plain, velocity = bench.plain(), bench(V)
    (batch,), draw = velocity.batches[0], velocity.draws[0]
    assert torch.equal(plain.judged[0].target, plain.draws[0].noise)
    alphas = ALPHAS[draw.timesteps].reshape(-1, 1, 1, 1)
    expected = alphas.sqrt() * draw.noise - (1 - alphas).sqrt() * batch.latents * 0.18215
    assert torch.allclose(velocity.judged[0].target, expected, atol=1e-6)
    assert [run.metadata()["modelspec.prediction_type"] for run in (plain, velocity)] == ["epsilon", "v"]

    rescaled = bench(V, "--zero_terminal_snr")
    roots = ALPHAS.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    assert torch.allclose(rescaled.setup.task.schedule.alphas_cumprod, roots**2, atol=1e-5)
    assert rescaled.setup.task.schedule.alphas_cumprod[-1] == 0
    assert velocity.setup.task.schedule.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)
    assert rescaled.losses != velocity.losses


# ---- loss


def l2(judged):
    return (judged.prediction - judged.target).square()


def huber(c):
    def distance(judged):
        size = c(judged).reshape(-1, 1, 1, 1) if callable(c) else c
        return 2 * size * ((l2(judged) + size**2).sqrt() - size)

    return distance


def smooth(c):
    return lambda judged: 2 * ((l2(judged) + c**2).sqrt() - c)


def snr_threshold(c):
    def threshold(judged):
        sigma = ((1 - ALPHAS) / ALPHAS).sqrt()[judged.timesteps]
        return (1 - c) / (1 + sigma) ** 2 + c

    return threshold


def weighted(weight):
    """The squared error of each sample times a function of its signal-to-noise ratio."""

    def loss(judged):
        snr = (ALPHAS / (1 - ALPHAS))[judged.timesteps].reshape(-1, 1, 1, 1)
        return l2(judged) * weight(snr)

    return loss


LOSSES = [
    # option, flags, the loss of every element
    ("loss_type", ["--loss_type=l1"], lambda judged: (judged.prediction - judged.target).abs()),
    ("loss_type", ["--loss_type=huber"], huber(snr_threshold(0.1))),
    ("loss_type", ["--loss_type=smooth_l1", "--huber_schedule=constant"], smooth(0.1)),
    ("huber_c", ["--loss_type=huber", "--huber_c=0.4"], huber(snr_threshold(0.4))),
    ("huber_schedule", ["--loss_type=huber", "--huber_schedule=constant"], huber(0.1)),
    (
        "huber_schedule",
        ["--loss_type=huber", "--huber_schedule=exponential"],
        huber(lambda judged: (math.log(0.1) * judged.timesteps / 1000).exp()),
    ),
    ("huber_scale", ["--loss_type=huber", "--huber_schedule=constant", "--huber_scale=3"], huber(0.3)),
    ("huber_scale", ["--loss_type=huber", "--huber_scale=3"], huber(lambda judged: 3 * snr_threshold(0.1)(judged))),
    ("min_snr_gamma", [*NEAR, "--min_snr_gamma=1"], weighted(lambda snr: snr.clamp(max=1) / snr)),
    ("min_snr_gamma", [*NEAR, V, "--min_snr_gamma=1"], weighted(lambda snr: snr.clamp(max=1) / (snr + 1))),
    (
        "scale_v_pred_loss_like_noise_pred",
        [V, "--scale_v_pred_loss_like_noise_pred"],
        weighted(lambda snr: snr / (snr + 1)),
    ),
    ("v_pred_like_loss", ["--v_pred_like_loss=0.5"], weighted(lambda snr: 1 + 0.5 * (snr + 1) / snr)),
    ("debiased_estimation_loss", [*NEAR, "--debiased_estimation_loss"], weighted(lambda snr: snr.rsqrt())),
    ("debiased_estimation_loss", [V, "--debiased_estimation_loss"], weighted(lambda snr: 1 / (snr + 1))),
]


@shows(*dict.fromkeys(option for option, _, _ in LOSSES))
@pytest.mark.parametrize(("option", "flags", "elementwise"), LOSSES, ids=[" ".join(flags) for _, flags, _ in LOSSES])
def test_losses(bench, option, flags, elementwise):
    outcome = bench(*flags)
    (judged,) = outcome.judged
    assert outcome.losses[0] == pytest.approx(elementwise(judged).mean().item(), rel=1e-4)
    assert outcome.losses[0] != pytest.approx(l2(judged).mean().item(), rel=1e-2)
    assert all((rows != start).all() for rows, start in zip(outcome.rows[-1], outcome.setup.starts, strict=True))


# ---- optimizer

OPTIMIZERS = {
    "AdamW": ("torch.optim.adamw.AdamW", []),
    "adamw8bit": ("bitsandbytes.optim.adamw.AdamW8bit", []),
    "PagedAdamW8bit": ("bitsandbytes.optim.adamw.PagedAdamW8bit", []),
    "Lion": ("lion_pytorch.lion_pytorch.Lion", []),
    "SGDNesterov": ("torch.optim.sgd.SGD", []),
    "Prodigy": ("prodigyopt.prodigy.Prodigy", ["--learning_rate=1"]),
    "DAdaptAdam": ("dadaptation.dadapt_adam.DAdaptAdam", ["--learning_rate=1"]),
    "AdamWScheduleFree": ("schedulefree.adamw_schedulefree.AdamWScheduleFree", []),
    "Adafactor": ("transformers.optimization.Adafactor", []),
    "RAdam": ("torch.optim.radam.RAdam", []),
    "torch.optim.Adamax": ("torch.optim.adamax.Adamax", []),
}


@shows("optimizer_type")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(bench, name):
    kind, flags = OPTIMIZERS[name]
    outcome = bench(f"--optimizer_type={name}", *flags, steps=2)
    assert outcome.setup.learner.choice.name == kind
    start, (first,), (second,) = outcome.setup.starts[0], *outcome.rows
    assert torch.isfinite(second).all()
    assert not torch.equal(start, first)
    assert not torch.equal(first, second)
    if name in ("AdamW", "Lion", "RAdam"):
        largest = (first - start).abs().max().item()
        # AdamW's first step and each of Lion's are as long as the rate; RAdam's first is the gradient times the rate.
        assert largest == pytest.approx(0.01, rel=0.02) or name == "RAdam"


@shows("use_8bit_adam", "use_lion_optimizer")
def test_old_ways_of_writing(bench):
    for flag, name in ("--use_8bit_adam", "AdamW8bit"), ("--use_lion_optimizer", "Lion"):
        old, new = bench(flag), bench(f"--optimizer_type={name}")
        assert type(old.setup.learner.choice.optimizer).__name__ == name
        assert torch.equal(old.rows[0][0], new.rows[0][0])
        assert not torch.equal(old.rows[0][0], bench.plain().rows[0][0]) or name == "AdamW8bit"
    assert "AdamW8bit" not in bench.plain().setup.learner.choice.name


@shows("optimizer_type", "num_vectors_per_token", "max_token_length")
def test_eight_bit_states_of_many_vectors(bench):
    outcome = bench("--optimizer_type=AdamW8bit", "--num_vectors_per_token=130", "--max_token_length=150", steps=2)
    (state,) = outcome.setup.learner.choice.optimizer.state.values()
    assert state["state1"].shape == (130, 32)
    assert {state[name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert (moved(outcome).norm(dim=1) > 1e-3).all()


@shows("learning_rate", "lr_scheduler")
def test_learning_rate(bench):
    full, tenth = bench(*SGD), bench(*SGD, "--learning_rate=0.1")
    assert torch.allclose(moved(full), 10 * moved(tenth), rtol=1e-3, atol=1e-6)
    unset = bench("--learning_rate=")
    assert unset.rates == [5e-4]
    assert "--learning_rate is not set: AdamW starts with 0.0005" in unset.said
    assert "very low" in bench("--learning_rate=1e-6").said
    # Clipped gradients are all of one length, whatever timestep was drawn.
    stages = bench(*SGD, "--max_grad_norm=1e-3", "--learning_rate=1:1,0.1:2,0.01", steps=3)
    assert stages.rates == [1, 0.1, 0.01]
    steps = [stages.setup.starts, *stages.rows]
    lengths = [(after[0] - before[0]).norm().item() for before, after in itertools.pairwise(steps)]
    assert lengths == pytest.approx([1e-3, 1e-4, 1e-5], rel=0.01)
    cosine = bench("--lr_scheduler=cosine", "--lr_warmup_steps=2", steps=4)
    assert cosine.rates == pytest.approx([0, 0.005, 0.01, 0.005])
    assert torch.equal(cosine.rows[0][0], cosine.setup.starts[0])


@shows("max_grad_norm")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradient_clipping(bench, family):
    free = bench(*SGD, "--max_grad_norm=0", family=family)
    clipped = bench(*SGD, "--max_grad_norm=1e-3", family=family)
    encoders = range(len(free.rows[0]))
    norm = torch.cat([moved(free, i).flatten() for i in encoders]).norm().item()
    assert norm > 2e-3
    for i in encoders:  # all rows by the same factor: their joint norm counts
        assert torch.allclose(moved(clipped, i), moved(free, i) * 1e-3 / norm, rtol=1e-2, atol=2e-7)


@shows("optimizer_args", "fused_backward_pass")
def test_optimizer_arguments(bench):
    outcome = bench("--optimizer_args", "weight_decay=0.5", "betas=0.8,0.9", "--fused_backward_pass")
    (group,) = outcome.setup.learner.choice.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.9))
    decayed = moved(bench.plain()) - outcome.setup.starts[0] * 0.01 * (0.5 - 0.01)
    assert torch.allclose(moved(outcome), decayed, atol=1e-6)
    assert "--fused_backward_pass: only the few new vectors have gradients." in outcome.said


def test_schedule_free_saves_are_the_average_and_change_nothing(bench):
    flags = ["--optimizer_type=AdamWScheduleFree", "--learning_rate=0.05"]
    often = bench(*flags, "--save_every_n_steps=1", steps=4)
    once = bench(*flags, steps=4)
    assert torch.equal(often.tensors()["emb_params"], once.tensors()["emb_params"])
    assert torch.equal(often.rows[3][0], once.rows[3][0])
    assert (often.tensors()["emb_params"] - often.rows[3][0]).abs().max() > 1e-3
    middle = often.tensors(f"{TOKEN}-step00000002.safetensors")["emb_params"]
    assert not torch.equal(middle, often.rows[1][0])


# ---- schedule


@pytest.fixture
def rates_of(tmp_path, tiny_sd1):
    """The learning rates of a run of ``steps`` steps at a rate of 1, without running it."""
    data = write_dataset(tmp_path, count=1)

    def rates(*flags, steps=8):
        argv = arguments("sd1", tiny_sd1, data, tmp_path / "out", f"--max_train_steps={steps}", "--learning_rate=1")
        job = plan("sd1", [*argv, *flags]).job
        choice, schedule = optimizer_and_rates(job, TrainableRows([torch.zeros(1, 4)]), 1.0)
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            choice.optimizer.step()
            schedule.step(1.0)
        return found

    return rates


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


WARM = "--lr_warmup_steps=4"
SCHEDULES = [
    # option, flags, rates of eight steps
    ("lr_scheduler", [], [1] * 8),
    ("lr_warmup_steps", ["--lr_scheduler=constant_with_warmup", WARM], [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ("lr_warmup_steps", ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=0.25"], [0, 0.5] + [1] * 6),
    (
        "lr_warmup_steps",
        ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=50%"],
        [0, 0.25, 0.5, 0.75] + [1] * 4,
    ),
    ("lr_scheduler", ["--lr_scheduler=linear"], [1 - s / 8 for s in range(8)]),
    ("lr_scheduler", ["--lr_scheduler=cosine"], [cosine(s / 8) for s in range(8)]),
    (
        "lr_scheduler_args",
        ["--lr_scheduler=cosine", "--lr_scheduler_args", "num_cycles=1"],
        [cosine(s / 4) for s in range(8)],
    ),
    ("lr_scheduler", ["--lr_scheduler=cosine_with_restarts"], [cosine(s / 8) for s in range(8)]),
    (
        "lr_scheduler_num_cycles",
        ["--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=2"],
        [cosine(s / 4 % 1) for s in range(8)],
    ),
    ("lr_scheduler", ["--lr_scheduler=polynomial"], [1 - s / 8 for s in range(8)]),
    (
        "lr_scheduler_power",
        ["--lr_scheduler=polynomial", "--lr_scheduler_power=2"],
        [(1 - s / 8) ** 2 for s in range(8)],
    ),
    (
        "lr_scheduler_timescale",
        ["--lr_scheduler=inverse_sqrt", "--lr_scheduler_timescale=2"],
        [1 / math.sqrt((s + 2) / 2) for s in range(8)],
    ),
    (
        "lr_scheduler_min_lr_ratio",
        ["--lr_scheduler=cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=0.5"],
        [0.5 + 0.5 * cosine(s / 8) for s in range(8)],
    ),
    (
        "lr_decay_steps",
        ["--lr_scheduler=warmup_stable_decay", "--lr_warmup_steps=2", "--lr_decay_steps=4"],
        [0, 0.5, 1, 1, *(cosine(s / 4) for s in range(4))],
    ),
    (
        "lr_scheduler_args",
        ["--lr_scheduler=piecewise_constant", "--lr_scheduler_args", "step_rules='1:4,0.1:6,0.01'"],
        [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01],
    ),
    (
        "lr_scheduler_args",
        ["--lr_scheduler=reduce_lr_on_plateau", "--lr_scheduler_args", "patience=2", "factor=0.5"],
        [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25],
    ),
    (
        "lr_scheduler_type",
        ["--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=3", "gamma=0.1"],
        [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01],
    ),
]


@shows(*dict.fromkeys(option for option, _, _ in SCHEDULES))
@pytest.mark.parametrize(("option", "flags", "expected"), SCHEDULES, ids=[" ".join(flags) for _, flags, _ in SCHEDULES])
def test_schedules(rates_of, option, flags, expected):
    assert rates_of(*flags) == pytest.approx(expected, abs=2e-7)


@shows("lr_scheduler")
def test_warm_up_with_a_floor(rates_of):
    rates = rates_of(
        "--lr_scheduler=cosine_warmup_with_min_lr", "--lr_scheduler_min_lr_ratio=0.1", "--lr_warmup_steps=2"
    )
    assert rates[:2] == [0.5, 1]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


@shows("lr_scheduler")
def test_adafactor_shows_its_own_rate(bench):
    outcome = bench("--optimizer_type=Adafactor", "--lr_scheduler=adafactor", "--learning_rate=0.03", steps=3)
    assert outcome.rates[0] == 0.03
    assert outcome.rates[1] != 0.03
    assert "only shown, not used" in outcome.said


# ---- length and chance


def gradient(setup, batch):
    """The gradient of a batch's loss for the rows at their start."""
    (rows,) = setup.rows.rows
    rows.data.copy_(setup.starts[0])
    rows.grad = None
    setup.task.losses(batch).mean().backward()
    return rows.grad.clone()


@shows("max_train_steps", "max_train_epochs", "seed", "gradient_accumulation_steps")
def test_length(bench, tmp_path):
    assert len(bench.plain(steps=3).losses) == 3
    single = tmp_path / "single.toml"
    single.write_text(bench.dataset.read_text().replace("batch_size = 2", "batch_size = 1"))
    slow = ["--optimizer_type=SGD", "--learning_rate=1e-3", "--max_grad_norm=0", "--max_train_epochs=2"]
    singly = bench(*slow, dataset=single)
    gathered = bench(*slow, "--gradient_accumulation_steps=2", dataset=single)
    assert (len(singly.losses), len(gathered.losses)) == (4, 2)
    assert [len(batches) for batches in gathered.batches] == [2, 2]
    means = [sum(singly.losses[:2]) / 2, sum(singly.losses[2:]) / 2]
    assert gathered.losses == pytest.approx(means, rel=1e-4)
    expected = sum(gradient(gathered.setup, batch) for batch in gathered.batches[0]) / 2
    assert (moved(gathered) + 1e-3 * expected).norm() < 1e-2 * moved(gathered).norm()

    again, other = bench(steps=3), bench("--seed=2", steps=3)
    assert torch.equal(again.rows[2][0], bench.plain(steps=3).rows[2][0])
    assert other.losses != again.losses
    assert (bench.plain().metadata()["ti.seed"], other.metadata()["ti.seed"]) == ("1", "2")


def test_validation_split_logs_a_loss(tmp_path, bench):
    data = write_dataset(tmp_path, dataset="validation_split = 0.25", count=4)
    outcome = bench(dataset=data, steps=4)
    assert outcome.said.count("loss/validation") == 2  # three images, two batches an epoch
    assert "loss/validation" not in bench.plain().said
