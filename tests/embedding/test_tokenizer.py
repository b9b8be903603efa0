"""tokenizer.py: ids as measured, refusals, start values, and rows that alone receive gradients."""

import re
from pathlib import Path

import pytest
import torch
from departures import departure
from ftfy import fix_text
from golden_data import golden_cases
from torch import nn
from transformers import CLIPTokenizer

from library.embedding.placeholder import Placeholder
from library.embedding.prompt_weights import parse_weights
from library.embedding.tokenizer import (
    MergedEmbedding,
    PromptTokenizer,
    TrainableRows,
    check_token_string,
    init_word_ids,
    rows_from_statistics,
    rows_from_word,
    table_spread,
    typical_norm,
)
from library.support.errors import UserError

VOCABULARY = Path(__file__).parents[2] / "configs" / "tokenizer"
PADS = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    return CLIPTokenizer(str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt"), pad_token=pad)


@pytest.fixture(scope="module")
def tokenizers():
    by_pad = {pad: clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")}
    return {model: [by_pad[pad] for pad in pads] for model, pads in PADS.items()}


def body_by_our_rules(caption: str, names: list[str], tokenizer) -> list[int]:
    """What is around the names is repaired; then whole words in any case become new ids, and control tokens text."""
    pattern = rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, names))})(?![A-Za-z0-9])"
    pieces = re.split(pattern, caption, flags=re.IGNORECASE)
    text = "".join(piece if i % 2 else " ".join(fix_text(piece).split("\n")) for i, piece in enumerate(pieces))
    body = []
    for i, piece in enumerate(re.split(pattern, text, flags=re.IGNORECASE)):
        plain = (
            piece.lower().replace("<|startoftext|>", "<| startoftext |>").replace("<|endoftext|>", "<| endoftext |>")
        )
        body += [49408 + names.index(piece.lower())] if i % 2 else tokenizer.encode(plain, add_special_tokens=False)
    return body


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|StartOfText|>", "<cat-toy>", "<other>"])
@pytest.mark.parametrize("count", [1, 2])
def test_special_and_added_tokens_are_words_of_the_model(token, count):
    """Also where the tokenizer reads special ones as text, as those of model folders do."""
    tokenizer = CLIPTokenizer(str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt"), split_special_tokens=True)
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>"]})
    with pytest.raises(UserError, match="already is a word"):
        check_token_string(Placeholder(token, count), [tokenizer])
    check_token_string(Placeholder("<dog-toy>", count), [tokenizer])


@pytest.mark.parametrize("text", ["H\u0331", "J\u030c", "\u0130", "W\u030a x", "STRASSE"])
def test_other_letters_are_lowered_by_the_tokenizer_alone(text, tokenizers):
    """It composes letters and marks before it lowers them."""
    prompts = PromptTokenizer(tokenizers["sd1"], Placeholder("mychar", 1))
    assert prompts.body_ids(text) == tokenizers["sd1"][0].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("model", PADS)
def test_greek_words_end_with_a_final_sigma(model, tokenizers):
    """As CLIP lowers text; the Rust tokenizer, on its own, does not look at where the letter stands."""
    prompts = PromptTokenizer(tokenizers[model], Placeholder("mychar", 1))
    for index, tokenizer in enumerate(tokenizers[model]):
        wanted = [*tokenizer.encode("οδος σας", add_special_tokens=False), 49408]
        assert prompts.body_ids("ΟΔΟΣ ΣΑΣ mychar", index) == wanted
        assert wanted != [*tokenizer.encode("ΟΔΟΣ ΣΑΣ", add_special_tokens=False), 49408]


@pytest.mark.parametrize("case", golden_cases("tokenize"))
def test_golden_tokenize(case, tokenizers):
    names = case["added_tokens"]
    placeholder = Placeholder(names[0], len(names))
    assert list(placeholder.names) == names
    prompts = PromptTokenizer(tokenizers[case["model"]], placeholder, case["max_token_length"])
    encoded = prompts.encode(case["caption"])
    if departure("tokenize", case):
        for ids, tokenizer in zip(encoded, tokenizers[case["model"]], strict=True):
            body = body_by_our_rules(case["caption"], names, tokenizer)
            assert ids[0, 1 : 1 + len(body)].tolist() == body[:75]
            assert ids[0, 0] == tokenizer.bos_token_id
        return
    for ids, expected in zip(encoded, case["input_ids"], strict=True):
        assert ids.tolist() == expected[0]


@pytest.mark.parametrize("case", golden_cases("weighted_tokens"))
def test_golden_weighted_tokens(case, tokenizers):
    prompts = PromptTokenizer(tokenizers[case["model"]], Placeholder("mychar"), case["max_token_length"])
    ids, weights = prompts.encode_weighted(case["prompt"])
    if departure("weighted_tokens", case):
        parts = [part for part, _ in parse_weights(case["prompt"])]
        for each, tokenizer in zip(ids, prompts.tokenizers, strict=True):
            body = [i for part in parts for i in body_by_our_rules(part, ["mychar"], tokenizer)]
            assert each[0, 1 : 1 + len(body)].tolist() == body[:75]
        return
    assert [each.tolist() for each in ids] == [batch[0] for batch in case["input_ids"]]
    for found, expected in zip(weights, case["weights"], strict=True):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", golden_cases("add_tokens"))
def test_golden_add_tokens(case, tokenizers):
    placeholder = Placeholder(case["token_string"], case["num_vectors_per_token"])
    assert list(placeholder.names) == case["names"]
    toks = tokenizers[case["model"]]
    accepted = all(entry["accepted"] for entry in case["per_tokenizer"])
    if departure("add_tokens", case):
        accepted = False
    if not accepted:
        with pytest.raises(UserError, match="--token_string"):
            check_token_string(placeholder, toks)
        return
    check_token_string(placeholder, toks)
    prompts = PromptTokenizer(toks, placeholder)
    for index, entry in enumerate(case["per_tokenizer"]):
        assert prompts.body_ids(placeholder.expanded, index) == entry["ids"]
        assert prompts.first_new_id(index) + placeholder.count == entry["len_after"]


@pytest.mark.parametrize("max_token_length", [None, 150, 225])
@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_without_attention_syntax_weights_change_nothing(model, max_token_length, tokenizers):
    prompts = PromptTokenizer(tokenizers[model], Placeholder("mychar", 3), max_token_length)
    for text in ("", "a photo of MyChar, 8k: mychar2!", "word " * 74 + "! mychar " + "word! " * 80):
        ids, weights = prompts.encode_weighted(text)
        for found, expected in zip(ids, prompts.encode(prompts.placeholder.expand(text)), strict=True):
            assert torch.equal(found, expected)
        assert all(torch.equal(each, torch.ones(ids[0].shape)) for each in weights)


def test_a_weight_is_for_all_vectors_of_the_word(tokenizers):
    prompts = PromptTokenizer(tokenizers["sdxl"], Placeholder("mychar", 3))
    for ids, weights in zip(*prompts.encode_weighted("cat (MyChar, [mychar1]:1.2)"), strict=True):
        assert ids[0, 1:7].tolist() == [2368, 49408, 49409, 49410, 267, 49409]
        assert weights.dtype == torch.float32
        assert weights[0, :8].tolist() == pytest.approx([1, 1, 1.2, 1.2, 1.2, 1.2, 1.2 / 1.1, 1])


def test_weights_are_cut_where_ids_are(tokenizers):
    prompts = PromptTokenizer(tokenizers["sd2"], Placeholder("mychar"), 150)
    (ids,), (weights,) = prompts.encode_weighted("cat " * 73 + "(dog mychar dog:2)" + " cat" * 80)
    assert ids.shape == weights.shape == (2, 77)
    assert weights[0].tolist() == [1] * 74 + [2, 2, 1]
    assert weights[1].tolist() == [1, 2] + [1] * 75
    assert (ids[0, 75], ids[1, 1]) == (49408, 1929)


@pytest.mark.parametrize("word", ["[V]", "my(char)", "a\\b"])
def test_brackets_of_the_word_are_no_attention_syntax(word, tokenizers):
    prompts = PromptTokenizer(tokenizers["sd1"], Placeholder(word, 2))
    (ids,), (weights,) = prompts.encode_weighted(f"cat ({word}:1.5) [{word}]")
    assert ids[0, 1:6].tolist() == [2368, 49408, 49409, 49408, 49409]
    assert prompts.hold_word([ids])
    assert not prompts.hold_word(prompts.encode("cat [V mychar"))
    assert weights[0, 1:7].tolist() == pytest.approx([1, 1.5, 1.5, 1 / 1.1, 1 / 1.1, 1])


@pytest.mark.parametrize("word", ["cat", "their", "sks", "Cat", "", " x y", "a\nb"])
def test_words_the_model_knows_are_refused(word, tokenizers):
    with pytest.raises(UserError, match="--token_string"):
        check_token_string(Placeholder(word, 1), tokenizers["sd1"])


def test_refusal_proposes_a_word_that_is_free(tokenizers):
    with pytest.raises(UserError) as error:
        check_token_string(Placeholder("cat", 2), tokenizers["sd1"])
    proposal = re.search(r'for example "(\w+)"', str(error.value)).group(1)
    check_token_string(Placeholder(proposal, 2), tokenizers["sd1"])


def test_a_numbered_name_that_is_known_is_refused(tokenizers):
    # "mp3" is in CLIP's vocabulary: the fourth name of "mp" would take it over.
    with pytest.raises(UserError, match='"mp'):
        check_token_string(Placeholder("mp", 4), tokenizers["sd1"])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("mychar_(x)", [0]),
        ("mycharの", [0]),
        ("mychars", []),
        ("a MYCHAR, mychar2", [0, 2]),
        ("xmychar mychar10", []),
    ],
)
def test_where_the_word_is_found(text, rows, tokenizers):
    prompts = PromptTokenizer(tokenizers["sd1"], Placeholder("mychar", 4))
    assert [i - 49408 for i in prompts.body_ids(text) if i >= 49408] == rows


