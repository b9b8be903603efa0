"""Targets that are text: dataset files, configuration files, command lines, prompts, captions and metadata."""

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import make_image, prompts
from hypothesis import strategies as st

from fuzz.mutations import FRAGMENTS, HOSTILE, edited, edits, encoded, json_text, spliced, splices, toml_text, values
from fuzz.running import LeftAsideError, Target
from library.data.captions import CaptionMoment, CaptionRules, process_caption, token_presence
from library.data.config import check_caching, load_dataset_configs
from library.data.schema import DATASET, DREAMBOOTH, FINETUNING, GENERAL, MASK, SUBSET, known_keys
from library.data.training_data import TrainingData
from library.options.notices import notices
from library.options.options import DatasetOptions, Options, as_dict, declared_options
from library.options.parser import build_parser, parse
from library.output.sample_prompts import read_sample_prompts
from library.output.trackers import check_trackers
from library.training.optimizer_step import check_learning

# Larger ones are trained for a reason, but not in a test.
_MOST_PIXELS, _MOST_SAMPLES = 2**18, 16

_KINDS = (DREAMBOOTH, FINETUNING, MASK)
_KEYS = sorted({key for kind in _KINDS for level in (GENERAL, DATASET, SUBSET) for key in known_keys(level, kind)})
_GENERAL = {"shuffle_caption": True, "caption_extension": ".txt", "keep_tokens": 1}
_DATASET = {"resolution": 64, "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128}
_SUBSETS = {
    DREAMBOOTH: {"image_dir": "images", "num_repeats": 2, "class_tokens": "mychar", "flip_aug": True},
    FINETUNING: {"image_dir": "images", "metadata_file": "metadata.json", "num_repeats": 1},
    MASK: {"image_dir": "images", "conditioning_data_dir": "masks", "caption_prefix": "mychar"},
}
_METADATA = {
    "a": {"caption": "mychar, a house", "tags": "red, blue", "image_size": [40, 30]},
    "images/b.png": {"caption": "a mychar", "tags": "green"},
}


def dataset_tree(kind: str) -> dict[str, Any]:
    """What a dataset file of one kind holds."""
    general = {key: value for key, value in _GENERAL.items() if kind != FINETUNING or key != "caption_extension"}
    return {"general": general, "datasets": [{**_DATASET, "subsets": [dict(_SUBSETS[kind])]}]}


def lay_out_images(folder: Path) -> None:
    """Two images with captions, their masks, and metadata, in ``folder``."""
    for name, size in (("a.png", (40, 30)), ("b.png", (33, 70))):
        make_image(folder / "images" / name, size, "mychar, red, green")
        make_image(folder / "masks" / name, size)
    (folder / "metadata.json").write_text(json.dumps(_METADATA), encoding="utf-8")


def load_data(options: DatasetOptions, words) -> None:
    """All that a run does with its data before a model is loaded, and a first batch where that is small."""
    configs = load_dataset_configs(options, bucket_step=64)
    check_caching(configs, caching=False)
    data = TrainingData(configs, words, seed=1)
    data.check()
    if all(c.batch_size <= _MOST_SAMPLES for c in configs) and _pixels(data) <= _MOST_PIXELS:
        next(iter(data.loader(max_steps=10)))


def _pixels(data: TrainingData) -> int:
    return max(width * height for width, height in (bucket.size for bucket in data.table.buckets))


def _dataset_file(suffix: str, text: Callable[[Any], str]):
    def prepare(folder: Path):
        lay_out_images(folder)
        words, file = prompts(2), folder / f"input{suffix}"

        def act(recipe):
            kind, changes, pieces = recipe
            os.chdir(folder)
            content = kind if kind not in _KINDS else text(edited(dataset_tree(kind), changes))
            file.write_bytes(encoded(spliced(content, pieces)))
            load_data(DatasetOptions(dataset_config=file, masked_loss=kind == MASK), words)

        return act

    return prepare


def _as_toml(tree: Any) -> str:
    return toml_text(tree if isinstance(tree, dict) else {"datasets": tree})


def _dataset_recipes():
    fitting = {}
    for kind in _KINDS:
        for name, key in (known_keys(GENERAL, kind) | known_keys(SUBSET, kind)).items():
            fitting[name] = [value for value in (*HOSTILE, 128, [64, 128], [1.0, 2.0], "area") if key.accepts(value)]
    pairs = st.sampled_from([(name, value) for name, found in fitting.items() for value in found])
    sound = st.lists(st.tuples(st.just("add"), st.integers(0, 99), st.just(0), pairs), max_size=3)
    changes = st.one_of(sound, sound, edits(_KEYS))
    return st.tuples(st.sampled_from(_KINDS), changes, st.one_of(st.just([]), splices()))


def _setting(key: str, value: Any, *, table: str = "general") -> tuple:
    """A dataset recipe with one key more."""
    place = {"general": 1, "datasets": 0}
    return (DREAMBOOTH, [("add", place[table], 0, (key, value))], [])


_MANY = 10**6
_BRACKETS = ("a = " + "[" * _MANY, "a = " + "[" * _MANY + "]" * _MANY, "{" * _MANY, "[" * _MANY, '{"a":' * _MANY)
_TEXT_SEEDS = (*_BRACKETS, "a = " + "9" * 5000, '{"a": ' + "9" * 5000 + "}", '"' * _MANY, "a = {" * 1000, "\n" * _MANY)
_DATASET_SEEDS = (
    *((text, [], []) for text in _TEXT_SEEDS),
    *(_setting(key, value) for key in ("max_bucket_reso", "resolution", "batch_size") for value in (10**10, 10**19)),
    *(_setting("num_repeats", value) for value in (10**8, 10**10, 10**19)),
    *(_setting("bucket_reso_steps", value) for value in (1, 10**19)),
    *(_setting(key, "a\ud800") for key in ("class_tokens", "caption_extension", "caption_prefix", "caption_separator")),
    *((DREAMBOOTH, [("set", place, 0, "a\ud800")], []) for place in range(20)),
)


def _config(folder: Path):
    parser, file = build_parser("", "sd"), folder / "input.toml"

    def act(recipe):
        tree, changes, pieces = recipe
        os.chdir(folder)
        content = tree if isinstance(tree, str) else _as_toml(edited(tree, changes))
        file.write_bytes(encoded(spliced(content, pieces)))
        _use_options(parse(parser, ["--config_file=input"]))

    return act


def _use_options(options: Options) -> None:
    """What is done with options before anything is loaded."""
    for sentence in notices(options):
        sentence.encode("utf-8", "backslashreplace")
    json.dumps(as_dict(options), default=str)
    check_trackers(options.logging)
    check_learning(options, 10)


_CONFIG = {
    "model": {"pretrained_model_name_or_path": "model.safetensors", "v2": False, "clip_skip": 2},
    "token": {"token_string": "mychar", "init_word": "girl", "num_vectors_per_token": 4},
    "output_dir": "out",
    "train_data_dir": "images",
    "resolution": "512,768",
    "max_train_steps": 100,
    "learning_rate": 5e-3,
    "optimizer_type": "AdamW",
    "optimizer_args": ["weight_decay=0.01", "betas=(0.9, 0.99)"],
    "lr_scheduler": "cosine",
    "mixed_precision": "no",
    "caption_dropout_rate": 0.1,
}
_OPTIONS = [name for name, _ in declared_options()]


def _words() -> st.SearchStrategy[str]:
    """One value of a command line, most of them wrong."""
    usual = ("1", "0", "0.5", "10%", "1e-4", "true", "False", "sdpa", "cosine", "AdamW", "fp16", "a=1", "betas=(0,1)")
    odd = ("--", "-", "--=", "-1", "=", "1,2", "5e-3:100,1e-3", "1,2,3", "a,b", "\udcff", "9" * 5000, "(" * 3000)
    shown = values.filter(lambda value: not isinstance(value, dict | list)).map(str)
    return st.one_of(st.sampled_from(usual + odd), shown, st.sampled_from(FRAGMENTS))


def _command_line(folder: Path):
    parsers = {family: build_parser("", family) for family in ("sd", "sdxl")}

    def act(recipe):
        family, arguments = recipe
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                options = parse(parsers[family], list(arguments))
        except SystemExit:  # --help
            return
        _use_options(options)

    return act


def _argument() -> st.SearchStrategy[str]:
    names, word = st.sampled_from([*_OPTIONS, "help", "", "config_file", "output_config", "no_such_option"]), _words()
    return st.one_of(
        st.tuples(names, word).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        names.map(lambda name: f"--{name}"),
        word,
    )


_GIVEN = ["--pretrained_model_name_or_path=m.safetensors", "--token_string=mychar", "--output_dir=out"]
_GIVEN += ["--train_data_dir=images", "--resolution=512", "--init_word=girl"]
_COMMANDS = st.tuples(
    st.sampled_from(("sd", "sdxl")),
    st.lists(_argument(), max_size=4).map(lambda more: (*_GIVEN, *more)),
)
_COMMAND_SEEDS = tuple(
    ("sd", (*_GIVEN, *more))
    for more in (
        *((f"--{name}=--",) for name in _OPTIONS),
        *((f"--{name}=\udcff",) for name in _OPTIONS),
        *((f"--{name}={'9' * 5000}",) for name in _OPTIONS),
        *((f"--{name}", "--") for name in ("max_train_steps", "optimizer_args", "token_string")),
    )
)


def _prompt_file(suffix: str, text: Callable[[Any], str]):
    def prepare(folder: Path):
        words, file = prompts(2, encoders=2), folder / f"input{suffix}"

        def act(recipe):
            base, changes, pieces = recipe
            content = base if isinstance(base, str) else text(edited(base, changes))
            file.write_bytes(encoded(spliced(content, pieces)))
            for prompt in read_sample_prompts(file):
                for said in (prompt.prompt, prompt.negative_prompt):
                    words.encode(said)
                    words.encode_weighted(said, weighted=prompt.weighted)

        return act

    return prepare


_PROMPT = {"prompt": "a mychar (red:1.3)", "negative_prompt": "[blur]", "width": 512, "height": 640, "seed": 1}
_PROMPT |= {"sample_steps": 20, "scale": 7.5, "sample_sampler": "ddim"}
_PROMPT_TABLE = {"prompt": {**_PROMPT, "subset": [_PROMPT]}}
_PROMPT_KEYS = (*_PROMPT, "subset", "guidance_scale", "controlnet_image")
_PROMPT_LINE = "a mychar (red:1.3) [blue] --w 512 --h 640 --d 1 --s 20 --l 7.5 --n ugly --ss ddim\n# note\nmychar1\n"
_PROMPT_TEXTS = st.tuples(st.just(_PROMPT_LINE), st.just([]), splices(4))


def _prompt_trees(base: Any):
    return st.tuples(st.just(base), edits(_PROMPT_KEYS), splices())


def _captions(folder: Path):
    lay_out_images(folder)
    words = {count: prompts(count) for count in (1, 3)}
    files = [folder / "images" / name for name in ("a.txt", "b.txt")]
    options = DatasetOptions(dataset_config=str(folder / "dataset.json"))
    (folder / "dataset.json").write_text(json_text(dataset_tree(DREAMBOOTH)), encoding="utf-8")

    def act(recipe):
        count, text, rules, pieces = recipe
        os.chdir(folder)
        content = encoded(spliced(text, pieces))
        for file in files:
            file.write_bytes(content)
        load_data(options, words[count])
        with contextlib.suppress(UnicodeDecodeError):
            caption = content.decode("utf-8").strip()
            rules, word = CaptionRules(**rules), words[count].placeholder
            token_presence(caption, rules, word)
            for seed in range(3):
                said = process_caption(caption, rules, word, random.Random(seed), CaptionMoment(3, 10, 2))
                words[count].encode(said)

    return act


_SIGNS = st.sampled_from((",", ", ", ";;;", "|||", "", " ", "m", "mychar", "|", "{", "\\", "é", "\U00100000"))
_RULES = st.fixed_dictionaries(
    {},
    optional={
        "prefix": _SIGNS,
        "suffix": _SIGNS,
        "separator": _SIGNS.filter(bool),
        "keep_tokens": st.sampled_from((0, 1, 5, 10**9)),
        "keep_tokens_separator": _SIGNS,
        "secondary_separator": _SIGNS,
        "shuffle": st.booleans(),
        "wildcard": st.booleans(),
        "dropout_rate": st.sampled_from((0.0, 0.5, 1.0)),
        "dropout_every_n_epochs": st.sampled_from((0, 1, 2)),
        "tag_dropout_rate": st.sampled_from((0.0, 0.5, 1.0)),
        "warmup_min": st.sampled_from((0, 1, 10**9)),
        "warmup_step": st.sampled_from((0, 0.5, 7, 1e308)),
    },
)
_CAPTION_RECIPES = st.tuples(
    st.sampled_from((1, 3)),
    st.sampled_from(("mychar, {red|blue} hair, smiling ||| a;;;b", "a photo of mychar\nmychar2 {a|{b|c}}\n", "")),
    _RULES,
    splices(4),
)
_CAPTION_SEEDS = tuple(
    (count, text, {"wildcard": True, "shuffle": True}, [])
    for count in (1, 3)
    for text in (
        *("mychar \ud800", "{" * 10**5 + "mychar", "{a|" * 10**4, "{}|" * 10**5, "mychar " * 10**5, ", " * 10**5),
        *(
            "{a" * 10**5 + "mychar",
            "{a|b}" * 10**5,
            "{a|b}" * 200 + "mychar",
            "\0",
            "\U00100000mychar\U0010fffd",
            "(" * 10**5,
            "\n" * 10**6,
            "“mychar”" * 10**4,
        ),
    )
)


def _metadata_file(suffix: str, text: Callable[[Any], str]):
    def prepare(folder: Path):
        lay_out_images(folder)
        words, file, config = prompts(2), folder / f"input{suffix}", folder / "dataset.json"
        subset = {"image_dir": str(folder), "metadata_file": str(file), "enable_wildcard": True}
        config.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}), encoding="utf-8")

        def act(recipe):
            base, changes, pieces = recipe
            content = base if isinstance(base, str) else text(edited(base, changes))
            file.write_bytes(encoded(spliced(content, pieces)))
            load_data(DatasetOptions(dataset_config=config), words)

        return act

    return prepare


