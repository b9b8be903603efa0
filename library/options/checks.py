"""What options must satisfy together: required ones, ranges and contradictions."""

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.options.declaration import Option
from library.options.option_types import shown
from library.options.options import AUTO, Options, as_dict, declared_options
from library.options.training import OptimizerOptions
from library.support.errors import UserError, looked_for
from library.support.text_files import is_unicode

logger = logging.getLogger(__name__)


CACHED_INPAINTING = (
    "train_inpainting hides another part of each image every time, so its latents cannot be made once and for all. "
    "Leave out --cache_latents and --cache_latents_to_disk."
)


def settle(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with old spellings, implied options and the default file name filled in.

    Takes and returns every option's value by name. Logs a warning for each value that is set aside.
    """
    settled = dict(values)
    for name, option in declared_options():
        if option.zero_is_off and settled[name] is not None and settled[name] <= 0:
            logger.warning("--%s %s means never; it is taken as not given.", name, settled[name])
            settled[name] = None
        if option.spelling_of and settled[name] is not None:
            settled[option.spelling_of] = settled[name]
    if settled["max_token_length"] == 75:
        settled["max_token_length"] = None
    if settled["cache_latents_to_disk"] and not settled["cache_latents"]:
        logger.warning("--cache_latents_to_disk switches --cache_latents on.")
        settled["cache_latents"] = True
    if settled["persistent_data_loader_workers"] and settled["max_data_loader_n_workers"] == 0:
        logger.warning("--persistent_data_loader_workers has no effect with --max_data_loader_n_workers 0.")
        settled["persistent_data_loader_workers"] = False
    settled["output_name"] = _output_name(settled)
    return settled


def _output_name(values: Mapping[str, Any]) -> str | None:
    """The name of the embedding files without their ending, which --save_model_as decides; unset, the token's."""
    name: str | None = values["output_name"]
    token: str | None = values["token_string"]
    if name is None:
        return None if token is None else safe_file_name(token)
    stem, _, ending = name.rpartition(".")
    endings = dict(declared_options())["save_model_as"].choices or ()
    if not stem or ending.lower() not in endings:
        return name
    logger.warning(
        '--output_name "%s" is taken as "%s": --save_model_as adds the ending, .%s.',
        name,
        stem,
        values["save_model_as"],
    )
    return stem


def safe_file_name(text: str) -> str:
    """Return the text with every sign that some file system refuses replaced by "_"; "embedding" if nothing is left."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", text).strip(" ._") or "embedding"


def check(options: Options, family: str) -> None:
    """Refuse options that cannot lead to a run of the family ("sd" or "sdxl"). Raises UserError."""
    check_limits(options)
    check_combinations(options)
    _check_family(options, family)
    _check_samples(options)
    _check_hub(options)
    _check_required(options)
    _check_output(options)


def check_limits(options: Options) -> None:
    """Refuse a number outside its option's range."""
    values = as_dict(options)
    for name, option in declared_options():
        value = values.get(name)
        if option.limits and value is not None and not option.allows(value):
            raise UserError(f"--{name} is {value}; it must be {option.limits}.")
        _check_unicode(name, option, value)
        if option.check and value is not None and (wrong := option.check(value)):
            raise UserError(f"--{name} {wrong}")


def _check_unicode(name: str, option: Option, value: Any) -> None:
    """Refuse bytes that are not UTF-8 where no file name is meant: no prompt, tokenizer or metadata can hold them."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not is_unicode(text, odd_names=option.is_place):
            raise UserError(f"--{name} {shown(text)} is not valid UTF-8. Type it again in a UTF-8 terminal or file.")


def check_combinations(options: Options) -> None:
    """Refuse options that contradict or miss each other; warn about likely mistakes."""
    _check_start(options)
    noise, loss, model = options.noise, options.loss, options.model
    if noise.adaptive_noise_scale is not None and noise.noise_offset is None:
        raise UserError("--adaptive_noise_scale changes the noise offset and needs --noise_offset, for example 0.05.")
    if loss.scale_v_pred_loss_like_noise_pred and not model.v_parameterization:
        raise UserError(
            "--scale_v_pred_loss_like_noise_pred is for v-prediction models and needs --v_parameterization."
        )
    if loss.v_pred_like_loss is not None and model.v_parameterization:
        raise UserError("--v_pred_like_loss is for models that predict noise. Leave it out with --v_parameterization.")
    if noise.zero_terminal_snr and model.v_parameterization is False:
        logger.warning(
            "--zero_terminal_snr with --v_parameterization=false: a model that predicts noise learns nothing from pure "
            "noise. The results may be unexpected."
        )
    if model.v2 and model.clip_skip is not None:
        logger.warning("--clip_skip is unusual with --v2: those models use the second last layer already.")
    if options.dataset.train_inpainting and options.cache.cache_latents:
        raise UserError(f"--{CACHED_INPAINTING}")
    if options.recipe.early_stopping and options.recipe.average_last:
        raise UserError(
            "--average_last takes the mean over the end of a run whose length is known, and --early_stopping may stop "
            "it before. Keep one of them."
        )
    _check_timesteps(noise.min_timestep, noise.max_timestep)
    _check_precision(options)
    chosen_optimizer(options.optimizer)


def _check_timesteps(lowest: int | None, end: int | None) -> None:
    low, high = lowest or 0, 1000 if end is None else end
    if low >= high:
        raise UserError(
            f"--min_timestep {low} is not below --max_timestep {high}. Both lie between 0 and 1000; unset they are "
            "0 and 1000."
        )


def _check_start(options: Options) -> None:
    if not options.token.chooses_start:
        return
    if AUTO in options.token.candidates:
        raise UserError(f'--init_word_candidates: "{AUTO}" asks for the choice and cannot be chosen. Write car.')
    if options.token.weights is not None:
        raise UserError("--init_word=auto chooses the start of new vectors, and those of --weights have one. Keep one.")
    if options.dataset.dataset_class:
        raise UserError(
            "--init_word=auto tries words on the training images, and only your --dataset_class knows them. Name a "
            "word, for example --init_word=girl."
        )


def _check_precision(options: Options) -> None:
    runtime = options.runtime
    for flag, wanted in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(runtime, flag) and runtime.mixed_precision != wanted:
            chosen = f'it is "{runtime.mixed_precision}"' if runtime.mixed_precision else "it is not given"
            raise UserError(f"--{flag} needs --mixed_precision {wanted}; {chosen}.")
    if options.deepspeed.deepspeed:
        raise UserError(
            "--deepspeed cannot help here: it divides weights, gradients and optimizer states among GPUs, and only the "
            "few new vectors have any. Leave it out; several GPUs work with accelerate launch --multi_gpu."
        )


def chosen_optimizer(options: OptimizerOptions) -> str:
    """The optimizer's name with the two old flags taken into account. Raises UserError where there are several."""
    names = {}
    if options.use_8bit_adam:
        names["--use_8bit_adam"] = "AdamW8bit"
    if options.use_lion_optimizer:
        names["--use_lion_optimizer"] = "Lion"
    if options.optimizer_type:
        names[f"--optimizer_type={options.optimizer_type}"] = options.optimizer_type
    if len(names) > 1:
        flag, meant = next(iter(names.items()))
        raise UserError(
            f"{' and '.join(names)} name {'two' if len(names) == 2 else 'three'} optimizers. Keep one of them; {flag} "
            f"means --optimizer_type={meant}."
        )
    return next(iter(names.values()), "AdamW")


def clip_limit(options: Options) -> float:
    """The joint norm that the gradient is clipped to, 0 for none: normalized gradients are bounded by themselves."""
    limit = options.optimizer.max_grad_norm
    is_default = limit == OptimizerOptions().max_grad_norm
    return 0.0 if is_default and options.recipe.normalize_sample_gradients else limit


def _check_family(options: Options, family: str) -> None:
    if family == "sdxl" and options.model.v2:
        raise UserError("--v2 is for Stable Diffusion 2.x: use train_textual_inversion.py, or leave --v2 out for SDXL.")


def _check_samples(options: Options) -> None:
    sample = options.sample
    if sample.draws_during_training and sample.sample_prompts is None:
        raise UserError(
            "--sample_prompts is missing: a file with the prompts to draw, one on each line, is needed for "
            "--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first."
        )
    if sample.learning_report and options.dataset.dataset_class:
        raise UserError(
            "--learning_report compares with the training images, and only your --dataset_class knows them. Leave "
            "one of the two out."
        )


def _check_hub(options: Options) -> None:
    hub = options.hub
    if hub.resume_from_huggingface and options.save.resume is None:
        raise UserError(
            "--resume_from_huggingface says where --resume is to be found; give --resume user/name/path too."
        )
    if hub.save_state_to_huggingface and hub.huggingface_repo_id is None:
        raise UserError("--save_state_to_huggingface needs --huggingface_repo_id, the repository to upload to.")


def _check_required(options: Options) -> None:
    values = as_dict(options)
    for name, option in declared_options():
        if option.required and not (values[name] or "").strip():
            raise UserError(f"--{name} is missing: {option.required}")
    data = options.dataset
    if not (data.dataset_config or data.train_data_dir or data.in_json or data.dataset_class):
        raise UserError("No images are given: use --dataset_config (a TOML file) or --train_data_dir (a folder).")
    if options.save.output_dir is None and not data.debug_dataset:
        raise UserError("--output_dir is missing: the folder for the embedding file.")


def _check_output(options: Options) -> None:
    if options.save.output_dir is not None:
        check_folder("--output_dir", options.save.output_dir)
    if options.logging.trackers and options.logging.logging_dir is not None:
        check_folder("--logging_dir", options.logging.logging_dir)


def check_given_files(options: Options) -> None:
    """Raise UserError for a file or state that is not there; what is in them takes PyTorch to see."""
    samples, state = options.sample, options.save.resume
    given = {
        "--weights": options.token.weights,
        "--sample_prompts": samples.sample_prompts if samples.draws_during_training else None,
        "--resume": None if state == "latest" or options.hub.resume_from_huggingface else state,
    }
    for option, name in given.items():
        if name and not os.path.exists(name):  # noqa: PTH110 - Path.exists raises for a name that is too long
            advice = "States are made by --save_state, in --output_dir" if option == "--resume" else "Check the path"
            raise UserError(f"{option} {name} does not exist{looked_for(name)}. {advice}.")


def check_folder(option: str, given: str) -> None:
    """Raise UserError unless files can be written into a folder that is there, or can be made."""
    folder = Path(given)
    try:
        places = (folder, *folder.absolute().parents)
        existing = next(place for place in places if place.exists() or place.is_symlink())
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be a folder: {error.strerror}. Choose another one.") from error
    if not existing.is_dir():
        what = "is a file, not a folder" if existing.exists() else "is a link to a folder that does not exist"
        raise UserError(f"{option} {folder}: {existing} {what}. Choose another folder.")
    try:
        # Asking for permissions says nothing of read-only and full disks, nor anything to a superuser.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {folder}: {existing} is not writable ({error.strerror}). Choose another folder or change its "
            "permissions."
        ) from error