def test_rows_behind_the_limit_are_lost(tokenizers):
    prompts = PromptTokenizer(tokenizers["sd1"], Placeholder("mychar", 4))
    text = "cat " * 73 + "mychar"
    assert prompts.length(text) == 77
    assert prompts.lost_rows(text) == {2, 3}
    assert prompts.lost_rows("mychar " + text) == set()


def test_init_word_ids(tokenizers):
    tokenizer = tokenizers["sd1"][0]
    assert init_word_ids("cat", 3, tokenizer) == [2368] * 3
    assert init_word_ids("cat dog", 2, tokenizer) == [2368, 1929]
    for word, count in (("cat dog", 1), ("cat dog", 3), ("", 1), ("  ", 2), ("mychar", 1)):
        with pytest.raises(UserError, match="--init_word"):
            init_word_ids(word, count, tokenizer)


def test_start_values_skip_zero_rows():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5000, 16, generator=generator) * 0.02 + 0.5
    table[::2] = 0
    rows = rows_from_statistics(table, 2000, generator)
    used = table[1::2]
    assert torch.allclose(rows.mean(0), used.mean(0), atol=2e-3)
    assert torch.allclose(rows.std(0), used.std(0), atol=2e-3)
    assert table_spread(table) == pytest.approx(0.02, rel=0.05)
    assert typical_norm(table) == pytest.approx(used.norm(dim=1).median().item())
    assert torch.equal(rows_from_word(table, [1, 3], "cat"), table[[1, 3]])
    with pytest.raises(UserError, match="all-zero"):
        rows_from_word(table, [2], "cat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_embedding_equals_a_larger_table(dtype):
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, dtype=dtype)
    rows = TrainableRows([torch.randn(2, 4)])
    merged = MergedEmbedding(table, 10)
    (merged.rows,) = rows()
    ids = torch.tensor([[0, 9, 10, 11, 3, 10]])
    full = torch.cat([table.weight, rows.rows[0].to(dtype)])
    output = merged(ids)
    assert output.dtype == dtype
    assert torch.equal(output, full[ids])
    output.float().pow(2).sum().backward()
    assert table.weight.grad is None
    assert (rows.rows[0].grad.abs().sum(dim=1) > 0).all()


