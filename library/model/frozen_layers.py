"""Frozen layers that keep little for the backward pass: 8-bit weights, and convolutions that drop their input.

Gradients must pass through the frozen U-Net to reach the trained rows. For a frozen ``nn.Linear`` PyTorch saves nothing
but the weight, for a frozen ``nn.Conv2d`` the input as well, which only the weight's gradient would need. And where a
stored 8-bit weight is dequantized in an ordinary forward, autograd keeps every such weight until the backward pass. The
two functions here save the weight as it is stored, and dequantize it a second time in backward.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

FLOAT8 = torch.float8_e4m3fn
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class _Context(Protocol):
    """What autograd hands on from forward to backward."""

    saved_tensors: tuple[Tensor, Tensor | None]
    input_shape: torch.Size
    geometry: Geometry

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors as ``saved_tensors``."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``weight`` as float8 of the same shape, and the float32 scale [outputs, 1, …] to multiply it by.

    Each output's largest weight becomes float8's largest value: small weights would otherwise fall among float8's
    coarse subnormal numbers (below 0.016), which is where many weights of a U-Net are.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    scale = torch.where(largest > 0, largest / torch.finfo(FLOAT8).max, 1.0)
    return (weight / scale).to(FLOAT8), scale


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight that :func:`quantize` stored, in ``dtype``; one that was never quantized has no scale.

    Every float8 number is one of ``dtype`` too. The product is taken in float32, element by element inside the one
    multiplication, since scales are small enough to lose digits in fp16: no float32 copy of the weight is ever made.
    """
    return weight.to(dtype) if scale is None else weight.to(dtype).mul_(scale)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ dequantize(*ctx.saved_tensors, grad.dtype), None, None, None


class _FrozenConv2d(torch.autograd.Function):
    """A convolution with a gradient for x alone; ``geometry`` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.input_shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, dequantize(weight, scale, x.dtype), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight = dequantize(*ctx.saved_tensors, grad.dtype)
        return conv2d_input(ctx.input_shape, weight, grad, *ctx.geometry), None, None, None, None


def _applied(function: type[torch.autograd.Function], *arguments: Tensor | Geometry | None) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


class FrozenLayer(nn.Module):
    """A layer without gradients of its own; ``float8`` stores its weight in 8 bits with a float32 ``scale``.

    8-bit weights are buffers, so that "the dtype of the module", which diffusers reads off the parameters, stays that
    of the computation. The bias keeps the computing dtype always.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, float8: bool) -> None:
        super().__init__()
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        if float8:
            weight, scale = quantize(layer.weight)
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)
        else:
            self.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
            self.scale = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLayer":
        """Follow the module to its device and its order in memory, but keep the stored dtypes when it is cast."""
        stored = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's is not annotated
        for name, tensor in stored.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, torch.empty_like(moved, dtype=tensor.dtype).copy_(tensor))
        return self


class FrozenLinear(FrozenLayer):
    """A frozen ``nn.Linear``: [.., inputs] → [.., outputs]."""

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b in x's dtype."""
        return _applied(_FrozenLinear, x, self.weight, self.scale, self.bias)


class FrozenConv2d(FrozenLayer):
    """A frozen ``nn.Conv2d`` with zero padding: [B, inputs, H, W] → [B, outputs, H', W']."""

    def __init__(self, layer: nn.Conv2d, float8: bool) -> None:
        super().__init__(layer, float8)
        if isinstance(layer.padding, str):
            raise ValueError(f"a convolution whose padding is {layer.padding!r}, not numbers")
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution in x's dtype."""
        return _applied(_FrozenConv2d, x, self.weight, self.scale, self.bias, self.geometry)


def _replacement(layer: nn.Module, float8: bool) -> FrozenLayer | None:
    if type(layer) is nn.Linear and float8:
        return FrozenLinear(layer, float8)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return FrozenConv2d(layer, float8)
    return None


def freeze_layers(
    module: nn.Module, *, float8: bool = False, fill: Callable[[nn.Module, str], None] | None = None, path: str = ""
) -> int:
    """Replace, in place, the layers below ``module`` that can keep less; return how many were replaced.

    Without ``float8``: convolutions, which no longer save their input; results stay the same to the last bit. With it,
    linear layers too, and all these weights are stored in 8 bits. Norms, embeddings and biases stay as they are. Call
    it when ``module`` has its computing dtype, or let ``fill`` give each layer its weights: it is called with the layer
    and its name (``path`` is that of ``module``) just before the layer is replaced, so that only one at a time is
    whole.
    """
    replaced = 0
    for name in [name for name, _ in module.named_children()]:  # a list of the layers would keep their weights alive
        child, child_path = module.get_submodule(name), f"{path}{name}."
        if fill:
            fill(child, child_path)
        replacement = _replacement(child, float8)
        if replacement is None:
            replaced += freeze_layers(child, float8=float8, fill=fill, path=child_path)
        else:
            setattr(module, name, replacement)
            replaced += 1
    return replaced
