"""What is imported for a training, in a process of its own; afterwards everything is as before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import gc, json, sys
from library.support.imports import lean_imports
told = []
gc.callbacks.append(lambda phase, info: told.append(phase))
with lean_imports():
    told.clear()
    import library.run
    searches = len(told)
first = gc.get_freeze_count()
with lean_imports():
    import library.run
from diffusers.utils import is_bitsandbytes_available
print(json.dumps({
    "searches": searches, "enabled": gc.isenabled(), "frozen": first, "frozen again": gc.get_freeze_count() - first,
    "bitsandbytes": "bitsandbytes" in sys.modules, "found": is_bitsandbytes_available(),
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_garbage_is_searched_for_meanwhile_and_what_was_imported_never_again(imported):
    assert imported["searches"] == 0
    assert imported["enabled"]
    assert imported["frozen"] > 100_000


def test_a_second_time_nothing_is_kept_from_the_search(imported):
    assert imported["frozen again"] <= 0


def test_diffusers_is_imported_without_bitsandbytes_and_finds_it_afterwards(imported):
    assert not imported["bitsandbytes"]
    assert imported["found"]
