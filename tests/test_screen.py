"""The real scripts as a user sees them: on a terminal of 80 columns and through a pipe, whatever way a run ends."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from photos import make_photos
from runs import TOKEN
from warm_processes import WarmProcess

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, str(ROOT / "train_textual_inversion.py")]
WIDTH = 80
LONG = "--max_train_steps=2000"  # an interrupt that is lost ends in minutes
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture
def folder(tmp_path, tiny_sd1, monkeypatch):
    """The current folder of the runs: paths are short, as users give them."""
    make_photos(tmp_path / "images", count=4)
    (tmp_path / "model").symlink_to(tiny_sd1)
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = 'images'\n"
        "caption_extension = '.txt'\n"
    )
    (tmp_path / "prompts.txt").write_text(f"a photo of {TOKEN} --w 64 --h 64 --s 1 --d 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*more: str) -> list[str]:
    given = ["--pretrained_model_name_or_path=model", "--dataset_config=data.toml", "--output_dir=out"]
    given += [f"--token_string={TOKEN}", "--init_word=girl", "--learning_rate=5e-3", "--seed=1", "--cache_latents"]
    return [*SCRIPT, *given, "--max_data_loader_n_workers=0", "--max_train_steps=4", *more]


def on_a_terminal(argv: list[str]) -> tuple[int, str]:
    """Run in a terminal of its own."""
    process, screen = pty.fork()
    if process == 0:
        os.execvpe(argv[0], argv, {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"})
    _set_size(screen)
    shown = b"".join(_shown_on(screen))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


def interrupted_on_a_terminal(folder: Path, interrupt) -> tuple[int, str]:
    """Run in a terminal of its own, with everything imported.

    ``interrupt`` is called with the terminal's descriptor and the process when it trains.
    """
    screen, inner = os.openpty()
    _set_size(screen)
    run = warm(folder, INTERRUPTED, os.ttyname(inner))
    shown, told = b"", False
    for chunk in _shown_on(screen, inner):
        shown += chunk
        if not told and TRAINING.exists():
            interrupt(screen, run.process.pid)
            told = True
    return run.ended(240)[0], shown.decode()


def _set_size(screen: int) -> None:
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))


def _shown_on(screen: int, inner: int | None = None) -> Iterator[bytes]:
    """What comes until nobody has the terminal any more; ``inner`` is this process's own hold of its other side."""
    try:
        while chunk := os.read(screen, 65536):
            yield chunk
            if inner is not None:  # the run has it now
                os.close(inner)
                inner = None
    except OSError:  # on Linux the end of a terminal is an error
        pass
    finally:
        os.close(screen)


def through_a_pipe(argv: list[str]) -> tuple[int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False, timeout=240
    )
    return done.returncode, done.stdout.decode()


def warm(folder: Path, argv: list[str], terminal: str = "") -> WarmProcess:
    """Begin a run with everything imported, on a terminal or into files."""
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    return WarmProcess(folder, 0, ROOT / "tests" / "begun_in.py", [folder, terminal, *argv[1:]], environment)


def into_files(folder: Path, argv: list[str], interrupt: signal.Signals | None = None) -> tuple[int, str]:
    """Run with everything imported, and with files in place of a pipe: they are no terminal either."""
    run = warm(folder, argv)
    while interrupt and run.process.is_alive() and not TRAINING.exists():
        time.sleep(0.05)
    if interrupt:
        os.kill(run.process.pid, interrupt)
    code, *said = run.ended(240)
    return code, "".join(said)


def broken_lines(shown: str) -> list[str]:
    """Lines that the end of the screen cuts within a word although the word would have fitted on a line of its own."""
    shown = shown.replace("^C", "")  # the terminal's own echo
    lines = [_ESCAPES.sub("", part).rstrip("\r") for line in shown.split("\n") for part in re.split(r"\r(?!$)", line)]
    return [line for line in lines if len(line) > WIDTH and len(line.split()) > 1]


def check_terminal(shown: str) -> None:
    assert broken_lines(shown) == []
    assert "Traceback" not in shown


def check_pipe(said: str) -> None:
    assert "\r" not in said
    assert "\x1b" not in said
    assert "Traceback" not in said


TRAINING = Path(f"out/{TOKEN}-step00000003.safetensors")  # is there in the midst of the training
INTERRUPTED = command(LONG, "--save_every_n_steps=3")
LOOKED_AT = ["--sample_prompts=prompts.txt", "--sample_every_n_steps=2", "--sample_at_first", "--save_state"]
MISTAKE = ["--v_parameterization", "--network_dim=8"]


def test_a_run_on_a_terminal(folder):
    code, shown = on_a_terminal(command(*LOOKED_AT, "--learning_rate=50"))
    assert code == 0, shown
    check_terminal(shown)
    assert "\x1b[33mWARNING\x1b[0m" in shown
    text = _ESCAPES.sub("", shown)
    assert "is very high for AdamW" in " ".join(text.split())
    bars = [part for part in text.split("\r") if part.startswith("steps:")]
    assert len(bars) > 1
    assert "4/4" in bars[-1]
    order = ["This run:", "optimizer", "steps: 100%", "The embedding is in", "TOO FAR: ", "to go on"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    assert text.rstrip().splitlines()[-1].endswith(f"--resume=out/{TOKEN}-state")


def test_a_run_in_a_pipe(folder):
    code, said = through_a_pipe(command(*LOOKED_AT))
    assert code == 0, said
    check_pipe(said)
    assert "This run:" in said
    assert "Caching latents: 100%" in said
    assert "steps: 100%" in said


def test_a_mistake(folder):
    code, shown = on_a_terminal(command(*MISTAKE))
    assert code == 1
    check_terminal(shown)
    assert len([line for line in shown.splitlines() if line.strip()]) > 1  # the sentence is longer than a line
    code, said = through_a_pipe(command(*MISTAKE))
    assert (code, said.count("\n")) == (1, 1)
    check_pipe(said)


def test_a_tool_s_command_that_cannot_be_read():
    argv = [sys.executable, "-m", "library.embedding", "nonsense"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_on_a_terminal(folder):
    code, shown = interrupted_on_a_terminal(folder, lambda screen, _: os.write(screen, b"\x03"))
    assert code == 130, shown
    check_terminal(shown)
    assert "Interrupted." in shown
    assert "are kept in" in " ".join(shown.split())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_without_a_terminal(name, folder):
    number = getattr(signal, name)
    code, said = into_files(folder, INTERRUPTED, number)
    assert code == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[name], said
    check_pipe(said)
    assert re.search(r"The vectors of step \d+ are kept in out/", said)
    assert said.endswith("Interrupted.\n")


def test_sigterm_on_a_terminal(folder):
    code, shown = interrupted_on_a_terminal(folder, lambda _, process: os.kill(process, signal.SIGTERM))
    assert code == 143, shown
    check_terminal(shown)


def test_nothing_below_the_level_is_printed(folder):
    code, said = into_files(folder, command("--console_log_level=ERROR", *LOOKED_AT))
    assert (code, said) == (0, "")
