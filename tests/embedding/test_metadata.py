"""ModelSpec keys, the training record, and what a file adds of its own."""

import base64
import logging
import re
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from departures import departure
from golden_data import golden_cases
from PIL import Image
from safetensors import safe_open

from library.embedding.files import run_of, write_embedding
from library.embedding.metadata import (
    TrainedFor,
    TrainingRecord,
    check_length,
    client_words,
    file_metadata,
    modelspec_metadata,
)
from library.model.family import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from library.options.options import MetadataOptions, Options
from library.options.parser import build_parser, read_values
from library.support.errors import UserError

RECORD = TrainingRecord("mychar", 2)
FOR_SD1 = TrainedFor("stable-diffusion-v1")


@pytest.mark.parametrize("case", golden_cases("sai_metadata"))
def test_golden_metadata(case, tmp_path):
    thumbnail = tmp_path / "thumbnail.png"
    embedded = case["metadata"].get("modelspec.thumbnail", "")
    if embedded.startswith("data:image/png;base64,"):
        thumbnail.write_bytes(base64.b64decode(embedded.partition(",")[2]))
    argv = [part.replace("@T", str(thumbnail)) for part in case["argv"]]
    family = STABLE_DIFFUSION_XL if case["sdxl"] else STABLE_DIFFUSION
    options = Options.from_values(read_values(build_parser("", "sdxl" if case["sdxl"] else "sd"), argv))
    trained_for = TrainedFor(
        architecture=family.modelspec_architecture(options.model),
        prediction_type="v_prediction" if options.model.v_parameterization else "epsilon",
        resolution=options.dataset.resolution,
        min_timestep=options.noise.min_timestep,
        max_timestep=options.noise.max_timestep,
        clip_skip=options.model.clip_skip,
    )
    metadata = file_metadata(modelspec_metadata(options.metadata, trained_for, options.save.output_name), RECORD, "n")

    expected = {**case["metadata"]}
    # The version is ours, and so are a trigger phrase and a hint where the user gave none; ti.* is extra.
    assert departure("sai_metadata", case)
    assert expected.pop("modelspec.implementation_version").startswith("sd-scripts/")
    assert metadata.pop("modelspec.implementation_version").startswith("textual-inversion-trainer/")
    for name in ("modelspec.trigger_phrase", "modelspec.usage_hint"):
        if name not in expected:
            metadata.pop(name)
    assert datetime.fromisoformat(metadata.pop("modelspec.date"))
    expected.pop("modelspec.date")
    if expected["modelspec.title"].startswith("TextualInversion@"):
        expected.pop("modelspec.title")
        assert float(metadata.pop("modelspec.title").partition("@")[2]) > 1.7e9
    assert {name: value for name, value in metadata.items() if not name.startswith("ti.")} == expected


def test_the_true_resolution_wins_over_the_base_s_own():
    trained_for = TrainedFor("stable-diffusion-xl-v1-base", resolution=(768, 640))
    assert modelspec_metadata(MetadataOptions(), trained_for, "n")["modelspec.resolution"] == "768x640"


@pytest.mark.parametrize(
    ("base", "resolution"),
    [
        ("stable-diffusion-v1", "512x512"),
        ("stable-diffusion-v2-512", "512x512"),
        ("stable-diffusion-v2-768-v", "768x768"),
        ("stable-diffusion-xl-v1-base", "1024x1024"),
    ],
)
def test_resolution_of_the_base(base, resolution):
    metadata = modelspec_metadata(MetadataOptions(), TrainedFor(base), "n")
    assert metadata["modelspec.resolution"] == resolution
    assert metadata["modelspec.architecture"] == f"{base}/textual-inversion"


def test_clip_skip_is_the_encoder_layer():
    metadata = modelspec_metadata(MetadataOptions(), TrainedFor("stable-diffusion-v1", clip_skip=2), "n")
    assert metadata["modelspec.encoder_layer"] == "2"


def test_text_options_are_written_and_the_title_is_the_user_s():
    given = {name: f"my {name}" for name in ("title", "author", "description", "license", "tags", "merged_from")}
    options = MetadataOptions(**{f"metadata_{name}": value for name, value in given.items()})
    metadata = modelspec_metadata(options, FOR_SD1, "n")
    assert {name: metadata[f"modelspec.{name}"] for name in given} == given


@pytest.mark.parametrize(
    ("given", "written"),
    [("true", "true"), ("True", "true"), (" YES ", "true"), ("1", "true"), ("False", "false"), ("0", "false"),
     ("", None), (None, None)],
)  # fmt: skip
def test_is_negative_embedding_is_normalised(given, written):
    metadata = modelspec_metadata(MetadataOptions(metadata_is_negative_embedding=given), FOR_SD1, "n")
    assert metadata.get("modelspec.is_negative_embedding") == written


