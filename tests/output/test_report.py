"""The closing report: movement of the rows, the warning, and the card that says what to write in which client."""

import ast
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build_pipeline

from library.embedding.files import write_embedding
from library.embedding.metadata import TrainingRecord
from library.output.report import Movement, diffusers_snippet, movement_table, movement_warning, movements, usage_card

SINGLE, PAIR = ("emb_params",), ("clip_l", "clip_g")


def moved(*percents):
    names = ("mychar", "mychar1", "mychar2")
    return [Movement(name, percent, 1.0, 0.4, 0.4) for name, percent in zip(names, percents, strict=False)]


def test_movement_in_numbers():
    start = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    rows = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.02]]))
    still, turned, nudged = movements(["a", "b", "c"], start, rows)
    assert (still.name, still.percent, still.start_norm, still.norm) == ("a", 0.0, 5.0, 5.0)
    assert still.cosine == pytest.approx(1.0)
    assert turned.percent == pytest.approx(100 * math.sqrt(2))
    assert turned.cosine == pytest.approx(0.0)
    assert nudged.percent == pytest.approx(1.0, rel=1e-6)
    assert nudged.norm == pytest.approx(2.0001, abs=1e-6)


def test_small_movements_are_not_lost_to_rounding():
    start = torch.full((1, 768), 0.0144)
    (row,) = movements(["a"], start.half(), start.half().float() * 1.0001)
    assert row.percent == pytest.approx(0.01, rel=1e-3)


def test_names_and_rows_must_agree():
    with pytest.raises(ValueError):
        movements(["a"], torch.ones(2, 3), torch.ones(2, 3))


def test_the_table_has_a_line_for_each_row():
    lines = movement_table([Movement("mychar", 12.345, 0.98765, 0.4, 0.41), *moved(1.0)]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["mychar", "12.35", "0.9877", "0.4000", "0.4100"]
    assert len({len(line) for line in lines}) == 1


def test_no_warning_when_every_row_moved():
    assert movement_warning(moved(1.0, 30.0), 1e-6, 10) is None


def test_a_row_that_is_not_a_number_did_not_move():
    assert "mychar1" in movement_warning(moved(30.0, math.nan), 5e-4, 1600)


def test_warning_when_nothing_moved_names_the_rate_and_how_far_it_reaches():
    text = movement_warning(moved(0.3, 0.99), 1e-6, 1600)
    assert text.startswith("THE EMBEDDING HAS HARDLY CHANGED")
    assert "At 1e-06" in text
    assert "0.0016 in 1600 steps" in text
    assert "--debug_dataset" in text
    assert "There were only" not in text


def test_warning_blames_few_steps_and_not_a_usual_rate():
    text = movement_warning(moved(0.3), 5e-4, 20)
    assert "only 20 steps" in text
    assert "learning rate is too low" not in text


def test_warning_without_a_rate_of_its_own_still_names_the_captions():
    text = movement_warning(moved(0.3), None, 1600)
    assert "learning rate is" not in text
    assert "captions lack the token" in text


def test_warning_names_the_rows_that_stayed():
    text = movement_warning(moved(20.0, 0.5, 0.2), 5e-4, 1600)
    assert text.startswith("SOME VECTORS HAVE HARDLY CHANGED")
    assert "mychar1, mychar2." in text.splitlines()[0]


def test_the_card_says_the_word_of_every_client():
    card = usage_card("out/mychar.safetensors", "mychar", SINGLE, 4, "Stable Diffusion 1.x")
    columns = [re.split(r"\s{2,}", line.strip()) for line in card.splitlines()]
    words = {parts[0]: parts[1] for parts in columns if len(parts) == 3}
    assert "Stable Diffusion 1.x; 4 vectors, 4 of a prompt's 75 tokens" in card
    assert words["ComfyUI"] == "embedding:mychar"
    assert words["InvokeAI"] == "<mychar>"
    assert words["SwarmUI"] == "<embed:mychar>"
    assert words["AUTOMATIC1111, Forge"] == words["SD.Next"] == words["diffusers"] == "mychar"
    assert "mychar.preview.png" in card
    assert "not mychar" not in card


def test_the_card_says_which_word_works_where_when_file_and_token_differ():
    card = usage_card("out/my_ti.safetensors", "mychar", SINGLE, 1, "Stable Diffusion 2.x")
    assert "the word is my_ti, not mychar" in card
    assert "rename the file to mychar.safetensors" in card
    assert "embedding:my_ti" in card
    assert "1 vector, 1 of" in card


def test_the_card_proposes_no_name_that_a_file_cannot_have():
    card = usage_card("out/my-tok.safetensors", "<my-tok>", SINGLE, 1, "Stable Diffusion 1.x")
    assert "the word is my-tok, not <my-tok>" in card
    assert "rename" not in card


@pytest.mark.parametrize(("stem", "noted"), [("my-char.v2", False), ("mychar_(x)", True), ("猫", True)])
def test_the_card_notes_a_name_that_invokeai_cannot_read(stem, noted):
    card = usage_card(f"out/{stem}.safetensors", stem, SINGLE, 1, "Stable Diffusion 1.x")
    assert ("InvokeAI reads only" in card) is noted


def card_rows(file, token, keys=SINGLE, count=1):
    """The card's table: word (or None) and the rest of its line, by client."""
    lines = usage_card(f"out/{file}", token, keys, count, "Stable Diffusion").splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith("  ")]
    return {row[0]: (None if row[1] == "-" else row[1], row[2]) for row in rows if len(row) == 3}


