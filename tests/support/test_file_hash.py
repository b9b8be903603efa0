"""The hash of a large file never holds up what cannot wait."""

import hashlib
import os
import threading

import pytest

from library.support.file_hash import FileHash


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a file whose end does not come")
def test_what_cannot_wait_does_without(tmp_path):
    file = tmp_path / "slow"
    os.mkfifo(file)
    found = FileHash(file)
    assert found.get(wait=False) is None
    found.begin()
    found.begin()  # once is enough
    assert found.get(wait=False) is None
    threading.Timer(0.2, lambda: file.write_bytes(b"content")).start()
    wanted = hashlib.sha256(b"content").hexdigest()
    assert found.get() == wanted
    assert found.get(wait=False) == wanted


def test_waiting_is_enough_to_begin(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert FileHash(file).get() == hashlib.sha256(b"content").hexdigest()


def test_a_file_that_cannot_be_read_costs_a_sentence(tmp_path, caplog):
    found = FileHash(tmp_path / "gone")
    assert found.get() is None
    assert found.get(wait=False) is None
    (record,) = caplog.records
    assert "gone is missing in what is saved" in record.message
