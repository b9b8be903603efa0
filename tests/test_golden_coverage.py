"""Every golden file has a test; those of features that do not exist yet are expected to have none."""

from pathlib import Path

import pytest
from golden_data import GOLDEN_DIR

TESTS = Path(__file__).parent
# Sample pictures and resuming are not built yet. A file leaves this list when its test arrives (strict).
PENDING = {"prompt_files", "prompt_lines"}


def marked(name: str):
    reason = "the feature is not built yet"
    return pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reason)) if name in PENDING else name


@pytest.mark.parametrize("name", [marked(file.stem) for file in sorted(GOLDEN_DIR.glob("*.json"))])
def test_golden_file_is_tested(name):
    others = [file for file in TESTS.glob("test_*.py") if file.name != Path(__file__).name]
    users = [file.name for file in others if f'"{name}"' in file.read_text(encoding="utf-8")]
    assert users
