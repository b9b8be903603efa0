"""A run may be killed, or its disk be full, at any moment: no file is damaged, and a resumed run ends in the same bits.

Every file event of a short run with states counts: opening for writing, writing (half of it is done), fsync, replace,
rename, mkdir, unlink, rmdir. At each of them a run is struck, what it left is looked at, and it is resumed with
--resume=latest, or begun anew where there was no state yet. By default every 29th event of each kind; the environment
variable FILE_EVENTS_STRIDE says otherwise, and 1 strikes at all of them (half an hour).
"""

import json
import os
from pathlib import Path

import pytest
from warm_processes import WarmProcess

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_whatever_happens_at_a_file_event(kind, tiny_sd1, tmp_path):
    stride = os.environ.get("FILE_EVENTS_STRIDE", "29")
    argv = [tiny_sd1, kind, stride]
    process = WarmProcess(tmp_path, 0, TESTS / "file_events.py", argv, {**os.environ, "OMP_NUM_THREADS": "1"})
    code, said, errors = process.ended(3 * 3600)
    assert code == 0, errors
    found = json.loads(said.splitlines()[-1])
    print(f"{kind}: {found['struck']} of {found['events']} file events")
    assert found["struck"] > 5
    assert found["wrong"] == []
