"""Files that are whole or not there, whatever fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.support.atomic_files import replacement, sweep_replacements, write_atomically
from library.support.errors import UserError

ROOT = Path(__file__).parents[2]


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


def abandoned(path: Path, *, age: float) -> Path:
    """What a process leaves that is killed in a ``replacement`` of ``path``, as if it were ``age`` seconds old."""
    program = "import os, sys; from pathlib import Path; from library.support.atomic_files import replacement\n"
    program += "with replacement(Path(sys.argv[1])) as file: os._exit(9)"
    before = set(path.parent.iterdir())
    assert subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=False).returncode == 9
    (left,) = set(path.parent.iterdir()) - before
    os.utime(left, (time.time() - age,) * 2)
    return left


@pytest.mark.skipif(os.name == "nt", reason="nothing is swept: whether a process is gone cannot be asked there")
def test_what_killed_processes_left_of_a_replacement_is_swept(tmp_path):
    """Of these files, of dead processes, and not while another machine may be at it."""
    ours, other = tmp_path / "a [1]_sd.npz", tmp_path / "b_sd.npz"
    gone = abandoned(ours, age=3600)
    stay = {abandoned(ours, age=30), abandoned(other, age=3600), tmp_path / f".{ours.name}.tmp"}
    (tmp_path / f".{ours.name}.tmp").touch()
    foreign = tmp_path / f".{ours.name}.{os.getppid()}-0123abcd.tmp"
    foreign.touch()
    os.utime(foreign, (0, 0))
    folder, unsuffixed = tmp_path / f".{ours.name}.99999999-0123abcd.tmp", tmp_path / f".{ours.name}.99999999.tmp"
    folder.mkdir()
    unsuffixed.touch()
    for one in (folder, unsuffixed):  # named as ours may be, but no replacement is
        os.utime(one, (0, 0))
    sweep_replacements({ours, tmp_path / "no folder" / "c.npz"})
    assert set(tmp_path.iterdir()) == {*stay, foreign, folder, unsuffixed}
    assert not gone.exists()
    with replacement(ours) as file:
        file.write(b"new")
    assert ours.read_bytes() == b"new"
