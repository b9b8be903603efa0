"""Noise schedule, noise, timesteps, losses and weights: the measured numbers, and what must hold beyond them."""

import random

import numpy as np
import pytest
import torch
from departures import departure
from golden_data import golden_arrays, golden_cases

from library.options.options import LossOptions, NoiseOptions, Options
from library.options.parser import build_parser, read_values
from library.training.diffusion import (
    NoiseSchedule,
    apply_mask,
    draw_noise,
    draw_timesteps,
    elementwise_loss,
    huber_threshold,
    offset_noise,
    per_sample_loss,
    pyramid_noise,
    sample_noise,
    weight_loss,
)


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.create()


@pytest.fixture(scope="module")
def zero_terminal() -> NoiseSchedule:
    return NoiseSchedule.create(zero_terminal_snr=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors_of(name: str, case: dict) -> dict[str, torch.Tensor]:
    """The case's arrays by their name without prefix."""
    prefix, arrays = case["npz_prefix"], golden_arrays(name)
    return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}


def close(found: torch.Tensor, expected, **tolerance) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **tolerance)


# Golden cases


@pytest.mark.parametrize("case", golden_cases("zero_terminal_snr"))
def test_golden_zero_terminal_snr(case, schedule, zero_terminal):
    arrays = golden_arrays("zero_terminal_snr")
    close(schedule.alphas_cumprod, arrays["alphas_cumprod_original"], rtol=1e-6, atol=0)
    close(zero_terminal.alphas_cumprod, arrays["alphas_cumprod_fixed"], rtol=1e-5, atol=1e-9)
    close(schedule.all_snr, arrays["all_snr"], rtol=1e-5, atol=0)
    assert zero_terminal.alphas_cumprod[-1] == case["last_alphas_cumprod"] == 0
    if departure("zero_terminal_snr", case):
        assert zero_terminal.all_snr[-1] == 0
    else:
        assert zero_terminal.all_snr[-1] == pytest.approx(case["all_snr_last_after_fix"])


def quantity(case: dict, schedule: NoiseSchedule) -> torch.Tensor:
    """What a case of loss_weights measured, computed here with ``schedule``."""
    timesteps, kind = torch.tensor(case["timesteps"]), case["quantity"]
    if kind == "alphas_cumprod":
        return schedule.alphas_cumprod[timesteps]
    if kind == "betas":
        alphas = schedule.alphas_cumprod
        return 1 - (alphas / torch.cat([torch.ones(1), alphas[:-1]]))[timesteps]
    if kind.startswith("all_snr"):
        return schedule.snr(timesteps)
    if kind == "huber_threshold":
        keys = ("huber_schedule", "huber_c", "huber_scale")
        return huber_threshold(timesteps, schedule, LossOptions(**{key: case[key] for key in keys}))
    options = {
        "min_snr_weight": lambda: LossOptions(min_snr_gamma=case["gamma"]),
        "scale_v_pred_loss_like_noise_pred": lambda: LossOptions(scale_v_pred_loss_like_noise_pred=True),
        "v_pred_like_loss": lambda: LossOptions(v_pred_like_loss=case["weight"]),
        "debiased_estimation": lambda: LossOptions(debiased_estimation_loss=True),
    }[kind]()
    ones = torch.ones(len(timesteps))
    return weight_loss(ones, timesteps, schedule, options, v_prediction=case.get("v_parameterization", False))


