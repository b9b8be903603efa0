"""Every golden file has a test."""

from pathlib import Path

import pytest
from golden_data import GOLDEN_DIR

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", [file.stem for file in sorted(GOLDEN_DIR.glob("*.json"))])
def test_golden_file_is_tested(name):
    others = [file for file in TESTS.rglob("test_*.py") if file.name != Path(__file__).name]
    users = [file.name for file in others if f'"{name}"' in file.read_text(encoding="utf-8")]
    assert users
