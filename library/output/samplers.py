"""The samplers of sample images: diffusers' schedulers over the schedule and prediction the model is trained on."""

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from library.support.errors import UserError, did_you_mean
from library.training.diffusion import BETAS, NoiseSchedule

_Settings = dict[str, Any]


class Step(Protocol):
    """What one step of a sampler gives: latents with less noise."""

    prev_sample: Tensor


class Sampler(Protocol):
    """What is asked of diffusers' schedulers; ``step`` may also take generators, for noise of its own."""

    timesteps: Tensor
    init_noise_sigma: float | Tensor

    def set_timesteps(self, num_inference_steps: int, *, device: torch.device) -> None:
        """Choose the ``timesteps``."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The latents as the U-Net expects them at a timestep."""

    @property
    def step(self) -> Callable[..., Step]:
        """From the U-Net's prediction, the timestep and the latents to the next latents."""


# diffusers' class, and what its usual settings would get wrong.
_SAMPLERS: dict[str, tuple[str, _Settings]] = {
    # Latents do not lie within ±1, where these two would cut them.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    # Its Runge-Kutta start cannot do fewer than 4 steps. Stable Diffusion's own settings leave it out, too.
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    # This form of the solver works with the noise, which is not defined where there is none left.
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    # What diffusers would switch to by itself, with a warning for each image.
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
_SAMPLERS |= {f"k_{name}": _SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}

SAMPLER_NAMES = tuple(_SAMPLERS)

# The multistep solver meets one timestep twice in 1000 steps, and divides by the difference.
_MOST_STEPS = {"DPMSolverMultistepScheduler": 999}

# Instead of 0, which most samplers divide by; diffusers takes it for the same purpose.
_LAST_ALPHA = 2**-24


def check_sampler(name: str) -> None:
    """Raise UserError where no sampler has this name, or where it is lms and scipy is missing."""
    if name not in _SAMPLERS:
        raise UserError(
            f'The sampler "{name}" is not known. Choose one of {", ".join(SAMPLER_NAMES)}.'
            f"{did_you_mean(name, SAMPLER_NAMES)}"
        )
    if _SAMPLERS[name][0] == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        raise UserError(f'The sampler "{name}" needs the package scipy: pip install scipy. Or choose another sampler.')


def make_sampler(name: str, *, v_prediction: bool, zero_terminal_snr: bool) -> Sampler:
    """A fresh sampler for a model that predicts the noise, or with ``v_prediction`` the velocity.

    With ``zero_terminal_snr`` the sampler follows the schedule that ends in pure noise, and begins there. Raises
    UserError as :func:`check_sampler` does.
    """
    check_sampler(name)
    class_name, settings = _SAMPLERS[name]
    scheduler_class = getattr(diffusers, class_name)
    settings = settings | BETAS | {"prediction_type": "v_prediction" if v_prediction else "epsilon"}
    if zero_terminal_snr:
        settings |= _zero_terminal_settings(scheduler_class, v_prediction=v_prediction)
    with warnings.catch_warnings():
        # diffusers advises against "dpmsolver"; who asks for it by name shall have it.
        warnings.simplefilter("ignore", FutureWarning)
        sampler: Sampler = scheduler_class(**settings)
    return sampler


def most_steps(sampler: Sampler) -> int:
    """How many steps a sampler can take; up to 1000, the number of timesteps."""
    return _MOST_STEPS.get(type(sampler).__name__, 1000)


def _zero_terminal_settings(scheduler_class: type, *, v_prediction: bool) -> _Settings:
    known = inspect.signature(scheduler_class).parameters
    # The one spacing of timesteps in common that begins with the last one; a class without the choice does so anyway.
    settings: _Settings = {"timestep_spacing": "trailing"} if "timestep_spacing" in known else {}
    # Some classes that rescale by themselves keep a last ᾱ of 0, which only velocities can do with.
    if v_prediction and "rescale_betas_zero_snr" in known:
        return settings | {"rescale_betas_zero_snr": True}
    return settings | {"trained_betas": _zero_terminal_betas()}


def _zero_terminal_betas() -> list[float]:
    """The betas whose ᾱ is that of the rescaled schedule, but for a last one just above 0."""
    alphas = NoiseSchedule.create(zero_terminal_snr=True).alphas_cumprod.double()
    alphas[-1] = _LAST_ALPHA
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    betas: list[float] = (1 - alphas / before).tolist()
    return betas
