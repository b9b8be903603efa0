"""What the process holds once a U-Net of 8-bit weights is loaded: the weights, and no holes between them."""

import shutil
import subprocess
import sys

import pytest
import torch
from tiny_models import build_unet

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")

LOAD = """
import sys, torch
from library.model.base_model import BaseModel
from library.options.options import ModelOptions

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

model = BaseModel.open(ModelOptions(pretrained_model_name_or_path=sys.argv[1]), None)
before = held()
unet = model.unet(torch.bfloat16, float8=True)
after = held()
print(after - before, sum(t.nbytes for tensors in (unet.parameters(), unet.buffers()) for t in tensors))
"""


def test_a_loaded_float8_unet_takes_its_weights_and_little_more(tiny_sdxl, tmp_path):
    """Making the empty model once left a heap of free memory, in which the weights were strewn and which stayed."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    # Layers as large as those of real models, which the C library treats otherwise than small ones.
    with torch.device("meta"):
        unet = build_unet("sdxl", block_out_channels=(32, 64, 640))
    unet = unet.half().to_empty(device="cpu")
    for weight in unet.parameters():
        torch.nn.init.constant_(weight, 0.02)
    unet.save_pretrained(folder / "unet")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 5 * 10**7
    assert grown < 1.15 * weights + 10**7
