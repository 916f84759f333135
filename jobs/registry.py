"""MLflow: one run for a recipe's outcome, with its lineage, and a registered model version.

The embedded default keeps everything under the work directory: `mlflow.db` (SQLite) and `mlartifacts/`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

ALIAS = "candidate"
BATCH = 1000  # MLflow's limit of metrics a call


@dataclass(frozen=True)
class Outcome:
    """What a run is about. `key` identifies it: recording the same key again continues the same run.

    `metrics`: (name, value, step, seconds since 1970). `artifacts`: files and directories by the name they get.
    """

    key: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Iterable[tuple[str, float, int, float]]
    artifacts: Mapping[str, Path]
    model: Path


def tracking_uri(work_dir: Path) -> str:
    """Where the embedded MLflow keeps its runs."""
    return f"sqlite:///{work_dir.resolve() / 'mlflow.db'}"


def record(outcome: Outcome, work_dir: Path) -> dict[str, str]:
    """Record the outcome as a finished run and a model version with the alias `candidate`.

    Recording again after a crash completes the run it began: points already there are not written twice.
    Returns {"run_id", "model", "version"}.
    """
    mlflow.set_tracking_uri(tracking_uri(work_dir))
    client = MlflowClient()
    experiment = client.get_experiment_by_name(outcome.name)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(outcome.name, (work_dir / "mlartifacts").resolve().as_uri())
    )
    run = _run(client, experiment_id, outcome)
    run_id = run.info.run_id
    for name, value in outcome.params.items():
        client.log_param(run_id, name, value)
    _log_metrics(client, run, outcome.metrics)
    for name, path in outcome.artifacts.items():
        (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), name)
    client.log_artifacts(run_id, str(outcome.model), "model")
    version = _model_version(client, run, outcome)
    client.set_terminated(run_id, "FINISHED")
    return {"run_id": run_id, "model": outcome.name, "version": version}


def _run(client: MlflowClient, experiment_id: str, outcome: Outcome) -> Run:
    found = client.search_runs([experiment_id], f"tags.`fot.key` = '{outcome.key}'", max_results=1)
    if found:
        return found[0]
    return client.create_run(experiment_id, run_name=outcome.name, tags={**outcome.tags, "fot.key": outcome.key})


def _log_metrics(client: MlflowClient, run: Run, metrics: Iterable[tuple[str, float, int, float]]) -> None:
    there = {
        name: {point.step for point in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics
    }
    points = [
        Metric(name, value, int(seconds * 1000), step)
        for name, value, step, seconds in metrics
        if step not in there.get(name, ())
    ]
    for first in range(0, len(points), BATCH):
        client.log_batch(run.info.run_id, metrics=points[first : first + BATCH])


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
