"""Runs the real scripts, one command line after the other, in one process in which PyTorch cannot be imported.

``python torchless.py`` reads the command lines as JSON, ``[[script, folder, arguments], …]``, and prints what became of
each: the exit code (None where it went on to import PyTorch), what was said, and which packages that take a while
were there by then.
"""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "safetensors", "huggingface_hub"}
SLOW = {"numpy", "PIL", "ftfy"}


@dataclass(frozen=True)
class CommandLine:
    """A script's name, the folder that it is started in, and its arguments."""

    script: str
    folder: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What became of a command line; ``code`` is None where it went on to import PyTorch."""

    code: int | None
    said: str
    slow: Sequence[str]


class WentOnError(BaseException):
    """Something heavy is to be imported; no ``except ImportError`` may take it for a package that is missing."""


class _Refuser(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise WentOnError(name)


def answers_to(lines: Sequence[CommandLine]) -> list[Answer]:
    """What became of each, run in their order."""
    command, given = [sys.executable, __file__], json.dumps([asdict(line) for line in lines])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=True)
    return [Answer(**answer) for answer in json.loads(done.stdout)]


def _answer(line: CommandLine) -> Answer:
    os.chdir(line.folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = importlib.import_module(line.script).main(line.arguments)
        except WentOnError:
            code = None
        except SystemExit as end:
            code = end.code
    return Answer(code, said.getvalue(), sorted(SLOW & sys.modules.keys()))


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refuser())
    print(json.dumps([asdict(_answer(CommandLine(**given))) for given in json.load(sys.stdin)]))
