"""What is kept of a run that ends early, and by which process."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from library.rescue import Rescue
from library.support.errors import UserError
from library.support.lookout import Vectors


class Learned:
    """Stands in for a learner: one encoder's rows, on a device that may be lost."""

    def __init__(self):
        self.watch, self.best, self.result = SimpleNamespace(taught=True), None, None
        self.choice, self.lost, self.rows = None, False, [torch.ones(1, 2)]

    @contextmanager
    def averaged_rows(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield self.rows


class Folder:
    """Stands in for the results: notes what is written."""

    def __init__(self, folder):
        self.folder, self.written = folder, []

    def path(self, name):
        return self.folder / name

    def owns(self, path):
        return path.exists()

    def write(self, name, vectors, choice, *, in_haste):
        assert in_haste
        self.path(name).touch()
        self.written.append((name, [each.tolist() for each in vectors.rows], vectors.step, vectors.epoch))


NAMES = SimpleNamespace(step=lambda step: f"a-{step}", file=lambda stem: f"{stem}.safetensors")


def rescue(folder, process: int = 0) -> Rescue:
    return Rescue(Learned(), Folder(folder), NAMES, process=process, watch=False, patience=None)


def test_a_lost_device_costs_what_was_learned_since_the_copy(tmp_path):
    kept = rescue(tmp_path)
    kept.lookout.step_done(lambda: kept.vectors(7, 1))
    kept.learner.lost = True
    kept.save(9, 2)
    assert kept.results.written == [("a-7.safetensors", [[[1.0, 1.0]]], 7, 1)]


@pytest.mark.parametrize(("step", "taught", "value"), [(0, True, 1.0), (3, False, 1.0), (3, True, float("nan"))])
def test_what_is_worth_nothing_is_not_kept(step, taught, value, tmp_path):
    kept = rescue(tmp_path)
    kept.learner.watch.taught, kept.learner.rows = taught, [torch.full((1, 2), value)]
    kept.save(step, 1)
    assert kept.results.written == []


def with_best(folder, **details) -> Rescue:
    """A rescue whose best vectors are those of step 7."""
    kept = rescue(folder, **details)
    kept.learner.best = Vectors([torch.zeros(1, 2)], 7, 1)
    return kept


@pytest.mark.parametrize(
    ("last", "there", "steps"),
    [(1.0, False, [9, 7]), (1.0, True, [9]), (float("nan"), False, [7]), (float("nan"), True, [])],
)
def test_the_best_vectors_so_far_are_kept_too(last, there, steps, tmp_path, caplog):
    """Unless they were saved as a checkpoint; also where the last ones have diverged."""
    kept = with_best(tmp_path)
    kept.learner.rows = [torch.full((1, 2), last)]
    if there:
        (tmp_path / "a-7.safetensors").touch()
    kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == steps
    assert (
        f"The vectors of step 7, the best so far, are kept in {tmp_path / 'a-7.safetensors'}." in caplog.messages
    ) == (7 in steps)


def test_the_best_of_vectors_that_were_never_taught_is_not_kept(tmp_path):
    kept = with_best(tmp_path)
    kept.learner.watch.taught = False
    kept.save(9, 2)
    assert kept.results.written == []


def test_the_best_vectors_are_kept_where_the_last_cannot_be_written(tmp_path, monkeypatch):
    kept = with_best(tmp_path)
    write = kept.results.write

    def refusing(name, vectors, choice, **details):
        if vectors.step == 9:
            raise UserError("values that are too large for fp16")
        write(name, vectors, choice, **details)

    kept.results.write = refusing
    monkeypatch.setattr("library.rescue.replace", lambda results, **_: results)
    with pytest.raises(UserError, match="too large for fp16"):
        kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == [7]


def test_where_the_main_thread_waits_for_a_lost_process_the_best_vectors_are_kept_too(tmp_path):
    kept = with_best(tmp_path)
    kept.lookout.step_done(lambda: kept.vectors(9, 2))
    kept.lookout._stopped, kept.lookout.end = False, lambda code: None
    kept.lookout._save_and_end("Nothing has come from the other processes.", 1)
    assert [step for _, _, step, _ in kept.results.written] == [9, 7]


@pytest.mark.parametrize(("there", "steps"), [(True, []), (False, [9, 7])])
def test_who_keeps_the_last_vectors_keeps_the_best(there, steps, tmp_path, monkeypatch):
    """Another process waits once, not for each."""
    waited = []

    def appears(path, since, seconds):
        if seconds:
            waited.append(path.name)
        return there

    monkeypatch.setattr("library.rescue.appears", appears)
    kept = with_best(tmp_path, process=2)
    kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == steps
    assert waited == ["a-9.safetensors"]


def test_the_best_vectors_that_another_process_keeps_are_left_to_it(tmp_path, monkeypatch):
    """It may have gone on to another step, and so have other last vectors."""
    monkeypatch.setattr("library.rescue.appears", lambda path, since, seconds: path.name == "a-7.safetensors")
    kept = with_best(tmp_path, process=1)
    kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == [9]


def test_a_folder_that_cannot_be_looked_into_is_no_reason_to_keep_nothing(tmp_path):
    kept = with_best(tmp_path)

    def broken(path):
        raise OSError("Stale file handle")

    kept.results.owns = broken
    kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == [9, 7]


def test_the_best_vectors_are_kept_once_where_they_are_the_last(tmp_path):
    kept = rescue(tmp_path)
    kept.learner.best = Vectors(kept.learner.rows, 9, 2)
    kept.save(9, 2)
    assert [step for _, _, step, _ in kept.results.written] == [9]


def test_a_process_writes_what_no_lower_one_has_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "library.support.lookout.time", SimpleNamespace(monotonic=iter(range(0, 10**6, 5)).__next__, sleep=id)
    )
    second = rescue(tmp_path, process=1)
    second.save(3, 1)
    assert len(second.results.written) == 1
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", f"The vectors of step 3 are kept in {tmp_path / 'a-3.safetensors'}.")
    ]
    second.save(3, 1)
    assert len(second.results.written) == 1
    second.began = time.time() + 60  # then the file is another run's
    second.save(3, 1)
    assert len(second.results.written) == 2
