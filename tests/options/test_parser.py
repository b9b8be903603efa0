"""The command line, alone and with a configuration file, up to checked options."""

import errno
import logging
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from departures import departure
from golden_data import golden_cases

from library.options import checks as option_checks
from library.options.checks import check_combinations, check_limits, safe_file_name, settle
from library.options.notices import notices
from library.options.options import Options, as_dict, declared_options
from library.options.parser import build_parser, parse, read_values
from library.support.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Parse a complete command line, to which the given arguments are added, for a family."""
    needed = ["--pretrained_model_name_or_path=model.safetensors", "--token_string=mychar", "--train_data_dir=data"]
    needed.append(f"--output_dir={tmp_path / 'output'}")

    def parse_with(*arguments: str, family: str = "sd") -> Options:
        return parse(build_parser("Train.", family), [*needed, *arguments])

    return parse_with


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_help_is_grouped_complete_and_needs_no_torch():
    program = (
        "import sys; from library.options.parser import build_parser\n"
        "text = build_parser('Train.', 'sd').format_help()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(text)"
    )
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"\n  --{name}" in shown for name, _ in declared_options())
    assert "\nThe token:\n" in shown
    assert "=false\n" not in shown.split("An option that a --config_file")[0]
    assert "(default: 1600)" not in shown  # the range is named with it
    assert "default: 1600" in " ".join(shown.split())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_both_families_take_every_option_with_its_default(family):
    parser = build_parser("Train.", family)
    assert {name: option.default for name, option in declared_options()} == read_values(parser, [])


@pytest.mark.parametrize(("flag", "value"), [("", None), ("=false", False), ("=true", True), (None, True)])
@pytest.mark.parametrize("name", ["v_parameterization", "zero_terminal_snr"])
def test_flags_that_follow_the_model_unless_they_are_given(run, name, flag, value):
    given = [] if flag == "" else [f"--{name}{flag or ''}"]
    options = run("--dataset_config=d.toml", *given)
    assert (options.model if name == "v_parameterization" else options.noise).__getattribute__(name) is value


def test_values_arrive_in_their_groups(run):
    options = run(
        "--resolution=512,768",
        "--learning_rate=5e-3:100,5e-4",
        "--optimizer_args",
        "weight_decay=0.1",
        "betas=0.9,0.99",
        "--dataset_config=data.toml",
        "--cache_latents",
        "--lr_warmup_steps=10%",
        "--lr_scheduler=linear",
        "--adaptive_noise_scale",
        "-0.1",
        "--noise_offset=0.1",
    )
    assert options.dataset.resolution == (512, 768)
    assert options.optimizer.learning_rate == ((5e-3, 100), (5e-4, None))
    assert options.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert options.dataset.dataset_config == Path("data.toml")
    assert options.cache.cache_latents is True
    assert options.schedule.lr_warmup_steps == 0.1
    assert options.noise.adaptive_noise_scale == -0.1


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("mychar", "mychar"),
        ("<my/char>", "my_char"),
        ('a:b*c?"', "a_b_c"),
        ("...", "embedding"),
        ("my char", "my char"),
    ],
)
def test_the_file_is_named_after_the_word(run, token, name):
    assert safe_file_name(token) == name
    assert run(f"--token_string={token}").save.output_name == name
    assert run(f"--token_string={token}", "--output_name=other").save.output_name == "other"


def test_an_empty_text_means_not_given(run):
    options = run("--vae=", "--caption_separator=", "--init_word", "")
    assert (options.model.vae, options.dataset.caption_separator, options.token.init_word) == (None, ",", None)


def test_looking_at_the_dataset_needs_no_output_folder(run):
    assert run("--output_dir=", "--debug_dataset").save.output_dir is None


def test_an_output_folder_that_cannot_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(UserError, match=r"file is a file, not a folder"):
            run(f"--output_dir={tmp_path / folder}")
    for name in ("folder/name", "folder\\name", "two\nlines"):
        with pytest.raises(UserError, match="is no file name"):
            run(f"--output_name={name}")
    with pytest.raises(UserError, match=r"--output_dir .*too long"):
        run(f"--output_dir={tmp_path / ('x' * 300)}")
    with pytest.raises(UserError, match="too long for a file name: 201 bytes"):
        run("--output_name=" + "é" * 100 + "x")
    assert run("--output_name=" + "é" * 100).save.output_name == "é" * 100


@pytest.mark.parametrize(
    "argument",
    [
        "num_vectors_per_token=0",
        "clip_skip=0",
        "max_train_steps=0",
        "max_train_epochs=0",
        "train_batch_size=0",
        "vae_batch_size=-1",
        "dataset_repeats=0",
        "gradient_accumulation_steps=0",
        "seed=-1",
        "seed=4294967296",
        "keep_tokens=-1",
        "caption_dropout_rate=1.1",
        "caption_tag_dropout_rate=-0.1",
        "huber_c=0",
        "max_grad_norm=-1",
        "lr_warmup_steps=-0.5",
        "lr_warmup_steps=150%",
        "lr_decay_steps=-3",
        "lr_scheduler_min_lr_ratio=2",
        "min_timestep=-1",
        "max_timestep=1001",
        "max_data_loader_n_workers=-1",
        "min_snr_gamma=-5",
        "prior_loss_weight=-1",
    ],
)
def test_a_number_outside_its_range_is_refused(run, argument):
    name, value = argument.split("=")
    with pytest.raises(UserError, match=rf"^--{name} is .*(must be|at most)"):
        run(f"--{name}", value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--min_timestep=500", "--max_timestep=500"], "--min_timestep 500 is not below --max_timestep 500"),
        (["--min_timestep=1000"], "--min_timestep 1000 is not below --max_timestep 1000"),
        (["--max_timestep=0"], "--min_timestep 0 is not below --max_timestep 0"),
    ],
)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_contradictions_are_refused(run, arguments, sentence, family):
    with pytest.raises(UserError) as caught:
        run(*arguments, family=family)
    assert sentence in str(caught.value)


def test_v2_is_refused_for_sdxl(run):
    assert run("--v2").model.v2
    with pytest.raises(UserError, match="--v2 is for Stable Diffusion 2"):
        run("--v2", family="sdxl")


def test_caching_to_disk_implies_caching(run, warnings):
    cache = run("--cache_latents_to_disk").cache
    assert cache.cache_latents
    assert cache.cache_latents_to_disk
    assert "--cache_latents_to_disk switches --cache_latents on." in warnings()


@pytest.mark.parametrize("name", ["sample_every_n_epochs", "sample_every_n_steps", "save_every_n_steps", "ddp_timeout"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_zero_switches_a_count_off(run, warnings, name, value):
    assert as_dict(run(f"--{name}", value))[name] is None
    assert any(f"--{name} {value} means never" in warning for warning in warnings())


def test_75_tokens_are_the_plain_limit(run):
    assert run("--max_token_length=75").token.max_token_length is None
    assert run("--max_token_length=150").token.max_token_length == 150


def test_the_old_spelling_of_the_caption_ending_wins(run):
    assert run("--caption_extension=.txt", "--caption_extention=.cap").dataset.caption_extension == ".cap"


def test_workers_that_do_not_exist_cannot_persist(run, warnings):
    options = run("--persistent_data_loader_workers", "--max_data_loader_n_workers=0")
    assert not options.dataset.persistent_data_loader_workers
    assert any("--persistent_data_loader_workers" in warning for warning in warnings())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--zero_terminal_snr", "--v_parameterization=false"], "--zero_terminal_snr with --v_parameterization=false"),
        (["--v2", "--clip_skip=2"], "--clip_skip is unusual with --v2"),
    ],
)
def test_likely_mistakes_are_warned_of(run, warnings, arguments, part):
    run(*arguments)
    assert any(part in warning for warning in warnings())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--sdpa"], "is the default anyway"),
        (["--sdpa", "--mem_eff_attn"], "--sdpa is not used: --mem_eff_attn wins"),
        (["--save_last_n_steps_state=1"], "--save_last_n_steps_state has no effect without --save_state"),
        (["--save_state", "--save_state_on_train_end"], "--save_state does so anyway"),
        (["--huggingface_repo_type=model"], "--huggingface_repo_type has no effect without --huggingface_repo_id"),
        (["--async_upload"], "--async_upload has no effect without --huggingface_repo_id"),
        (["--huggingface_token=t"], "without --huggingface_repo_id or --resume_from"),
        (
            ["--huggingface_repo_id=a/b", "--save_state_to_huggingface"],
            "--save_state_to_huggingface has no effect without --save_state",
        ),
        (["--xformers", "--mem_eff_attn"], "--xformers is not used"),
        (["--torch_compile", "--dynamo_backend=no"], "--torch_compile has no effect"),
        (["--dynamo_backend=eager"], "--dynamo_backend has no effect"),
        (["--prior_loss_weight=0.5"], "without regularisation images"),
        (["--min_bucket_reso=128"], "--min_bucket_reso has no effect without --enable_bucket"),
        (["--use_object_template", "--use_style_template"], "--use_style_template is not used"),
        (["--vae_batch_size=4"], "without --cache_latents"),
        (["--highvram"], "--highvram has no effect without --cache_latents"),
        (["--cache_latents", "--skip_cache_check"], "without --cache_latents_to_disk"),
        (["--adaptive_noise_scale=0.1", "--noise_offset=0"], "--adaptive_noise_scale has no effect"),
        (["--noise_offset_random_strength"], "--noise_offset_random_strength has no effect"),
        (["--multires_noise_discount=0.2"], "without --multires_noise_iterations"),
        (["--ip_noise_gamma_random_strength"], "without --ip_noise_gamma"),
        (["--huber_c=0.2"], "--huber_c has no effect without --loss_type huber or smooth_l1"),
        (["--lr_scheduler_power=2"], "has no effect without --lr_scheduler polynomial"),
        (["--lr_scheduler=polynomial", "--lr_scheduler_type=StepLR", "--lr_scheduler_power=2"], "--lr_scheduler_power"),
        (["--lr_scheduler=cosine", "--lr_scheduler_type=StepLR"], "--lr_scheduler is not used"),
        (["--max_train_epochs=2", "--max_train_steps=5"], "--max_train_steps is not used"),
        (["--save_n_epoch_ratio=2", "--save_every_n_epochs=1"], "--save_every_n_epochs is not used"),
        (["--save_last_n_epochs=2"], "without --save_every_n_epochs or --save_n_epoch_ratio"),
        (["--save_last_n_steps=2"], "without --save_every_n_steps"),
        (["--metadata_author=me", "--save_model_as=pt"], "--metadata_author is not written"),
        (["--zero_stage=3"], "about DeepSpeed"),
        (["--console_log_file=a.log", "--console_log_simple"], "--console_log_simple has no effect"),
    ],
)
def test_options_without_effect_are_named(run, arguments, part):
    assert [sentence for sentence in notices(run(*arguments)) if part in sentence]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--cache_latents", "--vae_batch_size=4", "--cache_latents_to_disk", "--skip_cache_check"],
        ["--noise_offset=0.1", "--adaptive_noise_scale=0.1"],
        ["--loss_type=huber", "--huber_c=0.2"],
        ["--lr_scheduler=polynomial", "--lr_scheduler_power=2"],
        ["--save_every_n_steps=5", "--save_last_n_steps=10"],
        ["--save_n_epoch_ratio=5", "--save_last_n_epochs=10"],
        ["--metadata_author=me"],
        ["--torch_compile"],
        ["--xformers"],
    ],
)
def test_options_with_effect_are_not_named(run, arguments):
    assert notices(run(*arguments)) == []


@pytest.mark.parametrize("case", golden_cases("verify_args"))
def test_golden_verify_args(case):
    assert departure("verify_args", case) is None

    def verified() -> Options:
        options = Options.from_values(settle(read_values(build_parser("Train.", "sd"), case["argv"])))
        check_limits(options)
        check_combinations(options)
        return options

    if "error" in case:
        with pytest.raises(UserError):
            verified()
        return
    options = verified()
    assert options.cache.cache_latents == case["cache_latents"]
    assert options.sample.sample_every_n_epochs == case["sample_every_n_epochs"]
    assert options.sample.sample_every_n_steps == case["sample_every_n_steps"]


@pytest.mark.parametrize(("name", "variable"), [("huggingface_token", "HF_TOKEN"), ("wandb_api_key", "WANDB_API_KEY")])
def test_a_secret_on_the_command_line_is_warned_of_and_one_in_the_file_is_not(run, warnings, tmp_path, name, variable):
    file = tmp_path / "config.toml"
    file.write_text(f"{name} = 'hush'\n")
    run(f"--config_file={file}")
    assert not any(variable in warning for warning in warnings())
    run(f"--{name}=hush")
    (warning,) = [warning for warning in warnings() if variable in warning]
    assert f"--{name} stands on the command line" in warning
    assert "hush" not in warning


@pytest.mark.parametrize("name", ["dataset_class", "optimizer_type", "lr_scheduler_type"])
def test_options_that_run_code_say_so(name):
    assert "the code in it runs" in dict(declared_options())[name].help


COMMAND = ["--pretrained_model_name_or_path=m", "--token_string=mychar", "--output_dir=o", "--train_data_dir=d"]
# "--" is what argparse reads as the end of all options, and lone surrogates what the shell's odd bytes become.
STRANGE = ["--", "-", "=", "%", "1" + "0" * 19, "-1" + "0" * 19, "9" * 5000, "-" + "9" * 4000, "nan", "inf%", "1e400"]
STRANGE += ["1e308", "1e-320", "\udcff", "a\0b", "5e-3:" + "9" * 5000 + ",1", "()", "²"]


@pytest.mark.parametrize("name", [name for name, option in declared_options() if not option.is_flag])
def test_strange_values_are_taken_or_refused_in_a_sentence(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = build_parser("Train.", "sd")
    for value in [*STRANGE, "\ud800"]:
        with suppress(UserError):
            parse(parser, [*COMMAND, f"--{name}={value}"])


@pytest.mark.parametrize("name", ["max_train_steps", "seed", "num_vectors_per_token", "ddp_timeout", "huber_c"])
def test_two_dashes_are_no_number(name):
    with pytest.raises(UserError, match=rf'--{name}: "--" is not a'):
        parse(build_parser("Train.", "sd"), [*COMMAND, f"--{name}=--"])


def test_two_dashes_are_a_text():
    options = parse(build_parser("Train.", "sd"), [*COMMAND, "--caption_separator=--"])
    assert options.dataset.caption_separator == "--"


@pytest.mark.parametrize(
    "name",
    [
        *("max_train_steps", "max_train_epochs", "train_batch_size", "dataset_repeats", "gradient_accumulation_steps"),
        *("num_vectors_per_token", "max_bucket_reso", "min_bucket_reso", "bucket_reso_steps", "vae_batch_size"),
        *("max_data_loader_n_workers", "ddp_timeout", "multires_noise_iterations", "seed"),
    ],
)
@pytest.mark.parametrize("value", [2**33, 10**19])
def test_counts_have_an_end(name, value):
    with pytest.raises(UserError, match=rf'--{name}.*("{value}" is too large|it must be .*at most)'):
        parse(build_parser("Train.", "sd"), [*COMMAND, f"--{name}={value}"])


@pytest.mark.parametrize("name", ["token_string", "output_name", "init_word", "caption_prefix", "metadata_title"])
def test_texts_are_unicode(name):
    with pytest.raises(UserError, match=rf"--{name} .*not valid UTF-8"):
        parse(build_parser("Train.", "sd"), [*COMMAND, f"--{name}=my\udcffchar"])


def test_file_names_need_not_be_unicode(tmp_path):
    folder = f"{tmp_path}/\udcff"
    assert parse(build_parser("Train.", "sd"), [*COMMAND, f"--output_dir={folder}"]).save.output_dir == folder


@pytest.mark.parametrize("name", ["output_dir", "logging_dir"])
@pytest.mark.parametrize("place", ["file", "file/below/it", "dangling", "dangling/below", "x" * 300])
def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path, name, place):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"^--{name} "):
        parse(build_parser("Train.", "sd"), [*COMMAND, f"--{name}={tmp_path / place}"])


@pytest.mark.parametrize("name", ["output_dir", "logging_dir"])
def test_a_folder_on_a_disk_that_takes_no_files_is_refused_at_once(tmp_path, name, monkeypatch):
    """Permissions say nothing of a read-only disk, nor anything to a superuser: a file is tried."""

    def refused(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(option_checks.tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"is not writable \(Read-only file system\)"):
        parse(build_parser("Train.", "sd"), [*COMMAND, f"--{name}={tmp_path}"])


def test_trying_a_folder_leaves_nothing_behind(tmp_path):
    parse(build_parser("Train.", "sd"), [*COMMAND, f"--output_dir={tmp_path / 'a' / 'b'}"])
    assert not list(tmp_path.iterdir())
