"""MLflow keeps its files in a bucket, which may be away."""

import sys
from pathlib import Path

import boto3
import pytest
from mlflow.store.artifact import s3_artifact_repo

from jobs.cli.commands.registry import show_run
from jobs.registry.models import fetch_model
from jobs.registry.outbox import Outbox
from jobs.registry.record import record
from jobs.registry.server import TrackingDownError, connect, embedded_uri
from jobs.registry.sync import sync
from jobs.registry.tracking import TrainingFacts, TrainingRun
from pipelines.workflow.progress import console

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def reach(monkeypatch):
    """Sets the environment as for the first use of S3: an address, with keys or without."""

    def set_environment(address: str, keys: bool = True) -> None:
        for name in KEYS:
            monkeypatch.setenv(name, "secret") if keys else monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        s3_artifact_repo._cached_get_s3_client.cache_clear()

    for name, value in {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    yield set_environment
    s3_artifact_repo._cached_get_s3_client.cache_clear()


@pytest.fixture
def bucket(s3_endpoint: str, reach, work_dir: Path):
    """A new bucket that the experiment's files go to. Yields it."""
    reach(s3_endpoint)
    made = boto3.resource("s3").create_bucket(Bucket=f"bucket-{work_dir.parent.name.replace('_', '-')[:40]}")
    connect(embedded_uri(work_dir)).create_experiment("tiny", f"s3://{made.name}/mlflow")
    yield made
    reach(s3_endpoint)
    made.objects.delete()
    made.delete()


def names(bucket) -> list[str]:
    return sorted(found.key.partition("artifacts/")[2] for found in bucket.objects.all())


def test_files_and_model_lie_in_the_bucket_and_come_back(
    bucket, work_dir: Path, make_outcome, tmp_path: Path, capsys
) -> None:
    outcome = make_outcome()
    lineage = outcome.artifacts["report.html"].with_name("lineage.json")
    lineage.write_text('{"base": {"key": "ba5e", "inputs": {}, "params": {}, "files": {}}}')
    artifacts = {**outcome.artifacts, "lineage.json": lineage}
    made = record(make_outcome(artifacts=artifacts), work_dir)
    model = ["model/config.json", "model/model.safetensors"]
    assert names(bucket) == ["gate.json", "lineage.json", *model, "recipe.json", "report.html"]
    fetched = fetch_model("models:/fot/tiny/1", embedded_uri(work_dir), tmp_path / "fetched")
    assert (fetched / "model.safetensors").read_bytes() == b"weights of one"
    show_run(work_dir, None, str(made["run_id"]))
    assert "lineage\n  base ba5e: 0 files\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "keys", "why"),
    [
        ("http://me:secret@127.0.0.1:9", True, "EndpointConnectionError"),
        ("secret", True, "ValueError"),
        (None, False, "NoCredentialsError"),
        (None, True, "NoSuchBucket"),
    ],
)
def test_while_the_bucket_cannot_be_used_what_is_made_waits(
    bucket, s3_endpoint: str, reach, work_dir: Path, make_outcome, address: str | None, keys: bool, why: str
) -> None:
    reach(s3_endpoint)
    bucket.delete()
    reach(address or s3_endpoint, keys)
    outcome = make_outcome()
    output, metrics = outcome.trainings[0], outcome.trainings[0] / "metrics.jsonl"
    with console.capture() as said:
        run = TrainingRun(work_dir, embedded_uri(work_dir), TrainingFacts.read(output), output)
        run.update(metrics)
        run.finish(metrics)
        assert record(outcome, work_dir)["run_id"] is None
    place = f"MLflow's files in s3://{bucket.name}/mlflow/"
    lines = said.get().splitlines()
    assert [line.startswith(place) and f"/artifacts cannot be used ({why}): " in line for line in lines] == [True] * 3
    assert "secret" not in said.get()
    assert [entry["key"] for entry in Outbox(work_dir).entries()] == ["finetune-one", "one"]

    reach(s3_endpoint)
    bucket.create()
    assert len(list(sync(work_dir))) == 2
    assert "report.html" in names(bucket)


def test_a_bucket_away_when_a_model_is_fetched_is_one_line(
    bucket, reach, work_dir: Path, make_outcome, tmp_path: Path
) -> None:
    record(make_outcome(), work_dir)
    reach("http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingDownError) as down:
        fetch_model("models:/fot/tiny/1", embedded_uri(work_dir), tmp_path / "fetched")
    assert str(down.value).endswith("/artifacts/model cannot be used (EndpointConnectionError)")
    with pytest.raises(TrackingDownError, match=r"/artifacts cannot be used \(EndpointConnectionError\)"):
        show_run(work_dir, None, "tiny/1")


@pytest.mark.parametrize(("package", "extra"), [("boto3", "s3"), ("google.cloud", "gs")])
def test_a_missing_package_is_named_with_what_brings_it(
    work_dir: Path, make_outcome, reach, monkeypatch, package: str, extra: str
) -> None:
    reach("http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, package, None)
    connect(embedded_uri(work_dir)).create_experiment("tiny", f"{extra}://bucket/mlflow")
    with console.capture() as said:
        assert record(make_outcome(), work_dir)["run_id"] is None
    assert f"/artifacts cannot be used ({package} is not installed: pip install 'fot[{extra}]')" in said.get()
    assert Outbox(work_dir).has("one")


def test_a_session_token_in_an_error_is_not_told(
    bucket, s3_endpoint: str, reach, work_dir: Path, make_outcome, monkeypatch
) -> None:
    reach(s3_endpoint)
    with monkeypatch.context() as here, console.capture() as said:
        here.setenv("AWS_SESSION_TOKEN", "secret\n")
        record(make_outcome(), work_dir)
    assert "cannot be used (HTTPClientError)" in said.get()
    assert "secret" not in said.get()
