"""What saves the vectors of a run whose main thread waits for another process that is gone."""

import os
import select
import signal
import threading
import time

import pytest
import torch

from library.support import lookout
from library.support.lookout import Lookout, Vectors, appears

SEVEN = Vectors([torch.ones(1, 2)], 7, 1)


@pytest.fixture
def watched(monkeypatch):
    """Makes lookouts with little patience that note what they did instead of ending this process."""
    monkeypatch.setattr(lookout, "GRACE", 0.2)
    happened: list = []
    ended = threading.Event()

    def end(code: int) -> None:
        happened.append(code)
        ended.set()

    def make(**options) -> Lookout:
        return Lookout(happened.append, watch=True, end=end, **options)

    make.happened, make.ended = happened, ended
    return make


def one_step(watch: Lookout) -> None:
    assert list(watch.beating([1, 2])) == [1, 2]
    watch.step_done(lambda: SEVEN)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_signal_that_the_main_thread_does_not_obey_saves_the_copy(watched):
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as in a blocked main thread: it comes to nothing
    try:
        with watched() as watch:
            one_step(watch)
            os.kill(os.getpid(), signal.SIGTERM)
            assert watched.ended.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert watched.happened == [SEVEN, 143]
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_further_signals_are_read_too(watched):
    """What nobody reads would keep the thread busy until the end."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with watched() as watch:
            one_step(watch)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                while unread := select.select([watch._reader], [], [], 0)[0]:
                    assert not watched.ended.wait(0.01), unread
            assert watched.ended.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_main_thread_that_saves_by_itself_is_left_alone(watched):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with watched() as watch:
            one_step(watch)
            os.kill(os.getpid(), signal.SIGTERM)
            watch.stop()
            time.sleep(0.5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert watched.happened == []


def test_other_processes_that_stay_silent_end_the_run_with_a_sentence(watched, caplog):
    with watched(patience=0.3) as watch:
        one_step(watch)
        batches = watch.beating([1])
        next(batches)
        assert watched.ended.wait(10)
    assert watched.happened == [SEVEN, 1]
    assert "Nothing has come from the other processes" in caplog.text


def test_the_first_step_and_what_is_done_between_steps_may_take_their_time(watched):
    with watched(patience=0.3) as watch:
        next(watch.beating([1]))
        time.sleep(1)
        one_step(watch)
        time.sleep(1)
    assert watched.happened == []


def test_the_copy_is_renewed_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now[0])
    watch = Lookout(print, watch=False)
    with watch:
        watch.step_done(lambda: SEVEN)
        watch.step_done(lambda: pytest.fail("too soon"))
        now[0] += lookout.COPY_EVERY
        watch.step_done(lambda: Vectors([], 8, 1))
    assert watch.copy.step == 8


def test_a_file_appears_when_it_was_written_after_a_moment(tmp_path):
    file = tmp_path / "file"
    assert not appears(file, 0, seconds=0)
    file.touch()
    written = file.stat().st_mtime
    assert appears(file, written, seconds=0)
    assert not appears(file, written + 3, seconds=0.1)
