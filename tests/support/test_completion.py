"""Tab in a real bash: each command's printed script is read by bash, and offers what the command takes."""

import subprocess
import sys
from pathlib import Path

import pytest

import train_textual_inversion
from library.embedding import tool

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train_textual_inversion": ["train_textual_inversion.py"],
    "sdxl_train_textual_inversion": ["sdxl_train_textual_inversion.py"],
    "textual_inversion_embedding": ["-m", "library.embedding"],
}
# Reads the script ($1), then completes the last of the other words as bash does for the first, the command.
PRESS_TAB = r"""
source "$1"; shift
function=$(complete -p "$1" | sed 's/.*-F \([^ ]*\) .*/\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"$function"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The bash script that each command prints, started as the pages say it."""
    folder = tmp_path_factory.mktemp("completion")
    for command, start in COMMANDS.items():
        argv = [sys.executable, *start, "--print_completion", "bash"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
        (folder / command).write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_reads_the_script(command, scripts):
    done = subprocess.run(["bash", "-n", str(scripts / command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["train_textual_inversion", "--num_v"], {"--num_vectors_per_token"}),
        (["sdxl_train_textual_inversion", "--cache_lat"], {"--cache_latents", "--cache_latents_to_disk"}),
        (["train_textual_inversion", "--cache_latents", "--token_s"], {"--token_string"}),
        (["train_textual_inversion", "--mixed_precision", "b"], {"bf16"}),
        (["train_textual_inversion", "--dataset_config", "data"], {"dataset.toml", "data"}),
        (["train_textual_inversion", "--output_dir", "data"], {"data"}),
        (["textual_inversion_embedding", "in"], {"inspect"}),
        (["textual_inversion_embedding", "inspect", "--m"], {"--model"}),
        (["textual_inversion_embedding", "inspect", "data"], {"dataset.toml", "data"}),
        (["textual_inversion_embedding", "convert", "--to", "a"], {"a1111"}),
    ],
    ids=lambda words: " ".join(sorted(words)),
)
def test_tab_offers_what_the_command_takes(typed, offered, scripts, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset.toml").touch()
    argv = ["bash", "-c", PRESS_TAB, "bash", str(scripts / typed[0]), *typed]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""


@pytest.mark.parametrize("main", [train_textual_inversion.main, tool.main])
def test_without_shtab_the_remedy_is_said(main, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print_completion", "bash"]) == 1
    assert capsys.readouterr().err == "error: --print_completion needs the package shtab: pip install shtab.\n"
