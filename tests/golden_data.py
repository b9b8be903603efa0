"""Reads the golden cases: inputs and outputs measured on the reference implementation.

``GOLDEN_DIR`` in the environment names another directory with further cases of the same kinds; every test must
therefore work by rule and not by a list of case ids.
"""

import json
import os
from pathlib import Path

import pytest

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_file(name: str) -> dict:
    """The whole content of ``<name>.json``."""
    return json.loads((GOLDEN_DIR / f"{name}.json").read_text(encoding="utf-8"))


def golden_arrays(name: str):
    """The arrays of ``<name>.npz``, opened lazily (an ``NpzFile``)."""
    import numpy

    return numpy.load(GOLDEN_DIR / f"{name}.npz")


def golden_cases(name: str, keep=None) -> list:
    """The cases of ``<name>.json`` as pytest parameters, one per case that ``keep(case)`` accepts (all by default)."""
    cases = golden_file(name)["cases"]
    numbered = [(case.get("id", f"{name}-{number}"), case) for number, case in enumerate(cases)]
    return [pytest.param(case, id=label) for label, case in numbered if keep is None or keep(case)]
