"""Uploads to the Hugging Face hub and states from there, against a stand-in of its server."""

import pytest
import torch
from hub_stand_in import running
from huggingface_hub import constants
from option_effects import shows
from runs import TOKEN, arguments, run, trainers, write_dataset  # noqa: F401  (a fixture)
from safetensors.torch import load, load_file

from library.model.base_model import BaseModel
from library.model.hub import HubUpload
from library.training.state import FILE, TrainingState

REPO = "someone/words"
RESULT = f"{TOKEN}.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def command(tmp_path, tiny_sd1):
    data = write_dataset(tmp_path, count=2)

    def build(*more: str, folder: str = "out") -> list[str]:
        return arguments("sd1", tiny_sd1, data, tmp_path / folder, f"--huggingface_repo_id={REPO}", *more)

    return build


@shows("huggingface_repo_id", "huggingface_token", "huggingface_path_in_repo", "save_state_to_huggingface")
def test_what_is_saved_is_uploaded(hub, command, tmp_path):
    more = ["--save_every_n_steps=1", "--save_last_n_steps=1", "--save_state", "--save_state_to_huggingface"]
    assert run("sd1", command(*more, "--huggingface_path_in_repo=/mine/", "--huggingface_token=secret")) == 0
    steps = [f"{TOKEN}-step{number:08d}" for number in (1, 2)]
    states = [f"mine/{stem}-state/{file}" for stem in [*steps, TOKEN] for file in ("README.txt", FILE)]
    assert set(hub.files) == {(REPO, f"mine/{stem}.safetensors") for stem in [*steps, TOKEN]} | {
        (REPO, name) for name in states
    }
    for (_, name), content in hub.files.items():
        assert (tmp_path / "out" / name.removeprefix("mine/")).read_bytes() == content
    order = [f"Add {name}" for stem in steps for name in (f"{stem}.safetensors", f"{stem}-state")]
    assert hub.commits == [*order, f"Add {TOKEN}-state", f"Add {RESULT}"]
    assert hub.tokens == {"secret"}


@shows("huggingface_repo_type", "huggingface_repo_visibility")
@pytest.mark.parametrize("kind", [None, "dataset", "space"])
@pytest.mark.parametrize("visibility", [None, "private", "public"])
def test_the_repository_is_made(kind, visibility, hub, command):
    more = [f"--huggingface_repo_type={kind}"] if kind else []
    more += [f"--huggingface_repo_visibility={visibility}"] if visibility else []
    assert run("sd1", command(*more, "--max_train_steps=1")) == 0
    (made,) = hub.created
    assert (made["organization"], made["name"], made["type"]) == ("someone", "words", kind or "model")
    assert made["visibility"] == (visibility or "private")
    assert set(hub.files) == {(REPO, RESULT)}
    assert run("sd1", command(*more, "--max_train_steps=1")) == 0  # it is there already


@shows("async_upload")
def test_uploads_in_the_background_are_waited_for(hub, command, tmp_path, monkeypatch, trainers, capsys):  # noqa: F811
    """The hub answers only when the training is over; by then a file is gone, and what it held still arrives."""
    from library.output.trackers import RunLog

    close = RunLog.close

    def finished(log):
        assert hub.files == {}
        assert not (tmp_path / "out" / f"{TOKEN}-step00000001.safetensors").exists()
        hub.gate.set()
        close(log)

    hub.gate.clear()
    monkeypatch.setattr(RunLog, "close", finished)
    more = ["--async_upload", "--save_every_n_steps=1", "--save_last_n_steps=1", "--max_train_steps=3"]
    assert run("sd1", command(*more)) == 0
    assert "Waiting for" in capsys.readouterr().err
    names = [f"{TOKEN}-step{number:08d}.safetensors" for number in (1, 2, 3)] + [RESULT]
    assert hub.commits == [f"Add {name}" for name in names]
    first = load(hub.files[REPO, names[0]])["emb_params"]
    assert first.isfinite().all()
    assert not torch.equal(first, load(hub.files[REPO, RESULT])["emb_params"])