def test_is_negative_embedding_that_is_neither():
    with pytest.raises(UserError, match=r'--metadata_is_negative_embedding is "maybe".*true or false'):
        modelspec_metadata(MetadataOptions(metadata_is_negative_embedding="maybe"), FOR_SD1, "n")


def test_a_jpeg_thumbnail_becomes_a_data_url(tmp_path):
    path = tmp_path / "small.jpg"
    Image.new("RGB", (4, 4), "red").save(path)
    metadata = modelspec_metadata(MetadataOptions(metadata_thumbnail=str(path)), FOR_SD1, "n")
    kind, _, content = metadata["modelspec.thumbnail"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert base64.b64decode(content) == path.read_bytes()


def test_a_missing_thumbnail_is_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "none.png"
    with caplog.at_level(logging.WARNING):
        metadata = modelspec_metadata(MetadataOptions(metadata_thumbnail=str(path)), FOR_SD1, "n")
    assert "modelspec.thumbnail" not in metadata
    assert str(path) in caplog.text


def test_the_file_s_own_keys_do_not_replace_the_user_s():
    run = {"modelspec.trigger_phrase": "say this", "modelspec.usage_hint": "gently"}
    metadata = file_metadata(run, RECORD, "stem")
    assert metadata["modelspec.trigger_phrase"] == "say this"
    assert metadata["modelspec.usage_hint"] == "gently"


def test_the_trigger_phrase_is_the_file_s_stem():
    metadata = file_metadata({}, RECORD, "mychar-000001")
    assert metadata["modelspec.trigger_phrase"] == "mychar-000001"
    assert "embedding:mychar-000001" in metadata["modelspec.usage_hint"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", metadata["modelspec.date"])


def test_the_record_as_strings_without_what_is_unknown():
    record = TrainingRecord("mychar", 4, steps=1600, epoch=8, init_word="girl", base_model="sd15", seed=0,
                            base_model_hash="ab12", learning_rate=1e-6, optimizer="AdamW8bit")  # fmt: skip
    assert record.as_metadata() == {
        "ti.token": "mychar", "ti.num_vectors": "4", "ti.steps": "1600", "ti.epoch": "8", "ti.init_word": "girl",
        "ti.base_model": "sd15", "ti.base_model_hash": "ab12", "ti.seed": "0", "ti.learning_rate": "1e-06",
        "ti.optimizer": "AdamW8bit",
        "ss_steps": "1600", "ss_epoch": "8", "ss_new_sd_model_hash": "ab12", "ss_seed": "0",
        "ss_learning_rate": "1e-06", "ss_optimizer": "AdamW8bit",
    }  # fmt: skip
    assert set(TrainingRecord("mychar", 1).as_metadata()) == {"ti.token", "ti.num_vectors"}
    kept = replace(record, run="r").without_training().as_metadata()
    assert kept == {"ti.token": "mychar", "ti.num_vectors": "4", "ti.run": "r"}


def test_the_words_of_the_clients():
    words = client_words("my_file", "mychar")
    assert words["AUTOMATIC1111, Forge"] == words["SD.Next"] == "my_file"
    assert words["ComfyUI"] == "embedding:my_file"
    assert words["InvokeAI"] == "<my_file>"
    assert words["SwarmUI"] == "<embed:my_file>"
    assert words["diffusers"] == "mychar"


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("modelspec.thumbnail", "Give a smaller image as --metadata_thumbnail."),
        ("modelspec.description", "Shorten --metadata_description."),
        ("ss_training_comment", "Shorten --training_comment."),
        ("ss_tag_frequency", "--no_metadata leaves it out."),
    ],
)
def test_more_than_a_file_can_hold_is_refused(key, cure, tmp_path):
    """A header longer than what readers accept would make the whole embedding unreadable."""
    with pytest.raises(UserError, match="most of them for ") as error:
        check_length({"modelspec.title": "x", key: "ü\n" * 7_000_000})
    assert key in str(error.value)
    assert str(error.value).endswith(cure)


def test_as_much_as_a_file_can_hold_is_read_again(tmp_path):
    metadata = {"modelspec.thumbnail": "A" * 23_999_900, "modelspec.title": "\ud800"}
    check_length(metadata)
    file, record = tmp_path / "mychar.safetensors", TrainingRecord("mychar", 1, run="r")
    write_embedding(file, {"emb_params": torch.ones(1, 8)}, record, metadata=metadata)
    assert run_of(file) == "r"
    with safe_open(file, "pt") as opened:
        assert len(opened.metadata()["modelspec.thumbnail"]) == 23_999_900