_ENTRIES = {"images/a.png": _METADATA["a"], "images/b": _METADATA["images/b.png"]}
_LINES = [{"image_path": key, **entry} for key, entry in _ENTRIES.items()]
_METADATA_KEYS = ("caption", "tags", "image_size", "image_path", "images/a.png", "../a.png", "train_resolution")
_ODD_KEYS = ("a\ud800", "a\0", "", "/", "..", "images", "a" * 5000, "\n", "images/a.png/", "%s", "~", "/dev/null")
_ODD_METADATA = tuple(({key: {"caption": "mychar"}}, [], []) for key in _ODD_KEYS)
_ODD_LINES = tuple(([{"image_path": key, "caption": "mychar"}], [], []) for key in _ODD_KEYS)


def _as_lines(tree: Any) -> str:
    return "\n".join(map(json_text, tree)) if isinstance(tree, list) else json_text(tree)


def _folder_cache(folder: Path):
    lay_out_images(folder)
    words, file = prompts(2), folder / "images" / "metadata_cache.json"
    tree = dataset_tree(DREAMBOOTH)
    tree["general"]["cache_info"] = True
    (folder / "dataset.json").write_text(json.dumps(tree), encoding="utf-8")
    os.chdir(folder)
    load_data(DatasetOptions(dataset_config="dataset.json"), words)
    good = json.loads(file.read_text(encoding="utf-8"))

    def act(recipe):
        changes, pieces = recipe
        os.chdir(folder)
        content = pieces if isinstance(pieces, str) else spliced(json_text(edited(good, changes)), pieces)
        file.write_bytes(encoded(content))
        (folder / "input.json").write_bytes(encoded(content))
        load_data(DatasetOptions(dataset_config="dataset.json"), words)
        if file.read_bytes() != encoded(content):
            raise LeftAsideError("made anew")

    return act


