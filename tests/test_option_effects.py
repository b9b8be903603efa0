"""Every declared option has a test that asserts what it does, a sentence that it gets, or a reason why neither is here.

The tests themselves are in the other ``test_option_effects_*`` files and those of ``MODULES``, marked with ``shows``.
"""

import pytest
import test_early_stopping
import test_hub
import test_inpainting
import test_learning_report
import test_metadata_files
import test_option_effects_data
import test_option_effects_learning
import test_option_effects_model
import test_option_effects_output
import test_option_effects_recipe
import test_rehearsal
import test_run_report
import test_sample_images
import test_start_choice
import test_state
import test_tail_average
import test_trackers
from option_effects import Bench, plan, shows
from runs import arguments, write_dataset

from library.options.options import DeepSpeedOptions, declared_options

MODULES = [
    test_early_stopping,
    test_hub,
    test_inpainting,
    test_option_effects_data,
    test_option_effects_learning,
    test_option_effects_model,
    test_option_effects_output,
    test_option_effects_recipe,
    test_learning_report,
    test_metadata_files,
    test_rehearsal,
    test_run_report,
    test_sample_images,
    test_trackers,
    test_start_choice,
    test_state,
    test_tail_average,
]

# Options whose effect needs what a test machine may lack. Their tests show that the value arrives where it acts, and
# what is said where it cannot act.
NOT_VISIBLE_EVERYWHERE = {
    "allow_tf32": "needs an NVIDIA GPU",
    "xformers": "needs an NVIDIA GPU and the package",
    "full_fp16": "fp16 needs an accelerator; without one it becomes bf16",
    "highvram": "there is device memory to keep only on a GPU",
    "ddp_timeout": "processes wait for each other only where there are several",
    "ddp_gradient_as_bucket_view": "DDP is used only with several processes",
    "ddp_static_graph": "DDP is used only with several processes",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_sd1):
    return Bench({"sd1": tiny_sd1}, write_dataset(tmp_path_factory.mktemp("data"), count=2))


@pytest.fixture
def argv(bench, tmp_path):
    return arguments("sd1", bench.models["sd1"], bench.dataset, tmp_path)


def shown_options():
    """The options that each marked test of all files shows."""
    own = [value for name, value in globals().items() if name.startswith("test_") and callable(value)]
    tests = own + [value for module in MODULES for value in vars(module).values()]
    return {option for test in tests for option in getattr(test, "shows", ())}


def test_every_option_is_shown():
    declared = {name for name, _ in declared_options()}
    assert shown_options() == declared
    assert declared > NOT_VISIBLE_EVERYWHERE.keys()


def given(name):
    return f"--{name}" if dict(declared_options())[name].is_flag else f"--{name}=something"


DEEPSPEED = {
    "zero_stage": "--zero_stage=3",
    "offload_optimizer_device": "--offload_optimizer_device=cpu",
    "offload_param_device": "--offload_param_device=nvme",
}


@shows(*DeepSpeedOptions.__dataclass_fields__)
def test_deepspeed(argv):
    assert "--deepspeed cannot help here" in plan("sd1", [*argv, "--deepspeed"], code=1).said
    idle = [name for name in DeepSpeedOptions.__dataclass_fields__ if name != "deepspeed"]
    said = plan("sd1", [*argv, *(DEEPSPEED.get(name) or given(name) for name in idle)]).said
    for name in idle:
        assert f"--{name} has no effect: it is about DeepSpeed" in said
