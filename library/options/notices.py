"""Options that are given and have nothing to do in this run: one sentence each, saying why.

What only shows later, with the pictures found or the optimizer built, is said there.
"""

from collections.abc import Iterator

from library.options.options import DeepSpeedOptions, MetadataOptions, Options, as_dict

Rule = tuple[bool, str]

# Which schedules read which of the settings that most ignore.
SCHEDULES_THAT_READ = {
    "lr_scheduler_num_cycles": (
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
}


def notices(options: Options) -> list[str]:
    """Return a sentence for each option that is given and changes nothing."""
    rules = (_data, _caches, _noise, _loss, _schedule, _length, _runtime, _saving, _hub, _samples, _logs)
    return [sentence for rule in rules for applies, sentence in rule(options, _given(options)) if applies]


def _given(options: Options) -> set[str]:
    """Names of the options whose value is not the default."""
    defaults = as_dict(Options(), secrets=True)
    return {name for name, value in as_dict(options, secrets=True).items() if value != defaults[name]}


def _data(options: Options, given: set[str]) -> Iterator[Rule]:
    data = options.dataset
    folders_only = data.dataset_config is None
    for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
        yield (
            folders_only and name in given and not data.enable_bucket,
            f"--{name} has nothing to do without --enable_bucket.",
        )
    yield (
        folders_only and "prior_loss_weight" in given and data.reg_data_dir is None,
        "--prior_loss_weight has nothing to do without regularisation pictures (--reg_data_dir).",
    )
    yield (
        options.token.use_object_template and options.token.use_style_template,
        "--use_style_template is not used: --use_object_template wins.",
    )


def _caches(options: Options, given: set[str]) -> Iterator[Rule]:
    cache = options.cache
    for name in ("vae_batch_size", "highvram"):
        yield name in given and not cache.cache_latents, f"--{name} has nothing to do without --cache_latents."
    yield (
        cache.skip_cache_check and not cache.cache_latents_to_disk,
        "--skip_cache_check has nothing to do without --cache_latents_to_disk.",
    )


def _noise(options: Options, given: set[str]) -> Iterator[Rule]:
    noise = options.noise
    for name in ("noise_offset_random_strength", "adaptive_noise_scale"):
        yield name in given and not noise.noise_offset, f"--{name} has nothing to do without a --noise_offset above 0."
    yield (
        "multires_noise_discount" in given and not noise.multires_noise_iterations,
        "--multires_noise_discount has nothing to do without --multires_noise_iterations.",
    )
    yield (
        noise.ip_noise_gamma_random_strength and not noise.ip_noise_gamma,
        "--ip_noise_gamma_random_strength has nothing to do without --ip_noise_gamma.",
    )


def _loss(options: Options, given: set[str]) -> Iterator[Rule]:
    loss = options.loss
    for name in ("huber_schedule", "huber_c", "huber_scale"):
        yield (
            name in given and loss.loss_type not in ("huber", "smooth_l1"),
            f"--{name} has nothing to do with --loss_type {loss.loss_type}.",
        )


def _schedule(options: Options, given: set[str]) -> Iterator[Rule]:
    schedule = options.schedule
    if schedule.lr_scheduler_type:
        yield "lr_scheduler" in given, "--lr_scheduler is not used: --lr_scheduler_type names the schedule."
    chosen = schedule.lr_scheduler_type or schedule.lr_scheduler
    for name, readers in SCHEDULES_THAT_READ.items():
        yield (
            name in given and bool(getattr(schedule, name)) and chosen not in readers,
            f"--{name} has nothing to do: it is read by {', '.join(readers)}, and the schedule is {chosen}.",
        )


def _length(options: Options, given: set[str]) -> Iterator[Rule]:
    yield (
        {"max_train_steps", "max_train_epochs"} <= given,
        "--max_train_steps is not used: --max_train_epochs sets the length.",
    )


def _runtime(options: Options, given: set[str]) -> Iterator[Rule]:
    runtime = options.runtime
    efficient, xformers = runtime.mem_eff_attn, runtime.xformers
    yield runtime.sdpa and not (efficient or xformers), "--sdpa: PyTorch's own attention is the default anyway."
    yield runtime.sdpa and (efficient or xformers), "--sdpa is not used: another kind of attention is asked for."
    yield runtime.lowram, "--lowram: the models are loaded straight to the device anyway."
    yield xformers and efficient, "--xformers is not used: --mem_eff_attn wins."
    yield (
        "dynamo_backend" in given and runtime.dynamo_backend != "no" and not runtime.torch_compile,
        "--dynamo_backend has nothing to do without --torch_compile.",
    )
    yield (
        runtime.torch_compile and runtime.dynamo_backend == "no",
        "--torch_compile has nothing to do: --dynamo_backend no means not to compile.",
    )
    yield (
        runtime.console_log_simple and runtime.console_log_file is not None,
        "--console_log_simple has nothing to do: the messages go to --console_log_file.",
    )
    for name in DeepSpeedOptions.__dataclass_fields__:
        yield (
            name in given and not options.deepspeed.deepspeed,
            f"--{name} has nothing to do: it is about DeepSpeed, which is not used.",
        )


def _saving(options: Options, given: set[str]) -> Iterator[Rule]:
    save = options.save
    yield (
        {"save_every_n_epochs", "save_n_epoch_ratio"} <= given,
        "--save_every_n_epochs is not used: --save_n_epoch_ratio wins.",
    )
    yield (
        "save_last_n_epochs" in given and not {"save_every_n_epochs", "save_n_epoch_ratio"} & given,
        "--save_last_n_epochs has nothing to do: no files are saved after epochs (--save_every_n_epochs).",
    )
    yield (
        "save_last_n_steps" in given and "save_every_n_steps" not in given,
        "--save_last_n_steps has nothing to do: no files are saved after steps (--save_every_n_steps).",
    )
    for name in ("save_last_n_epochs_state", "save_last_n_steps_state"):
        yield name in given and not save.save_state, f"--{name} has nothing to do without --save_state."
    yield save.save_state and save.save_state_on_train_end, "--save_state_on_train_end: --save_state does so anyway."
    yield (
        {"training_comment", "no_metadata"} <= given,
        "--training_comment is not written: --no_metadata leaves it out.",
    )
    for name in MetadataOptions.__dataclass_fields__.keys() - {"no_metadata"}:
        yield (
            name in given and save.save_model_as != "safetensors",
            f"--{name} is not written: only safetensors files hold metadata, and --save_model_as is "
            f"{save.save_model_as}.",
        )


def _hub(options: Options, given: set[str]) -> Iterator[Rule]:
    hub = options.hub
    upload = hub.huggingface_repo_id is not None
    for name in ("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"):
        yield name in given and not upload, f"--{name} has nothing to do without --huggingface_repo_id."
    yield (
        "huggingface_token" in given and not (upload or hub.resume_from_huggingface),
        "--huggingface_token has nothing to do: nothing is uploaded (--huggingface_repo_id).",
    )
    yield (
        hub.save_state_to_huggingface and not (options.save.save_state or options.save.save_state_on_train_end),
        "--save_state_to_huggingface has nothing to do without --save_state or --save_state_on_train_end.",
    )


def _samples(options: Options, given: set[str]) -> Iterator[Rule]:
    sample = options.sample
    yield (
        sample.sample_prompts is not None and not sample.draws_during_training,
        "--sample_prompts has nothing to do: add --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first.",
    )
    yield (
        {"sample_every_n_epochs", "sample_every_n_steps"} <= given,
        "--sample_every_n_steps is not used: --sample_every_n_epochs wins.",
    )
    yield (
        "sample_sampler" in given and not sample.draws_pictures,
        "--sample_sampler has nothing to do: no pictures are drawn.",
    )


def _logs(options: Options, given: set[str]) -> Iterator[Rule]:
    logs = options.logging
    tensorboard, wandb = "tensorboard" in logs.trackers, "wandb" in logs.trackers
    for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"):
        yield (
            name in given and not (tensorboard or wandb),
            f"--{name} has nothing to do: nothing is logged (--logging_dir, --log_with).",
        )
    yield "log_prefix" in given and wandb and not tensorboard, "--log_prefix has nothing to do: it is for TensorBoard."
    for name in ("wandb_run_name", "wandb_api_key"):
        yield name in given and not wandb, f"--{name} has nothing to do without --log_with wandb or all."
    yield (
        {"wandb_run_name", "log_tracker_config"} <= given,
        "--wandb_run_name is not used: --log_tracker_config replaces all trackers' settings.",
    )
