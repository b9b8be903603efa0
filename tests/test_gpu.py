"""Trainings on a GPU, held against the same ones on the CPU: ``pytest -m gpu``, and only where there is one.

``--gpu-tests-on-cpu`` tries them out without: what asks something of the GPU itself is left out then.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from option_effects import Bench, Outcome
from PIL import Image
from runs import SCRIPTS, TOKEN, arguments, write_dataset
from safetensors.torch import load_file

from library.data.latent_cache import LatentCache
from library.training.optimizer_step import Learner

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
FAMILIES = ("sd1", "sd2", "sdxl")
STEPS = 3
# Options, dtype of the frozen weights, and how far a loss may be from that of the CPU in float32.
PRECISIONS = {
    "float32": ((), torch.float32, 0.005),
    "fp16": (("--mixed_precision=fp16",), torch.float16, 0.02),
    "bf16": (("--mixed_precision=bf16",), torch.bfloat16, 0.03),
    "full_fp16": (("--mixed_precision=fp16", "--full_fp16"), torch.float16, 0.02),
    "full_bf16": (("--mixed_precision=bf16", "--full_bf16"), torch.bfloat16, 0.03),
    "fp8": (("--mixed_precision=bf16", "--fp8_base"), torch.bfloat16, 0.06),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1, tiny_sd2, tiny_sdxl):
    folder = tmp_path_factory.mktemp("gpu")
    models = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
    return Bench(models, write_dataset(folder, count=4))


@pytest.fixture(scope="module")
def on_the_cpu(bench):
    """The same run on the CPU in float32, made once: ``on_the_cpu("sd1", "--flag", …)``."""
    made: dict[tuple, Outcome] = {}

    def run(family: str, *more: str) -> Outcome:
        if (family, *more) not in made:
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("ACCELERATE_USE_CPU", "true")
                made[family, *more] = bench(*more, family=family, steps=STEPS)
                assert made[family, *more].rows[-1][0].device.type == "cpu"
        return made[family, *more]

    return run


@pytest.fixture(autouse=True)
def _gpu_as_it_was(on_gpu):
    """Every test finds an empty GPU, exact convolutions, and nothing compiled."""
    if not on_gpu:
        yield
        return
    exact = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = exact
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    torch.cuda.empty_cache()


@pytest.fixture
def needs_gpu(on_gpu):
    """For tests that look at the GPU itself."""
    if not on_gpu:
        pytest.skip("asks for a GPU")


def assert_computed_there(outcome: Outcome, on_gpu: bool) -> None:
    """The run was on the device, taught every vector, and its rows are finite."""
    kind = "cuda" if on_gpu else "cpu"
    assert next(outcome.setup.task.unet.parameters()).device.type == kind
    assert ("  the GPU " in outcome.said) == on_gpu
    for start, *steps in zip(outcome.setup.starts, *outcome.rows, strict=True):
        assert {rows.device.type for rows in steps} == {kind}
        assert all(torch.isfinite(rows).all() for rows in steps)
        assert (steps[-1].cpu() - start).norm(dim=1).min() > 0


def assert_moved_alike(one: Outcome, two: Outcome, cosine: float) -> None:
    """The rows of both went the same way."""
    for start, ours, theirs in zip(one.setup.starts, one.rows[-1], two.rows[-1], strict=True):
        moved = [(rows.cpu() - start).flatten() for rows in (ours, theirs)]
        assert torch.cosine_similarity(*moved, dim=0) > cosine


# ---- precisions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_computes_what_it_does_on_the_cpu(family, precision, bench, on_the_cpu, on_gpu):
    flags, dtype, tolerance = PRECISIONS[precision]
    # The scaler of fp16, which GPUs alone need, may skip the first steps, until its scale fits.
    outcome = bench(*flags, family=family, steps=12 if dtype == torch.float16 and on_gpu else STEPS)
    assert_computed_there(outcome, on_gpu)
    assert outcome.losses[:STEPS] == pytest.approx(on_the_cpu(family).losses, rel=tolerance)
    for ours, theirs in zip(outcome.draws[:STEPS], on_the_cpu(family).draws, strict=True):
        assert torch.equal(ours.noise.cpu(), theirs.noise)
        assert torch.equal(ours.timesteps.cpu(), theirs.timesteps)
    if on_gpu:  # without one, fp16 becomes bf16
        assert outcome.setup.task.unet.conv_norm_out.weight.dtype == dtype
        assert (outcome.job.accelerator.scaler is not None) == (dtype == torch.float16)
    if precision == "fp8":
        assert torch.float8_e4m3fn in {buffer.dtype for buffer in outcome.setup.task.unet.buffers()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_cpu(family, bench, on_the_cpu):
    flags = ("--optimizer_type=SGD", "--learning_rate=0.1", "--num_vectors_per_token=2")
    assert_moved_alike(bench(*flags, family=family, steps=STEPS), on_the_cpu(family, *flags), cosine=0.95)


def test_tf32_is_an_option(bench, needs_gpu):
    seen, step = [], Learner.step

    def watched(*given):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return step(*given)

    said = [bench(*flags, patches=[patch.object(Learner, "step", watched)]).said for flags in ((), ("--allow_tf32",))]
    possible = torch.cuda.get_device_capability() >= (8, 0)
    assert seen == [False, possible]
    assert ("multiplied in TF32" in said[1]) == possible
    assert "TF32" not in said[0]


@pytest.mark.parametrize("flags", [(), ("--mixed_precision=bf16",), ("--mixed_precision=bf16", "--fp8_base")], ids=len)
def test_half_precision_keeps_the_channels_last(flags, bench, needs_gpu):
    task = bench(*flags, "--cache_latents=false").setup.task
    for weight in (task.unet.conv_in.weight, _vae_weight(task)):
        assert weight.is_contiguous(memory_format=torch.channels_last) == bool(flags)


def _vae_weight(task) -> torch.Tensor:
    return task.vae.vae.encoder.down_blocks[0].resnets[0].conv1.weight


# ---- options that save memory or time


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--sdpa", "--mem_eff_attn"])
def test_options_that_change_no_result(flag, family, bench, on_gpu):
    outcome = bench(flag, family=family, steps=2)
    assert_computed_there(outcome, on_gpu)
    assert outcome.losses == pytest.approx(bench.plain(family, steps=2).losses, rel=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("flags", [(), ("--mixed_precision=bf16", "--gradient_checkpointing")], ids=["float32", "bf16"])
def test_compilation(family, flags, bench, needs_gpu):
    compiled = bench("--torch_compile", *flags, family=family, steps=2)
    assert_computed_there(compiled, on_gpu=True)
    assert compiled.losses == pytest.approx(bench(*flags, family=family, steps=2).losses, rel=0.03 if flags else 2e-3)


def test_xformers(bench, needs_gpu):
    pytest.importorskip("xformers")
    outcome = bench("--xformers", "--mixed_precision=fp16", steps=2)
    assert_computed_there(outcome, on_gpu=True)
    assert outcome.losses == pytest.approx(bench.plain(steps=2).losses, rel=0.03)


def test_adamw8bit_keeps_its_state_in_8_bits(bench, on_gpu):
    """From 4096 numbers on: 64 vectors of SDXL's second encoder."""
    flags = ("--optimizer_type=AdamW8bit", "--num_vectors_per_token=64")
    outcome = bench(*flags, family="sdxl", steps=2)
    assert_computed_there(outcome, on_gpu)
    small, large = (outcome.setup.learner.choice.optimizer.state[rows]["state1"] for rows in outcome.setup.rows.rows)
    assert (small.dtype, large.dtype) == (torch.float32, torch.uint8)
    exact = bench("--optimizer_type=AdamW", "--num_vectors_per_token=64", family="sdxl", steps=2)
    assert outcome.losses == pytest.approx(exact.losses, rel=0.02)


