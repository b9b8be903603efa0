"""The samplers: as measured, and proven to denoise with a predictor that knows the answer."""

import functools
import importlib.util
import inspect
import sys

import pytest
import torch
from departures import departure
from golden_data import golden_cases

from library.options.output import SAMPLERS
from library.output.samplers import SAMPLER_NAMES, make_sampler, most_steps
from library.support.errors import UserError
from library.training.diffusion import NoiseSchedule

HAS_SCIPY = importlib.util.find_spec("scipy") is not None
needs_scipy = pytest.mark.skipif(not HAS_SCIPY, reason="lms needs scipy")
DISTINCT = [
    pytest.param(name, marks=needs_scipy if name == "lms" else ())
    for name in SAMPLER_NAMES
    if not name.startswith("k_")
]
# These add noise of their own at each step.
ANCESTRAL = ("ddpm", "euler_a", "dpm_2_a")
# These stop at the noise of the first timestep, σ = 0.03.
ENDING_IN_NOISE = ("pndm", "dpmsolver")


@pytest.mark.parametrize("case", golden_cases("samplers"))
def test_golden_samplers(case):
    name, v_prediction = case["sample_sampler"], case["v_parameterization"]
    departs = departure("samplers", case)
    if name not in SAMPLER_NAMES:
        assert departs
        with pytest.raises(UserError, match="sampler"):
            make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=False)
        return
    if name in ("lms", "k_lms") and not HAS_SCIPY:
        with pytest.raises(UserError, match="scipy"):
            make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=False)
        return
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=False)
    if "error" in case:
        assert departs
        works = {"lms": "LMSDiscreteScheduler", "dpmsolver": "DPMSolverMultistepScheduler"}
        assert type(sampler).__name__ == works[name.removeprefix("k_")]
        assert sampler.config.prediction_type == ("v_prediction" if v_prediction else "epsilon")
        return
    expected = case["config"] | ({"clip_sample": False} if departs else {})
    assert type(sampler).__name__ == case["class"]
    assert {key: sampler.config[key] for key in expected} == expected


def test_every_choice_of_the_option_is_a_sampler():
    assert set(SAMPLERS) <= set(SAMPLER_NAMES)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r'"euler_b".* Did you mean "euler_a"'):
        make_sampler("euler_b", v_prediction=False, zero_terminal_snr=False)


def test_lms_names_the_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match="pip install scipy"):
        make_sampler("k_lms", v_prediction=False, zero_terminal_snr=False)


class Oracle:
    """A network that knows the one clean image, and the schedule it was trained on.

    It also notes the noise it finds in each input: which shows whether the sampler's inputs are as noisy as it says.
    """

    def __init__(self, picture: torch.Tensor, *, v_prediction: bool, zero_terminal_snr: bool):
        alphas = NoiseSchedule.create(zero_terminal_snr=zero_terminal_snr).alphas_cumprod.double()
        self.log_sigmas = (1 / alphas.clamp(min=2**-24) - 1).sqrt().log()
        self.picture = picture
        self.v_prediction = v_prediction
        self.noises: list[torch.Tensor] = []

    def __call__(self, noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        below = int(timestep)
        above = min(below + 1, len(self.log_sigmas) - 1)  # some samplers ask between two timesteps
        log_sigma = torch.lerp(self.log_sigmas[below], self.log_sigmas[above], timestep - below)
        signal, spread = (1 + (2 * log_sigma).exp()).rsqrt(), (1 + (-2 * log_sigma).exp()).rsqrt()
        noise = (noisy - signal * self.picture) / spread
        self.noises.append(noise)
        return (signal * noise - spread * self.picture if self.v_prediction else noise).float()


def denoise(sampler, oracle: Oracle, steps: int) -> torch.Tensor:
    """The image that the sampler makes from noise."""
    generator = torch.Generator().manual_seed(1)
    sampler.set_timesteps(steps)
    step = sampler.step
    if "generator" in inspect.signature(step).parameters:
        step = functools.partial(step, generator=generator)
    latents = torch.randn(oracle.picture.shape, generator=generator) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        prediction = oracle(sampler.scale_model_input(latents, timestep), float(timestep))
        latents = step(prediction, timestep, latents).prev_sample
    return latents


def size(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))


