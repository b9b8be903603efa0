"""Options about learning: noise, loss, optimizer, schedule, length, precision, several processes.

Each is declared once, here, with the help a user sees.
"""

from dataclasses import dataclass

from library.options.declaration import OnResume, flag, option
from library.options.option_types import (
    LearningRate,
    boolean,
    int_or_float,
    learning_rate,
    number,
    texts,
    whole_number,
)

DYNAMO_BACKENDS: tuple[str, ...] = ("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs")
DYNAMO_BACKENDS += ("ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm", "no")


def _share_of_steps(value: float) -> str | None:
    """What is wrong with a number of steps, or a share of them."""
    is_share = isinstance(value, float) and value > 1
    return f"is {value:.0%} of all steps; a share must be at most 100%." if is_share else None


@dataclass(frozen=True)
class NoiseOptions:
    """Noise and timesteps"""

    noise_offset: float | None = option(
        None,
        "Shift of each channel's mean noise, which helps very dark and very bright images. Typical: 0.05 to 0.1; "
        "0 is off.",
        read=number,
    )
    noise_offset_random_strength: bool = flag(
        "Draw the offset anew between 0 and --noise_offset at each step.", needs=("noise_offset",)
    )
    adaptive_noise_scale: float | None = option(
        None,
        "Add this times the mean brightness of the latents to the noise offset. Typical: the size of the offset. Needs "
        "--noise_offset.",
        read=number,
    )
    multires_noise_iterations: int | None = option(
        None,
        "Layers of ever coarser noise, another help for dark and bright images; do not combine it with "
        "--noise_offset. Typical: 6 to 10; 0 is off.",
        read=whole_number,
        at_least=0,
        at_most=100,
    )
    multires_noise_discount: float = option(
        0.3,
        "Strength that each coarser layer keeps. Typical: 0.1 to 0.3.",
        read=number,
        at_least=0,
        needs=("multires_noise_iterations",),
    )
    ip_noise_gamma: float | None = option(
        None,
        "Extra noise in the model's input only (input perturbation), against over-fitting. Typical: 0.05 to 0.1; "
        "0 is off.",
        read=number,
        at_least=0,
    )
    ip_noise_gamma_random_strength: bool = flag(
        "Draw that noise's strength between 0 and --ip_noise_gamma.", needs=("ip_noise_gamma",)
    )
    min_timestep: int | None = option(
        None,
        "Lowest timestep trained, 0 to 999 (0: nearly clean image, fine detail). Unset: 0.",
        read=whole_number,
        at_least=0,
        at_most=1000,
    )
    max_timestep: int | None = option(
        None,
        "Upper bound (exclusive) of the training timesteps, 1 to 1000 (1000: pure noise, composition). Unset: 1000.",
        read=whole_number,
        at_least=0,
        at_most=1000,
    )
    zero_terminal_snr: bool | None = option(
        None,
        "Noise schedule that ends in pure noise. Only for models made with it (v-prediction, for example some SD 2 and "
        "SDXL v-pred models). Unset: as the model says.",
        read=boolean,
    )


