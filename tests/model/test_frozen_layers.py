"""Frozen layers: 8-bit weights that gradients pass through, and what the backward pass keeps."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from held_memory import HeldMemory
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.model.frozen_layers import (
    FLOAT8,
    FrozenConv2d,
    FrozenLayer,
    FrozenLinear,
    dequantize,
    freeze_layers,
    quantize,
)


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """A layer of each kind with a shape it takes."""
    torch.manual_seed(0)
    return [
        (nn.Linear(12, 20), (2, 5, 12)),
        (nn.Linear(12, 20, bias=False), (7, 12)),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=2), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 1, bias=False), (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5)),
    ]


NAMES = ["linear", "linear_no_bias", "conv", "conv_stride_dilation", "conv_no_bias", "conv_groups"]
EVERY_LAYER = pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)


def frozen(layer: nn.Module, *, float8: bool) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer).requires_grad_(False))
    freeze_layers(model, float8=float8)
    return model[0]


def result_and_gradient(layer: nn.Module, shape: tuple, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad


def saved_for_backward(model: nn.Module, *inputs) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(*inputs)
    del result
    return sum(size for size, _ in kept.values())


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_layers_compute_with_the_unfolded_weight(number, dtype):
    layer, shape = layers()[number]
    layer = layer.to(dtype)
    quantized = frozen(layer, float8=True)
    reference = copy.deepcopy(layer).requires_grad_(False)
    reference.weight.copy_(dequantize(*quantize(layer.weight), dtype))
    for found, expected in zip(
        result_and_gradient(quantized, shape, dtype), result_and_gradient(reference, shape, dtype), strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


@EVERY_LAYER
def test_float8_layers_stay_near_the_original(number):
    layer, shape = layers()[number]
    pairs = zip(result_and_gradient(frozen(layer, float8=True), shape), result_and_gradient(layer, shape), strict=True)
    for found, expected in pairs:
        assert 0 < (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.02, 30.0])
def test_folding_keeps_small_and_large_weights(spread):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * spread
    weight[0] = 0
    for dtype in (torch.float32, torch.bfloat16):
        error = (dequantize(*quantize(weight), dtype).float() - weight).norm() / weight.norm()
        assert error < 0.03


def test_folding_for_half_precision_loses_nothing_to_small_scales():
    weight = torch.full((2, 8), 2e-4)
    torch.testing.assert_close(dequantize(*quantize(weight), torch.float16), weight.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unfolding_rounds_once(dtype):
    """Every float8 number times scales of all sizes: the float32 product, rounded to the computing dtype."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(64, 1).view(FLOAT8)
    scale = torch.logspace(-9, 1, 64).unsqueeze(1)
    expected = (weight.float() * scale).to(dtype)
    assert torch.equal(dequantize(weight, scale, dtype).nan_to_num(0), expected.nan_to_num(0))


def test_unfolding_makes_no_float32_copy():
    weight, scale = quantize(torch.randn(64, 256))
    with HeldMemory() as memory:
        dequantize(weight, scale, torch.bfloat16)
    assert memory.most == 2 * weight.numel()


@EVERY_LAYER
def test_only_the_stored_weight_is_kept_for_the_backward_pass(number):
    layer, shape = layers()[number]
    quantized = frozen(layer, float8=True)
    x = torch.randn(shape, requires_grad=True)
    assert saved_for_backward(quantized, x) == 0
    assert quantized.weight.dtype == FLOAT8
    assert quantized.weight.element_size() == 1
    assert quantized.weight.numel() == layer.weight.numel()

    class Naive(nn.Module):  # what an ordinary forward with a cast would keep
        def forward(self, x):
            return nn.functional.linear(x, dequantize(quantized.weight, quantized.scale, x.dtype))

    if isinstance(layer, nn.Linear):
        assert saved_for_backward(Naive(), x) >= layer.weight.numel() * 4


def test_plain_frozen_convolutions_drop_their_input_and_linear_layers_have_none():
    convolution, shape = layers()[2]
    x = torch.randn(shape, requires_grad=True)
    convolution.requires_grad_(False)
    assert saved_for_backward(convolution, x) == x.nbytes
    assert saved_for_backward(frozen(convolution, float8=False), x) == 0
    linear, shape = layers()[0]
    assert saved_for_backward(linear.requires_grad_(False), torch.randn(shape, requires_grad=True)) == 0
    assert type(frozen(linear, float8=False)) is nn.Linear


