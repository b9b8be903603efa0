"""The one list of places where this project departs from a golden case, with the numbers of docs/decisions.md.

A departure is a rule about a case's inputs, so that it also covers cases that are not in our copy. The golden tests
ask ``departure(file, case)``; where it answers, they assert our behaviour instead of the measured one.
"""

import functools
import io
import json
import re
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftfy import fix_text
from golden_data import golden_arrays

from library.data.schema import DREAMBOOTH, GENERAL, known_keys
from library.embedding.placeholder import Placeholder
from library.options.declaration import checked
from library.options.options import declared_options
from library.output.samplers import SAMPLER_NAMES


@dataclass(frozen=True)
class Departure:
    """One documented difference: the golden file, its number in docs/decisions.md, why, and which cases it concerns."""

    file: str
    number: str
    why: str
    applies: Callable[[dict], bool]


def _pieces_where_sd_scripts_finds_the_names(case: dict) -> list[str]:
    """Split at the names anywhere in the text, longest first, minding case: what added tokens do."""
    names = sorted(case["added_tokens"], key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, names)) + ")", case["caption"])


def _names_are_found_elsewhere(case: dict) -> bool:
    names = sorted(case["added_tokens"], key=len, reverse=True)
    whole_words = rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, names))})(?![A-Za-z0-9])"
    return re.split(whole_words, case["caption"], flags=re.IGNORECASE) != _pieces_where_sd_scripts_finds_the_names(case)


def _text_is_read_in_our_way(case: dict) -> bool:
    control = re.search(r"<\|(startoftext|endoftext)\|>", case["caption"], re.IGNORECASE)
    return control is not None or fix_text(case["caption"]) != case["caption"]


@functools.cache
def _whole_words() -> frozenset[str]:
    vocabulary = json.loads((Path(__file__).parents[1] / "configs/tokenizer/vocab.json").read_text(encoding="utf-8"))
    return frozenset(piece.removesuffix("</w>") for piece in vocabulary if piece.endswith("</w>"))


def _is_multi_line_in_our_way(case: dict) -> bool:
    lines = case["caption"].split("\n")
    decorated = len(lines) > 1 and (case["subset"].get("caption_prefix") or case["subset"].get("caption_suffix"))
    blank = [not line.strip() for line in lines]
    skipped = any(blank) if case["subset"].get("enable_wildcard") else blank[0]
    return bool(decorated or (skipped and not all(blank)))


