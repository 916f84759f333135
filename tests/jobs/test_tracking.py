"""A training's MLflow run follows its metrics file: every step once, whatever happens in between."""

import json
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs import tracking
from jobs.tracking import TrainingRun, tracking_uri
from pipelines.errors import UserError
from pipelines.progress import console


@pytest.fixture
def follow(tmp_path: Path):
    def start(key: str = "one") -> TrainingRun:
        return TrainingRun(tmp_path, "tiny", key, "tiny: finetune", {"fot.manifest": "abc"}, {"steps": 5})

    return start


def write(path: Path, steps: range, loss: float = 1.0) -> Path:
    lines = [json.dumps({"step": step, "loss": loss / step, "mfu": 0.5, "time": 100.0 + step}) for step in steps]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def history(tmp_path: Path, run: TrainingRun, name: str = "loss") -> list[tuple[int, float]]:
    points = MlflowClient(tracking_uri(tmp_path)).get_metric_history(run.run_id, name)
    return [(point.step, point.value) for point in points]


def test_a_crashed_training_continues_its_run_and_no_step_is_there_twice(follow, tmp_path: Path) -> None:
    run, file = follow(), tmp_path / "metrics.jsonl"
    run.update(file)  # nothing there yet
    run.update(write(file, range(1, 40)))
    run.update(file)
    again = follow()
    assert again.run_id == run.run_id
    again.update(write(file, range(1, 31)))  # gone back to a checkpoint
    again.update(write(file, range(1, 61)))
    again.finish(file)
    assert history(tmp_path, run) == [(step, 1 / step) for step in range(1, 61)]
    assert history(tmp_path, run, "mfu") == [(step, 0.5) for step in range(1, 61)]
    recorded = MlflowClient(tracking_uri(tmp_path)).get_run(run.run_id)
    assert (recorded.info.status, recorded.data.tags["fot.manifest"], recorded.data.params) == (
        "FINISHED",
        "abc",
        {"steps": "5"},
    )
    assert follow("other").run_id != run.run_id


def test_what_mlflow_could_not_take_comes_later(follow, tmp_path: Path, monkeypatch) -> None:
    run, file = follow(), tmp_path / "metrics.jsonl"
    write(file, range(1, 6))

    def refuse(*_: object) -> None:
        raise MlflowException("the server is away\nfor now")

    with monkeypatch.context() as away, console.capture() as said:
        away.setattr(tracking, "log_points", refuse)
        run.update(file)
        run.update(file)
        with pytest.raises(UserError, match=rf"its last steps are in {file}; mend it and run the same command again"):
            run.finish(file)
    assert said.get().replace("\n", " ").count("MLflow cannot be written (the server is away): it is tried again") == 1
    assert history(tmp_path, run) == []
    run.finish(file)
    assert history(tmp_path, run) == [(step, 1 / step) for step in range(1, 6)]
