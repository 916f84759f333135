"""Where MLflow is, whether it answers, and how runs in it are found and written.

The embedded default keeps everything under the work directory: `mlflow.db` (SQLite) and `mlartifacts/`. Before anything
is asked of a server or database it is looked at for a few seconds: one that is down is a TrackingDownError, at once.
"""

import fcntl
import os
import re
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from jobs.common.version import JOB_TAG, add_jobs
from jobs.config.registry import SERVERS, check_tracking_uri
from pipelines.sources.storage import EXTRAS
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import complete_or_invisible

KEY = "fot.key"  # the tag that names a run, whichever server it is on
KIND = "fot.kind"
PATIENCE = 5.0  # seconds for a server or database to answer
METRICS_AT_ONCE, TAGS_AT_ONCE = 1000, 100  # MLflow's limits of a call
TAG_LENGTH, PARAM_LENGTH = 8000, 6000  # MLflow's limits in characters
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
Point = tuple[str, float, int, float]  # name, value, step, seconds since 1970


class TrackingDownError(UserError):
    """MLflow cannot be reached or written now."""


def tracking_uri(work_dir: Path, given: str | None = None) -> str:
    """The address given, else that of MLFLOW_TRACKING_URI, else the database in the work directory.

    Raises UserError where the environment's is none.
    """
    if given is not None:
        return given
    if from_environment := os.environ.get("MLFLOW_TRACKING_URI"):
        try:
            return check_tracking_uri(from_environment)
        except ValueError as error:
            raise UserError(f"MLFLOW_TRACKING_URI: {error}") from None
    return embedded_uri(work_dir)


def embedded_uri(work_dir: Path) -> str:
    return f"sqlite:///{work_dir.resolve() / 'mlflow.db'}"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite database. As SQLAlchemy reads it: a % stands for itself, options follow a ?."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def connect(uri: str) -> MlflowClient:
    """A client of what answers there; a SQLite database is made where there is none.

    Raises TrackingDownError.
    """
    shown, file = hide_credentials(uri), database_file(uri)
    try:
        if file is not None:
            _check_database(file)
        elif urlsplit(uri).scheme in SERVERS:
            _check_server(uri)
        else:
            parts = urlsplit(uri)
            port = parts.port or DATABASE_PORTS[parts.scheme.partition("+")[0]]
            socket.create_connection((str(parts.hostname), port), PATIENCE).close()
        with talking_to(uri):
            return MlflowClient(uri, uri)
    except (OSError, sqlite3.Error, MlflowException) as error:
        raise TrackingDownError(f"MLflow at {shown} cannot be used ({_reason(error)})") from None
    except ImportError as error:  # of a database's driver, or of a way to sign in
        raise TrackingDownError(f"MLflow at {shown} cannot be used ({error.name} is not installed)") from None


@contextmanager
def talking_to(uri: str) -> Iterator[None]:
    """What goes wrong with MLflow in the block is a TrackingDownError of one line, without credentials."""
    try:
        yield
    except BrokenPipeError:  # of who reads what is printed; a server's comes wrapped
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:  # requests' errors are OSErrors
        raise TrackingDownError(f"MLflow at {hide_credentials(uri)} cannot be used ({_reason(error)})") from error


@contextmanager
def files_in(place: str) -> Iterator[None]:
    """Around a call of MLflow's that reads or writes files in this place, and around nothing else: drivers of buckets
    raise whatever they like, and all of it is a TrackingDownError of one line."""
    try:
        yield
    except (MlflowException, SQLAlchemyError):  # of the server or database: `talking_to` tells
        raise
    except Exception as error:
        why = _drivers_reason(error, EXTRAS.get(place.partition("://")[0]))
        raise TrackingDownError(f"MLflow's files in {hide_credentials(place)} cannot be used ({why})") from None


def find_run(client: MlflowClient, experiment: str, key: str) -> Run | None:
    """The run with this key, of several the one that began first."""
    found, first = client.get_experiment_by_name(experiment), ["attributes.start_time ASC"]
    asked = f"tags.`{KEY}` = '{key}'"
    runs = client.search_runs([found.experiment_id], asked, max_results=1, order_by=first) if found else []
    return runs[0] if runs else None