_CACHE_KEYS = ("caption", "resolution", "stamp", "images/a.png")
_ODD_SIZES = ([], [0, 0], [-1, 5], ["a", "b"], [2**40, 1], [1.5, 2], [True, 1], [None, 1], float("nan"), "\ud800", {})
_CACHE_SEEDS = (
    *(([], text) for text in _TEXT_SEEDS),
    *(([("set", place, 0, value)], []) for place in range(12) for value in _ODD_SIZES),
)

TARGETS = (
    Target("dataset.toml", _dataset_file(".toml", _as_toml), _dataset_recipes(),
           (DREAMBOOTH, [], []), _DATASET_SEEDS, 300),
    Target("dataset.json", _dataset_file(".json", json_text), _dataset_recipes(),
           (DREAMBOOTH, [], []), _DATASET_SEEDS, 300),
    Target("config.toml", _config, st.tuples(st.just(_CONFIG), edits(_OPTIONS), splices()), (_CONFIG, [], []),
           tuple((text, [], []) for text in _TEXT_SEEDS), 300),
    Target("command_line", _command_line, _COMMANDS, ("sd", tuple(_GIVEN)), _COMMAND_SEEDS, 200),
    Target("prompts.txt", _prompt_file(".txt", str), _PROMPT_TEXTS, (_PROMPT_LINE, [], []),
           tuple((text, [], []) for text in (*_TEXT_SEEDS, "a \ud800", "(a:" + "9" * 5000 + ")", "(a:1e999)")), 250),
    Target("prompts.toml", _prompt_file(".toml", _as_toml), _prompt_trees(_PROMPT_TABLE),
           (_PROMPT_TABLE, [], []),
           tuple((text, [], []) for text in _TEXT_SEEDS), 250),
    Target("prompts.json", _prompt_file(".json", json_text), _prompt_trees([_PROMPT, _PROMPT_LINE]),
           ([_PROMPT], [], []),
           (*((text, [], []) for text in _TEXT_SEEDS), (["a \ud800"], [], [])), 250),
    Target("captions", _captions, _CAPTION_RECIPES, (1, "mychar", {}, []), _CAPTION_SEEDS, 200),
    Target("metadata.json", _metadata_file(".json", json_text),
           st.tuples(st.just(_ENTRIES), edits(_METADATA_KEYS), splices()), (_ENTRIES, [], []),
           (*((text, [], []) for text in _TEXT_SEEDS), *_ODD_METADATA), 300),
    Target("metadata.jsonl", _metadata_file(".jsonl", _as_lines),
           st.tuples(st.just(_LINES), edits(_METADATA_KEYS), splices()), (_LINES, [], []),
           (*((text, [], []) for text in _TEXT_SEEDS), *_ODD_LINES), 300),
    Target("metadata_cache.json", _folder_cache, st.tuples(edits(_CACHE_KEYS), splices()), ([], []), _CACHE_SEEDS, 200),
)  # fmt: skip
