"""Memory that is freed goes back to the system."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")

# Layers whose weights are large beside what is kept of them for the backward pass, as in a U-Net.
STEP = """
import sys, torch
from torch import nn
from library.support import main_memory
from library.model.frozen_layers import freeze_layers

def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

float8, apart = (argument == "1" for argument in sys.argv[1:])
if apart:
    main_memory.return_large_blocks()
layers = []
for number in range(40):
    layers += [nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device="cpu"), nn.GELU()]
    layers[-2].weight.data.fill_(0.02)
    layers[-2].requires_grad_(False)
    model = nn.Sequential(*layers[-2:])
    freeze_layers(model, float8=float8)
    layers[-2] = model[0]
del model
main_memory.give_back()
before = held("RssAnon")
x = torch.ones(4, 2048, dtype=torch.bfloat16, requires_grad=True)
nn.Sequential(*layers)(x).float().sum().backward()
print(before, held("RssAnon"))
"""


def memory_of_a_step(*, float8: bool, apart: bool) -> tuple[int, int]:
    """Megabytes of anonymous memory before a step and after it, in a process of its own."""
    command = [sys.executable, "-c", STEP, str(int(float8)), str(int(apart))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    return before // 1024, after // 1024


def test_dequantized_weights_leave_no_holes():
    """Each is freed as soon as it was used; without a hand the heap keeps the place of many of them."""
    before, after = memory_of_a_step(float8=True, apart=True)
    whole_before, _ = memory_of_a_step(float8=False, apart=False)
    assert before < whole_before - 100  # 8 instead of 16 bits for 168 million weights
    assert after < before + 60
