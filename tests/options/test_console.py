"""What a run says: where it goes, and that nothing it says can end it."""

import io
import logging
import sys
import threading

import pytest
from tqdm import tqdm

from library.options.console import keep_talking, set_up_logging, silenced
from library.options.options import RuntimeOptions
from library.support.errors import UserError


@pytest.fixture(autouse=True)
def _leave_no_handlers():
    logger = logging.getLogger("library")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_records_stand_on_lines_of_their_own_above_a_progress_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    set_up_logging(RuntimeOptions())
    with tqdm(total=2, desc="steps", file=screen, mininterval=0) as progress:
        progress.update()
        logging.getLogger("library.x").info("halfway")
        progress.update()
    lines = screen.getvalue().replace("\r", "\n").split("\n")
    assert [line.split()[1:] for line in lines if "halfway" in line] == [["INFO", "halfway"]]


def test_what_an_output_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", errors="strict"))
    keep_talking()
    print("mychar é 写", flush=True)
    assert written.getvalue().decode("cp1252").strip() == "mychar é \\u5199"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be set so, and need not be
    keep_talking()


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"console_log_file .* cannot be written: Is a directory\.$"):
        set_up_logging(RuntimeOptions(console_log_file=str(tmp_path)))


def test_a_log_file_belongs_to_the_main_process(tmp_path, monkeypatch):
    screen, file = io.StringIO(), tmp_path / "log.txt"
    monkeypatch.setattr(sys, "stderr", screen)
    file.write_text("what the main process said\n")
    monkeypatch.setenv("RANK", "1")
    set_up_logging(RuntimeOptions(console_log_file=str(file)))
    logging.getLogger("library.x").info("not worth saying twice")
    logging.getLogger("library.x").error("lost")
    assert file.read_text() == "what the main process said\n"
    assert [line.split()[1:] for line in screen.getvalue().splitlines()] == [["ERROR", "lost"]]


def test_only_the_thread_that_tries_something_out_is_silent(caplog):
    logger = logging.getLogger("library.anything")
    with silenced():
        logger.warning("not said")
        logger.error("an error")
        other = threading.Thread(target=logger.warning, args=("of another thread",))
        other.start()
        other.join()
    logger.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["an error", "of another thread", "afterwards"]
