"""The metrics file: lines that are whole or passed over, and a resumed run's that are there once."""

import json

from library.output.metrics_file import MetricsFile, lines_until, run_of_metrics


def test_what_is_appended_is_read_back(tmp_path):
    metrics = MetricsFile.begin(tmp_path / "out" / "a_metrics.jsonl", "run1")
    metrics.append({"step": 1, "loss": 0.123456789, "norm/ü": 2.0})
    metrics.append({"step": 2, "loss": float("nan"), "nearest": {"a": [["girl", 0.5]]}})
    assert metrics.lines() == [
        {"step": 1, "loss": 0.123457, "norm/ü": 2.0},
        {"step": 2, "loss": None, "nearest": {"a": [["girl", 0.5]]}},
    ]
    assert run_of_metrics(metrics.path) == "run1"
    for line in metrics.path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: 1 / 0)  # NaN is no JSON


def test_a_torn_line_is_passed_over_and_spoils_no_other(tmp_path, monkeypatch):
    metrics = MetricsFile.begin(tmp_path / "a_metrics.jsonl", "run1")
    metrics.append({"step": 1})
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 2, "lo')  # a full disk
    metrics._torn = True
    metrics.append({"step": 3})
    assert [line["step"] for line in metrics.lines()] == [1, 3]


def test_a_file_that_is_not_there_or_not_ours_has_no_run(tmp_path):
    assert run_of_metrics(tmp_path / "none") is None
    (tmp_path / "other").write_bytes(b"\xff\xfe[1]\n{\n")
    assert run_of_metrics(tmp_path / "other") is None


def test_a_resumed_run_takes_over_what_leads_to_its_step(tmp_path):
    metrics = MetricsFile.begin(tmp_path / "a_metrics.jsonl", "run1")
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 1.0})
    metrics.append({"step": 2, "loss/validation": 0.5})
    metrics.append({"step": 2, "verdict": "UNCLEAR"})  # it was the end of a shorter run
    assert [line["step"] for line in lines_until(metrics.path, 2, epoch_closed=True)] == [1, 2, 2]
    # The end of that epoch is still to come, and its validation with it.
    kept = lines_until(metrics.path, 2, epoch_closed=False)
    assert kept == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