def _is_joined_with_another_separator(case: dict) -> bool:
    subset = case["subset"]
    rearranged = any(subset.get(key) for key in ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"))
    return bool(rearranged and subset.get("caption_separator", ",") != ",")


def _naive_expansion_differs(case: dict) -> bool:
    return any(
        word and _placeholder(word, names).expand(case["caption"]) != case["caption"].replace(word, names)
        for word, names in case["replacements"].items()
    )


def _placeholder(word: str, names: str) -> Placeholder:
    return Placeholder(word, names.count(" ") // (word.count(" ") + 1) + 1)


def _dropping_could_lose_the_word(case: dict) -> bool:
    subset = case["subset"]
    every = subset.get("caption_dropout_every_n_epochs", 0)
    whole = subset.get("caption_dropout_rate", 0) > 0 or (every > 0 and case["current_epoch"] % every == 0)
    parts = subset.get("caption_tag_dropout_rate", 0) > 0 or subset.get("token_warmup_step", 0) > 0
    if "" in case["replacements"]:
        return whole
    caption = case["caption"] if subset.get("enable_wildcard") else case["caption"].split("\n")[0]
    caption = " ".join(filter(None, (subset.get("caption_prefix"), caption, subset.get("caption_suffix"))))
    placeholders = (_placeholder(word, names) for word, names in case["replacements"].items())
    return (whole or parts) and any(placeholder.found_in(caption) for placeholder in placeholders)


def _in_config_file(case: dict) -> dict:
    """The file's keys without their tables."""
    flat = {}
    for key, value in tomllib.loads(case["toml"]).items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def _is_refused(name: str, value: object) -> bool:
    options = dict(declared_options())
    if name not in options or value in ("", []):
        return False
    try:
        checked(options[name], value)
    except ArgumentTypeError:
        return True
    return False


def _config_file_is_refused(case: dict) -> bool:
    return any(_is_refused(name, value) for name, value in _in_config_file(case).items())


def _config_file_is_converted(case: dict) -> bool:
    options = dict(declared_options())
    read = {name: value for name, value in case.get("non_default", {}).items() if name != "config_file"}
    return any(name not in options or checked(options[name], value) != value for name, value in read.items())


def _image_is_read_in_our_way(case: dict) -> bool:
    """The file holds 16-bit greys, an EXIF orientation, or transparency that is not kept as alpha."""
    from PIL import ExifTags, Image

    data = golden_arrays("load_image")[case["npz_key"].split("_")[0] + "_file"].tobytes()
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return turned or image.mode.startswith("I") or (image.has_transparency_data and not case["alpha"])


def _cache_lacks_what_fits(case: dict) -> bool:
    """The file exists, but its latents do not have the bucket's shape, or it lacks an array that is asked for."""
    width, height = case["bucket_reso"]
    asked = {"latents": True, "latents_flipped": case["flip_aug"], "alpha_mask": case["alpha_mask"]}
    complete = {key for key in asked if asked[key]} <= set(case["npz_keys"])
    return case["exists"] and not (complete and case["npz_latents_shape"] == [4, height // 8, width // 8])


def _caption_is_found_or_read_in_our_way(case: dict) -> bool:
    """A .txt file without extension and class tokens, or a file that is empty or begins with a blank line or a BOM."""
    firsts = [text.split("\n")[0].strip() for text in case["files"].values()]
    unset = "caption_extension" not in case["subset"] and not case["subset"].get("class_tokens")
    txt = unset and any(name.endswith(".txt") for name in case["files"])
    return txt or any(not first or first.startswith(("\ufeff", "efbbbf")) for first in firsts)


def _tags_would_be_lost(case: dict) -> bool:
    """Tags beside a blank caption, or behind a line break where only the first line is used."""
    wildcard = case["subset"].get("enable_wildcard", False)

    def lost(tags: str, caption: str) -> bool:
        blank = not caption.strip() and (wildcard or caption)
        return bool(tags and (blank or (not wildcard and "\n" in caption + tags)))

    return any(lost(entry.get("tags", ""), entry.get("caption", "")) for entry in case["metadata"].values())


def _tables_of(case: dict) -> list[dict]:
    """All tables of a dataset file."""
    content = case["user_config"]
    datasets = content.get("datasets", [])
    return [content.get("general", {}), *datasets, *(subset for d in datasets for subset in d.get("subsets", []))]


def _holds_what_we_refuse(case: dict) -> bool:
    """A value of the right measured type (a boolean passes as a whole number) that is none of ours or out of range."""
    known = known_keys(GENERAL, DREAMBOOTH)
    tables = _tables_of(case)
    return any(name in known and not known[name].accepts(table[name]) for table in tables for name in table)


def _holds_no_images(case: dict) -> bool:
    datasets = case["user_config"].get("datasets", [])
    repeats = [[subset.get("num_repeats", 1) for subset in dataset.get("subsets", [])] for dataset in datasets]
    return not datasets or any(all(count < 1 for count in counts) for counts in repeats)


def _has_no_masks(case: dict) -> bool:
    return case["masked_loss"] and not any(
        mask in str(case["user_config"]) + str(case["argv"]) for mask in ("conditioning_data_dir", "alpha_mask")
    )


def _schedule_crashes_in_sd_scripts_alone(case: dict) -> bool:
    """A plateau without warm-up, or the floor of cosine_warmup_with_min_lr, which we refuse where it is not given."""
    words = " ".join(case["argv"]).replace("=", " ").split()
    plateau = "reduce_lr_on_plateau" in words and "--lr_warmup_steps" not in words
    return plateau or ("cosine_warmup_with_min_lr" in words and "--lr_scheduler_min_lr_ratio" in words)


def _is_no_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return True
    return False


def _weight_is_no_number(case: dict) -> bool:
    return any(_is_no_number(weight) for weight in re.findall(r":([+-]?[.\d]+)\)", case["prompt"]))


def _begins_like_a_flag(text: str) -> bool:
    return re.match(r"([whds] \d|(l|g|ctr|rcfg|fs) [\d.]|(n|ss|cn|ctr|rcfg|fs) .)", text, re.IGNORECASE) is not None


_PROMPT_TYPES = {
    **dict.fromkeys(("prompt", "negative_prompt", "sample_sampler"), str),
    **dict.fromkeys(("width", "height", "sample_steps"), int),
    **dict.fromkeys(("scale", "seed"), int | float),
}


def _prompt_is_refused(values: dict) -> bool:
    """No text, the name of no sampler, or a value of another type."""
    given = {key: value for key, value in values.items() if value is not None}
    fit = all(isinstance(given[key], kind) for key, kind in _PROMPT_TYPES.items() if key in given)
    return "prompt" not in given or given.get("sample_sampler", "ddim") not in SAMPLER_NAMES or not fit


def _prompts_are_refused(case: dict) -> bool:
    return "prompts" in case and (not case["prompts"] or any(map(_prompt_is_refused, case["prompts"])))


def _seed_is_not_used(values: dict) -> bool:
    return not isinstance(values.get("seed", 0), int) or values.get("seed", 0) < 0


def _prompts_are_read_by_us_alone(case: dict) -> bool:
    """A TOML file with a key in both tables, or without the second one; an ending in capitals."""
    if "error" not in case:
        return False
    suffix = Path(case["file"]).suffix
    if suffix == ".toml":
        try:
            return isinstance(tomllib.loads(case["text"]).get("prompt"), dict)
        except tomllib.TOMLDecodeError:
            return False
    return suffix != suffix.lower() and suffix.lower() in (".txt", ".toml", ".json")


DEPARTURES: list[Departure] = [
    Departure("run_schedule", "D3", "logs are by optimizer steps, on one axis", lambda case: "log_calls" in case),
    Departure(
        "dataset_config",
        "D5",
        "refused: booleans as whole numbers, values out of range, unknown interpolations",
        lambda case: "error" not in case and _holds_what_we_refuse(case),
    ),
    Departure(
        "dataset_config",
        "D5",
        "refused: a file or dataset with nothing in it",
        lambda case: "error" not in case and _holds_no_images(case),
    ),
    Departure("dataset_config", "Q11", "refused: masked loss without masks", _has_no_masks),
    Departure("dataset_config", "D5", "dropout keys are accepted", lambda case: "dropout" in (case.get("where") or "")),
    Departure(
        "dataset_config",
        "D5",
        "an unset caption_extension means .caption, then .txt",
        lambda case: "error" not in case and ".caption'" not in f"{case['user_config']} {case['argv']}",
    ),
    Departure(
        "bucket_adjust",
        "Q16",
        "the least bucket side is one step or more",
        lambda case: case["min_bucket_reso"] < case["bucket_reso_steps"],
    ),
    Departure(
        "bucket_assign",
        "Q16",
        "bucket_no_upscale never makes a bucket smaller than one step",
        lambda case: case["bucket_no_upscale"] and (case["row"][-1] == "ZeroDivisionError" or 0 in case["row"][2:4]),
    ),
    Departure(
        "config_file",
        "D7",
        "a value that cannot be converted is refused",
        _config_file_is_refused,
    ),
    Departure(
        "config_file",
        "D7",
        "values are converted to their option's type, unknown keys are a warning",
        _config_file_is_converted,
    ),
    Departure(
        "output_config",
        "Q40",
        "secrets are never written",
        lambda case: any("huggingface_token" in text for text in case["files"].values()),
    ),
    Departure(
        "captions", "D6", "prefix and suffix go to the chosen line, which is not blank", _is_multi_line_in_our_way
    ),
    Departure(
        "captions", "D10", "tags are joined with the separator in force and a space", _is_joined_with_another_separator
    ),
    Departure("captions", "D5", "dropping a caption or its tags never drops the word", _dropping_could_lose_the_word),
    Departure("captions", "Q27", "the word is expanded in any case and only as a whole word", _naive_expansion_differs),
    Departure(
        "tokenize", "Q29", "the word is matched in any case and only as a whole word", _names_are_found_elsewhere
    ),
    Departure(
        "tokenize", "D8", "texts are repaired first, and control tokens in them are text", _text_is_read_in_our_way
    ),
    Departure(
        "weighted_tokens",
        "D8",
        "texts are repaired first, and control tokens in them are text",
        lambda case: _text_is_read_in_our_way({"caption": case["prompt"]}),
    ),
    Departure(
        "add_tokens",
        "D8",
        "a token that text repair changes is refused",
        lambda case: fix_text(case["token_string"]) != case["token_string"],
    ),
    Departure(
        "add_tokens",
        "Q45",
        "a name that already is a whole word of the vocabulary is refused",
        lambda case: any(name.lower() in _whole_words() for name in case["names"]),
    ),
    Departure(
        "load_weights",
        "Q22",
        "a file for two encoders is refused by a model with one; sd-scripts takes its first tensor",
        lambda case: not case["sdxl"] and "clip_l" in str(case["content"]) and "clip_g" in str(case["content"]),
    ),
    Departure("sai_metadata", "D1", "the version is ours; more keys where the user gave none", lambda case: True),
    Departure("saved_file", "D1", "torch files hold AUTOMATIC1111's fields too; more metadata keys", lambda case: True),
    Departure(
        "load_image", "D6", "16 bits are scaled, EXIF turns, transparency lies on white", _image_is_read_in_our_way
    ),
    Departure(
        "dataset_item",
        "D6",
        "transparency is laid on white where no alpha mask is asked for",
        lambda case: "A" in case["mode"] and not case.get("alpha_mask"),
    ),
    Departure(
        "dataset_item",
        "Q15",
        "without buckets images are resized to cover and cropped",
        lambda case: not case["bucket"] and case["wh"] != case["resolution"],
    ),
    Departure(
        "caption_files",
        "D6",
        "an unset extension finds .txt too, unless class tokens are set; blank lines and a byte order mark are skipped",
        _caption_is_found_or_read_in_our_way,
    ),
    Departure(
        "finetune_metadata",
        "D5",
        "a dataset with nothing in it is an error",
        lambda case: case["subset"].get("num_repeats", 1) < 1,
    ),
    Departure("finetune_metadata", "D6", "tags are never lost", _tags_would_be_lost),
    Departure("latents_validity", "D6", "shapes and keys are always checked", _cache_lacks_what_fits),
    Departure(
        "latents_cache",
        "D10",
        "keys end in the latents' size, as in the newest reference",
        lambda case: case["to_disk"],
    ),
    Departure(
        "loss_weights",
        "Q8",
        "huber_scale acts in the snr schedule too",
        lambda case: case.get("huber_schedule") == "snr" and case["huber_scale"] != 1,
    ),
    Departure(
        "loss_weights",
        "Q6",
        "signal-to-noise ratios follow the zero-terminal betas",
        lambda case: (
            case["zero_terminal_snr"] and case["quantity"] not in ("alphas_cumprod", "betas", "huber_threshold")
        ),
    ),
    Departure("zero_terminal_snr", "Q6", "the last signal-to-noise ratio is 0, like the last ᾱ", lambda case: True),
    Departure(
        "optimizer_map",
        "D2",
        "D-Adaptation: the class alone counts, its defaults were read off a stand-in",
        lambda case: "dadapt" in case["optimizer_type"].lower() and "error" not in case,
    ),
    Departure(
        "optimizer_args",
        "D2",
        "fused_backward_pass has no effect and is no error",
        lambda case: "--fused_backward_pass" in case["argv"],
    ),
    Departure(
        "lr_schedules",
        "D7",
        "schedules that crash in sd-scripts work",
        _schedule_crashes_in_sd_scripts_alone,
    ),
    Departure(
        "samplers", "D4", "an unknown sampler is an error", lambda case: case["sample_sampler"] not in SAMPLER_NAMES
    ),
    Departure("samplers", "D4", "latents are not clipped", lambda case: case["sample_sampler"] in ("ddim", "ddpm")),
    Departure(
        "samplers",
        "D4",
        "lms works where scipy is installed, and dpmsolver without a last step to no noise at all",
        lambda case: case["sample_sampler"] in ("lms", "k_lms", "dpmsolver"),
    ),
    Departure(
        "prompt_lines",
        "D4",
        "flags are read only after the prompt text",
        lambda case: _begins_like_a_flag(case["line"].split(" --")[0]),
    ),
    Departure(
        "prompt_files",
        "D4",
        "flags are read only after the prompt text",
        lambda case: any(_begins_like_a_flag(str(values.get("prompt"))) for values in case.get("prompts", [])),
    ),
    Departure(
        "prompt_files",
        "Q22",
        "refused: a file without prompts, a prompt without text, values of another type, an unknown sampler",
        _prompts_are_refused,
    ),
    Departure(
        "prompt_files",
        "Q22",
        "a seed that is no whole number from 0 up is not used",
        lambda case: any(map(_seed_is_not_used, case.get("prompts", []))),
    ),
    Departure(
        "prompt_files",
        "Q22",
        "a subset wins over the table [prompt], which may stand alone; endings may be in capitals",
        _prompts_are_read_by_us_alone,
    ),
    Departure("prompt_weights", "Q22", "a weight that is no number is text", _weight_is_no_number),
]


def departure(file: str, case: dict) -> Departure | None:
    """The first departure that concerns this case of this golden file, or None."""
    return next((d for d in DEPARTURES if d.file == file and d.applies(case)), None)
