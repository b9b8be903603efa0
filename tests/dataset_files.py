"""Helpers for tests of dataset files: write one, read the options that go with it, load it."""

import json
from dataclasses import fields
from pathlib import Path

from library.data.config import DatasetConfig, load_dataset_configs
from library.options.declaration import option_of
from library.options.options import DatasetOptions

# The least that is a dataset file.
MINIMAL = """
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "images"
"""


def dataset_options(argv=(), **given) -> DatasetOptions:
    """Options as from a command line of ``--name=value`` and ``--flag`` arguments."""
    declared = {field.name: option_of(field) for field in fields(DatasetOptions)}
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        given[name] = declared[name].read(value) if equals else True
    return DatasetOptions(**given)


def load(folder: Path, content: str | dict, argv=(), *, bucket_step=64, name=None) -> tuple[DatasetConfig, ...]:
    """Write a dataset file (TOML text, or a dict as JSON) and load it with these arguments."""
    as_json = isinstance(content, dict)
    file = folder / (name or ("data.json" if as_json else "data.toml"))
    file.write_text(json.dumps(content) if as_json else content, encoding="utf-8")
    return load_dataset_configs(dataset_options(argv, dataset_config=file), bucket_step=bucket_step)
