"""The command for embedding files: each layout read back, means and parts, what is said and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build_pipeline

from library.embedding.files import read_embedding, write_embedding
from library.embedding.metadata import TrainingRecord
from library.embedding.tool import main

ROOT = Path(__file__).parents[2]
RECORD = TrainingRecord("mychar", 3, steps=100, base_model="some-model", run="a run")


def embedding(path: Path, seed: int = 0, *, pair: bool = False, count: int = 3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    widths = {"clip_l": 768, "clip_g": 1280} if pair else {"emb_params": 768}
    rows = {key: torch.randn(count, width, generator=generator) for key, width in widths.items()}
    write_embedding(path, rows, RECORD, metadata={"modelspec.title": "mine", "ss_training_comment": "hello"})
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_same(one: Path, other: Path) -> None:
    first, second = read_embedding(one), read_embedding(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(
    ("layout", "ending", "keys"),
    [
        ("safetensors", ".safetensors", {"emb_params"}),
        ("comfyui", ".safetensors", {"emb_params"}),
        ("onetrainer", ".safetensors", {"emp_params"}),
        ("diffusers", ".safetensors", {"mychar"}),
        ("a1111", ".pt", {"string_to_param", "emb_params"}),
    ],
)
def test_every_layout_holds_the_same_vectors(layout, ending, keys, pair, tmp_path):
    source, target = embedding(tmp_path / "source.safetensors", pair=pair), tmp_path / f"target{ending}"
    assert main(["convert", str(source), f"--to={layout}", f"--output={target}"]) == 0
    assert_same(source, target)
    content = torch.load(target, weights_only=True) if ending == ".pt" else load_file(target)
    assert ({"clip_l", "clip_g"} if pair else keys) <= set(content)
    again = tmp_path / "again.safetensors"
    assert main(["convert", str(target), "--to=safetensors", f"--output={again}"]) == 0
    assert_same(source, again)


def test_what_a_file_says_goes_along_and_what_is_of_one_file_does_not(tmp_path):
    source, target = embedding(tmp_path / "mychar.safetensors"), tmp_path / "other.safetensors"
    assert main(["convert", str(source), "--to=safetensors", f"--output={target}"]) == 0
    before, after = metadata(source), metadata(target)
    for name in ("modelspec.title", "ss_training_comment", "ti.token", "ti.steps", "ti.base_model", "ti.run"):
        assert after[name] == before[name]
    assert after["modelspec.trigger_phrase"] == "other"
    assert after["modelspec.hash_sha256"] == before["modelspec.hash_sha256"]  # of the same bytes, made anew


def test_diffusers_loads_its_layout(tmp_path):
    target = tmp_path / "target.safetensors"
    rows = torch.randn(2, 32)
    write_embedding(tmp_path / "a.safetensors", {"emb_params": rows}, RECORD)
    assert main(["convert", str(tmp_path / "a.safetensors"), "--to=diffusers", f"--output={target}"]) == 0
    pipe: StableDiffusionPipeline = build_pipeline("sd1")
    pipe.load_textual_inversion(target, token="mychar")
    ids = pipe.tokenizer.convert_tokens_to_ids(["mychar", "mychar_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids].detach(), rows)


@pytest.mark.parametrize(("weights", "shares"), [([], [0.5, 0.5]), (["--weights", "3", "1"], [0.75, 0.25])])
def test_a_merged_file_is_the_mean(weights, shares, tmp_path):
    files = [embedding(tmp_path / f"{seed}.safetensors", seed, pair=True) for seed in (0, 1)]
    output = tmp_path / "mean.safetensors"
    assert main(["merge", *map(str, files), *weights, f"--output={output}"]) == 0
    one, two, mean = map(read_embedding, (*files, output))
    for key in ("clip_l", "clip_g"):
        torch.testing.assert_close(mean[key], shares[0] * one[key] + shares[1] * two[key])


def test_a_slice_is_the_first_vectors(tmp_path):
    source, output = embedding(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert main(["slice", str(source), "--vectors=2", f"--output={output}"]) == 0
    assert torch.equal(read_embedding(output)["emb_params"], read_embedding(source)["emb_params"][:2])
    assert metadata(output)["ti.num_vectors"] == "2"


def test_a_file_that_was_there_is_kept(tmp_path, caplog):
    source, output = embedding(tmp_path / "a.safetensors"), embedding(tmp_path / "b.safetensors", 7)
    before = output.read_bytes()
    for layout in ("safetensors", "diffusers"):
        assert main(["convert", str(source), f"--to={layout}", f"--output={output}"]) == 0
    assert (tmp_path / "b-1.safetensors").read_bytes() == before
    assert (tmp_path / "b-2.safetensors").is_file()
    assert [message.split(": ")[-1] for message in caplog.messages] == [
        "it is now b-1.safetensors.",
        "it is now b-2.safetensors.",
    ]


def test_what_is_said(tmp_path, capsys):
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).repeat(1, 384)
    write_embedding(tmp_path / "mychar.safetensors", {"emb_params": rows}, RECORD, dtype=torch.float16, metadata={})
    assert main(["inspect", str(tmp_path / "mychar.safetensors"), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["base"] == "Stable Diffusion 1.x (vectors of width 768)"
    assert (facts["token"], facts["num_vectors"]) == ("mychar", 2)
    (vectors,) = facts["vectors"].values()
    assert vectors["dtype"] == "float16"
    assert vectors["norms"] == pytest.approx([5 * 384**0.5, 2 * 384**0.5])
    assert vectors["cosines"] == [[1.0, 0.8], [0.8, 1.0]]
    assert facts["clients"]["ComfyUI"]["prompt"] == "embedding:mychar"
    assert facts["metadata"]["ti.base_model"] == "some-model"
    assert main(["inspect", str(tmp_path / "mychar.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "2 vectors, token mychar" in text
    assert "embedding:mychar" in text
    assert "ti.base_model: some-model" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "missing.safetensors"], "missing.safetensors"),
        (["inspect", "model.safetensors"], "is not an embedding"),
        (["merge", "a.safetensors", "pair.safetensors", "--output=x.safetensors"], "cannot be averaged"),
        (["merge", "a.safetensors", "short.safetensors", "--output=x.safetensors"], "(2 vectors for Stable"),
        (["merge", "a.safetensors", "--weights", "1", "2", "--output=x.safetensors"], "2 numbers for 1 file."),
        (["merge", "a.safetensors", "a.safetensors", "--weights", "1", "-1", "--output=x.safetensors"], "adds up to 0"),
        (["slice", "a.safetensors", "--vectors=4", "--output=x.safetensors"], "has 3 vectors"),
        (["slice", "a.safetensors", "--vectors=0", "--output=x.safetensors"], "has 3 vectors"),
        (["convert", "a.safetensors", "--to=a1111", "--output=x.safetensors"], "is a .pt file"),
        (["convert", "a.safetensors", "--to=diffusers", "--output=x"], "is a .safetensors file"),
        (
            ["convert", "a.safetensors", "--to=lora", "--output=x.safetensors"],
            '--to: "lora" is not one of: safetensors, a',
        ),
        (["merge", "a.safetensors", "--output=x.zip"], "ends in .safetensors, .pt, .bin or .ckpt."),
        (["merge", "a.safetensors", "--weights", "1e308", "--output=x.safetensors"], '--weights: "1e308" is too large'),
        (["merge", "a.safetensors", "--weights", "nan", "--output=x.safetensors"], '--weights: "nan" is not a finite'),
        (
            ["slice", "a.safetensors", "--vectors=two", "--output=x.safetensors"],
            '--vectors: "two" is not a whole number.',
        ),
        (
            ["slice", "uneven.safetensors", "--vectors=1", "--output=x.safetensors"],
            "2 vectors for clip_l and 3 vectors for",
        ),
        (["inspect", "lora.safetensors"], "lora.safetensors is not an embedding but a LoRA file."),
        (["inspect", "nothing.safetensors"], "nothing.safetensors is not an embedding: it holds no tensors."),
        (["inspect", "nan.safetensors"], "holds NaN or infinite values (emb_params), so nothing can be made of it."),
        (
            ["inspct", "a.safetensors"],
            '"inspct" is not one of: inspect, convert, merge, slice. Did you mean',
        ),
        (["inspect"], "see --help; there must also be FILE."),
    ],
)
def test_mistakes_are_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    embedding(tmp_path / "a.safetensors")
    embedding(tmp_path / "short.safetensors", count=2)
    embedding(tmp_path / "pair.safetensors", pair=True)
    save_file({f"w{number}": torch.zeros(2, 2) for number in range(3)}, tmp_path / "model.safetensors")
    foreign = {
        "lora": {"lora_unet_a.lora_down.weight": torch.zeros(2, 2), "lora_unet_a.lora_up.weight": torch.zeros(2, 2)},
        "nothing": {},
        "nan": {"emb_params": torch.full((2, 768), float("nan"))},
        "uneven": {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(3, 1280)},
    }
    for name, tensors in foreign.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert not (tmp_path / "x.safetensors").exists()


def test_the_command(tmp_path):
    source = embedding(tmp_path / "mychar.safetensors")
    command = [sys.executable, "-m", "library.embedding", "inspect", str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 vectors, token mychar" in done.stdout
