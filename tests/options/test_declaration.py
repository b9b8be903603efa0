"""What stands on a declaration is about options that exist, and the words and lists made from it are right."""

import dataclasses

import pytest

from library.options.declaration import DATASETS, FOLDERS, SUBSETS, OnResume, any_of
from library.options.options import (
    LoggingOptions,
    MetadataOptions,
    SaveOptions,
    dataset_keys,
    declared_options,
    options_with,
)

DECLARED = dict(declared_options())


@pytest.mark.parametrize("name", DECLARED)
def test_an_option_speaks_of_others_that_exist(name):
    option = DECLARED[name]
    for need in option.needs:
        other, _, value = need.partition(" ")
        known = DECLARED[other].choices
        assert not value or known is None or value in known
    others = {*option.yields_to, *filter(None, [option.spelling_of]), *(need.split()[0] for need in option.needs)}
    assert others <= DECLARED.keys() - {name}
    assert not option.key or option.table


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("vae_batch_size", "--cache_latents"),
        ("huber_c", "--loss_type huber or smooth_l1"),
        ("sample_prompts", "--sample_every_n_steps, --sample_every_n_epochs or --sample_at_first"),
        ("wandb_api_key", "--log_with wandb or all"),
        ("seed", ""),
    ],
)
def test_what_an_option_needs_is_put_in_words(name, condition):
    option = DECLARED[name]
    assert option.condition == condition
    assert option.whole_help.endswith(f"Ignored without {condition}." if condition else option.help)


def test_choices_in_words():
    assert [any_of(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a or b", "a, b or c"]


def test_what_resuming_asks_of_an_option():
    assert options_with(OnResume.REFUSED) == ("token_string", "num_vectors_per_token")
    assert options_with(OnResume.STATE_COUNTS) == ("init_word", "weights")
    free = set(options_with(OnResume.FREE))
    for group in (SaveOptions, LoggingOptions, MetadataOptions):
        assert {field.name for field in dataclasses.fields(group)} <= free
    assert {"resolution", "noise_offset", "loss_type", "mixed_precision"} <= set(options_with(OnResume.SAID))
    assert sum(len(options_with(kind)) for kind in OnResume) == len(DECLARED)


def test_keys_of_a_dataset_file_fall_back_on_options():
    keys = dataset_keys(DATASETS, SUBSETS, FOLDERS)
    assert {key: name for key, (name, _) in keys.items() if key != name} == {
        "batch_size": "train_batch_size",
        "num_repeats": "dataset_repeats",
    }
    assert set(dataset_keys(FOLDERS)) == {"caption_extension", "cache_info"}
