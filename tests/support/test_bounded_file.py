import io

import pytest

from library.support.bounded_file import BoundedFile


def test_it_reads_as_every_file_does(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with BoundedFile(tmp_path / "a") as file:
        assert (file.read(3), file.read(0), file.read(10**18), file.read(5)) == (b"012", b"", b"3456789", b"")
        file.seek(-2, io.SEEK_END)
        assert file.read() == b"89"
        file.seek(0)
        assert file.read(None) == b"0123456789"


@pytest.mark.parametrize(("name", "error"), [("b", FileNotFoundError), (".", IsADirectoryError)])
def test_what_cannot_be_opened_is_named(name, error, tmp_path):
    with pytest.raises(error) as raised:
        BoundedFile(tmp_path / name)
    assert str(raised.value.filename) == str(tmp_path / name)