@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_accumulation_steps=2",),
        ("--gradient_accumulation_steps=2", "--cache_latents=false", "--mixed_precision=bf16"),
        ("--mixed_precision=fp16", "--cache_text_encoder_outputs", "--noise_offset=0.1", "--ip_noise_gamma=0.1"),
        ("--mixed_precision=bf16", "--gradient_checkpointing", "--fp8_base", "--preserve_embedding_norm"),
    ],
    ids=["cached", "uncached", "fp16", "checkpointing"],
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_step_waits_for_the_gpu_once(family, flags, bench, needs_gpu):
    """And a batch never, from the third step on; see test_optimizer_step.py for the same without a GPU."""
    counted, step = [], Learner.step

    def watched(*given):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return step(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                counted.append([str(one.message) for one in seen if "synchronizing CUDA operation" in str(one.message)])

    bench(*flags, family=family, steps=6, patches=[patch.object(Learner, "step", watched)])
    assert [len(each) for each in counted[2:]] == [1] * 4, counted


# ---- latents and images


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_are_those_of_the_cpu(family, to_disk, bench, on_the_cpu):
    flags = ("--cache_latents_to_disk",) if to_disk else ()
    caches: list[LatentCache] = []
    for outcome in (bench(*flags, family=family, steps=STEPS), on_the_cpu(family)):
        data = outcome.job.data
        caches.append([data.cache.load(entry).latents for entry in data.latent_entries()])
    for ours, theirs in zip(*caches, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_images_are_encoded_at_every_step(bench, on_the_cpu, on_gpu):
    outcome = bench("--cache_latents=false", steps=STEPS)
    assert_computed_there(outcome, on_gpu)
    assert outcome.losses == pytest.approx(on_the_cpu("sd1", "--cache_latents=false").losses, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_cpu(family, bench, on_the_cpu, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{TOKEN} --w 64 --h 64 --s 4 --d {seed} --ss {name}" for seed, name in DRAWN))
    flags = (f"--sample_prompts={prompts}", "--sample_at_first")
    drawn = []
    for outcome in (bench(*flags, family=family, steps=STEPS), on_the_cpu(family, *flags)):
        files = sorted((outcome.folder / "sample").glob("*.png"))
        drawn.append([np.array(Image.open(file), dtype=float) for file in files])
    assert len(drawn[0]) == len(DRAWN)
    for ours, theirs in zip(*drawn, strict=True):
        assert np.abs(ours - theirs).mean() < 2
        assert theirs.std() > 5


DRAWN = [(1, "ddim"), (2, "euler_a")]


# ---- what goes wrong, and going on


def test_a_full_memory_is_a_sentence(bench, needs_gpu):
    torch.cuda.empty_cache()
    torch.zeros(1, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 8 * 2**20) / total)
    try:
        outcome = bench(family="sdxl", code=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "error: The device's memory is full" in outcome.err
    assert "--gradient_checkpointing" in outcome.err
    assert "Traceback" not in outcome.said


DETERMINISTIC = """
import sys; sys.path.insert(0, {root!r})
import torch
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.benchmark = False
import {script} as script
sys.exit(script.main())
"""


@pytest.mark.parametrize(("family", "precision"), [("sd1", "no"), ("sd1", "fp16"), ("sdxl", "bf16")])
def test_a_resumed_run_ends_in_the_same_bits(family, precision, bench, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(DETERMINISTIC.format(root=str(ROOT), script=SCRIPTS[family].__name__))

    def run(folder: str, *more: str) -> list[torch.Tensor]:
        given = ["--max_train_steps=6", f"--mixed_precision={precision}", "--save_every_n_steps=3", "--save_state"]
        argv = arguments(family, bench.models[family], bench.dataset, tmp_path / folder, *given, *more)
        done = child(file, *argv, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        assert done.returncode == 0, done.stderr
        return list(load_file(tmp_path / folder / f"{TOKEN}.safetensors").values())

    whole = run("whole")
    resumed = run("rest", f"--resume={tmp_path / 'whole' / f'{TOKEN}-step00000003-state'}")
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))


def child(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own; it uses the GPU as this one does."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_quickstart_learns_as_on_the_cpu(model, tmp_path, needs_gpu):
    distances = {}
    for device in ("gpu", "cpu"):
        script = "sdxl_train_textual_inversion.py" if model == "sdxl" else "train_textual_inversion.py"
        given = [f"--config_file=configs/quickstart/{model}.toml", f"--output_dir={tmp_path / device}"]
        done = child(script, *given, ACCELERATE_USE_CPU="true" if device == "cpu" else "false")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / device / f"{TOKEN}_report.json").read_text())
        distances[device] = report["after"]["distance"]
        assert report["after"]["distance"] < 0.6 * report["before"]["distance"]
    assert distances["gpu"] == pytest.approx(distances["cpu"], rel=0.1)


# ---- several


def test_two_gpus_equal_one_with_accumulation(bench, tmp_path, on_gpu):
    if on_gpu and torch.cuda.device_count() < 2:
        pytest.skip("asks for two GPUs")
    more = ["--max_train_steps=2", "--optimizer_type=SGD", "--learning_rate=0.1"]
    starts, ends = None, []
    for folder, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        argv = arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path / folder, *more)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        steps = f"--gradient_accumulation_steps={accumulation}"
        done = child(*launcher, SCRIPTS["sd1"].__file__, *argv, steps)
        assert done.returncode == 0, done.stderr
        ends.append(load_file(tmp_path / folder / f"{TOKEN}.safetensors")["emb_params"])
    starts = bench.plain().setup.starts[0]
    assert (ends[0] - starts).norm() > 0
    assert (ends[0] - ends[1]).norm() < 0.05 * (ends[0] - starts).norm()