def open_run(
    client: MlflowClient, work_dir: Path, experiment: str, key: str, name: str, began: float | None = None
) -> Run:
    """The run with this key, or a new one that `began` then (seconds since 1970) or now, in an experiment that comes
    back if it was deleted. Files of a run go to the server, and without one into the work directory."""
    with locked(work_dir / "outbox" / "open.lock"):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            served = urlsplit(client.tracking_uri).scheme in SERVERS
            try:
                client.create_experiment(experiment, None if served else (work_dir / "mlartifacts").resolve().as_uri())
            except MlflowException as error:  # by another process, meanwhile
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(experiment)
        elif found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if (run := find_run(client, experiment, key)) is not None:
            return run
        start = None if began is None else int(began * 1000)
        made = client.create_run(found.experiment_id, start_time=start, run_name=name, tags={KEY: key})
        run = find_run(client, experiment, key) or made
        if run.info.run_id != made.info.run_id:  # one from elsewhere, to where the lock does not reach, came first
            client.delete_run(made.info.run_id)
        return run


def log_facts(client: MlflowClient, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Write parameters and tags, cut where MLflow takes no more. Jobs are added to those that the run names already."""
    if JOB_TAG in tags:
        known = client.get_run(run_id).data.tags.get(JOB_TAG, "")
        tags = {**tags, JOB_TAG: add_jobs(known, tags[JOB_TAG])[-TAG_LENGTH:]}
    made_params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in params.items()]
    made_tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in tags.items()]
    for first in range(0, max(len(made_params), len(made_tags)), TAGS_AT_ONCE):
        part = slice(first, first + TAGS_AT_ONCE)
        client.log_batch(run_id, params=made_params[part], tags=made_tags[part])


def log_points(client: MlflowClient, run_id: str, points: Iterable[Point]) -> None:
    """Write metric points, in as few calls as may be."""
    made = [Metric(name, value, int(seconds * 1000), step) for name, value, step, seconds in points]
    for first in range(0, len(made), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=made[first : first + METRICS_AT_ONCE])


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes, which the system releases however the holder ends.

    Yields whether it is held: with `wait`, always.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _check_server(uri: str) -> None:
    """Whether a server answers, be it with a refusal: that comes again, and is then told, where something is asked."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(
        get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=PATIENCE, raise_on_status=False
    )
    if answer.status_code >= 500:
        raise ConnectionError(f"it answers {answer.status_code}")


def _check_database(file: Path) -> None:
    """Whether a SQLite database can be written. Makes it where there is none: complete, by one process alone."""
    if not file.exists():
        with locked(file.with_name(f"{file.name}.lock")):
            if not file.exists():
                _make_database(file)
    with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")


def _make_database(file: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with complete_or_invisible(file) as temporary:
        store = SqlAlchemyStore(f"sqlite:///{temporary}", (file.parent / "mlartifacts").as_uri())
        store.engine.dispose()


def _reason(error: Exception) -> str:
    """What is wrong, in a line: the innermost cause of what libraries wrap around it."""
    text = hide_credentials(str(error)).strip()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if "in header value" in text:  # and quotes it
        return "a token holds a line break: see MLFLOW_TRACKING_TOKEN"
    for sign in ("Connection refused", "timed out", "Name or service not known", "database is locked"):
        if sign in text:
            return sign
    return text.splitlines()[0] if text else type(error).__name__


def _drivers_reason(error: Exception, extra: str | None) -> str:
    """What is wrong with a bucket, by whose driver `extra` of ours brings. Not in its words, which may quote keys."""
    if isinstance(error, ImportError):
        return f"{error.name} is not installed" + (f": pip install 'fot[{extra}]'" if extra else "")
    if isinstance(error, OSError):
        return _reason(error)
    amazons = re.search(r"An error occurred \((\w+)\)", str(error))
    return amazons[1] if amazons else type(error).__name__