def test_rows_without_their_word_get_a_gradient_of_exactly_zero():
    rows = TrainableRows([torch.randn(2, 4)])
    merged = MergedEmbedding(nn.Embedding(10, 4), 10)
    (merged.rows,) = rows()
    merged(torch.tensor([[1, 2, 3]])).sum().backward()
    assert torch.equal(rows.rows[0].grad, torch.zeros(2, 4))


def test_rescale_keeps_directions():
    rows = TrainableRows([torch.randn(3, 8), torch.randn(3, 5)])
    before = [r.detach().clone() for r in rows.rows]
    rows.rescale([0.4, 0.7])
    for old, new, norm in zip(before, rows.rows, (0.4, 0.7), strict=True):
        assert torch.allclose(new.norm(dim=1), torch.full((3,), norm))
        assert torch.allclose(torch.cosine_similarity(old, new), torch.ones(3))


def test_shorten_leaves_shorter_rows_alone():
    rows = TrainableRows([torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), torch.tensor([[0.0, 6.0]])])
    rows.shorten([2.5, 7.0])
    assert torch.equal(rows.rows[0][1:], torch.tensor([[0.3, 0.4], [0.0, 0.0]]))
    assert torch.allclose(rows.rows[0][0], torch.tensor([1.5, 2.0]))
    assert torch.equal(rows.rows[1], torch.tensor([[0.0, 6.0]]))


def test_rows_hold_other_values_for_a_while_and_then_their_own_bits():
    rows = TrainableRows([torch.randn(3, 8), torch.randn(3, 5)])
    before = [each.detach().clone() for each in rows.rows]
    with pytest.raises(KeyError), rows.holding([torch.ones(3, 8), torch.zeros(3, 5)]):
        assert all(float(each.detach().min()) == value for each, value in zip(rows.rows, (1, 0), strict=True))
        raise KeyError
    assert all(torch.equal(each, start) for each, start in zip(rows.rows, before, strict=True))
