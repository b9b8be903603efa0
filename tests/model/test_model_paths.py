"""Which names of models are paths, which can be names on the hub, and what is said of neither."""

from dataclasses import dataclass

import pytest

from library.model.model_paths import check_paths, local_path, looks_like_hub_id
from library.support.errors import UserError


@dataclass
class Named:
    """The two options that are read."""

    pretrained_model_name_or_path: str | None
    vae: str | None = None


def test_a_path_that_exists_is_resolved_and_another_is_none(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert local_path(str(tmp_path / "link.safetensors")) == (tmp_path / "model.safetensors").resolve()
    assert local_path(str(tmp_path / "other.safetensors")) is None


@pytest.mark.parametrize(
    ("name", "can_be"),
    [("owner/model-1.5", True), ("model", False), ("a/b/c", False), ("/a/b", False), ("models/sd.safetensors", False)],
)
def test_names_on_the_hub_have_an_owner_and_no_ending_of_a_file(name, can_be):
    assert looks_like_hub_id(name) is can_be


def test_what_exists_or_can_be_on_the_hub_passes(tmp_path):
    check_paths(Named(str(tmp_path), "owner/vae"))
    check_paths(Named("owner/model"))
    check_paths(Named(None))


@pytest.mark.parametrize(
    ("named", "option"),
    [(Named("nothing.ckpt"), "--pretrained_model_name_or_path"), (Named("owner/model", "nothing.ckpt"), "--vae")],
)
def test_a_missing_file_is_named_with_its_option(named, option):
    with pytest.raises(
        UserError, match=rf"^{option} nothing\.ckpt does not exist \(looked for in /.*\)\. Check the path\.$"
    ):
        check_paths(named)
