"""text_repair.py: text is read as ftfy repairs it, wherever it comes from and before anything is looked for in it."""

import ftfy
import pytest
from datasets import data_of, make_image, prompts
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import CaptionRules
from library.data.preflight import check
from library.data.preview import show_dataset
from library.embedding.text_repair import repair
from library.embedding.tokenizer import check_token_string, init_word_ids
from library.support.errors import UserError
from tests.limits import outcome

# What is written, and what CLIP's own tokenizer makes of it.
REPAIRED = {
    "“mychar” at night": '"mychar" at night',
    "mychar’s hat, it’s red": "mychar's hat, it's red",
    "mychar，red，blue": "mychar,red,blue",
    "ｍｙｃｈａｒ ｒｅｄ": "mychar red",
    "ＭｙＣｈａｒ！": "MyChar!",
    "ﬁne art of mychar": "fine art of mychar",
    "mychar &amp; friend": "mychar & friend",
    "mychar in a cafÃ©": "mychar in a café",
    "a â€œmycharâ€\x9d": 'a "mychar"',
    "cafe\u0301 mychar": "café mychar",
    "\ufeffmychar\x00 \x07red": "mychar red",
    "mychar…": "mychar…",
    "日本語 mychar 🎉": "日本語 mychar 🎉",
}


@pytest.mark.parametrize("text", REPAIRED)
@pytest.mark.parametrize("count", [1, 3])
def test_written_so_is_read_like_this(text, count):
    words = prompts(count, encoders=2)
    clean = words.placeholder.expand(REPAIRED[text])
    # Around the word as in one piece.
    assert words.placeholder.expand(words.repaired(text)) == words.placeholder.expand(repair(text)) == clean
    for ids, expected in zip(words.encode_weighted(text)[0], words.encode(clean), strict=True):
        assert ids.tolist() == expected.tolist()
        assert (ids >= 49408).sum() == count
    assert words.length(text) == len(words.body_ids(clean))


def test_a_word_in_angle_brackets_is_no_html():
    """ftfy leaves entities alone where it sees a "<"; sd-scripts takes the word out before it repairs."""
    assert prompts(word="<my-style>").repaired("<my-style>, black &amp; white") == "<my-style>, black & white"
    assert prompts(word="mychar").repaired("mychar <b>, black &amp; white") == "mychar <b>, black &amp; white"


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_text_is_left_alone_for_the_same_reason_as_by_ftfy(text):
    lines = text.split("\n")
    assert repair(text) == "\n".join(ftfy.fix_text(line).replace("\n", " ") for line in lines)


_PIECES = ["&", "＆", "amp;", "AMP;", "#38;", "#038;", "#x26;", "ａｍｐ；", "lt;", "<", "＜", "Ã©", "a", " ", "#", ";"]


@given(st.lists(st.sampled_from(_PIECES)).map("".join))
def test_entities_within_entities_become_the_same_as_by_ftfy(text):
    assert repair(text) == ftfy.fix_text(text)


def test_entities_within_entities_do_not_take_for_ever():
    """A line of the greatest length took 39 s."""
    found = outcome(lambda: [repair("&" + count * piece) for piece, count in (("amp;", 16_000), ("#38;", 16_000))])
    assert found == ("ok", "['&', '&']")


@given(st.text())
def test_lines_stay_lines(text):
    assert repair(text).count("\n") == text.count("\n")


def test_line_separators_do_not_cut_a_caption():
    assert repair("mychar\u2028in a park\rat night") == "mychar in a park at night"