@dataclass(frozen=True)
class LossOptions:
    """Loss"""

    loss_type: str = option(
        "l2",
        "How errors are measured: l2 (usual), l1, or huber and smooth_l1, which are less moved by odd images.",
        choices=("l1", "l2", "huber", "smooth_l1"),
    )
    huber_schedule: str = option(
        "snr",
        "How the Huber threshold changes with the timestep.",
        choices=("constant", "exponential", "snr"),
        needs=(
            "loss_type huber",
            "loss_type smooth_l1",
        ),
    )
    huber_c: float = option(
        0.1,
        "Huber threshold: smaller is closer to l1, larger closer to l2.",
        read=number,
        above=0,
        needs=(
            "loss_type huber",
            "loss_type smooth_l1",
        ),
    )
    huber_scale: float = option(
        1.0,
        "Factor on the Huber threshold.",
        read=number,
        above=0,
        needs=(
            "loss_type huber",
            "loss_type smooth_l1",
        ),
    )
    min_snr_gamma: float | None = option(
        None,
        "Weigh down timesteps with little noise (min-SNR), so that all matter alike. Typical: 5; 0 is off.",
        read=number,
        at_least=0,
    )
    scale_v_pred_loss_like_noise_pred: bool = flag(
        "Weigh the loss of a v-prediction model as if it predicted noise. Needs --v_parameterization."
    )
    v_pred_like_loss: float | None = option(
        None,
        "Add this share of a v-prediction-like loss to a noise-predicting model. Typical: 0.1. Not with "
        "--v_parameterization.",
        read=number,
    )
    debiased_estimation_loss: bool = flag("Weigh each timestep by its noise level (debiased estimation).")


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer"""

    optimizer_type: str = option(
        "",
        "AdamW (the default), AdamW8bit, Lion, SGDNesterov, Prodigy, DAdaptAdam, Adafactor, AdamWScheduleFree …, a "
        "class of torch.optim, or a dotted path (its module is imported: the code in it runs). The trained rows are "
        "tiny: 8-bit kinds save no memory worth having.",
        metavar="NAME",
        on_resume=OnResume.OPTIMIZER,
    )
    use_8bit_adam: bool = flag("Old way of writing --optimizer_type AdamW8bit.", on_resume=OnResume.OPTIMIZER)
    use_lion_optimizer: bool = flag("Old way of writing --optimizer_type Lion.", on_resume=OnResume.OPTIMIZER)
    learning_rate: LearningRate | None = option(  # noqa: RUF009 - makes a field
        None,
        "How far the vectors move per step: a number, or numbers with the step each lasts until, "
        '"5e-3:100,1e-3:1000,5e-4". Unset, it fits the optimizer: AdamW 5e-4, Lion 1e-4, SGD 5e-3, Prodigy and '
        "D-Adaptation 1.0, Adafactor its own. Typical for AdamW: 1e-4 to 5e-3; 1e-6 hardly moves anything.",
        read=learning_rate,
        on_resume=OnResume.RECORDED,
    )
    max_grad_norm: float = option(
        1.0,
        "Clip the gradient norm (over all trained vectors) to this; 0 disables clipping.",
        read=number,
        at_least=0,
    )
    optimizer_args: tuple[str, ...] | None = option(
        None,
        "Further settings for the optimizer, for example weight_decay=0.01 betas=0.9,0.99.",
        read=texts,
        on_resume=OnResume.OPTIMIZER,
    )
    fused_backward_pass: bool = flag(
        "Accepted for compatibility, without effect: only the few new vectors have gradients, there is nothing to "
        "fuse.",
        idle="only the few new vectors have gradients",
        on_resume=OnResume.FREE,
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning-rate schedule"""

    lr_scheduler: str = option(
        "constant",
        "How the learning rate changes: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, "
        "polynomial, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, "
        "piecewise_constant, reduce_lr_on_plateau, adafactor.",
        metavar="NAME",
        yields_to=("lr_scheduler_type",),
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_type: str = option(
        "",
        "Your own scheduler: a class of torch.optim.lr_scheduler or a dotted path (its module is imported: the code in "
        "it runs). Used instead of --lr_scheduler.",
        metavar="NAME",
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        None,
        "Further settings for the scheduler, for example T_max=100 num_cycles=0.5.",
        read=texts,
        on_resume=OnResume.RECORDED,
    )
    lr_warmup_steps: int | float = option(
        0,
        "Steps in which the rate climbs from 0: a whole number, or a share of all steps (0.1 or 10%). Not with the "
        "constant schedule. Typical: 5 to 10%.",
        read=int_or_float,
        at_least=0,
        check=_share_of_steps,
        on_resume=OnResume.RECORDED,
    )
    lr_decay_steps: int | float = option(
        0,
        "Steps of the final decay, as a number or a share. Only for warmup_stable_decay.",
        read=int_or_float,
        at_least=0,
        check=_share_of_steps,
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "Restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay.",
        read=whole_number,
        at_least=1,
        needs=(
            "lr_scheduler cosine_with_restarts",
            "lr_scheduler cosine_with_min_lr",
            "lr_scheduler cosine_warmup_with_min_lr",
            "lr_scheduler warmup_stable_decay",
        ),
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_power: float = option(
        1.0,
        "Exponent of the polynomial schedule.",
        read=number,
        at_least=0,
        needs=("lr_scheduler polynomial",),
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_timescale: int | None = option(
        None,
        "Steps after which inverse_sqrt has fallen noticeably. Unset: the warm-up's length.",
        read=whole_number,
        zero_is_off=True,
        needs=("lr_scheduler inverse_sqrt",),
        on_resume=OnResume.RECORDED,
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "Lowest rate as a share of --learning_rate, 0 to 1, for the schedules with min_lr and warmup_stable_decay.",
        read=number,
        at_least=0,
        at_most=1,
        needs=(
            "lr_scheduler cosine_with_min_lr",
            "lr_scheduler cosine_warmup_with_min_lr",
            "lr_scheduler warmup_stable_decay",
        ),
        on_resume=OnResume.RECORDED,
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Length and repetition of the training"""

    max_train_steps: int = option(
        1600,
        "Optimizer steps in all. Typical: 500 to 3000.",
        read=whole_number,
        at_least=1,
        at_most=100_000_000,
        yields_to=("max_train_epochs",),
        on_resume=OnResume.FREE,
    )
    max_train_epochs: int | None = option(
        None,
        "Length in epochs instead; wins over --max_train_steps.",
        read=whole_number,
        at_least=1,
        at_most=100_000_000,
        on_resume=OnResume.FREE,
    )
    seed: int | None = option(
        None,
        "Number that makes a run repeatable. Unset: a random one, which the log names.",
        read=whole_number,
        at_least=0,
        at_most=2**32 - 1,
        on_resume=OnResume.FREE,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Batches gathered into one optimizer step: a larger batch without the memory, at the price of time.",
        read=whole_number,
        at_least=1,
        at_most=100_000,
    )
    gradient_checkpointing: bool = flag(
        "Compute intermediate results twice instead of keeping them: much less memory, about a third slower."
    )


@dataclass(frozen=True)
class RuntimeOptions:
    """Speed, memory, several processes, console"""

    mixed_precision: str | None = option(
        None,
        "Number format of the frozen models: bf16 for recent GPUs (RTX 30 and later), fp16 for older ones, no for full "
        "precision. Unset: what accelerate is set to, else no. The new vectors are float32 always.",
        choices=("no", "fp16", "bf16"),
    )
    full_fp16: bool = flag("Everything frozen in fp16, which --mixed_precision fp16 does already. Needs that option.")
    full_bf16: bool = flag("Everything frozen in bf16, which --mixed_precision bf16 does already. Needs that option.")
    fp8_base: bool = flag(
        "Store the U-Net in 8 bits and dequantize it layer by layer: half the memory of fp16, somewhat slower, a "
        "little less exact."
    )
    lowram: bool = flag(
        "Load the models straight to the GPU. This happens anyway, so the flag changes nothing.",
        idle="the models are loaded straight to the device anyway",
        on_resume=OnResume.FREE,
    )
    highvram: bool = flag(
        "Do not clear the GPU's memory while latents are cached: a bit faster.",
        needs=("cache_latents",),
        on_resume=OnResume.FREE,
    )
    xformers: bool = flag(
        "Attention by the xformers package (NVIDIA). Seldom better than what PyTorch has itself.",
        yields_to=("mem_eff_attn",),
    )
    sdpa: bool = flag(
        "Attention by PyTorch itself. This is the default, so the flag changes nothing.",
        yields_to=(
            "mem_eff_attn",
            "xformers",
        ),
        idle="PyTorch's own attention is the default anyway",
    )
    mem_eff_attn: bool = flag(
        "Attention by PyTorch's memory-efficient kernel alone. For NVIDIA GPUs on which the default needs more memory."
    )
    allow_tf32: bool = flag(
        "Multiply float32 matrices in TF32: several times as fast on NVIDIA GPUs from the RTX 30 series on, a little "
        "less exact. Ignored with fp16 or bf16."
    )
    torch_compile: bool = flag(
        "Compile the models. The first steps take minutes, later ones are faster: for long runs with few bucket sizes."
    )
    dynamo_backend: str = option(
        "inductor",
        "Compiler behind --torch_compile. no: do not compile.",
        choices=DYNAMO_BACKENDS,
        needs=("torch_compile",),
    )
    ddp_timeout: int | None = option(
        None,
        "Minutes that processes wait for each other before they give up. Ignored with one process.",
        read=whole_number,
        zero_is_off=True,
        at_most=1_000_000,
        on_resume=OnResume.FREE,
    )
    ddp_gradient_as_bucket_view: bool = flag(
        "Share gradient memory between processes. Ignored with one process.", on_resume=OnResume.FREE
    )
    ddp_static_graph: bool = flag(
        "Tell DDP that the graph never changes. Ignored with one process.", on_resume=OnResume.FREE
    )
    console_log_level: str | None = option(
        None,
        "Least important messages shown. Unset: INFO.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        on_resume=OnResume.FREE,
    )
    console_log_file: str | None = option(
        None,
        "Write the messages to this file (overwriting it) instead of the console.",
        metavar="FILE",
        on_resume=OnResume.FREE,
    )
    console_log_simple: bool = flag(
        "Plain messages on standard output, without time and level.", on_resume=OnResume.FREE
    )


@dataclass(frozen=True)
class DeepSpeedOptions:
    """DeepSpeed (not possible here)"""

    deepspeed: bool = flag(
        "Stops the run with an explanation: DeepSpeed divides weights, gradients and optimizer states among GPUs, and "
        "those of a few vectors fit anywhere."
    )
    zero_stage: int = option(2, "ZeRO stage. Only with --deepspeed.", read=whole_number, choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(None, "Only with --deepspeed.", choices=("cpu", "nvme"))
    offload_optimizer_nvme_path: str | None = option(None, "Only with --deepspeed.", metavar="DIR")
    offload_param_device: str | None = option(None, "Only with --deepspeed.", choices=("cpu", "nvme"))
    offload_param_nvme_path: str | None = option(None, "Only with --deepspeed.", metavar="DIR")
    zero3_init_flag: bool = flag("Only with --deepspeed.")
    zero3_save_16bit_model: bool = flag("Only with --deepspeed.")
    fp16_master_weights_and_gradients: bool = flag("Only with --deepspeed.")
