"""A training's MLflow run follows its metrics file: every step once, whatever happens in between."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from jobs.registry import tracking
from jobs.registry.outbox import Outbox
from jobs.registry.server import connect, embedded_uri, find_run, tracking_uri
from jobs.registry.sync import sync
from jobs.registry.tracking import TrainingFacts, TrainingRun, upload_training
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import console

DOWN = "http://reader:secret@127.0.0.1:9"  # a port where nobody listens


@pytest.fixture
def output(work_dir: Path) -> Path:
    path = work_dir / "store" / "finetune" / "abc.partial"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def follow(work_dir: Path, output: Path):
    def start(key: str = "one", uri: str | None = None, job: str | None = None) -> TrainingRun:
        tags = {"fot.manifest": "abc", **({"fot.job": job} if job else {})}
        facts = TrainingFacts(key, "tiny", "tiny: finetune", tags, {"steps": 5}, {"seed": 1})
        return TrainingRun(work_dir, uri or tracking_uri(work_dir), facts, output)

    return start


def write(output: Path, steps: range, began: float = 100.0) -> Path:
    lines = [json.dumps({"step": step, "loss": 1 / step, "mfu": 0.5, "time": began + step}) for step in steps]
    path = output / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def die(run: TrainingRun) -> None:
    """What the system does for a process that is killed."""
    run._alive.close()


def history(work_dir: Path, key: str = "one", name: str = "loss") -> list[tuple[int, float]]:
    client = connect(embedded_uri(work_dir))
    run = find_run(client, "tiny", key)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_a_crashed_training_continues_its_run_and_no_step_is_there_twice(follow, work_dir: Path, output: Path) -> None:
    run, file = follow(), output / "metrics.jsonl"
    run.update(file)  # nothing there yet
    run.update(write(output, range(1, 40)))
    run.update(file)
    die(run)
    again = follow()
    again.update(write(output, range(1, 31), began=900.0))  # gone back to a checkpoint
    again.update(write(output, range(1, 61), began=900.0))
    again.finish(file)
    assert history(work_dir) == [(step, 1 / step) for step in range(1, 61)]
    assert history(work_dir, name="mfu") == [(step, 0.5) for step in range(1, 61)]
    client = connect(embedded_uri(work_dir))
    recorded = find_run(client, "tiny", "one")
    assert (recorded.info.status, recorded.data.params) == ("FINISHED", {"steps": "5"})
    assert (recorded.data.tags["fot.manifest"], recorded.data.tags["fot.kind"]) == ("abc", "training")
    assert [artifact.path for artifact in client.list_artifacts(recorded.info.run_id)] == ["recipe.json"]
    follow("other").finish(file)
    assert len(client.search_runs([recorded.info.experiment_id])) == 2


def test_a_training_begins_goes_on_and_ends_without_its_server_and_sync_brings_it_later(
    follow, work_dir: Path, output: Path
) -> None:
    with console.capture() as said:
        run = follow(uri=DOWN)
        run.update(write(output, range(1, 4)))
        run.finish(write(output, range(1, 6)))
    lines = said.get().splitlines()
    assert [line.partition("metrics.jsonl; ")[2] for line in lines] == [
        "the training goes on and tries again",
        "`fot registry sync` uploads it",
    ]
    assert lines[0].startswith(
        "MLflow at http://127.0.0.1:9 cannot be used (Connection refused): tiny: finetune is in "
    )
    kept = (work_dir / "outbox" / "one.json").read_text()
    assert "secret" not in said.get() + kept
    output.rename(output.with_suffix(""))  # the stage is complete

    with pytest.raises(UserError, match=r"could not be uploaded: one.json"):
        list(sync(work_dir))
    assert Outbox(work_dir).has("one")
    for told in (1, 0):
        assert len(list(sync(work_dir, embedded_uri(work_dir)))) == told
        assert history(work_dir) == [(step, 1 / step) for step in range(1, 6)]
    assert find_run(connect(embedded_uri(work_dir)), "tiny", "one").info.status == "FINISHED"


def test_what_a_locked_database_could_not_take_comes_as_soon_as_it_can(
    follow, work_dir: Path, output: Path, monkeypatch
) -> None:
    monkeypatch.setattr("jobs.registry.server.PATIENCE", 0.1)
    monkeypatch.setattr(tracking, "RETRY", 0.0)
    file, holder = write(output, range(1, 4)), sqlite3.connect(work_dir / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with console.capture() as said:
        run = follow()
        run.update(file)
    assert said.get().count("cannot be used (database is locked)") == 1
    assert Outbox(work_dir).has("one")
    assert list(sync(work_dir)) == ["one still runs: it tells MLflow itself"]
    holder.execute("ROLLBACK")
    run.update(file)
    assert history(work_dir) == [(step, 1 / step) for step in range(1, 4)]
    assert not Outbox(work_dir).has("one")
    run.abandon("FAILED")
    assert find_run(connect(embedded_uri(work_dir)), "tiny", "one").info.status == "FAILED"


def test_a_training_killed_while_mlflow_was_down_is_uploaded_as_killed(follow, work_dir: Path, output: Path) -> None:
    die(follow(uri=DOWN))
    follow().finish(write(output, range(1, 2)))  # started again it is no longer one that was killed
    assert list(sync(work_dir)) == []
    run = follow(uri=DOWN)
    write(output, range(1, 4))
    die(run)
    assert len(list(sync(work_dir, embedded_uri(work_dir)))) == 1
    assert history(work_dir) == [(step, 1 / step) for step in range(1, 4)]
    assert find_run(connect(embedded_uri(work_dir)), "tiny", "one").info.status == "KILLED"


def jobs_of(work_dir: Path) -> str:
    return find_run(connect(embedded_uri(work_dir)), "tiny", "one").data.tags["fot.job"]


def test_a_training_keeps_the_jobs_of_all_its_attempts(follow, work_dir: Path, output: Path) -> None:
    for job, uri in (("tiny-1", DOWN), ("tiny-1-2", None), ("tiny-1-3", DOWN), (None, None)):  # the last in no job
        die(follow(uri=uri, job=job))
    assert jobs_of(work_dir) == "tiny-1 tiny-1-2 tiny-1-3"
    elsewhere = output.with_name("elsewhere")  # the same training, of somebody who began it in a work_dir of their own
    elsewhere.mkdir()
    TrainingFacts("one", "tiny", "tiny: finetune", {"fot.job": "other-9"}, {}, {}).write(elsewhere)
    write(elsewhere, range(1, 3))
    upload_training(work_dir, embedded_uri(work_dir), elsewhere, "FINISHED")
    assert jobs_of(work_dir) == "tiny-1 tiny-1-2 tiny-1-3 other-9"


def test_a_training_that_mlflow_has_wholly_is_left_as_it_is(follow, work_dir: Path, output: Path) -> None:
    follow().finish(write(output, range(1, 4)))
    client = connect(embedded_uri(work_dir))
    before = find_run(client, "tiny", "one").info
    assert upload_training(work_dir, embedded_uri(work_dir), output, "FINISHED") == before.run_id
    after = find_run(client, "tiny", "one").info
    assert (after.start_time, after.end_time) == (before.start_time, before.end_time)
    write(output, range(1, 6))  # more than MLflow has
    upload_training(work_dir, embedded_uri(work_dir), output, "FINISHED")
    assert history(work_dir) == [(step, 1 / step) for step in range(1, 6)]
    assert find_run(client, "tiny", "one").info.end_time == 105_000


def test_a_step_is_written_whole_however_many_metrics_it_has(follow, work_dir: Path, output: Path) -> None:
    wide = {f"m{number}": 1.0 for number in range(400)}
    lines = [json.dumps({"step": step, "loss": 1.0, **wide, "time": 1.0}) for step in range(1, 6)]
    file = output / "metrics.jsonl"
    file.write_text("\n".join(lines) + "\n")
    follow().finish(file)
    assert [step for step, _ in history(work_dir, name="m399")] == [1, 2, 3, 4, 5]


def test_the_address_is_the_recipes_then_the_environments_then_the_work_directorys(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri(tmp_path) == "http://there:5000"
    assert tracking_uri(tmp_path, "http://here:5000") == "http://here:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://me:secret@there")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: ftp://there is no tracking server: give http://"):
        tracking_uri(tmp_path)


def test_writing_runs_leaves_the_environment_alone(follow, output: Path) -> None:
    follow().finish(write(output, range(1, 2)))
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_database_that_was_deleted_is_made_anew(follow, work_dir: Path, output: Path, empty_database: Path) -> None:
    follow().finish(write(output, range(1, 3)))
    (work_dir / "mlflow.db").unlink()
    shutil.copy(empty_database, work_dir)  # what connect does in ten seconds
    follow().finish(write(output, range(1, 4)))
    assert [step for step, _ in history(work_dir)] == [1, 2, 3]
