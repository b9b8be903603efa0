"""An embedding file beside a model's vocabulary: norms and nearest words are those of the model's own tables."""

import json

import pytest
import torch
from datasets import tokenizer
from safetensors.torch import load_file
from tiny_models import build_pipeline, single_file_tensors

from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.embedding.tool import main
from library.model.base_model import BaseModel

WORDS = ("girl", "castle")
ENCODERS = {
    "sd1": {"emb_params": "text_encoder"},
    "sd2": {"emb_params": "text_encoder"},
    "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
}


def tables(folder, family):
    """The token tables that the model's files hold, by the key of an embedding's vectors."""
    found = {}
    for key, component in ENCODERS[family].items():
        tensors = load_file(folder / component / "model.safetensors")
        found[key] = next(value for name, value in tensors.items() if name.endswith("token_embedding.weight"))
    return found


@pytest.fixture
def embedding(request, tmp_path):
    """Writes an embedding of twice the vectors of ``WORDS`` for a family, and gives the file and the model's tables."""

    def write(family, form="folder"):
        whole = request.getfixturevalue("folder_of_file")
        folder = request.getfixturevalue(f"tiny_{family}") if form == "folder" else whole(family)
        found = tables(folder, family)
        ids = tokenizer().convert_tokens_to_ids([f"{word}</w>" for word in WORDS])
        file = tmp_path / "mychar.safetensors"
        write_embedding(file, {key: 2 * table[ids] for key, table in found.items()}, TrainingRecord("mychar", 2))
        return file, found

    return write


@pytest.fixture
def model(request, tmp_path):
    """A family's model in one of the forms that the training takes."""

    def make(family, form):
        if form != "ckpt":
            return request.getfixturevalue(f"tiny_{family}" + "_file" * (form == "file"))
        torch.save({"state_dict": single_file_tensors(build_pipeline(family), family)}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return make


@pytest.mark.parametrize(
    ("family", "form"), [("sd1", "folder"), ("sd1", "ckpt"), ("sd2", "file"), ("sdxl", "folder"), ("sdxl", "file")]
)
def test_vectors_stand_beside_the_model_s_own_words(family, form, embedding, model, monkeypatch, capsys):
    monkeypatch.setattr(BaseModel, "unet", lambda *_: pytest.fail("the U-Net was loaded"))
    monkeypatch.setattr(BaseModel, "text_encoders", lambda *_: pytest.fail("a text encoder was loaded"))
    (file, found), path = embedding(family, form), model(family, form)
    assert main(["inspect", str(file), f"--model={path}", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["model"] == str(path)
    assert facts["vocabulary"].keys() == found.keys()
    for key, table in found.items():
        beside, usual = facts["vocabulary"][key], float(table.norm(dim=1).median())
        assert beside["usual_norm"] == pytest.approx(usual, abs=1e-5)
        expected = [norm / usual for norm in facts["vectors"][key]["norms"]]
        assert beside["times_usual"] == pytest.approx(expected, abs=1e-3)
        assert [nearest[0] for nearest in beside["nearest"]] == [{"word": word, "cosine": 1.0} for word in WORDS]
        assert all(len(nearest) == 5 for nearest in beside["nearest"])


def test_what_people_read(embedding, tiny_sd1, capsys):
    file, found = embedding("sd1")
    assert main(["inspect", str(file), f"--model={tiny_sd1}"]) == 0
    text = capsys.readouterr().out
    usual = float(found["emb_params"].norm(dim=1).median())
    assert f"emb_params beside {tiny_sd1}: norm in norms of a usual word ({usual:.4f})" in text
    assert "×  girl 1.000, " in text
    assert "×  castle 1.000, " in text


def test_without_a_model_nothing_is_said_of_words(embedding, capsys):
    file, _ = embedding("sd1")
    assert main(["inspect", str(file), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert not {"model", "vocabulary"} & facts.keys()


def test_one_encoder_s_vectors_stand_beside_that_one(embedding, tiny_sdxl, tmp_path, capsys):
    _, found = embedding("sdxl")
    part = tmp_path / "part.safetensors"
    write_embedding(part, {"clip_g": found["clip_g"][:1]}, TrainingRecord("mychar", 1))
    assert main(["inspect", str(part), f"--model={tiny_sdxl}", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert list(facts["vocabulary"]) == ["clip_g"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("tiny_sd2", "belongs to an unknown base (vectors of width 32); --model {} is an unknown base (vectors of"),
        ("tiny_sdxl", "--model {} is Stable Diffusion XL (clip_l 32, clip_g 64). Give a model of the same base."),
        ("nowhere.safetensors", "--model nowhere.safetensors does not exist (looked for in "),
        ("embedding", "{} is an embedding. Give a base model of Stable Diffusion 1.x, 2.x or XL."),
    ],
)
def test_another_model_is_a_sentence(given, sentence, embedding, request, capsys):
    file, _ = embedding("sd1")
    other = file if given == "embedding" else request.getfixturevalue(given) if given.startswith("tiny") else given
    capsys.readouterr()  # a model that is made for this test shows a progress bar
    assert main(["inspect", str(file), f"--model={other}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence.format(other) in said


def test_a_model_without_a_token_table_is_incomplete(embedding, tmp_path, capsys):
    file, _ = embedding("sd1")
    tensors = single_file_tensors(build_pipeline("sd1"), "sd1")
    del tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    torch.save(tensors, tmp_path / "model.ckpt")
    assert main(["inspect", str(file), f"--model={tmp_path / 'model.ckpt'}"]) == 1
    assert "is incomplete: the text_encoder's token table is missing." in capsys.readouterr().err