@pytest.mark.parametrize("control", ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>"])
def test_control_tokens_in_a_caption_are_text(control):
    words = prompts(encoders=2)
    for windows, tokenizer in zip(words.encode(f"a {control} mychar{control}"), words.tokenizers, strict=True):
        ids = windows[0].tolist()
        name = control.strip("<|>").lower()
        text = tokenizer.encode(f"<| {name} |>", add_special_tokens=False)
        assert not {49406, 49407} & set(text)
        body = [49406, 320, *text, 49408, *text]
        assert ids[: len(body)] == body
        assert ids[len(body)] in (tokenizer.eos_token_id, 49407)


def test_full_width_brackets_are_no_attention_syntax():
    words = prompts()
    ids, weights = words.encode_weighted("（mychar：1.2） （(red:1.5)）")
    assert ids[0].tolist() == words.encode("(mychar:1.2) (red)")[0].tolist()
    assert weights[0].max() == 1.5
    assert (weights[0] != 1).sum() == 1


def test_init_word_is_repaired():
    tokenizer = prompts().tokenizers[0]
    assert init_word_ids("ｇｉｒｌ", 1, tokenizer) == init_word_ids("girl", 1, tokenizer)


@pytest.mark.parametrize(("token", "read"), [("“xqz”", '"xqz"'), ("ｍｙｃｈ", "mych"), ("my&amp;char", "my&char")])
def test_a_token_that_repair_changes_is_refused(token, read):
    words = prompts(word=token)
    with pytest.raises(UserError, match=r"would never be found: .* becomes") as error:
        check_token_string(words.placeholder, words.tokenizers)
    assert f'--token_string="{read}"' in str(error.value)


def test_rules_are_rewritten_with_the_captions():
    rules = CaptionRules(prefix="“a”", separator="，", secondary_separator="；", keep_tokens_separator="｜｜｜")
    wanted = CaptionRules(prefix='"a"', separator=",", secondary_separator=";", keep_tokens_separator="|||")
    assert rules.rewritten(repair) == wanted
    assert CaptionRules(separator="\x00").rewritten(repair).separator == "\x00"


def test_captions_are_repaired_before_the_word_is_looked_for(tmp_path, capsys):
    """Presence, dropout, shuffling, lengths, validation and what --debug_dataset shows go by the repaired text."""
    folder = tmp_path / "images"
    make_image(folder / "a.png", caption="ｒｅｄ，ｍｙｃｈａｒ，“big”", size=(64, 64))
    subset = {"image_dir": str(folder), "caption_prefix": "ﬁne", "class_tokens": "x", "caption_extension": ".txt"}
    data = data_of(tmp_path, {"resolution": 64, "subsets": [subset]}, words=prompts(2))
    assert check(data.table, data.prompts).warnings == []
    show_dataset(data)
    assert 'caption: fine red,mychar mychar1,"big"' in capsys.readouterr().out
    assert next(iter(data.concept().fixed_batches(1, held_out=False))).captions == ['fine red,mychar mychar1,"big"']

    kept = subset | {"caption_tag_dropout_rate": 1.0}
    thinned = data_of(tmp_path, {"resolution": 64, "subsets": [kept]}, words=prompts(2))
    (batch,) = thinned.loader()
    assert batch.captions == ["mychar mychar1"]  # tags end at the repaired commas
    dropped = data_of(tmp_path, {"resolution": 64, "subsets": [subset | {"caption_dropout_rate": 1.0}]})
    (batch,) = dropped.loader()
    assert batch.captions == ["mychar"]


def test_held_out_captions_are_repaired(tmp_path):
    for name in "ab":
        make_image(tmp_path / "images" / f"{name}.png", caption="“mychar”")
    subset = {"image_dir": str(tmp_path / "images")}
    data = data_of(tmp_path, {"resolution": 64, "validation_split": 0.5, "subsets": [subset]})
    assert [batch.captions for batch in data.validation_loader()] == [['"mychar"']]


def test_class_tokens_of_a_folder_are_repaired(tmp_path):
    make_image(tmp_path / "images" / "a.png")
    subset = {"image_dir": str(tmp_path / "images"), "class_tokens": "ｍｙｃｈａｒ ﬁne"}
    data = data_of(tmp_path, {"resolution": 64, "subsets": [subset]})
    assert [batch.captions for batch in data.loader()] == [["mychar fine"]]
