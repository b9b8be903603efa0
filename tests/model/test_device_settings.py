"""What is set for a device: TF32, the order in memory, the allocator; on machines that are simulated."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.model import device_settings
from library.model.device_settings import check_device, fastest_format, let_memory_grow, set_tf32
from library.model.frozen_layers import freeze_layers
from library.options.options import RuntimeOptions
from library.support.errors import UserError

CPU, MPS, CUDA = torch.device("cpu"), torch.device("mps"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A GPU of a generation: ``card(8, 6)``; with ``hip`` AMD's."""

    def simulate(*capability, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield simulate
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("device", "capability", "hip", "asked", "on"),
    [
        (CUDA, (8, 6), None, True, True),
        (CUDA, (8, 6), None, False, False),
        (CUDA, (7, 5), None, True, False),
        (CUDA, (9, 4), "6.3", True, False),
        (CPU, (), None, True, False),
        (MPS, (), None, True, False),
    ],
)
def test_tf32_is_used_where_it_is_asked_for_and_possible(device, capability, hip, asked, on, card, caplog):
    card(*capability, hip=hip)
    torch.backends.cuda.matmul.allow_tf32 = not on
    with caplog.at_level("INFO"):
        set_tf32(RuntimeOptions(allow_tf32=asked), device)
    assert torch.backends.cuda.matmul.allow_tf32 == on
    assert ("multiplied in TF32" in caplog.text) == on
    assert ("--allow_tf32 has no effect" in caplog.text) == (asked and not on)


def test_the_channels_are_last_where_tensor_cores_compute_in_half_precision(card):
    card(8, 9)
    assert fastest_format(CUDA, torch.bfloat16) == fastest_format("cuda", torch.float16) == torch.channels_last
    assert fastest_format(CUDA, torch.float32) == torch.preserve_format
    assert fastest_format(CPU, torch.bfloat16) == fastest_format(MPS, torch.float16) == torch.preserve_format
    card(6, 1)
    assert fastest_format(CUDA, torch.float16) == torch.preserve_format
    card(9, 4, hip="6.3")
    assert fastest_format(CUDA, torch.float16) == torch.preserve_format


@pytest.mark.parametrize("float8", [False, True])
def test_frozen_layers_keep_the_order_in_memory_and_compute_the_same(float8):
    torch.manual_seed(0)
    images = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    freeze_layers(model, float8=float8)
    before = model(images)
    data = model[0].weight.data_ptr()
    model.to(CPU, memory_format=torch.preserve_format)
    assert model[0].weight.data_ptr() == data
    model.to(CPU, memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (model[0].weight.dtype == torch.float8_e4m3fn) == float8
    assert torch.allclose(model(images), before, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "sizes", "platform", "variable", "grows"),
    [
        (CUDA, {(512, 512), (512, 576)}, "linux", None, True),
        (CUDA, {(512, 512)}, "linux", None, False),
        (CUDA, {(512, 512), (512, 576)}, "win32", None, False),
        (CUDA, {(512, 512), (512, 576)}, "linux", "PYTORCH_CUDA_ALLOC_CONF", False),
        (CUDA, {(512, 512), (512, 576)}, "linux", "PYTORCH_ALLOC_CONF", False),
        (CPU, {(512, 512), (512, 576)}, "linux", None, False),
    ],
)
def test_memory_grows_where_sizes_vary_unless_the_user_says_how(
    device, sizes, platform, variable, grows, card, monkeypatch
):
    card(8, 6)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    monkeypatch.setattr(device_settings, "sys", SimpleNamespace(platform=platform))
    said = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    let_memory_grow(sizes, device)
    assert said == (["expandable_segments:True"] if grows else [])


def test_float8_on_apples_gpus_is_refused():
    with pytest.raises(UserError, match="--fp8_base does not work on Apple's GPUs"):
        check_device(RuntimeOptions(fp8_base=True), MPS)
    check_device(RuntimeOptions(), MPS)
    check_device(RuntimeOptions(fp8_base=True), CUDA)
