"""The way of a tensor from the main memory to the device that computes, without anyone waiting for it."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``; one that is there already is returned as it is.

    An NVIDIA GPU takes it from page-locked memory whenever it gets there: from ordinary memory, the program would wait
    until all that it asked of the GPU before is done.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")  # elsewhere the source may be gone too early
