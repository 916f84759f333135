"""MLflow: one run for a recipe's outcome, with its lineage, and a registered model version."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.tracking import Point, log_points, open_run

ALIAS = "candidate"


@dataclass(frozen=True)
class Outcome:
    """What a run is about. `key` identifies it: recording the same key again continues the same run.

    `metrics`: (name, value, step, seconds since 1970). `artifacts`: files and directories by the name they get.
    `trainings`: ids of the runs that made the model; they become the run's children.
    """

    key: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Iterable[Point]
    artifacts: Mapping[str, Path]
    model: Path
    trainings: Sequence[str]


def record(outcome: Outcome, work_dir: Path) -> dict[str, str]:
    """Record the outcome as a finished run and a model version with the alias `candidate`.

    Recording again after a crash completes the run it began: points already there are not written twice.
    Returns {"run_id", "model", "version"}.
    """
    client, run = open_run(work_dir, outcome.name, outcome.key, outcome.name, outcome.tags)
    run_id = run.info.run_id
    for name, value in outcome.params.items():
        client.log_param(run_id, name, value)
    _log_metrics(client, run, outcome.metrics)
    for name, path in outcome.artifacts.items():
        (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), name)
    client.log_artifacts(run_id, str(outcome.model), "model")
    for training in outcome.trainings:
        client.set_tag(training, "mlflow.parentRunId", run_id)
    version = _model_version(client, run, outcome)
    client.set_terminated(run_id, "FINISHED")
    return {"run_id": run_id, "model": outcome.name, "version": version}


def _log_metrics(client: MlflowClient, run: Run, metrics: Iterable[Point]) -> None:
    there = {
        name: {point.step for point in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics
    }
    new = [(name, value, step, seconds) for name, value, step, seconds in metrics if step not in there.get(name, ())]
    log_points(client, run.info.run_id, new)


def _model_version(client: MlflowClient, run: Run, outcome: Outcome) -> str:
    try:
        client.create_registered_model(outcome.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    existing = client.search_model_versions(f"name = '{outcome.name}' and run_id = '{run.info.run_id}'")
    if existing:
        version = str(existing[0].version)
    else:
        source = f"{run.info.artifact_uri}/model"
        created = client.create_model_version(outcome.name, source, run.info.run_id, tags=dict(outcome.tags))
        version = str(created.version)
    client.set_registered_model_alias(outcome.name, ALIAS, version)
    return version
