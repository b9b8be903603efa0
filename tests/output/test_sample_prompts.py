"""Files of sample prompts: as measured, what they tolerate, and what they say about mistakes."""

import json
import logging
import re
import tomllib

import pytest
from departures import departure
from golden_data import golden_cases

from library.output.sample_prompts import SamplePrompt, parse_prompt_lines, read_sample_prompts
from library.support.errors import UserError

FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "sample_steps": "steps",
    "scale": "scale",
    "seed": "seed",
    "sample_sampler": "sampler",
}


def parse_prompt_line(line: str) -> dict:
    """The keys and values of one line."""
    (values,) = parse_prompt_lines([line])
    return values


def with_effect(values: dict) -> dict:
    return {key: value for key, value in values.items() if key in FIELDS}


def expected_prompt(values: dict) -> SamplePrompt:
    """What an image is drawn from where a file holds these values."""
    fields = {FIELDS[key]: value for key, value in with_effect(values).items() if value is not None}
    for side in fields.keys() & {"width", "height"}:
        fields[side] = max(64, fields[side] // 8 * 8)
    if not isinstance(fields.get("seed", 0), int) or fields.get("seed", 0) < 0:
        del fields["seed"]
    return SamplePrompt(**fields)


@pytest.mark.parametrize("case", golden_cases("prompt_lines"))
def test_golden_prompt_lines(case):
    values = parse_prompt_line(case["line"])
    if departure("prompt_lines", case):
        text, _, _ = case["line"].partition(" --")
        behind = with_effect(parse_prompt_line("x" + case["line"][len(text) :]))
        assert with_effect(values) == behind | {"prompt": text}
        return
    assert with_effect(values) == with_effect(case["result"])


@pytest.mark.parametrize("case", golden_cases("prompt_files"))
def test_golden_prompt_files(case, tmp_path):
    file = tmp_path / case["file"]
    file.write_bytes(case["text"].encode())
    departs = departure("prompt_files", case)
    if departs and "flags" in departs.why:
        assert [found.prompt for found in read_sample_prompts(file)] == [values["prompt"] for values in case["prompts"]]
    elif departs and "a subset wins" in departs.why:
        small = file.with_name(file.name.lower())
        small.write_bytes(case["text"].encode())
        assert read_sample_prompts(file) == read_sample_prompts(small)
        if small.suffix == ".toml":
            common = tomllib.loads(case["text"])["prompt"]
            subsets = common.pop("subset", [{}])
            assert read_sample_prompts(file) == [expected_prompt(common | subset) for subset in subsets]
    elif "error" in case or (departs and "refused" in departs.why):
        with pytest.raises(UserError, match=re.escape(str(file))):
            read_sample_prompts(file)
    else:
        assert read_sample_prompts(file) == [expected_prompt(values) for values in case["prompts"]]


def read(tmp_path, name: str, content: str) -> list[SamplePrompt]:
    file = tmp_path / name
    file.write_bytes(content.encode())
    return read_sample_prompts(file)


def test_all_of_a_line(tmp_path):
    line = "a cat --w 771 --H 50 --d 42 --s 20 --l 1.5 --n bad, worse --ss euler_a"
    assert read(tmp_path, "p.txt", line) == [SamplePrompt("a cat", "bad, worse", 768, 64, 20, 1.5, 42, "euler_a")]


def test_defaults():
    assert SamplePrompt("x") == SamplePrompt("x", "", 512, 512, 30, 7.5, None, None)


def test_byte_order_marks_and_line_endings(tmp_path):
    expected = [SamplePrompt("a"), SamplePrompt("ü\u2028b", seed=1)]
    assert read(tmp_path, "p.txt", "\ufeff# no prompt\r\n\r\na\r\n  ü\u2028b --d 1  \r\n") == expected
    assert read(tmp_path, "p.TXT", "\ufeffa\rü\u2028b --d 1") == expected
    assert read(tmp_path, "p.JSON", '\ufeff["a", {"prompt": "ü\u2028b", "seed": 1}]') == expected
    toml = '\ufeff[prompt]\r\n[[prompt.subset]]\r\nprompt="a"\r\n[[prompt.subset]]\r\nprompt="ü\u2028b"\r\nseed=1'
    assert read(tmp_path, "p.toml", toml) == expected


def test_toml_subsets_add_and_override(tmp_path):
    content = """
        [prompt]
        width = 768
        scale = 5
        negative_prompt = "bad"
        [[prompt.subset]]
        prompt = "a"
        [[prompt.subset]]
        prompt = "b"
        width = 256
        sample_steps = 10
        sample_sampler = "k_euler"
    """
    assert read(tmp_path, "p.toml", content) == [
        SamplePrompt("a", "bad", width=768, scale=5),
        SamplePrompt("b", "bad", width=256, steps=10, scale=5, sampler="k_euler"),
    ]


def test_toml_without_subsets_is_one_prompt(tmp_path):
    assert read(tmp_path, "p.toml", '[prompt]\nprompt = "a"') == [SamplePrompt("a")]


def test_null_and_empty_values_are_unset(tmp_path):
    content = [{"prompt": "a", "seed": None, "width": None, "sample_sampler": ""}]
    assert read(tmp_path, "p.json", json.dumps(content)) == [SamplePrompt("a")]


@pytest.mark.parametrize(
    ("line", "named", "values"),
    [
        ("a cat --zz 3", ["--zz 3", "a cat", "--w"], {}),
        ("a cat --w512", ["--w512", "a cat"], {}),
        ("a -- b", ['"-- b"', '"a"'], {}),
        ("a cat --d -1", ["--d -1", "a cat", "from 0 up"], {}),
        ("a cat --d 1.5", ["--d 1.5", "a cat", "read as 1"], {"seed": 1}),
        ("a cat --w 513.5", ["--w 513.5", "a cat", "read as 513"], {"width": 513}),
        ("a cat --w  512", ["--w  512", "a cat"], {}),
        ("a cat --s 5000", ["--s 5000", "a cat", "read as 1000"], {"sample_steps": 1000}),
        ("a cat --s 0", ["--s 0", "read as 1"], {"sample_steps": 1}),
        ("a cat --l 1.2.3", ["--l 1.2.3", "a cat"], {}),
        ("a cat --n", ["--n", "a cat", "a text"], {}),
        ("a cat --d " + "9" * 5000, ["--d 999", "a cat"], {}),
    ],
)
def test_flags_that_cannot_be_read_are_named(line, named, values, caplog):
    with caplog.at_level(logging.WARNING):
        assert parse_prompt_line(line) == {"prompt": line.split(" --")[0]} | values
    (record,) = caplog.records
    assert all(words in record.getMessage() for words in named)


def test_good_flags_are_not_mentioned(caplog):
    parse_prompt_line("a --w 512  --d 007 --l 7 --l 7.50 --s 1000 --n a: b --ss euler --g 1 --cn x.png --fs a --ctr 1")
    assert not caplog.records


@pytest.mark.parametrize("text", ["w 512 tall", "d 5", "n something", "--w 512", "ss euler"])
def test_a_prompt_that_begins_like_a_flag_is_text(text):
    assert parse_prompt_line(f"{text} --h 256") == {"prompt": text, "height": 256}


def test_flags_without_effect_are_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, "p.txt", "a --g 3.5 --cn x.png\nb --g 1 --rcfg 1 --fs 3 --ctr 1")
    assert found == [SamplePrompt("a"), SamplePrompt("b")]
    (record,) = caplog.records
    assert all(f"(--{flag})" in record.getMessage() for flag in ("g", "cn", "rcfg", "fs", "ctr"))


