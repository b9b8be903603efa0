"""How many bytes of tensors are held at once, counted tensor by tensor: exact, and the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """Within a ``with``: watches tensors being made; ``most`` is the largest sum of bytes held at any time.

    What was there before is not counted, nor are views, those of a mapped file among them.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation, then count what it made."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _add(self, size: int) -> None:
        self.now += size
