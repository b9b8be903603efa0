"""What a run says while it goes: log records on the console or in a file, from the main process only."""

import logging
import os
import sys
from contextlib import suppress

from tqdm import tqdm

from library.errors import UserError
from library.options import RuntimeOptions

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class HeldBack(logging.Handler):
    """Keeps records until it is known where they go."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.records.append(record)


class AboveProgress(logging.StreamHandler):
    """Writes each record on lines of its own, above a progress bar that may be on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; the bar is drawn again below it."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except OSError:
            self.handleError(record)


def allow_any_text() -> None:
    """Let signs that the terminal or a redirected output cannot show be written as escapes instead of raising."""
    with suppress(AttributeError):  # a stand-in for standard output may not be a real file
        sys.stdout.reconfigure(errors="backslashreplace")


def hold_back() -> None:
    """Keep what is said while the options are read, which decide where messages go."""
    _replace_handlers(HeldBack())
    logging.getLogger("library").setLevel(logging.INFO)
    quieten()


def release() -> None:
    """Say on the console what is still held back."""
    if any(isinstance(handler, HeldBack) for handler in logging.getLogger("library").handlers):
        set_up_logging(RuntimeOptions())


def quieten() -> None:
    """Silence other processes' records, and libraries' advice that no user of ours can act on."""
    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger("library").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # "Token indices sequence length is longer than …": long captions are cut, and reported with their files.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def set_up_logging(options: RuntimeOptions) -> None:
    """Send log records to the console (stderr, or plain stdout) or to a file, beginning with those held back.

    Raises UserError for a file that cannot be written.
    """
    if options.console_log_file:
        try:
            handler: logging.Handler = logging.FileHandler(
                options.console_log_file, mode="w", encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise UserError(
                f"--console_log_file {options.console_log_file} cannot be written: {error.strerror}."
            ) from error
    else:
        handler = AboveProgress(sys.stdout if options.console_log_simple else sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if options.console_log_simple else FORMAT, datefmt="%H:%M:%S"))
    logger = logging.getLogger("library")
    logger.setLevel(options.console_log_level or logging.INFO)
    quieten()
    held_back = [record for old in logger.handlers if isinstance(old, HeldBack) for record in old.records]
    _replace_handlers(handler)
    for record in held_back:
        if logger.isEnabledFor(record.levelno):
            handler.handle(record)


def _replace_handlers(handler: logging.Handler) -> None:
    logger = logging.getLogger("library")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
