"""What is said about the device, on machines that are simulated."""

from types import SimpleNamespace

import pytest
import torch

from library.model import device_report, runtime
from library.model.device_report import describe_device, unsupported_gpu, unused_gpu
from library.options.options import RuntimeOptions


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


def install(build: str) -> str:
    """The last command that the warnings give, at their very end."""
    release = torch.__version__.split("+")[0]
    return f" -m uv pip install --reinstall-package torch torch=={release} --torch-backend={build}"


def test_a_gpu_that_this_pytorch_cannot_use_is_a_warning(machine):
    machine(driver=True)
    said = unused_gpu(cpu_chosen=False)
    assert "built without CUDA" in said
    assert said.endswith(install("auto"))
    machine(cuda="13.0", driver=True)
    said = unused_gpu(cpu_chosen=False)
    assert "the driver is too old" in said
    assert said.endswith(install("cu126"))  # "auto" would take the build for the CPU


@pytest.mark.parametrize(
    ("system", "python", "written"),
    [
        ("posix", "/home/me/.venv/bin/python", "/home/me/.venv/bin/python"),
        ("posix", "/home/my own/python", "'/home/my own/python'"),
        ("nt", r"C:\venv\python.exe", r"C:\venv\python.exe"),
        ("nt", r"C:\my own\python.exe", r'& "C:\my own\python.exe"'),
    ],
)
def test_the_commands_are_for_this_python(system, python, written, machine, monkeypatch):
    machine(driver=True)
    monkeypatch.setattr(device_report.sys, "executable", python)
    monkeypatch.setattr(device_report, "os", SimpleNamespace(name=system, environ={}))
    lines = unused_gpu(cpu_chosen=False).splitlines()
    assert lines[1] == f"  {written} -m pip install uv"
    assert lines[2] == f"  {written}{install('auto')}"


@pytest.mark.parametrize(
    ("capability", "codes", "build"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90"], None),  # what is made for 8.0 runs on 8.6
        ((12, 0), ["sm_75", "sm_90", "compute_90"], None),  # compiled for the card when it is loaded
        ((9, 0), ["sm_80", "sm_90a"], None),
        ((8, 6), [], None),  # nothing is known
        ((6, 1), ["sm_75", "sm_80", "compute_90"], "cu126"),
        ((12, 0), ["sm_75", "sm_90"], "auto"),
        ((8, 0), ["sm_75", "sm_86"], "auto"),
        ((3, 5), ["sm_50", "sm_90"], "none"),
    ],
)
def test_a_card_that_this_pytorch_has_no_code_for_is_a_warning(capability, codes, build, machine, monkeypatch):
    machine(cuda="13.0", gpu=True, driver=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    said = unsupported_gpu(torch.device("cuda", 0))
    if build is None:
        assert said is None
    else:
        assert f"NVIDIA GeForce RTX 3060 (compute capability {capability[0]}.{capability[1]})" in said
        assert ", ".join(codes) in said
        assert said.endswith(install(build) if build != "none" else "Set ACCELERATE_USE_CPU=true to train on the CPU.")
    assert unsupported_gpu(torch.device("cpu")) is None


@pytest.mark.parametrize("which", ["unused_gpu", "unsupported_gpu"])
def test_a_run_warns_of_its_gpu(which, monkeypatch, caplog):
    monkeypatch.setattr(runtime, which, lambda *_, **__: "This is about the GPU.")
    runtime.Machine.create(RuntimeOptions())
    assert "This is about the GPU." in caplog.text


@pytest.mark.parametrize(
    ("details", "cpu_chosen"), [({}, False), ({"driver": True}, True), ({"driver": True, "gpu": True}, False)]
)
def test_nothing_amiss(machine, details, cpu_chosen):
    machine(**details)
    assert unused_gpu(cpu_chosen) is None