def by_the_rule(case: dict) -> torch.Tensor:
    """Our values where we depart, in float64: by the SNR of the betas in force, and with huber_scale."""
    alphas = NoiseSchedule.create(zero_terminal_snr=case["zero_terminal_snr"]).alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    divisor = torch.where(snr > 0, snr, snr[snr > 0].min())
    at = torch.tensor(case["timesteps"])
    s, d, v = snr[at], divisor[at], case.get("v_parameterization", False)
    kind, gamma = case["quantity"], case.get("gamma")
    if kind.startswith("all_snr"):
        return s
    if kind == "huber_threshold":
        c = case["huber_c"]
        return case["huber_scale"] * ((1 - c) / (1 + ((1 - alphas[at]) / alphas[at]).sqrt()) ** 2 + c)
    if kind == "min_snr_weight":
        return s.clamp(max=gamma) / (s + 1) if v else d.clamp(max=gamma) / d
    s, d = s.clamp(max=1000), d.clamp(max=1000)
    if kind == "scale_v_pred_loss_like_noise_pred":
        return s / (s + 1)
    if kind == "v_pred_like_loss":
        return 1 + case["weight"] * (d + 1) / d
    return 1 / (s + 1) if v else d**-0.5


@pytest.mark.parametrize("case", golden_cases("loss_weights"))
def test_golden_loss_weights(case):
    found = quantity(case, NoiseSchedule.create(zero_terminal_snr=case["zero_terminal_snr"]))
    assert torch.isfinite(found).all()
    if departure("loss_weights", case):
        assert not np.allclose(found, case["values"], rtol=1e-4)
        # ᾱ near 0 carries few float32 digits, and 1/ᾱ no more.
        close(found, by_the_rule(case), rtol=1e-4, atol=1e-7)
    elif case["quantity"] == "betas":
        close(found, case["values"], rtol=0, atol=2e-7)
    else:
        close(found, case["values"], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("case", golden_cases("conditional_loss"))
def test_golden_conditional_loss(case, schedule):
    arrays = tensors_of("conditional_loss", case)
    keys = ("loss_type", "huber_schedule", "huber_c", "huber_scale")
    options = LossOptions(**{key: case[key] for key in keys if key in case})
    timesteps = torch.tensor(case["timesteps"])
    loss = elementwise_loss(arrays["pred"], arrays["target"], timesteps, schedule, options)
    close(loss, arrays["loss"], rtol=1e-5, atol=1e-6)
    whole = per_sample_loss(arrays["pred"], arrays["target"], timesteps, schedule, options, v_prediction=False)
    close(whole, case["per_sample_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", golden_cases("masked_loss"))
def test_golden_masked_loss(case):
    arrays = tensors_of("masked_loss", case)
    if "conditioning_images" in arrays:  # in [-1, 1], the first channel counts, and it wins over alpha
        mask = arrays["conditioning_images"].float()[:, :1] / 2 + 0.5
    else:
        mask = arrays["alpha_masks"].float()[:, None]
    masked = apply_mask(arrays["loss"], mask)
    close(masked, arrays["out"], rtol=1e-4, atol=1e-5)
    close(masked.mean(dim=(1, 2, 3)), case["per_sample_mean"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", golden_cases("timesteps"))
def test_golden_timesteps(case):
    timesteps = draw_timesteps(case["n"], case["min_timestep"], case["max_timestep"], generator(0))
    assert str(timesteps.dtype) == case["dtype"]
    lowest, highest = case["observed_min"], case["observed_max"]
    assert timesteps.max() < (case["max_timestep"] or 1000) or lowest == highest
    # Which of the outermost timesteps so many draws meet is chance.
    near = pytest.approx((lowest, highest), abs=0.01 * (highest - lowest))
    assert (timesteps.min().item(), timesteps.max().item()) == near


def noise_options(arguments: list[str]) -> NoiseOptions:
    return Options.from_values(read_values(build_parser("", "sd"), arguments)).noise


@pytest.mark.parametrize("case", golden_cases("noise"))
def test_golden_noise(case):
    arrays = tensors_of("noise", case)
    draws = generator(case["torch_seed_before_call"])
    if case["fn"] == "apply_noise_offset":
        out = offset_noise(
            arrays["noise"], arrays["latents"], case["noise_offset"], case["adaptive_noise_scale"], draws
        )
        close(out, arrays["out"], rtol=1e-5, atol=1e-6)
    elif case["fn"] == "pyramid_noise_like":
        rng = random.Random(case["python_random_seed_before_call"])
        out = pyramid_noise(arrays["noise"], case["iterations"], case["discount"], draws, rng)
        close(out, arrays["out"], rtol=1e-5, atol=1e-5)
        assert out.std() == pytest.approx(case["std_out"], abs=1e-5)
    else:
        options = noise_options(case["argv"])
        schedule = NoiseSchedule.create(zero_terminal_snr=options.zero_terminal_snr)
        latents = arrays["latents"]
        draw = sample_noise(latents, options, draws, random.Random(case["python_random_seed_before_call"]))
        assert draw.timesteps.tolist() == case["timesteps"]
        close(draw.noise, arrays["noise"], rtol=1e-5, atol=1e-5)
        noisy = schedule.add_noise(latents, draw.input_noise, draw.timesteps)
        close(noisy, arrays["noisy"], rtol=1e-5, atol=1e-5)
        velocity = schedule.target(latents, draw.noise, draw.timesteps, v_prediction=True)
        close(velocity, arrays["velocity"], rtol=1e-5, atol=1e-5)


# Beyond them

ALL_WEIGHTS = {
    "min_snr": (LossOptions(min_snr_gamma=5.0), False),
    "min_snr_v": (LossOptions(min_snr_gamma=5.0), True),
    "scale_v": (LossOptions(scale_v_pred_loss_like_noise_pred=True), True),
    "v_like": (LossOptions(v_pred_like_loss=0.1), False),
    "debiased": (LossOptions(debiased_estimation_loss=True), False),
    "debiased_v": (LossOptions(debiased_estimation_loss=True), True),
}


@pytest.mark.parametrize(("options", "v_prediction"), ALL_WEIGHTS.values(), ids=ALL_WEIGHTS)
def test_every_weight_is_finite_at_every_timestep(options, v_prediction, zero_terminal):
    loss = torch.ones(1000, requires_grad=True)
    weighted = weight_loss(loss, torch.arange(1000), zero_terminal, options, v_prediction=v_prediction)
    weighted.sum().backward()
    assert torch.isfinite(weighted).all()
    assert torch.isfinite(loss.grad).all()
    assert (weighted >= 0).all()


def test_a_step_of_pure_noise_weighs_like_the_step_before_it(zero_terminal):
    last_two = torch.tensor([998, 999])
    for options in (LossOptions(debiased_estimation_loss=True), LossOptions(v_pred_like_loss=0.1)):
        before, last = weight_loss(torch.ones(2), last_two, zero_terminal, options, v_prediction=False)
        assert before == last


@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
def test_huber_scale_acts_in_every_schedule(kind, schedule):
    timesteps = torch.tensor([0, 500, 999])
    single = huber_threshold(timesteps, schedule, LossOptions(huber_schedule=kind, huber_scale=1.0))
    double = huber_threshold(timesteps, schedule, LossOptions(huber_schedule=kind, huber_scale=2.0))
    close(double, 2 * single)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_losses_are_finite_with_zero_terminal_snr(loss_type, zero_terminal):
    prediction = torch.randn(2, 4, 3, 3, generator=generator(0)).requires_grad_()
    target = prediction.detach().clone()  # a perfect answer, where a square root has no slope
    target[1] += 1
    timesteps = torch.tensor([999, 999])
    loss = per_sample_loss(
        prediction, target, timesteps, zero_terminal, LossOptions(loss_type=loss_type), v_prediction=True
    )
    loss.sum().backward()
    assert loss[0] == 0
    assert torch.isfinite(prediction.grad).all()


def test_first_timesteps_get_noise_even_for_half_precision_latents(schedule):
    latents = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    noisy = schedule.add_noise(latents, torch.ones(1, 4, 2, 2), torch.tensor([0]))
    assert noisy.dtype == torch.float32
    assert noisy[0, 0, 0, 0].item() == pytest.approx(0.00085**0.5, rel=1e-4)


def test_target_and_noisy_latents_determine_each_other(schedule):
    latents, noise = torch.randn(2, 3, 4, 5, 6, generator=generator(0))
    timesteps = torch.tensor([3, 500, 990])
    noisy, velocity = (f(latents, noise, timesteps) for f in (schedule.add_noise, schedule.velocity))
    signal = schedule.alphas_cumprod[timesteps].sqrt().reshape(-1, 1, 1, 1)
    close(signal * noisy - (1 - signal**2).sqrt() * velocity, latents, rtol=1e-4, atol=1e-5)


EVERY_NOISE = NoiseOptions(
    noise_offset=0.1,
    noise_offset_random_strength=True,
    adaptive_noise_scale=0.05,
    multires_noise_iterations=4,
    ip_noise_gamma=0.1,
    ip_noise_gamma_random_strength=True,
    min_timestep=100,
    max_timestep=900,
)


@pytest.mark.parametrize("options", [NoiseOptions(), EVERY_NOISE], ids=["plain", "everything"])
def test_a_samples_noise_does_not_depend_on_its_batch(options):
    latents = torch.randn(3, 4, 8, 6, generator=generator(0))
    together = draw_noise(latents, options, [5, 6, 7])
    alone = draw_noise(latents[1:2], options, [6])
    for name in ("noise", "input_noise", "timesteps"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    assert not torch.equal(together.noise[0], together.noise[1])


def test_noise_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    draw_noise(torch.zeros(1, 4, 8, 8), EVERY_NOISE, [1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_input_perturbation_leaves_the_target_alone():
    latents = torch.zeros(1, 4, 64, 64)
    plain = draw_noise(latents, NoiseOptions(), [1])
    perturbed = draw_noise(latents, NoiseOptions(ip_noise_gamma=0.5), [1])
    assert torch.equal(perturbed.noise, plain.noise)
    assert (perturbed.input_noise - perturbed.noise).std().item() == pytest.approx(0.5, rel=0.05)


def test_random_strengths_vary_between_zero_and_the_value():
    latents = torch.zeros(1, 4, 32, 32)
    options = NoiseOptions(ip_noise_gamma=1.0, ip_noise_gamma_random_strength=True)
    spreads = [(d.input_noise - d.noise).std().item() for d in (draw_noise(latents, options, [s]) for s in range(40))]
    assert max(spreads) <= 1.05
    assert min(spreads) < 0.3
    assert max(spreads) > 0.7


def test_pyramid_noise_has_a_spread_of_one_and_is_smoother():
    latents = torch.zeros(1, 4, 64, 64)

    def roughness(noise):
        return (noise[..., 1:] - noise[..., :-1]).std().item()

    plain = draw_noise(latents, NoiseOptions(), [1]).noise
    pyramid = draw_noise(latents, NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.8), [1]).noise
    assert pyramid.std().item() == pytest.approx(1, abs=1e-4)
    assert roughness(pyramid) < 0.9 * roughness(plain)


def test_timesteps_cover_their_range_evenly():
    timesteps = draw_timesteps(20000, 100, 200, generator(0))
    counts = torch.bincount(timesteps, minlength=1000)
    assert counts[:100].sum() == counts[200:].sum() == 0
    assert counts[100:200].min() > 120
    assert counts[100:200].max() < 280


def test_per_sample_loss_applies_everything_in_order(schedule):
    prediction, target = torch.ones(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., :16] = 1  # the left half: half the loss, which is not brought back by the mask's area
    timesteps = torch.tensor([10, 10])
    found = per_sample_loss(
        prediction,
        target,
        timesteps,
        schedule,
        LossOptions(min_snr_gamma=5.0),
        v_prediction=False,
        mask=mask,
        loss_weights=torch.tensor([1.0, 0.25]),
    )
    weight = 5 / schedule.snr(timesteps)[0].item()
    close(found, [0.5 * weight, 0.125 * weight])


def test_the_loss_of_half_precision_predictions_is_float32(schedule):
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square is beyond float16
    loss = per_sample_loss(
        prediction, torch.zeros(1, 4, 2, 2), torch.tensor([1]), schedule, LossOptions(), v_prediction=False
    )
    assert loss.dtype == torch.float32
    assert loss.item() == 90000
