"""clients.py: names that some program cannot use are told before a training, with a better one."""

import pytest
from runs import run

from library.clients import client_words, name_warnings


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


def test_a_run_tells_it_at_the_start(tmp_path, capfd):
    argv = ["--pretrained_model_name_or_path=missing.safetensors", "--token_string=mychar", "--output_name=my char"]
    assert run("sd1", [*argv, f"--output_dir={tmp_path}", "--train_data_dir=missing"]) != 0
    assert "ComfyUI and SwarmUI cannot use" in "".join(capfd.readouterr())
