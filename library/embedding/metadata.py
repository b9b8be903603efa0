"""What a saved embedding says about itself: ModelSpec keys, the record of its training, the word to write for it.

All of it goes into the ``__metadata__`` of a ``.safetensors`` file, so every value is a string. The ``modelspec.*``
keys follow the SAI ModelSpec 1.0.1 as sd-scripts writes them; ``ti.*`` is this trainer's own record.
"""

import base64
import json
import logging
import mimetypes
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from library.embedding.clients import client_words
from library.options.output import MetadataOptions
from library.support.errors import UserError
from library.support.safetensors_header import LONGEST_HEADER
from library.support.version import DISTRIBUTION, version

logger = logging.getLogger(__name__)

# The size a base was made for: what the file says when the run names no resolution of its own.
_NATIVE_RESOLUTIONS = {"stable-diffusion-v2-768-v": (768, 768), "stable-diffusion-xl-v1-base": (1024, 1024)}
_SS_NAMES = {
    "steps": "steps",
    "epoch": "epoch",
    "base_model_hash": "new_sd_model_hash",
    "seed": "seed",
    "learning_rate": "learning_rate",
    "optimizer": "optimizer",
}
# Of what a run's files share, in bytes: what one file adds to it, and its tensors' places, take far less than the rest.
_LONGEST = LONGEST_HEADER - 1_000_000
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class TrainingRecord:
    """How an embedding came about; None means "not known" and is left out of the file.

    ``base_model`` is a name (never a path), ``steps`` and ``epoch`` count from 1 at the moment of saving. ``run`` is
    the same in all files of one run; ``resumed`` tells what ``--resume`` changed in its course, ``chosen`` how the
    vectors became its result, where they are not simply those of its last step.
    """

    token: str
    num_vectors: int
    steps: int | None = None
    epoch: int | None = None
    init_word: str | None = None
    base_model: str | None = None
    base_model_hash: str | None = None
    seed: int | None = None
    learning_rate: float | str | None = None
    optimizer: str | None = None
    run: str | None = None
    resumed: str | None = None
    chosen: str | None = None

    def as_metadata(self) -> dict[str, str]:
        """The record as ``ti.<name>`` strings, and what sd-scripts has a name for (``ss_<name>``) under that too."""
        known = {name: str(value) for name, value in asdict(self).items() if value is not None}
        own = {f"ti.{name}": value for name, value in known.items()}
        return own | {f"ss_{theirs}": known[ours] for ours, theirs in _SS_NAMES.items() if ours in known}

    def without_training(self) -> "TrainingRecord":
        """What a file says with ``--no_metadata``: what it holds, and the run, by which its files are known."""
        return TrainingRecord(self.token, self.num_vectors, run=self.run)


@dataclass(frozen=True)
class TrainedFor:
    """The model and the settings that an embedding belongs to.

    ``architecture`` is ModelSpec's name of the base (``stable-diffusion-v1``, …), ``resolution`` the width and height
    of the training images in pixels (None: the base's own), ``clip_skip`` the layer as given on the command line.
    """

    architecture: str
    prediction_type: str = "epsilon"
    resolution: tuple[int, int] | None = None
    min_timestep: int | None = None
    max_timestep: int | None = None
    clip_skip: int | None = None


def modelspec_metadata(options: MetadataOptions, trained_for: TrainedFor, output_name: str | None) -> dict[str, str]:
    """The ``modelspec.*`` keys that stay the same for a whole run; :func:`file_metadata` adds those of one file.

    Raises :class:`UserError` for a ``--metadata_is_negative_embedding`` that is neither true nor false. A thumbnail
    that cannot be read is left out with a warning.
    """
    width, height = trained_for.resolution or _NATIVE_RESOLUTIONS.get(trained_for.architecture, (512, 512))
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{trained_for.architecture}/textual-inversion",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "implementation_version": f"{DISTRIBUTION}/{version()}",
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if trained_for.prediction_type.startswith("v") else "epsilon",
    }
    if (trained_for.min_timestep, trained_for.max_timestep) != (None, None):
        values["timestep_range"] = f"{trained_for.min_timestep or 0},{trained_for.max_timestep or 1000}"
    if trained_for.clip_skip is not None:
        values["encoder_layer"] = str(trained_for.clip_skip)

    names = [field.name for field in fields(options) if field.name.startswith("metadata_")]
    given = {name.removeprefix("metadata_"): getattr(options, name) for name in names}
    given["title"] = given["title"] or output_name or f"TextualInversion@{time.time()}"
    given["thumbnail"] = _thumbnail(given["thumbnail"])
    given["is_negative_embedding"] = _true_or_false(given["is_negative_embedding"])
    values |= {name: value for name, value in given.items() if value is not None}
    return {f"modelspec.{name}": value for name, value in values.items()}


def check_length(run_metadata: Mapping[str, str]) -> None:
    """Raise UserError for more than the header of a file may hold: nobody could read the embedding any more."""
    lengths = {
        key: len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        for key, value in run_metadata.items()
    }
    if (total := sum(lengths.values())) <= _LONGEST:
        return
    longest = max(lengths, key=lengths.__getitem__)
    cures = {
        "modelspec.thumbnail": "Give a smaller image as --metadata_thumbnail",
        "ss_training_comment": "Shorten --training_comment",
        "ss_tag_frequency": "It counts the tags of all captions; --no_metadata leaves it out",
    }
    cure = cures.get(longest, f"Shorten --{longest.replace('modelspec.', 'metadata_')}")
    raise UserError(
        f"The metadata of the embedding would take {total:,} bytes, most of them for {longest}, and of files with more "
        f"than {_LONGEST:,} the embedding cannot be read. {cure}."
    )


def file_metadata(run_metadata: Mapping[str, str], record: TrainingRecord, stem: str) -> dict[str, str]:
    """The whole metadata of one file named ``stem``, its hash excepted.

    Adds the date (local, to the second), the record, and, unless the user gave their own, the trigger phrase (the
    file's stem: what most clients listen to) and a hint that says what to write in which client.
    """
    words = client_words(stem, record.token, record.num_vectors)
    hint = "; ".join(f"{client}: {word}" for client, word in words.items())
    own = {"modelspec.trigger_phrase": stem, "modelspec.usage_hint": hint}
    date = {"modelspec.date": datetime.now().isoformat(timespec="seconds")}
    return {**own, **run_metadata, **date, **record.as_metadata()}


def _thumbnail(value: str | None) -> str | None:
    """An image file as a ``data:`` URL; a value that is one already stays as it is."""
    if not value or value.startswith("data:"):
        return value or None
    media_type = mimetypes.guess_type(value)[0] or "application/octet-stream"
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        logger.warning(
            "--metadata_thumbnail: %s cannot be read (%s); the file gets no thumbnail.", value, error.strerror
        )
        return None
    if not media_type.startswith("image/"):
        logger.warning("--metadata_thumbnail: %s does not look like an image; clients may not show it.", value)
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _true_or_false(value: str | None) -> str | None:
    """``true`` or ``false``, the only spellings that clients read, from the usual ways to write them."""
    if value is None or value.strip() == "":
        return None
    word = value.strip().lower()
    if word in _TRUE:
        return "true"
    if word in _FALSE:
        return "false"
    raise UserError(f'--metadata_is_negative_embedding is "{value}". Write true or false.')