def test_round_brackets_are_escaped_where_they_weigh():
    rows = card_rows("mychar_(x).safetensors", "mychar_(x)")
    assert rows["AUTOMATIC1111, Forge"][0] == r"mychar_\(x\)"
    assert rows["ComfyUI"][0] == r"embedding:mychar_\(x\)"
    assert rows["SD.Next"][0] == "mychar_(x)"
    assert rows["InvokeAI"][0] == "<mychar_x>"


def test_sd_next_minds_case():
    assert "mind upper and lower case" in card_rows("MyChar.safetensors", "MyChar")["SD.Next"][1]


@pytest.mark.parametrize(("count", "word"), [(1, "MyChar"), (4, "mychar")])
def test_diffusers_gets_many_vectors_in_lower_case(count, word):
    assert card_rows("MyChar.safetensors", "MyChar", count=count)["diffusers"][0] == word
    card = usage_card("out/MyChar.safetensors", "MyChar", SINGLE, count, "Stable Diffusion")
    assert f"token='{word}'" in card
    assert ("type mychar in lower case" in card) is (count > 1)


def test_angle_brackets_are_not_doubled_for_invokeai():
    assert card_rows("<my-style>.safetensors", "<my-style>")["InvokeAI"][0] == "<my-style>"
    card = usage_card("out/<my-style>.safetensors", "<my-style>", SINGLE, 1, "Stable Diffusion")
    assert "give the model the name my-style there" in card
    assert "leave a space between <my-style> and a comma" in card


@pytest.mark.parametrize(
    ("file", "keys", "without"),
    [
        ("mychar.safetensors", SINGLE, set()),
        ("mychar.pt", SINGLE, set()),
        ("mychar.ckpt", SINGLE, {"AUTOMATIC1111, Forge", "SD.Next"}),
        ("mychar.safetensors", PAIR, set()),
        ("mychar.pt", PAIR, {"SD.Next"}),
        ("mychar.ckpt", PAIR, {"AUTOMATIC1111, Forge", "SD.Next"}),
        ("my char v1.2.safetensors", SINGLE, {"ComfyUI", "SwarmUI"}),
    ],
)
def test_the_card_says_who_cannot_use_the_file(file, keys, without):
    rows = card_rows(file, "mychar", keys)
    assert len(rows) == 6
    assert {client for client, (word, _) in rows.items() if word is None} == without
    assert all("does not" in rows[client][1] for client in without)


def test_comfyui_finds_a_ckpt_by_its_ending_only():
    assert card_rows("mychar.ckpt", "mychar")["ComfyUI"][0] == "embedding:mychar.ckpt"


def test_the_card_of_two_encoders_warns_of_invokeai_s_pooling():
    assert "InvokeAI may pool" in usage_card("out/a.safetensors", "a", PAIR, 1, "Stable Diffusion XL")
    assert "InvokeAI may pool" not in usage_card("out/a.safetensors", "a", SINGLE, 1, "Stable Diffusion 1.x")


