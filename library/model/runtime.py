"""What a run stands on: the Accelerator, number formats, threads, attention and compilation."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import accelerate
import torch
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    set_seed,
)

from library.model.device_report import unsupported_gpu, unused_gpu
from library.model.device_settings import check_device, set_tf32
from library.options.launcher import check_launcher
from library.options.training import RuntimeOptions
from library.support import processes
from library.support.errors import UserError, first_line

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL, UNet2DConditionModel

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_U = TypeVar("_U")

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of Intel and AMD, and of ARM
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Number formats of a run: ``mixed_precision`` as accelerate wants it, ``dtype`` of all frozen weights."""

    mixed_precision: str

    @property
    def dtype(self) -> torch.dtype:
        """float32, float16 or bfloat16; the trained rows, the loss and the optimizer are float32 always."""
        return DTYPES[self.mixed_precision]


def halves(options: RuntimeOptions) -> bool:
    """Whether the frozen weights will be cast to 16 bits, as far as options and ``accelerate launch`` tell."""
    return (options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) in ("fp16", "bf16")


def choose_precision(options: RuntimeOptions) -> Precision:
    """Decide the number format before the Accelerator is made.

    Where ``--mixed_precision`` is not given, ``accelerate launch``'s own setting counts. float16 needs an accelerator
    that is used: without one, bfloat16 takes its place with a warning (accelerate would silently run float32).
    """
    chosen = options.mixed_precision or "no"
    from_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if options.mixed_precision is None and from_launcher in ("fp16", "bf16"):
        logger.info("Mixed precision %s is taken from accelerate's settings.", from_launcher)
        chosen = from_launcher
    if chosen == "fp16" and computes_on_cpu():
        logger.warning("fp16 needs a GPU and none is used: bf16 is used instead.")
        chosen = "bf16"
    if chosen == "bf16" and computes_on_cpu() and not _multiplies_bfloat16():
        logger.warning(
            "bf16 is slow here: this CPU has no instructions for bfloat16, so that a step can take many times as "
            "long as in float32. Use --mixed_precision=no where twice the memory for the frozen models is at hand."
        )
    if options.full_fp16 or options.full_bf16:
        flag = "--full_fp16" if options.full_fp16 else "--full_bf16"
        logger.info(
            "%s: the frozen models are held in %s in any case; the rows and the optimizer stay float32.", flag, chosen
        )
    return Precision(chosen)


def computes_on_cpu() -> bool:
    """Whether there is no accelerator, or ``accelerate launch --cpu`` leaves it alone."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _multiplies_bfloat16() -> bool:
    """Whether this CPU does so itself, and not by way of float32."""
    capable = torch.cpu.get_capabilities()
    return any(capable.get(name) for name in _BFLOAT16_INSTRUCTIONS)


def vae_dtype(precision: Precision, device: torch.device, *, whole: bool = False) -> torch.dtype:
    """What the VAE works in: the run's precision, but float32 if that is asked for (``whole``) or faster.

    A CPU without instructions for bfloat16 multiplies it by way of float32.
    """
    if whole or (device.type == "cpu" and not _multiplies_bfloat16()):
        return torch.float32
    return precision.dtype


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and in which number formats."""

    accelerator: accelerate.Accelerator
    precision: Precision

    @classmethod
    def create(cls, options: RuntimeOptions) -> "Machine":
        """Choose the precision and join the other processes, if there are any."""
        precision = choose_precision(options)
        accelerator = make_accelerator(options, precision)
        unused = unused_gpu(cpu_chosen=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if warning := unused or unsupported_gpu(accelerator.device):
            logger.warning(warning)
        check_device(options, accelerator.device)
        set_tf32(options, accelerator.device)
        check_compiler(options, accelerator.device)
        return cls(accelerator, precision)


def make_accelerator(options: RuntimeOptions, precision: Precision) -> accelerate.Accelerator:
    """Create the Accelerator (device, processes, gradient scaler); gradient accumulation is the trainer's own."""
    handlers: list[KwargsHandler] = []
    if options.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout)))
    if options.ddp_gradient_as_bucket_view or options.ddp_static_graph:
        handlers.append(
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=options.ddp_gradient_as_bucket_view, static_graph=options.ddp_static_graph
            )
        )
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(),  # on the CPU accelerate joins processes only when it is told so
        mixed_precision=precision.mixed_precision,
        dynamo_backend="no",  # the modules worth compiling are not accelerate's
        kwargs_handlers=handlers,
    )
    if processes.count() != accelerator.num_processes:
        raise UserError(
            f"The environment speaks of {processes.count()} processes (WORLD_SIZE or its like), but accelerate joined "
            f"{accelerator.num_processes} on {accelerator.device.type}: each would train on its own and write the same "
            "files. Start the run with accelerate launch or torchrun, with one process for each GPU; for a single "
            "process unset the variable."
        )
    if accelerator.device.type == "cpu":
        _use_all_cores()
    return accelerator


def patience(options: RuntimeOptions, device: torch.device) -> float | None:
    """Seconds that a process waits for the others in silence; None on the CPU, where a lost one is noticed at once.

    A little less than NCCL's own (10 minutes if unset), which ends a process without a word.
    """
    return None if device.type == "cpu" else 0.9 * 60 * (options.ddp_timeout or 10)


