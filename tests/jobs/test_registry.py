import time
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from jobs.registry import Outcome, record
from jobs.tracking import tracking_uri


def outcome(directory: Path, key: str, metrics: list) -> Outcome:
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(b"weights of " + key.encode())
    (directory / "note.json").write_text("{}")
    return Outcome(
        key=key,
        name="tiny",
        tags={"fot.manifest": "abc"},
        params={"seed": 0},
        metrics=metrics,
        artifacts={"note": directory / "note.json"},
        model=model,
        trainings=[],
    )


def test_recording_again_continues_the_run_and_a_new_outcome_is_a_new_version(tmp_path: Path) -> None:
    work_dir = tmp_path / "runs"
    work_dir.mkdir()
    now = time.time()
    points = [("loss", 3.0 - step, step, now + step) for step in range(3)]
    first = record(outcome(tmp_path, "one", points[:2]), work_dir)
    again = record(outcome(tmp_path, "one", points), work_dir)
    assert again == first
    client = MlflowClient(tracking_uri(work_dir))
    history = client.get_metric_history(first["run_id"], "loss")
    assert [(point.step, point.value) for point in history] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    run = client.get_run(first["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["fot.manifest"] == "abc"

    second = record(outcome(tmp_path, "two", points), work_dir)
    assert second["run_id"] != first["run_id"]
    assert (first["version"], second["version"]) == ("1", "2")
    fetched = mlflow.artifacts.download_artifacts("models:/tiny@candidate", dst_path=str(tmp_path / "fetched"))
    assert (Path(fetched) / "model.safetensors").read_bytes() == b"weights of two"
