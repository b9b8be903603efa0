"""What is said about the device, on machines that are simulated."""

from types import SimpleNamespace

import pytest
import torch

from library.model import device_report
from library.model.device_report import describe_device, unused_gpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set what PyTorch and the system say: ``machine(cuda=…, gpu=…, driver=…)``."""

    def simulate(*, cuda=None, gpu=False, driver=False):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
        card = SimpleNamespace(name="NVIDIA GeForce RTX 3060", total_memory=12 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        place = tmp_path / "version"
        if driver:
            place.touch()
        monkeypatch.setattr(device_report, "LINUX_DRIVER", place)
        monkeypatch.setattr(device_report.shutil, "which", lambda name: None)
        monkeypatch.setenv("SYSTEMROOT", str(tmp_path))

    return simulate


def test_a_gpu_is_named_with_memory_precision_and_versions(machine):
    machine(cuda="12.8", gpu=True, driver=True)
    said = describe_device(torch.device("cuda", 0), "bf16")
    assert said.startswith("the GPU NVIDIA GeForce RTX 3060 (12.0 GiB) in bf16, with PyTorch ")
    assert said.endswith("(CUDA 12.8, driver up to CUDA 12.4)")


def test_a_cpu_is_named_with_its_threads(machine, monkeypatch):
    machine()
    for count, words in ((1, "1 thread "), (2, "2 threads ")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert f"the CPU with {words}in float32" in describe_device(torch.device("cpu"), "no")


def test_other_devices_are_named(machine):
    machine()
    assert "the device mps in fp16" in describe_device(torch.device("mps"), "fp16")


def test_a_gpu_that_this_pytorch_cannot_use_is_a_warning(machine):
    machine(driver=True)
    assert "built without CUDA" in unused_gpu(cpu_chosen=False)
    machine(cuda="13.0", driver=True)
    assert "the driver is too old" in unused_gpu(cpu_chosen=False)


@pytest.mark.parametrize(
    ("details", "cpu_chosen"), [({}, False), ({"driver": True}, True), ({"driver": True, "gpu": True}, False)]
)
def test_nothing_amiss(machine, details, cpu_chosen):
    machine(**details)
    assert unused_gpu(cpu_chosen) is None
