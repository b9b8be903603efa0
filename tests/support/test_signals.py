"""Signals end a run in an orderly way at every moment; they and closed outputs are tried on the real command line.

What trains is a stand-in, so that these processes load nothing heavy.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import make_image

from library.support.signals import ended_gently, in_one_piece, signals_handled, undisturbed

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "--pretrained_model_name_or_path=m",
    "--token_string=mychar",
    "--train_data_dir=d",
    "--console_log_level=ERROR",
]
NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def script(training: str, before: str = "") -> str:
    """A process that runs the script with ``training`` as the body of what trains."""
    body = "".join(f"    {line}\n" for line in training.splitlines())
    return (
        f"import sys, types, signal, atexit, os, time\nsys.path.insert(0, {str(ROOT)!r})\n{before}\n"
        f"def train(*_):\n{body}"
        "import contextlib\ndef stub(name, **content):\n    module = sys.modules[name] = types.ModuleType(name)\n"
        "    vars(module).update(content)\n"
        "stub('library.run', train=train)\n"
        "stub('library.support.imports', lean_imports=contextlib.nullcontext)\n"
        "stub('library.data.found_images', find_images=lambda *_: None)\n"
        "stub('library.model.model_paths', check_paths=id)\n"
        "import train_textual_inversion\nsys.exit(train_textual_inversion.main())\n"
    )


def start(code: str, folder: Path, **streams) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-c", code, *ARGUMENTS, f"--output_dir={folder / 'out'}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(argv, text=True, cwd=folder, check=False, timeout=300, **streams)


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_a_second_signal_changes_nothing(first, second, tmp_path):
    """It comes while the first one's exception is on its way, or while Python shuts down."""
    code = script(
        f"try:\n    signal.raise_signal(signal.{first})\nfinally:\n    signal.raise_signal(signal.{second})",
        f"atexit.register(lambda: signal.raise_signal(signal.{second}))",
    )
    done = start(code, tmp_path)
    assert (done.returncode, done.stdout) == (128 + getattr(signal, first), "")
    assert set(done.stderr.splitlines()) == {"Interrupted."}


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As with nohup, which is there to let a run live on when its terminal is closed."""
    code = script("signal.raise_signal(signal.SIGHUP)\nprint('done')", "signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    done = start(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", NAMES)
def test_during_the_imports(name, tmp_path):
    """The import of torch takes its time; here it swallows exceptions, too."""
    package = tmp_path / "path" / "torch"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)\n"
    )
    make_image(tmp_path / "d" / "1_mychar" / "a.png", (64, 64))  # images are found before torch is imported
    argv = [sys.executable, str(ROOT / "train_textual_inversion.py"), *ARGUMENTS, f"--output_dir={tmp_path / 'out'}"]
    argv += ["--pretrained_model_name_or_path=.", "--resolution=64"]
    process = subprocess.Popen(
        argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(package.parent)}, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=50)
    assert (process.returncode, said) == (128 + getattr(signal, name), "Interrupted.\n")


def test_what_a_signal_does_depends_on_the_moment():
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    done = []
    with signals_handled(own_process=False), ended_gently():
        with undisturbed():
            signal.raise_signal(signal.SIGHUP)
            done.append("undisturbed")
        with pytest.raises(KeyboardInterrupt):
            with in_one_piece():
                signal.raise_signal(signal.SIGTERM)
                done.append("in one piece")
            done.append("never")
        with in_one_piece():
            done.append("once only")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert done == ["undisturbed", "in one piece", "once only"]
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before


TALK = """
import logging
from tqdm import tqdm
for number in tqdm(range(50), mininterval=0):
    print("a line of the report " * 50)
    logging.getLogger("library").warning("a record " * 50)
    tqdm.write("above the bar " * 50)
    sys.stderr.write("x" * 1000)
    sys.stderr.flush()
open("done", "w").close()
"""


@pytest.mark.parametrize("streams", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("how", ["full", "gone", "closed"])
def test_no_output_ends_a_run(how, streams, tmp_path):
    """A full disk behind a redirected output, a pipe whose reader has left (| head), a descriptor that was closed."""
    chosen = ["stdout", "stderr"] if streams == "both" else [streams]
    if how == "closed":
        (tmp_path / "code.py").write_text(script(TALK))
        closing = " ".join({"stdout": "1>&-", "stderr": "2>&-"}[name] for name in chosen)
        command = f'"$0" code.py {" ".join(ARGUMENTS)} --output_dir=out {closing}'
        done = subprocess.run(
            ["sh", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    else:
        if how == "full":
            target = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, target = os.pipe()
            os.close(reader)
        done = start(script(TALK), tmp_path, **dict.fromkeys(chosen, target))
        os.close(target)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    assert "Traceback" not in (done.stderr or "")


def test_a_full_log_file_is_said_once(tmp_path):
    code = script(
        "import logging\nfor _ in range(9):\n    logging.getLogger('library').warning('a record')\nprint('done')"
    )
    argv = [sys.executable, "-c", code, *ARGUMENTS, f"--output_dir={tmp_path / 'out'}", "--console_log_file=/dev/full"]
    argv.append("--console_log_level=WARNING")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n")
    (said,) = done.stderr.splitlines()
    assert "--console_log_file cannot be written ([Errno 28] No space left on device); records are missing" in said
