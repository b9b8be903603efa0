"""What a run computes on, in words: the device, its memory, number format, and the PyTorch behind it."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

LINUX_DRIVER = Path("/proc/driver/nvidia/version")
_OLD_CARDS, _FOR_OLD_CARDS = (5, 0), "cu126"  # from Maxwell on, and for drivers from CUDA 12.6 on


def describe_device(device: torch.device, precision: str) -> str:
    """The device with name and memory, ``precision`` ("no", "fp16", "bf16"), PyTorch and driver, in words."""
    numbers = "float32" if precision == "no" else precision
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        where = f"the GPU {found.name} ({found.total_memory / 2**30:.1f} GiB)"
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"the CPU with {threads} thread{'s' * (threads != 1)}"
    else:
        where = f"the device {device}"
    return f"{where} in {numbers}, with {describe_torch()}"


def describe_torch() -> str:
    """PyTorch's version and what it was built for; with an NVIDIA GPU the newest CUDA of its driver too."""
    if torch.version.hip:
        return f"PyTorch {torch.__version__} (ROCm {torch.version.hip})"
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__}"
    driver = _cuda_of_driver() if torch.cuda.is_available() else ""
    return f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}{driver})"


def _cuda_of_driver() -> str:
    number: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # torch's stubs leave it out
    # 12040: CUDA 12.4
    return f", driver up to CUDA {number // 1000}.{number % 1000 // 10}" if number else ""


def unused_gpu(cpu_chosen: bool) -> str | None:
    """Why an NVIDIA GPU is there and not used, with what to do; None where nothing is amiss.

    ``cpu_chosen``: the user asked for the CPU.
    """
    if cpu_chosen or torch.accelerator.is_available() or not _nvidia_driver_found():
        return None
    if torch.version.cuda:
        return (
            f"An NVIDIA driver was found, but {describe_torch()} can use no GPU, and training goes on, slowly, on the "
            "CPU. If CUDA_VISIBLE_DEVICES is set, unset it. If not, the driver is too old: update it, or install a "
            f"PyTorch for an older CUDA. {_install(_FOR_OLD_CARDS)}"
        )
    return (
        f"An NVIDIA driver was found, but this PyTorch {torch.__version__} was built without CUDA (as plain pip has it "
        "on Windows), and training goes on, slowly, on the CPU. Install a build for your driver. "
        f"{_install('auto')}"
    )


def unsupported_gpu(device: torch.device) -> str | None:
    """That this PyTorch has no code for the NVIDIA GPU ``device``, with what to do; None where nothing is amiss."""
    if device.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    codes = [_code(name) for name in torch.cuda.get_arch_list()]
    if not codes or any(_runs_on(capability, kind, version) for kind, version in codes):
        return None
    said = (
        f"{describe_torch()} has no code for {torch.cuda.get_device_properties(device).name} (compute capability "
        f"{capability[0]}.{capability[1]}), only for {', '.join(torch.cuda.get_arch_list())}: the first computation "
        "will fail."
    )
    if capability < _OLD_CARDS:
        return f"{said} It is too old for PyTorch. Set ACCELERATE_USE_CPU=true to train on the CPU."
    older = capability < min(version for _, version in codes)
    return f"{said} Install a build that supports it. {_install(_FOR_OLD_CARDS if older else 'auto')}"


def _code(name: str) -> tuple[str, tuple[int, int]]:
    """``sm_86`` as ("sm", (8, 6)); the letter of ``sm_90a`` is of no account."""
    kind, number = name.split("_")
    digits = number.rstrip("af")
    return kind, (int(digits[:-1]), int(digits[-1]))


def _runs_on(card: tuple[int, int], kind: str, version: tuple[int, int]) -> bool:
    """Code for one generation (``sm``) runs on later cards of it; the other kind is compiled for any later card."""
    return version <= card and (kind == "compute" or version[0] == card[0])


def _install(build: str) -> str:
    """The commands for a build of PyTorch, on lines of their own.

    uv knows where builds are; pip would have to be told the address of an index.
    """
    python = shlex.quote(sys.executable)
    if os.name == "nt":
        python = f'& "{sys.executable}"' if " " in sys.executable else sys.executable
    release = torch.__version__.split("+")[0]
    return (
        f"These commands do it:\n  {python} -m pip install uv\n"
        f"  {python} -m uv pip install --reinstall-package torch torch=={release} --torch-backend={build}"
    )


def _nvidia_driver_found() -> bool:
    places = (LINUX_DRIVER, Path(os.environ.get("SYSTEMROOT", "")) / "System32" / "nvcuda.dll")
    return any(place.exists() for place in places) or shutil.which("nvidia-smi") is not None


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has held so far, in GiB: the GPU's, or else main memory; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