def recording_pipe(eos_token_id=2):
    """A stand-in for a pipeline that records what it is given."""
    part = SimpleNamespace(eos_token_id=eos_token_id)
    encoder_2 = SimpleNamespace(config=SimpleNamespace(eos_token_id=eos_token_id), text_model=part)
    pipe = SimpleNamespace(
        text_encoder="encoder", tokenizer="tokenizer", text_encoder_2=encoder_2, tokenizer_2="tokenizer 2", loads=[]
    )
    pipe.load_textual_inversion = lambda what, **options: pipe.loads.append((what, options))
    return pipe


@pytest.mark.parametrize("path", ["out/mychar.safetensors", 'C:\\new\\it\'s "here".pt'])
@pytest.mark.parametrize("token", ["mychar", "it's", 'a"b'])
def test_the_snippet_for_one_encoder_runs(path, token):
    pipe = recording_pipe()
    exec(diffusers_snippet(path, token, SINGLE), {"pipe": pipe})
    assert pipe.loads == [(path, {"token": token})]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_snippet_for_two_encoders_runs(tmp_path, suffix):
    rows = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}
    path = tmp_path / f"it's mychar{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(rows, path)
    pipe = recording_pipe()
    exec(diffusers_snippet(path, "mychar", PAIR), {"pipe": pipe})

    (first, first_options), (second, second_options) = pipe.loads
    assert (first.shape[1], second.shape[1]) == (768, 1280)
    assert first_options == {"token": "mychar", "text_encoder": "encoder", "tokenizer": "tokenizer"}
    assert second_options == {"token": "mychar", "text_encoder": pipe.text_encoder_2, "tokenizer": "tokenizer 2"}
    assert pipe.text_encoder_2.config.eos_token_id == pipe.text_encoder_2.text_model.eos_token_id == 49407


def test_the_card_s_snippet_is_python_and_names_the_file():
    card = usage_card("out/my ti.safetensors", "mychar", PAIR, 2, "Stable Diffusion XL")
    snippet = card.partition("of the same base:\n")[2]
    ast.parse("if True:\n" + snippet)
    assert "load_file('out/my ti.safetensors')" in snippet


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_snippet_gives_a_real_pipeline_with_one_encoder_the_word(tmp_path, suffix):
    pipe = build_pipeline("sd1")
    rows = {"emb_params": torch.randn(2, 32)}
    write_embedding(tmp_path / f"stem{suffix}", rows, TrainingRecord("mychar", 2))
    exec(diffusers_snippet(tmp_path / f"stem{suffix}", "mychar", SINGLE), {"pipe": pipe})
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a mychar here", pipe.tokenizer)).input_ids
    assert torch.equal(table[ids[2:4]], rows["emb_params"])


@pytest.mark.parametrize("eos_in_config", [2, 49407])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_snippet_gives_a_real_pipeline_with_two_encoders_the_word(tmp_path, suffix, eos_in_config):
    pipe = build_pipeline("sdxl")
    encoder = pipe.text_encoder_2
    encoder.config.eos_token_id = encoder.text_model.eos_token_id = eos_in_config
    rows = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 64)}
    write_embedding(tmp_path / f"stem{suffix}", rows, TrainingRecord("mychar", 2))
    exec(diffusers_snippet(tmp_path / f"stem{suffix}", "mychar", PAIR), {"pipe": pipe})

    with torch.no_grad():
        pooled = pipe.encode_prompt("a mychar here", do_classifier_free_guidance=False)[2]
        prompt = pipe.maybe_convert_prompt("a mychar here", pipe.tokenizer_2)
        ids = pipe.tokenizer_2(prompt, padding="max_length", return_tensors="pt").input_ids
        states = encoder(ids).last_hidden_state
        at_end_of_text = encoder.text_projection(states[0, ids[0].tolist().index(49407)])
        at_new_token = encoder.text_projection(states[0, ids[0].argmax()])
    assert torch.equal(encoder.get_input_embeddings().weight[ids[0, 2:4]], rows["clip_g"])
    assert torch.allclose(pooled[0], at_end_of_text, atol=1e-6)
    assert not torch.allclose(pooled[0], at_new_token, atol=1e-3)