@contextmanager
def lost_processes_said() -> Iterator[None]:
    """Within a ``with``: an error because another process is gone becomes a sentence. Raises UserError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise UserError(
                f"Another process of this run is gone, or cannot be reached ({first_line(error)}). Look at its "
                "messages: it may have been killed, for lack of memory perhaps."
            ) from error
        raise


def _use_all_cores() -> None:
    """Launchers leave one thread to a process; without a GPU that would idle the other cores.

    A number of threads that the user has chosen stays.
    """
    if _threads_chosen():
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, processes.usable_cores() // local_processes)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def _threads_chosen() -> bool:
    """Whether the user says how many threads there are; 1 is also what a launcher says where nobody asked."""
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    unsaid = ("", "1") if launched else ("",)
    return bool(os.environ.get("MKL_NUM_THREADS")) or os.environ.get("OMP_NUM_THREADS", "") not in unsaid


def decided_by_main(decide: Callable[[], _T]) -> _T:
    """What ``decide`` gives in the main process, for all processes; it is called there alone. Its UserError too."""
    answer: list[Any] = [None]  # pickled on its way to the others
    if accelerate.PartialState().is_main_process:
        try:
            answer = [decide()]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    decided: _T = answer[0]
    return decided


def shared_out(items: Sequence[_T], work: Callable[[Sequence[_T]], list[_U]]) -> list[_U]:
    """What ``work`` makes of all items, in their order; of several processes each does a part of them, side by side.

    All must call it, with the same items. What goes wrong in one is an error in all: none waits for a lost part.
    """
    state = accelerate.PartialState()
    share = -(-len(items) // state.num_processes)
    mine = items[state.process_index * share :][:share]
    if state.num_processes == 1:
        return work(mine)
    try:
        made: list[tuple[list[_U], str | None]] = [(work(mine), None)]
    except Exception as error:  # whatever it is, the others are told before it goes on
        made = [([], f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))]
    parts = gather_object(made)
    if said := next((error for _, error in parts if error), None):
        raise UserError(said)
    return [one for part, _ in parts for one in part]


def seed_everything(seed: int | None) -> int:
    """Seed Python, numpy and torch; return the seed, the same in all processes, drawn where none is given."""
    if seed is None:
        seed = decided_by_main(lambda: int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF)
        logger.info("No --seed given: using %d.", seed)
    set_seed(seed)
    return seed


def check_runtime(options: RuntimeOptions) -> None:
    """Refuse what this machine cannot do, before any model is loaded. Raises UserError."""
    check_launcher(options)
    if options.xformers and not options.mem_eff_attn:
        try:
            import xformers  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--xformers needs the package xformers: pip install xformers. Without the option the same attention "
                "runs through PyTorch (SDPA), usually just as fast."
            ) from error
        if not torch.cuda.is_available():
            raise UserError("--xformers works on NVIDIA GPUs only and none was found. Leave the option out.")
    if _compiles(options):
        backends = torch._dynamo.list_backends(exclude_tags=())
        if options.dynamo_backend not in backends:
            raise UserError(
                f"--dynamo_backend {options.dynamo_backend} is not part of this PyTorch. "
                f"Available here: {', '.join(backends)}."
            )


def set_attention(options: RuntimeOptions, unet: "UNet2DConditionModel | None", vae: "AutoencoderKL | None") -> None:
    """Choose the attention implementation: xformers, or PyTorch's own (the default, ``--sdpa``).

    ``--mem_eff_attn`` leaves PyTorch its memory-efficient CUDA kernel (and the plain one where that cannot serve); the
    CPU's only kernel is of that kind. The choice is PyTorch's own global one, since checkpointed layers run again in
    the backward pass, outside of any context. Either model may be None: they are not always loaded at the same time.
    """
    torch.backends.cuda.enable_flash_sdp(not options.mem_eff_attn)
    torch.backends.cuda.enable_cudnn_sdp(not options.mem_eff_attn)
    if options.xformers and not options.mem_eff_attn:
        for model in (unet, vae):
            if model is not None:
                model.enable_xformers_memory_efficient_attention()


def _compiles(options: RuntimeOptions) -> bool:
    return options.torch_compile and options.dynamo_backend != "no"


def check_compiler(options: RuntimeOptions, device: torch.device) -> None:
    """Compile next to nothing: a backend may be known to PyTorch and still lack its package or a compiler.

    Found here, that is one sentence before any model is loaded. Raises UserError.
    """
    if not _compiles(options):
        return
    try:
        torch.compile(torch.sin, backend=options.dynamo_backend)(torch.ones(2, device=device))
    except Exception as error:  # each backend fails in its own way
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "Error: " in line), lines[0]).rstrip(".")
        raise UserError(
            f"--dynamo_backend {options.dynamo_backend} does not work here ({reason}). Use another one, or leave "
            "--torch_compile out."
        ) from error


def compile_modules(options: RuntimeOptions, modules: list[torch.nn.Module]) -> None:
    """Compile the modules in place with ``--torch_compile`` and its ``--dynamo_backend``."""
    if not _compiles(options):
        return
    logger.info("Compiling the U-Net and the text encoders (%s); the first steps take longer.", options.dynamo_backend)
    for module in modules:
        module.compile(backend=options.dynamo_backend)
