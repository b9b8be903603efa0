"""What ``accelerate launch`` and ``accelerate config`` ask of a training besides our options: served or refused."""

import logging
import os
from dataclasses import replace

from library.options.training import RuntimeOptions
from library.support.errors import UserError

logger = logging.getLogger(__name__)

_DIVIDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def check_launcher(options: RuntimeOptions) -> None:
    """Refuse what accelerate's settings ask for and no run here can do. Raises UserError."""
    for variable, name in _DIVIDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(
                f"accelerate's settings ask for {name}, which divides trained weights and optimizer states among GPUs, "
                "and only a few vectors are trained here. Start the run with accelerate launch --multi_gpu "
                "(--num_processes=1 for one GPU), or choose differently in accelerate config."
            )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" and options.mixed_precision is None:
        raise UserError(
            "accelerate's settings ask for the mixed precision fp8, which speeds up layers that are trained, and none "
            "is trained here. Give --mixed_precision=bf16; --fp8_base then stores the U-Net in 8 bits."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} has no effect here. Unset it and give "
            f"--gradient_accumulation_steps={steps}."
        )


def with_launcher(options: RuntimeOptions) -> RuntimeOptions:
    """The options with the compiler that accelerate's settings ask for, unless ``--torch_compile`` is given."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "no" or options.torch_compile:
        return options
    logger.info("accelerate's settings ask for dynamo: taken as --torch_compile --dynamo_backend=%s.", backend)
    return replace(options, torch_compile=True, dynamo_backend=backend)
