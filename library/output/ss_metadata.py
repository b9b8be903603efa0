"""The ``ss_*`` keys that sd-scripts writes into LoRA files, for the model managers that read them.

They tell the base model, the images and how often each tag occurs in their captions. Values are sd-scripts': what
Python's ``str`` makes of them, tables as JSON.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from library.data.batched_data import BatchedData
from library.data.config import SubsetConfig
from library.data.image_table import ImageTable
from library.model.architectures import SD2
from library.model.base_model import BaseModel
from library.model.family import ModelFamily
from library.options.options import Options

# Of all folders together: captions that are sentences would make a file of kilobytes a large one.
_MOST_TAGS = 5000


def ss_metadata(options: Options, family: ModelFamily, model: BaseModel, data: BatchedData) -> dict[str, str]:
    """The keys that all files of a run share; with ``--no_metadata`` only those that tell the kind of base."""
    base = replace(options.model, v2=model.architecture is SD2)
    values: dict[str, Any] = {"ss_v2": base.v2, "ss_base_model_version": family.base_model_version(base)}
    if not options.metadata.no_metadata:
        values |= {
            "ss_sd_model_name": model.name,
            "ss_sd_model_hash": model.legacy_hash(),
            "ss_output_name": options.save.output_name,
            "ss_training_comment": options.metadata.training_comment,
            "ss_clip_skip": options.model.clip_skip,
            "ss_resolution": data.resolution,
        }
        if data.table is not None:
            values |= _image_keys(data.table)
            if not data.templates:
                values["ss_tag_frequency"] = _json(tag_frequency(data.table))
    return {name: str(value) for name, value in values.items() if value is not None}


def tag_frequency(table: ImageTable) -> dict[str, dict[str, int]]:
    """How often each tag occurs in the captions, by the last part of the folder's (or the metadata file's) path.

    Tags are what stands between commas, in lower case. A folder that several datasets name counts once; of very many
    tags the most frequent are kept.
    """
    frequency: dict[str, Counter[str]] = {}
    dataset_of: dict[str, int] = {}
    for part in table.subsets():
        name = _short_name(part.found.subset)
        if dataset_of.setdefault(name, part.dataset) == part.dataset:
            texts = ",".join(part.found.captions).replace("\n", ",")
            tags = (tag.strip().lower() for tag in texts.split(","))
            frequency.setdefault(name, Counter()).update(filter(None, tags))
    share = max(1, _MOST_TAGS // len(frequency))
    return {name: tags if len(tags) <= share else dict(tags.most_common(share)) for name, tags in frequency.items()}


def _image_keys(table: ImageTable) -> dict[str, Any]:
    counts: Counter[bool] = Counter()
    folders: dict[str, dict[str, int]] = {}
    for found in table.sets:
        subset = found.subset
        counts[subset.is_reg] += len(found) * subset.num_repeats
        if not subset.is_reg:
            name = _free_name(_short_name(subset), folders)
            folders[name] = {"n_repeats": subset.num_repeats, "img_count": len(found)}
    return {
        "ss_num_train_images": counts[False],  # repeats included
        "ss_num_reg_images": counts[True],
        "ss_dataset_dirs": _json(folders),
    }


def _short_name(subset: SubsetConfig) -> str:
    return PurePath(subset.source).name


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with " (2)" and so on behind it where it is taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, ensure_ascii=False)
