"""Counts where a program would wait for its GPU, on a machine without one.

Tensors that were sent to "the device", and all that is computed of them, are told from the others although everything
is on the CPU: reading one of them back is a wait, and using one together with a tensor of the CPU would be an error.
"""

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.data import batches
from library.embedding import prompt_encoder as text_encoding
from library.model import vae as frozen_vae
from library.support import transfers
from library.training import diffusion

_SENDING = (batches, diffusion, frozen_vae, text_encoding)
# What reads values, or needs them to know the size of its result.
_READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
_READ_BY_METHOD = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class SimulatedDevice:
    """What is on the device, by storage; all of it is held, so that no storage's place is taken by another."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._held = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self.waits: list[str] = []
        self.strays: list[str] = []

    def take(self, tensor: Tensor) -> Tensor:
        """From here on ``tensor`` is on the device."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage
        return tensor

    def give_back(self, tensor: Tensor) -> Tensor:
        """From here on ``tensor``, a copy, is on the CPU."""
        del self._held[tensor.untyped_storage()._cdata]
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    @contextmanager
    def watched(self):
        """Within a ``with``: whatever is sent or computed is known, and every wait is noted."""
        with ExitStack() as stack:
            for module in _SENDING:
                stack.enter_context(patch.object(module, "sent", self._sent))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Calls(self))
            yield self

    def _sent(self, tensor: Tensor, device: torch.device) -> Tensor:
        # A copy, as it would be: the one on the CPU stays where it is.
        return tensor if self.holds(tensor) else self.take(transfers.sent(tensor, device).clone())


class _Calls(TorchFunctionMode):
    """Calls that read without an operation of their own, and tensors that are made on the device."""

    def __init__(self, device: SimulatedDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _READ_BY_METHOD and self.device.holds(args[0]):
            self.device.waits.append(func.__name__)
            if func is Tensor.cpu:
                return self.device.give_back(func(*args, **kwargs).clone())
        result = func(*args, **kwargs)
        made_there = "device" in kwargs and kwargs["device"] not in (None, "cpu", "meta")
        if made_there and isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args):
            self.device.take(result)
        return result


class _Operations(TorchDispatchMode):
    """Every operation, those of the backward pass too: its results are where its tensors are."""

    def __init__(self, device: SimulatedDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_meta]
        there = [tensor for tensor in given if self.device.holds(tensor)]
        if not there:
            return result
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None)
        if name in _READING or by_mask:
            self.device.waits.append(name)
        # Numbers may come from the CPU.
        if not name.startswith("_foreach") and any(t.ndim and not self.device.holds(t) for t in given):
            self.device.strays.append(f"{name} of {[list(t.shape) for t in given]}")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.device.take(leaf)
        return result
