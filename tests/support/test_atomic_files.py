"""Files that are whole or not there, whatever fails."""

import pytest

from library.support.atomic_files import write_atomically
from library.support.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "n.safetensors"
    write_atomically(path, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match=r"n\.safetensors cannot be written: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["n.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be written.*Check the folder and the disk"):
        write_atomically(tmp_path / "file" / "n.pt", b"new")


def test_the_file_has_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "n.pt", b"new")
    (tmp_path / "usual").write_bytes(b"x")
    assert (tmp_path / "n.pt").stat().st_mode == (tmp_path / "usual").stat().st_mode
