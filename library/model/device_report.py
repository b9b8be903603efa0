"""What a run computes on, in words: the device, its memory, number format, and the PyTorch behind it."""

import os
import shutil
import sys
from pathlib import Path

import torch

LINUX_DRIVER = Path("/proc/driver/nvidia/version")


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
            f"An NVIDIA driver was found, but {describe_torch()} can use no GPU: the driver is too old for it, the GPU "
            "is not supported any more, or CUDA_VISIBLE_DEVICES hides it. Update the driver, or install a PyTorch for "
            "an older CUDA (the command is on pytorch.org, under Get Started). Training goes on, slowly, on the CPU."
        )
    return (
        f"An NVIDIA driver was found, but this PyTorch {torch.__version__} was built without CUDA. Remove it "
        "(pip uninstall torch) and install one for CUDA with the command that pytorch.org shows under Get Started: "
        "on Windows plain pip installs the one for the CPU. Training goes on, slowly, on the CPU."
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
