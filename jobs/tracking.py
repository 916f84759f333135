"""MLflow runs that can be continued: found again by key, and points written once.

The embedded default keeps everything under the work directory: `mlflow.db` (SQLite) and `mlartifacts/`.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.train.metrics import MetricsReader
from pipelines.errors import UserError
from pipelines.progress import say

BATCH = 1000  # MLflow's limit of metrics a call
STEPS_AT_ONCE = 5
Point = tuple[str, float, int, float]  # name, value, step, seconds since 1970


def tracking_uri(work_dir: Path) -> str:
    """Where the embedded MLflow keeps its runs."""
    return f"sqlite:///{work_dir.resolve() / 'mlflow.db'}"


def open_run(work_dir: Path, experiment: str, key: str, name: str, tags: Mapping[str, str]) -> tuple[MlflowClient, Run]:
    """The run with this key, or a new one with these tags."""
    mlflow.set_tracking_uri(tracking_uri(work_dir))
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    location = (work_dir / "mlartifacts").resolve().as_uri()
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
    runs = client.search_runs([experiment_id], f"tags.`fot.key` = '{key}'", max_results=1)
    run = runs[0] if runs else client.create_run(experiment_id, run_name=name, tags={**tags, "fot.key": key})
    return client, run


def log_points(client: MlflowClient, run_id: str, points: Iterable[Point]) -> None:
    """Write metric points, in as few calls as may be."""
    made = [Metric(name, value, int(seconds * 1000), step) for name, value, step, seconds in points]
    for first in range(0, len(made), BATCH):
        client.log_batch(run_id, metrics=made[first : first + BATCH])


class TrainingRun:
    """A training as an MLflow run, live: `update` adds the steps of its metrics file that are not there yet.

    The file is the truth, and MLflow follows: while it cannot be written the training goes on, and what is missing is
    added later. A training that is continued after a crash continues its run; steps done again are not written again.
    """

    def __init__(
        self, work_dir: Path, experiment: str, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        self._client, run = open_run(work_dir, experiment, key, name, tags)
        self.run_id = str(run.info.run_id)
        self._client.update_run(self.run_id, status="RUNNING")
        for tag, value in tags.items():
            self._client.set_tag(self.run_id, tag, value)
        for param, value in params.items():
            self._client.log_param(self.run_id, param, value)
        history = self._client.get_metric_history(self.run_id, "loss")
        self._logged = max((point.step for point in history), default=0)
        self._read = MetricsReader()
        self._pending: list[dict[str, float]] = []
        self._complained = False

    def attach(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep JSON with the run."""
        self._client.log_dict(self.run_id, dict(content), name)

    def update(self, metrics: Path) -> None:
        """Add what is new in the file."""
        self._pending += self._read.new(metrics)
        try:
            while self._pending:  # a call has whole steps, so that none is half there
                new = {int(entry["step"]): entry for entry in self._pending[:STEPS_AT_ONCE]}
                steps = [entry for step, entry in new.items() if step > self._logged]
                log_points(self._client, self.run_id, [point for entry in steps for point in _points(entry)])
                self._logged = max(self._logged, *new)
                del self._pending[:STEPS_AT_ONCE]
        except MlflowException as error:
            if not self._complained:
                say(f"MLflow cannot be written ({str(error).splitlines()[0]}): it is tried again, {metrics} has it all")
                self._complained = True
            return
        self._complained = False

    def finish(self, metrics: Path) -> None:
        """The training is done. Raises UserError where MLflow still lacks some of it."""
        self.update(metrics)
        if self._pending:
            raise UserError(
                f"the training is done, but MLflow cannot be written: its last steps are in {metrics}; mend it and run "
                f"the same command again"
            )
        self._client.set_terminated(self.run_id, "FINISHED")

    def abandon(self, status: str) -> None:
        """The training stopped: FAILED or KILLED."""
        with suppress(MlflowException):  # what stopped it is what is to be told
            self._client.set_terminated(self.run_id, status)


def _points(entry: Mapping[str, float]) -> list[Point]:
    """A line of a metrics file."""
    step, seconds = int(entry["step"]), entry["time"]
    return [(name, value, step, seconds) for name, value in entry.items() if name not in ("step", "time")]
