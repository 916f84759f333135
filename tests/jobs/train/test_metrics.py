"""The log of a training: whole lines only, and none of a run that died."""

import json
from pathlib import Path

from jobs.config.train_spec import METRICS
from jobs.train.metrics import MetricsFile, MetricsReader, last_metrics, read_metrics


def test_a_half_written_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert last_metrics(path) is None
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    assert last_metrics(path) == {"step": 1, "loss": 2.0}
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_steps_after_the_checkpoint_are_dropped_when_the_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    first = MetricsFile(path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": 1 / step, "norm": float("inf")})
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    again = MetricsFile(path, 3)
    assert len(read_metrics(path)) == 5  # until it is written
    again.write(4, {"loss": 0.0})
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(path)] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 0)]
    assert all(set(entry) == {"step", "loss", "time"} for entry in read_metrics(path))  # infinity is no JSON


def test_a_reader_goes_on_where_it_was_and_begins_again_in_a_new_file(tmp_path: Path) -> None:
    path, reader = tmp_path / METRICS, MetricsReader()
    assert reader.new(path) == []
    log = MetricsFile(path, 0)
    log.write(1, {"loss": 3.0})
    log.write(2, {"loss": 2.0})
    with open(path, "a") as file:
        file.write('{"step": 3')
    assert [entry["step"] for entry in reader.new(path)] == [1, 2]
    assert reader.new(path) == []
    MetricsFile(path, 1).write(2, {"loss": 2.0})
    assert [entry["step"] for entry in reader.new(path)] == [1, 2]