@pytest.mark.parametrize("number", [2, 3, 4, 5], ids=NAMES[2:])
def test_plain_frozen_convolutions_change_nothing(number):
    layer, shape = layers()[number]
    pairs = zip(result_and_gradient(frozen(layer, float8=False), shape), result_and_gradient(layer, shape), strict=True)
    for found, expected in pairs:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("number", [0, 2], ids=["linear", "conv"])
def test_gradient_checkpointing_gives_the_same_gradient(number, reentrant):
    layer, shape = layers()[number]
    quantized = frozen(layer, float8=True)
    expected = result_and_gradient(quantized, shape)
    found = result_and_gradient(lambda x: checkpoint(quantized, x, use_reentrant=reentrant), shape)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("float8", [False, True])
def test_autocast_decides_the_dtype_as_for_plain_layers(float8):
    for layer, shape in (layers()[0], layers()[2]):
        with torch.autocast("cpu", torch.bfloat16):
            y, gradient = result_and_gradient(frozen(layer, float8=float8), shape)
            expected = layer(torch.zeros(shape))
        assert y.dtype == expected.dtype == torch.bfloat16
        assert gradient.dtype == torch.float32


def test_moving_and_casting_keep_what_is_stored():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert freeze_layers(model, float8=True) == 1
    stored = model[0].weight.float()
    for moved in (model.to(torch.bfloat16), model.half(), model.to("cpu", torch.float32)):
        assert moved[0].weight.dtype == FLOAT8
        assert moved[0].scale.dtype == torch.float32
        assert torch.equal(moved[0].weight.float(), stored)
        assert moved[0].bias.dtype == moved[1].weight.dtype
    assert model.to("meta")[0].weight.device.type == "meta"


def test_what_cannot_be_replaced_stays():
    model = nn.ModuleList(
        [
            nn.Conv2d(2, 2, 3, padding="same"),
            nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1),
            nn.ConvTranspose2d(2, 2, 3),
            nn.Embedding(3, 3),
        ]
    )
    assert freeze_layers(model, float8=True) == 0


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=32,
        block_out_channels=(32, 64),
        attention_head_dim=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model.requires_grad_(False).eval()


def run(model: UNet2DConditionModel, context: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).to(context.dtype)
    return model(latents, torch.tensor([500]), context).sample


def gradient_of(model: UNet2DConditionModel, dtype=torch.float32) -> torch.Tensor:
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    run(model, context).float().square().mean().backward()
    return context.grad.float()


def test_a_whole_unet_trains_through_float8_weights(unet):
    quantized = copy.deepcopy(unet)
    replaced = freeze_layers(quantized, float8=True)
    assert replaced == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in unet.modules())
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in quantized.modules())
    assert {FrozenLinear, FrozenConv2d} == {type(m) for m in quantized.modules() if isinstance(m, FrozenLayer)}
    assert quantized.dtype == unet.dtype
    cosine = torch.cosine_similarity(gradient_of(quantized).flatten(), gradient_of(unet).flatten(), dim=0)
    assert cosine > 0.98


def test_a_whole_unet_in_bfloat16_with_checkpointing(unet):
    quantized = copy.deepcopy(unet).to(torch.bfloat16)
    freeze_layers(quantized, float8=True)
    plain = gradient_of(quantized, torch.bfloat16)
    quantized.enable_gradient_checkpointing()
    assert torch.equal(gradient_of(quantized, torch.bfloat16), plain)


def test_float8_stores_a_quarter_of_float32_and_keeps_fewer_activations(unet):
    quantized, convolutions = copy.deepcopy(unet), copy.deepcopy(unet)
    freeze_layers(quantized, float8=True)
    freeze_layers(convolutions)

    def stored(model):
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    assert stored(quantized) < 0.27 * stored(unet)
    assert stored(convolutions) == stored(unet)
    context = torch.randn(1, 7, 32, requires_grad=True)
    latents = torch.randn(1, 4, 16, 16)
    kept = [saved_for_backward(m, latents, torch.tensor([500]), context) for m in (unet, convolutions, quantized)]
    assert kept[1] < 0.95 * kept[0]
    assert kept[2] <= kept[1]