def unlikeness(name: str, oracle: Oracle) -> float:
    """How far the inputs of a run were from what they should be.

    Of a deterministic sampler every input is the image and the noise it began with, mixed as the schedule says for
    the timestep. What other samplers mix in has a spread of 1, too.
    """
    if name in ANCESTRAL:
        return max(abs(noise.std().item() - 1) for noise in oracle.noises)
    return max(size(noise - oracle.noises[0]) for noise in oracle.noises)


def usual_unlikeness(name: str, v_prediction: bool) -> float:
    """PNDM averages the velocities of several timesteps, as if they were equal."""
    return 1 if name == "pndm" and v_prediction else 0.05 if name in ANCESTRAL else 0.01


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("name", DISTINCT)
def test_a_perfect_predictor_leads_to_the_image(name, v_prediction, zero_terminal_snr, steps, picture):
    oracle = Oracle(picture, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    found = denoise(sampler, oracle, steps)
    assert size(found - picture) < (0.04 if name in ENDING_IN_NOISE else 1e-3)
    assert unlikeness(name, oracle) < usual_unlikeness(name, v_prediction)


@pytest.mark.parametrize("name", DISTINCT)
def test_the_predictor_notices_another_prediction_or_schedule(name, picture):
    """A perfect predictor corrects what a sampler does wrong: the inputs on the way show it, not the result."""
    for v_prediction in (False, True):
        oracle = Oracle(picture, v_prediction=not v_prediction, zero_terminal_snr=False)
        denoise(make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=False), oracle, 10)
        assert unlikeness(name, oracle) > usual_unlikeness(name, v_prediction)
    if name not in (*ANCESTRAL, "pndm"):
        oracle = Oracle(picture, v_prediction=True, zero_terminal_snr=True)
        denoise(make_sampler(name, v_prediction=True, zero_terminal_snr=False), oracle, 10)
        assert unlikeness(name, oracle) > usual_unlikeness(name, True)


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "lms"])  # which takes half a minute for it
def test_the_most_steps_work(name, v_prediction, picture):
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=False)
    oracle = Oracle(picture, v_prediction=v_prediction, zero_terminal_snr=False)
    assert size(denoise(sampler, oracle, min(1000, most_steps(sampler))) - picture) < 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 30])
@pytest.mark.parametrize("name", DISTINCT)
def test_any_number_of_steps_works(name, steps, picture):
    """DDIM and PNDM take all steps to be equally wide, and end a little early where that is not so."""
    oracle = Oracle(picture, v_prediction=True, zero_terminal_snr=True)
    found = denoise(make_sampler(name, v_prediction=True, zero_terminal_snr=True), oracle, steps)
    assert size(found - picture) < (0.05 if steps > 3 else 0.2)


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("v_prediction", [False, True])
def test_with_zero_terminal_snr_sampling_begins_with_pure_noise(v_prediction, name):
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=True)
    expected = NoiseSchedule.create(zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(sampler.alphas_cumprod, expected, rtol=1e-4, atol=1e-7)
    sampler.set_timesteps(20)
    assert sampler.timesteps[0] == 999
    assert all(sampler.alphas_cumprod[:-1] > 0)


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name.startswith("k_")])
def test_the_names_with_k_mean_the_same(name):
    if name == "k_lms" and not HAS_SCIPY:
        pytest.skip("lms needs scipy")
    one, other = (make_sampler(n, v_prediction=True, zero_terminal_snr=True) for n in (name, name[2:]))
    assert (type(one), one.config) == (type(other), other.config)


def test_samplers_are_fresh():
    one, other = (make_sampler("euler", v_prediction=False, zero_terminal_snr=False) for _ in range(2))
    assert one is not other
