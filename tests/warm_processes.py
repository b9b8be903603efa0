"""Processes of their own that begin with everything imported, for tests that are not about how a script starts."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SCRIPTS = ["train_textual_inversion", "sdxl_train_textual_inversion"]
_PRELOADED = ["library.trainer", "library.run", *_SCRIPTS, "tests.spared_imports"]
_SERVED = "forkserver" in multiprocessing.get_all_start_methods()


class WarmProcess:
    """A script that runs in a process of its own; what it prints goes into files of ``folder``."""

    def __init__(self, folder: Path, number: int, file: Path, argv: Sequence[object], environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver" if _SERVED else "spawn")
        if _SERVED:
            context.set_forkserver_preload(_PRELOADED)
        self.files = [folder / f"{name}{number}.txt" for name in ("out", "err")]
        given = ([str(each) for each in self.files], str(file), [str(each) for each in argv], environment)
        self.process = context.Process(target=_run, args=given)
        with chdir(ROOT):  # where the server, which the first of them starts, imports the library from
            self.process.start()

    def ended(self, seconds: float) -> tuple[int, str, str]:
        """Exit code, standard output and errors; a process that is not over in time is killed."""
        self.process.join(seconds)
        self.kill()
        self.process.join()
        return (self.process.exitcode, *(each.read_text() if each.exists() else "" for each in self.files))

    def kill(self) -> None:
        """End it at once, if it is not over."""
        self.process.kill()


def _run(streams: list[str], file: str, argv: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, place in enumerate(streams, start=1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    sys.argv = [file, *argv]
    runpy.run_path(file, run_name="__main__")
