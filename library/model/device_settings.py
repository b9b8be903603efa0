"""What is set for the device that computes: how exact float32 is, how weights lie in memory, how memory grows."""

import logging
import os
import sys
from collections.abc import Collection

import torch

from library.options.training import RuntimeOptions
from library.support.errors import UserError

logger = logging.getLogger(__name__)

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# The first cards with TF32 (Ampere), and the first with tensor cores for half precision (Volta).
_WITH_TF32, _WITH_TENSOR_CORES = (8, 0), (7, 0)


def check_device(options: RuntimeOptions, device: torch.device) -> None:
    """Refuse what the device cannot do, before any model is loaded. Raises UserError."""
    if options.fp8_base and device.type == "mps":
        raise UserError(
            "--fp8_base does not work on Apple's GPUs: PyTorch has no 8-bit floats there. Leave it out; "
            "--gradient_checkpointing and --mixed_precision=bf16 save memory too."
        )


def set_tf32(options: RuntimeOptions, device: torch.device) -> None:
    """Multiply float32 matrices in TF32 if ``--allow_tf32`` is given, as far as the card can; else exactly."""
    possible = _is_nvidia(device, _WITH_TF32)
    if options.allow_tf32 and not possible:
        logger.info("--allow_tf32 has no effect: only NVIDIA GPUs from the RTX 30 series on have TF32.")
    elif options.allow_tf32:
        logger.info("float32 matrices are multiplied in TF32, with 10 bits of their 23 (--allow_tf32).")
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32 and possible


def fastest_format(device: torch.device | str, dtype: torch.dtype) -> torch.memory_format:
    """How convolution weights should lie in memory: the channels last where NVIDIA's tensor cores take them so.

    Elsewhere they stay as they are: in float32, and on other devices, nothing is won.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if half and _is_nvidia(torch.device(device), _WITH_TENSOR_CORES):
        return torch.channels_last
    return torch.preserve_format


def let_memory_grow(sizes: Collection[object], device: torch.device) -> None:
    """Let the GPU's memory be taken in pieces that can grow, where batches are of several ``sizes``.

    Otherwise what one size leaves is too small for the next, and memory is full while much of it is unused. What the
    user has set of PyTorch's allocator stays.
    """
    chosen = any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES)
    if chosen or len(sizes) < 2 or not _is_nvidia(device) or not sys.platform.startswith("linux"):
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _is_nvidia(device: torch.device, capability: tuple[int, int] = (0, 0)) -> bool:
    """Whether this is one of NVIDIA's GPUs, of a generation that can do what is asked."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= capability
