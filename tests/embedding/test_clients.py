"""clients.py: names that some program cannot use are told before a training, with a better one."""

import re
from pathlib import Path

import pytest
from runs import run, write_dataset

from library.embedding.clients import client_words, name_warnings, usages
from library.output.report import diffusers_snippet


@pytest.mark.parametrize("name", ["mychar", "my_char-v1.2", "MyChar", "猫", ""])
def test_good_names_need_no_warning(name):
    assert name_warnings(name) == []


@pytest.mark.parametrize(
    ("name", "told", "better"),
    [
        ("my char v1.2", ["ComfyUI and SwarmUI cannot use"], "my_char_v1.2"),
        ("mychar_(x)", [r"must be written mychar_\(x\)", "leave a space before the comma"], "mychar_x"),
        ("<my-style>", ["leave a space before the comma"], "my-style"),
        ("mychar_", ["leave a space before the comma"], "mychar"),
        ("!!", ["leave a space before the comma"], "embedding"),
    ],
)
def test_troublesome_names_are_told_and_another_is_proposed(name, told, better):
    *sentences, proposal = name_warnings(name)
    assert len(sentences) == len(told)
    assert all(part in sentence for part, sentence in zip(told, sentences, strict=True))
    assert proposal == f"--output_name={better} avoids this."
    assert name_warnings(better) == []


def test_the_hint_in_the_file_follows_the_number_of_vectors():
    assert client_words("MyChar", "MyChar", 1)["diffusers"] == "MyChar"
    assert client_words("MyChar", "MyChar", 4)["diffusers"] == "mychar"


PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def table(title: str) -> dict[str, list[str]]:
    """The rows of the page's table under a title, as their cells, by the first."""
    lines = PAGE.partition(f"## {title}\n")[2].partition("##")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {cells[0]: cells for cells in rows}


@pytest.mark.parametrize("usage", usages("mychar", ".safetensors", "mychar", 1, pair=True), ids=lambda u: u.client)
def test_the_page_says_what_a_run_prints(usage):
    _, folder, prompt = table("Where it goes and what to write")[usage.client]
    assert re.match("`(.+?)`", prompt)[1] == usage.word
    if folder.startswith("`"):
        assert folder.strip("`") in usage.how


@pytest.mark.parametrize("keys", [("emb_params",), ("clip_l", "clip_g")])
def test_the_page_has_the_lines_for_diffusers(keys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert diffusers_snippet("mychar.safetensors", "mychar", keys).replace("'", '"').strip() in map(str.strip, blocks)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("pair", [True, False])
def test_the_page_says_which_files_are_not_read(suffix, pair):
    column = 1 + [".safetensors", ".pt", ".ckpt"].index(suffix)
    rows = table("Which file")
    for usage in usages("mychar", suffix, "mychar", 1, pair=pair):
        said = rows[usage.client][column]
        assert (usage.word is None) == (said == "not read" or (said.endswith("2.x only") and pair)), usage.client


def test_a_run_tells_it_at_the_start(tmp_path, capfd):
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    argv = [f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}", "--token_string=mychar"]
    argv.append("--output_name=my char")
    assert run("sd1", [*argv, f"--output_dir={tmp_path}", f"--dataset_config={write_dataset(tmp_path)}"]) != 0
    assert "ComfyUI and SwarmUI cannot use" in "".join(capfd.readouterr())
