"""Small datasets for tests: images of given sizes, and the configuration that a dataset file would give."""

import json
import random
from functools import cache
from pathlib import Path

from PIL import Image
from transformers import CLIPTokenizer

from library.data.config import DatasetConfig, SubsetConfig, load_dataset_configs
from library.data.training_data import TrainingData
from library.embedding.placeholder import Placeholder
from library.embedding.tokenizer import PromptTokenizer
from library.options.options import DatasetOptions

VOCABULARY = Path(__file__).parents[1] / "configs" / "tokenizer"


@cache
def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of SD 1, or with ``pad`` "!" that of SD 2."""
    return CLIPTokenizer.from_pretrained(VOCABULARY, pad_token=pad)


def prompts(count: int = 1, *, word: str = "mychar", limit: int | None = None, encoders: int = 1) -> PromptTokenizer:
    """Prompts with a word of ``count`` vectors, for one or two text encoders."""
    tokenizers = [tokenizer(), tokenizer("!")][:encoders]
    return PromptTokenizer(tokenizers, Placeholder(word, count), limit)


def make_image(file: Path, size: tuple[int, int] = (32, 32), caption: str | None = None, mode: str = "RGB") -> Path:
    """Write an image that is like no other of the same test run, and its caption beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = Image.frombytes(mode, (3, 3), random.Random(file.as_posix()).randbytes(9 * bands))
    coarse.resize(size, Image.Resampling.BILINEAR).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def configs_of(folder: Path, *datasets: dict, general: dict | None = None, **options) -> tuple[DatasetConfig, ...]:
    """What a dataset file with these tables means; it is written into ``folder``."""
    file = folder / "dataset.json"
    file.write_text(json.dumps({"general": general or {}, "datasets": datasets}), encoding="utf-8")
    return load_dataset_configs(DatasetOptions(dataset_config=str(file), **options), bucket_step=8)


def subset_of(folder: Path, values: dict, **options) -> SubsetConfig:
    """One subset of a dataset file."""
    return configs_of(folder, {"resolution": 64, "subsets": [values]}, **options)[0].subsets[0]


def data_of(folder: Path, *datasets: dict, words: PromptTokenizer | None = None, seed: int = 1, **more) -> TrainingData:
    """The training data of a dataset file; ``templates`` and options of the dataset go into ``more``."""
    templates = more.pop("templates", None)
    return TrainingData(configs_of(folder, *datasets, **more), words or prompts(), templates=templates, seed=seed)
