"""What accelerate's launcher and configuration ask for: served, or refused with a sentence."""

import pytest

from library.options.launcher import check_launcher, with_launcher
from library.options.options import RuntimeOptions
from library.support.errors import UserError


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "ask for FSDP, which divides"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ask for DeepSpeed, which divides"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "ask for Megatron-LM, which divides"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ask for a parallelism config, which divides"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "Give --mixed_precision=bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "give --gradient_accumulation_steps=4"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(variable, value, said, monkeypatch):
    check_launcher(RuntimeOptions())
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said):
        check_launcher(RuntimeOptions())


def test_what_is_off_is_not_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    check_launcher(RuntimeOptions(mixed_precision="bf16"))


def test_the_launchers_compiler_is_ours(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert with_launcher(RuntimeOptions()) == RuntimeOptions()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert with_launcher(RuntimeOptions()) == RuntimeOptions(torch_compile=True, dynamo_backend="eager")
    assert "taken as --torch_compile --dynamo_backend=eager" in caplog.text
    given = RuntimeOptions(torch_compile=True, dynamo_backend="aot_eager")
    assert with_launcher(given) == given