def test_unknown_keys_are_named_once_with_the_nearest(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read(tmp_path, "p.toml", 'x = 1\n[prompt]\nwidht = 64\nsubset = [{ prompt = "a" }, { prompt = "b" }]')
    assert [record.getMessage().split(" of --sample_prompts")[1] for record in caplog.records] == [
        ": only the table [prompt] is read, and not x.",
        ': unknown keys, which change nothing: widht (did you mean "width"?).',
    ]


@pytest.mark.parametrize("seed", [-1, 1.5, 2**64])
def test_seeds_that_cannot_be_used(seed, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, "p.json", json.dumps([{"prompt": "a cat", "seed": seed}])) == [SamplePrompt("a cat")]
    (record,) = caplog.records
    assert all(words in record.getMessage() for words in ("Prompt 1", "a cat", "--d", str(seed)))


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("p.yaml", "a", "must be a .txt, .toml or .json file"),
        ("p", "a", "must be a .txt, .toml or .json file"),
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "# a\n \n", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.toml", "", "holds no prompt"),
        ("p.toml", "[prompt]\n", "holds no prompt"),
        ("p.toml", "[prompt]\nsubset = []", "holds no prompt"),
        ("p.toml", "[prompt]\nprompt = a", "not valid TOML"),
        ("p.toml", '[[prompt]]\nprompt = "a"', "must hold one table [prompt]"),
        ("p.toml", '[prompt]\nsubset = "a"', "must hold one table [prompt]"),
        ("p.toml", "[prompt]\nwidth = 64", "Prompt 1"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "must hold a list"),
        ("p.json", '["a", 1]', "must hold a list"),
        ("p.json", '["a", {"prompt": 1}]', "prompt must be a string in quotes, not 1"),
        ("p.json", '[{"prompt": "a", "width": "64"}]', "width must be a whole number of pixels, such as 512, not '64'"),
        ("p.json", '[{"prompt": "a", "height": 64.5}]', "height must be"),
        ("p.json", '[{"prompt": "a", "height": 4104}]', "height (--h) 4104 is too large; the most is 4096 pixels"),
        ("p.txt", "a\nb --w 100000", 'Prompt 2 in "'),
        ("p.txt", "a\nb --w 100000", "width (--w) 100000 is too large"),
        ("p.json", '[{"prompt": "a", "width": true}]', "width must be"),
        ("p.json", '[{"prompt": "a", "sample_steps": 0}]', "sample_steps must be a whole number from 1 to 1000, not 0"),
        ("p.json", '[{"prompt": "a", "scale": NaN}]', "scale must be"),
        ("p.json", '[{"prompt": "a", "seed": "1"}]', "seed must be"),
        ("p.json", '[{"prompt": "a", "negative_prompt": ["b"]}]', "negative_prompt must be"),
        ("p.txt", "a\nb --ss eulr", 'Prompt 2 in "'),
        ("p.txt", "a\nb --ss eulr", 'The sampler "eulr" is not known'),
        ("p.txt", "a\nb --ss eulr", 'Did you mean "euler"?'),
    ],
)
def test_mistakes(name, content, phrase, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, name, content)
    assert phrase in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r'p\.txt" of --sample_prompts does not exist'):
        read_sample_prompts(tmp_path / "p.txt")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_sample_prompts(tmp_path / "d.json")
    (tmp_path / "l.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_sample_prompts(str(tmp_path / "l.txt"))


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_of_very_many_bad_flags_a_few_are_named(tmp_path, caplog, ending):
    lines = [f"a --w 6{number % 10}x" for number in range(16_000)]
    with caplog.at_level(logging.WARNING):
        read(tmp_path, f"p.{ending}", "\n".join(lines) if ending == "txt" else json.dumps(lines))
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == "15,995 more flags of sample prompts are wrong too."
