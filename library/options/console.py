"""What a run says while it goes: log records on the console or in a file, from the main process only."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm import tqdm

from library.options.training import RuntimeOptions
from library.support.errors import UserError
from library.support.processes import rank
from library.support.terminal import coloured, fitted

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class HeldBack(logging.Handler):
    """Keeps records until it is known where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.records.append(record)


class AboveProgress(logging.StreamHandler[TextIO]):
    """Writes each record on lines of its own, above a progress bar that may be on the screen.

    On a terminal lines are broken between words, and the level of a warning is coloured where records show it.
    """

    def __init__(self, stream: TextIO, *, shows_level: bool) -> None:
        super().__init__(stream)
        self.shows_level = shows_level

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; the bar is drawn again below it."""
        try:
            text = fitted(self.format(record), self.stream)
            tqdm.write(coloured(text, record.levelname, self.stream) if self.shows_level else text, file=self.stream)
        except OSError:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Writes records to a file; where that fails (a full disk) it is said once, and the training goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say the first failure on stderr."""
        if not self.failed:
            self.failed = True
            reason = sys.exc_info()[1]
            print(f"--console_log_file cannot be written ({reason}); records are missing there.", file=sys.stderr)


class ToughStream:
    """A standard stream that may be closed or full (``| head``, a terminal that is gone, a full disk).

    What cannot be written is lost without an error: no message is worth a training. All else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if that is possible."""
        with suppress(OSError, ValueError):  # ValueError: the stream itself was closed
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write the lines if that is possible."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_talking() -> None:
    """Let no output end the run: signs that it cannot show become escapes, and a failure to write is passed over."""
    _fill_closed_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - is open to the end
        if isinstance(stream, ToughStream):
            continue
        with suppress(AttributeError):  # a stand-in may not be a real file
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, ToughStream(stream))


def _fill_closed_descriptors() -> None:
    """Let no file of the run get the number of a standard stream: what libraries print would go into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def hold_back() -> None:
    """Keep what is said while the options are read, which decide where messages go."""
    _replace_handlers(HeldBack())
    logging.getLogger("library").setLevel(logging.INFO)
    quieten()


@contextmanager
def silenced() -> Iterator[None]:
    """Within a ``with``: no log record of this thread but errors; for what is only tried out.

    Other threads are heard: what the one that reads the checkpoint's hash has to say may come at any moment.
    """
    silent = threading.get_ident()

    def heard(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != silent

    handlers = [*logging.getLogger().handlers, *logging.getLogger("library").handlers]
    for handler in handlers:
        handler.addFilter(heard)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(heard)


def say(text: str) -> None:
    """Print what a run has to tell in the end, on standard output, where --console_log_level lets INFO through."""
    if logging.getLogger("library").level <= logging.INFO:
        print(fitted(text, sys.stdout))


def release() -> None:
    """Say on the console what is still held back."""
    if any(isinstance(handler, HeldBack) for handler in logging.getLogger("library").handlers):
        set_up_logging(RuntimeOptions())


def quieten() -> None:
    """Silence other processes' records, and libraries' advice that no user of ours can act on."""
    if rank() > 0:
        logging.getLogger("library").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # "Token indices sequence length is longer than …": long captions are cut, and reported with their files.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    # "Couldn't connect to the Hub": said in our words where nothing is in the cache either.
    logging.getLogger("diffusers.pipelines.pipeline_utils").setLevel(logging.ERROR)


def set_up_logging(options: RuntimeOptions) -> None:
    """Send log records to the console (stderr, or plain stdout) or to a file, beginning with those held back.

    The file is the main process's alone, and always has times and levels; the errors of others go to the console.
    Raises UserError for a file that cannot be written.
    """
    plain = options.console_log_simple
    if options.console_log_file and rank() == 0:
        try:
            handler: logging.Handler = LogFile(
                options.console_log_file, mode="w", encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise UserError(
                f"--console_log_file {options.console_log_file} cannot be written: {error.strerror}."
            ) from error
        plain = False
    else:
        handler = AboveProgress(sys.stdout if plain else sys.stderr, shows_level=not plain)
    handler.setFormatter(logging.Formatter("%(message)s" if plain else FORMAT, datefmt="%H:%M:%S"))
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