@pytest.mark.parametrize("more", [[], ["--async_upload"]])
def test_an_upload_that_fails_costs_no_training(more, hub, command, tmp_path, capsys):
    hub.refuse.append(f"/api/models/{REPO}/commit")
    assert run("sd1", command(*more, "--save_every_n_steps=1", "--max_train_steps=2")) == 0
    said = capsys.readouterr().err
    for name in (f"{TOKEN}-step00000001.safetensors", RESULT):
        assert said.count(f"{name} was not uploaded to {REPO}; the training goes on.") == 1
        assert (tmp_path / "out" / name).is_file()
    assert "You may not do this" in said
    assert hub.files == {}


def test_a_file_that_is_gone_costs_no_training(hub, command, monkeypatch, capsys):
    upload = HubUpload.upload

    def late(uploads, path):
        path.unlink()
        upload(uploads, path)

    monkeypatch.setattr(HubUpload, "upload", late)
    assert run("sd1", command("--max_train_steps=1")) == 0
    assert f"{RESULT} was not uploaded to {REPO}" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["/api/repos/create", f"/api/models/{REPO}/auth-check"])
def test_what_the_hub_does_not_allow_is_found_before_a_model_is_loaded(refused, hub, command, monkeypatch, capsys):
    monkeypatch.setattr(BaseModel, "text_encoders", lambda *_: pytest.fail("a model was loaded"))
    hub.refuse.append(refused)
    assert run("sd1", command("--huggingface_token=secret")) == 1
    said = capsys.readouterr().err
    assert f"--huggingface_repo_id {REPO}: the request to the Hugging Face Hub failed" in said
    assert "secret" not in said


def test_without_a_connection(hub, command, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("sd1", command()) == 1
    said = capsys.readouterr().err
    assert "--huggingface_repo_id someone/words: the request to the Hugging Face Hub failed" in said
    assert "offline" in said.lower()


@shows("resume_from_huggingface")
@pytest.mark.parametrize(
    "place", [f"{REPO}/deep/{TOKEN}-step00000002-state", f"{REPO}/deep/{TOKEN}-step00000002-state/:main:model"]
)
def test_a_state_on_the_hub_is_gone_on_from(place, hub, command, tmp_path, capsys):
    more = ["--max_train_steps=4", "--save_every_n_steps=2", "--save_state", "--save_state_to_huggingface"]
    assert run("sd1", command(*more, "--huggingface_path_in_repo=deep")) == 0
    capsys.readouterr()
    argv = command("--max_train_steps=4", "--resume_from_huggingface", f"--resume={place}", folder="rest")
    assert run("sd1", argv) == 0
    assert "Resuming after step 2 of 4" in capsys.readouterr().err
    whole, rest = (load_file(tmp_path / name / RESULT)["emb_params"] for name in ("out", "rest"))
    assert torch.equal(rest, whole)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("someone/words", "it must be user/name/path"),
        ("words", "it must be user/name/path"),
        (f"{REPO}/state:main:image", "Types are model, dataset, space"),
        (f"{REPO}/nothing", f"--resume {REPO}/nothing: the request to the Hugging Face Hub failed"),
    ],
)
def test_places_that_are_none(place, sentence, hub, command, trainers, capsys):  # noqa: F811
    assert run("sd1", command("--resume_from_huggingface", f"--resume={place}")) == 1
    assert sentence in capsys.readouterr().err
    assert trainers == []


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--resume_from_huggingface"], "give --resume user/name/path too"),
        (["--huggingface_repo_type=modle"], 'it must be one of model, dataset, space. Did you mean "model"?'),
        (["--huggingface_repo_visibility=secret"], "it must be one of public, private"),
        (["--huggingface_repo_id=", "--save_state_to_huggingface"], "needs --huggingface_repo_id"),
        (["--huggingface_repo_id=words"], 'is "words"; it must be user/name'),
    ],
)
def test_mistakes(more, sentence, command, trainers, capsys):  # noqa: F811
    assert run("sd1", command(*more)) == 1
    assert sentence in capsys.readouterr().err
    assert trainers == []


def test_a_state_is_not_read_as_anything_else(hub, command, tmp_path):
    """What comes from the hub is read like a local state: without running any code in it."""
    hub.files[REPO, f"bad/{FILE}"] = b"no state"
    assert run("sd1", command("--resume_from_huggingface", f"--resume={REPO}/bad")) == 1
    with pytest.raises(Exception, match="damaged"):
        TrainingState.read(next((tmp_path / "cache").rglob(FILE)).parent)
