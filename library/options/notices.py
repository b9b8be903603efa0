"""Options that are given and have no effect in this run: one sentence each, saying why.

Most of it is declared with the option. What only shows later, with the images found or the optimizer built, is said
there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from library.options.checks import clip_limit
from library.options.declaration import Option
from library.options.options import Options, as_dict, declared_options
from library.options.output import MetadataOptions
from library.options.training import DeepSpeedOptions

Rule = tuple[bool, str]

_DECLARED = dict(declared_options())


def notices(options: Options) -> list[str]:
    """Return a sentence for each option that is given and changes nothing."""
    values, given = as_dict(options, secrets=True), _given(options)
    sentences = [_notice(name, _DECLARED[name], values) for name in values if name in given]
    rules = (_folders, _noise, _recipe, _runtime, _saving, _logs)
    told = [sentence for rule in rules for applies, sentence in rule(options, given) if applies]
    return [*filter(None, sentences), *told]


def _given(options: Options) -> set[str]:
    """Names of the options that ask for something which is not the default."""
    defaults = as_dict(Options(), secrets=True)
    values = as_dict(options, secrets=True)
    in_file = {name for name, option in _DECLARED.items() if option.table and options.dataset.dataset_config}
    return {name for name in values.keys() - in_file if values[name] != defaults[name] and _asks(values[name])}


def _asks(value: Any) -> bool:
    return value not in (None, False, 0, "", "no")


def _notice(name: str, option: Option, values: Mapping[str, Any]) -> str | None:
    """What the declaration of a given option says of it."""
    if winner := next((other for other in option.yields_to if _asks(values[other])), None):
        return f"--{name} is not used: --{winner} wins."
    if option.idle:
        return f"--{name}: {option.idle}."
    if option.needs and not any(_is_met(need, values) for need in option.needs):
        return f"--{name} has no effect without {option.condition}."
    return None


def _is_met(need: str, values: Mapping[str, Any]) -> bool:
    """Whether a need is in force: it asks for something, has the value that is needed, and no other option wins."""
    name, _, wanted = need.partition(" ")
    wins = not any(_asks(values[other]) for other in _DECLARED[name].yields_to)
    return wins and (values[name] == wanted if wanted else _asks(values[name]))


def _folders(options: Options, given: set[str]) -> Iterator[Rule]:
    data = options.dataset
    yield (
        data.dataset_config is None and "prior_loss_weight" in given and data.reg_data_dir is None,
        "--prior_loss_weight has no effect without regularisation images (--reg_data_dir).",
    )


def _noise(options: Options, given: set[str]) -> Iterator[Rule]:
    # Without any --noise_offset the run is refused.
    yield (
        "adaptive_noise_scale" in given and not options.noise.noise_offset,
        "--adaptive_noise_scale has no effect without a --noise_offset above 0.",
    )


def _recipe(options: Options, given: set[str]) -> Iterator[Rule]:
    normalizes = options.recipe.normalize_sample_gradients
    yield (
        normalizes and not clip_limit(options),
        "--normalize_sample_gradients: the gradient norm is not clipped, since no sample's is above 1.",
    )
    for name in ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss"):
        yield (
            normalizes and name in given,
            f"--{name} changes the loss that is logged, but not what is learned: --normalize_sample_gradients brings "
            "each sample's gradient to a norm of 1, whatever its loss is multiplied by.",
        )


def _runtime(options: Options, given: set[str]) -> Iterator[Rule]:
    runtime = options.runtime
    yield (
        runtime.torch_compile and runtime.dynamo_backend == "no",
        "--torch_compile has no effect: --dynamo_backend no means not to compile.",
    )
    yield (
        runtime.console_log_simple and runtime.console_log_file is not None,
        "--console_log_simple has no effect: the messages go to --console_log_file.",
    )
    for name in DeepSpeedOptions.__dataclass_fields__:
        yield (
            name in given and not options.deepspeed.deepspeed,
            f"--{name} has no effect: it is about DeepSpeed, which is not used.",
        )


def _saving(options: Options, given: set[str]) -> Iterator[Rule]:
    save = options.save
    yield save.save_state and save.save_state_on_train_end, "--save_state_on_train_end: --save_state does so anyway."
    yield (
        {"training_comment", "no_metadata"} <= given,
        "--training_comment is not written: --no_metadata leaves it out.",
    )
    for name in MetadataOptions.__dataclass_fields__:
        yield (
            name in given and name != "no_metadata" and save.save_model_as != "safetensors",
            f"--{name} is not written: only safetensors files hold metadata, and --save_model_as is "
            f"{save.save_model_as}.",
        )


def _logs(options: Options, given: set[str]) -> Iterator[Rule]:
    for_tensorboard = options.logging.trackers != ("wandb",)
    yield "log_prefix" in given and not for_tensorboard, "--log_prefix has no effect: it is for TensorBoard."
