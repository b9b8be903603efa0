"""Runs a script in a folder, on a terminal unless that is empty: ``begun_in.py FOLDER TERMINAL SCRIPT ARGUMENT…``.

As a shell would, but without a process of its own, so that ``WarmProcess`` can do it.
"""

import os
import runpy
import sys


def take(terminal: str) -> None:
    """Make the terminal that of a new session, which gets its Ctrl+C, and of the standard streams."""
    os.setsid()
    screen = os.open(terminal, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(screen, descriptor)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115


if __name__ == "__main__":
    folder, terminal, *sys.argv = sys.argv[1:]
    os.chdir(folder)
    if terminal:
        take(terminal)
    runpy.run_path(sys.argv[0], run_name="__main__")
