"""A training as an MLflow run, live, that can be continued: found again by key, and every step written once.

The files are the truth and MLflow follows. A training writes `training.json` (what its run is called and tagged) and
`metrics.jsonl`; from these alone its run can be made, now or later. While MLflow is down the training goes on, and an
entry in the outbox says that something is missing there.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from jobs.common.version import JOB_TAG, add_jobs
from jobs.config.train_spec import METRICS
from jobs.registry.outbox import Entry, Outbox, within
from jobs.registry.server import (
    KIND,
    METRICS_AT_ONCE,
    Point,
    TrackingDownError,
    connect,
    embedded_uri,
    files_in,
    locked,
    log_facts,
    log_points,
    open_run,
    talking_to,
)
from jobs.train.metrics import MetricsReader, read_metrics
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.files import write_atomically
from pipelines.workflow.progress import say

RUN = "training.json"
RETRY = 30.0  # seconds until a server that was down is asked again
SYNC = "`fot registry sync` uploads it"


@dataclass(frozen=True)
class TrainingFacts:
    """What a training's run says besides metrics. `key` names it; `recipe` is kept with it as recipe.json."""

    key: str
    experiment: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    recipe: Mapping[str, Any]

    def write(self, output: Path) -> "TrainingFacts":
        """Returns what is there now: this, with the jobs of earlier attempts."""
        known = TrainingFacts.read(output).tags.get(JOB_TAG, "") if (output / RUN).exists() else ""
        jobs = add_jobs(known, self.tags.get(JOB_TAG, ""))
        facts = replace(self, tags={**self.tags, JOB_TAG: jobs}) if jobs else self
        write_atomically(output / RUN, json.dumps(asdict(facts), indent=1).encode())
        return facts

    @classmethod
    def read(cls, output: Path) -> "TrainingFacts":
        return cls(**json.loads((output / RUN).read_text()))


class TrainingRun:
    """The run of a training that writes into `output`. `update` adds the steps that MLflow does not have yet.

    A training that is continued after a crash continues its run; steps done again are not written again. Nothing here
    fails because of MLflow: what it could not be told, `fot registry sync` tells it.
    """

    def __init__(self, work_dir: Path, uri: str, facts: TrainingFacts, output: Path) -> None:
        self._work_dir, self._uri, self._facts, self._output = work_dir, uri, facts.write(output), output
        self._outbox = Outbox(work_dir)
        self._client: MlflowClient | None = None
        self._run_id, self._logged = "", 0
        self._read = MetricsReader()
        self._pending: list[dict[str, float]] = []
        self._ask_again = 0.0
        self._complained = False
        self._alive = ExitStack()  # sync leaves a training alone that still tells MLflow itself
        self._alive.enter_context(locked(self._outbox.lock_of(facts.key)))
        self._tell("RUNNING")

    def update(self, metrics: Path) -> None:
        """Add what is new in the file."""
        self._pending += self._read.new(metrics)
        if time.monotonic() >= self._ask_again:
            self._tell("RUNNING")

    def finish(self, metrics: Path) -> None:
        """The training is done."""
        self._pending += self._read.new(metrics)
        self._tell("FINISHED")
        self._alive.close()

    def abandon(self, status: str) -> None:
        """The training stopped: FAILED or KILLED."""
        self._tell(status)
        self._alive.close()

    def _tell(self, status: str) -> None:
        """Write what MLflow lacks, or leave an entry in the outbox that says so."""
        key = self._facts.key
        try:
            with talking_to(self._uri):
                if self._client is None:
                    client = connect(self._uri)
                    run, self._logged = _open(client, self._work_dir, self._facts, self._pending)
                    self._run_id = str(run.info.run_id)
                    _describe(client, run, self._facts)
                    self._client = client
                self._logged = _log_all(self._client, self._run_id, self._pending, self._logged)
                if status != "RUNNING":
                    self._client.set_terminated(self._run_id, status)
        except TrackingDownError as error:
            self._client = None  # what it has by then is looked up
            self._ask_again = time.monotonic() + RETRY
            self._outbox.keep(key, training_entry(self._work_dir, self._uri, self._output, status))
            if not self._complained or status == "FINISHED":
                later = SYNC if status == "FINISHED" else "the training goes on and tries again"
                say(f"{error}: {self._facts.name} is in {self._output / METRICS}; {later}")
            self._complained = True
        else:
            self._outbox.remove(key)  # an earlier start's, too
            self._complained = False


def training_entry(work_dir: Path, uri: str, output: Path, status: str) -> Entry:
    """The outbox's word for a training that MLflow does not wholly have."""
    kept = None if uri == embedded_uri(work_dir) else hide_credentials(uri)
    return {"kind": "training", "output": within(output, work_dir), "status": status, "uri": kept}


def upload_training(work_dir: Path, uri: str, output: Path, status: str) -> str:
    """Make or complete the run of a training that wrote `output`; one that has all of it is left as it is. Returns the
    run's id. Raises TrackingDownError.
    """
    facts, entries = TrainingFacts.read(output), read_metrics(output / METRICS)
    with talking_to(uri):
        client = connect(uri)
        run, logged = _open(client, work_dir, facts, entries)
        run_id = str(run.info.run_id)
        if run.info.status == status and (not entries or logged >= entries[-1]["step"]):
            return run_id
        ended = int(entries[-1]["time"] * 1000) if entries else None
        _describe(client, run, facts)
        _log_all(client, run_id, entries, logged)
        client.set_terminated(run_id, status, ended)
    return run_id


def _open(
    client: MlflowClient, work_dir: Path, facts: TrainingFacts, entries: Sequence[Mapping[str, float]]
) -> tuple[Run, int]:
    """The training's run, which began with the first of the entries, and the last step that it has."""
    began = entries[0]["time"] if entries else None
    run = open_run(client, work_dir, facts.experiment, facts.key, facts.name, began)
    history = client.get_metric_history(run.info.run_id, "loss")
    return run, max((point.step for point in history), default=0)


def _describe(client: MlflowClient, run: Run, facts: TrainingFacts) -> None:
    """Mark the run as running, and say what it is of."""
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    log_facts(client, run_id, facts.params, {KIND: "training", **facts.tags})
    with files_in(run.info.artifact_uri):
        client.log_dict(run_id, dict(facts.recipe), "recipe.json")


def _log_all(client: MlflowClient, run_id: str, entries: list[dict[str, float]], logged: int) -> int:
    """Write the entries, and take away those that are written. Returns the last step that is there now."""
    while entries:
        steps = _whole_steps(entries)
        logged = _log_steps(client, run_id, steps, logged)
        del entries[: len(steps)]
    return logged


def _log_steps(client: MlflowClient, run_id: str, entries: Sequence[Mapping[str, float]], logged: int) -> int:
    """Write the steps after `logged`, of those done twice the last. Returns the last step that is there now."""
    new = {int(entry["step"]): entry for entry in entries}
    log_points(client, run_id, _points(entry for step, entry in new.items() if step > logged))
    return max(logged, *new)


def _whole_steps(entries: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The first entries that fit a call, so that of no step half is written."""
    taken, points = 0, 0
    while taken < len(entries) and (taken == 0 or points + len(entries[taken]) <= METRICS_AT_ONCE):
        points += len(entries[taken])
        taken += 1
    return list(entries[:taken])


def _points(entries: Iterable[Mapping[str, float]]) -> Iterator[Point]:
    """Lines of a metrics file."""
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "time"):
                yield name, value, int(entry["step"]), entry["time"]
