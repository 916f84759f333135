"""Runs as people ask for them: found by the beginning of an id or by a model, filtered, with all their numbers."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.common.version import JOB_TAG
from jobs.registry.models import find_version, model_address, registered_models
from jobs.registry.record import TRAININGS
from jobs.registry.server import KEY, KIND
from pipelines.workflow.errors import UserError

PAGE = 1000
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
    "!=": operator.ne,
}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FILTER = re.compile(rf"metric\s+(\S+?)(?:@(\d+))?\s*(>=|<=|!=|>|<|=)\s*({NUMBER})")
JOB_ID = re.compile(r"[A-Za-z0-9_.-]+")  # of any launcher's
OUR_JOB_ID = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{8}(-[0-9]+)?")
ID, SHORT_ID = re.compile(r"[0-9a-f]{4,32}"), re.compile(r"[0-9a-f]{1,3}")
LATEST = ("perplexity/model", "passkey/exact", "loss")  # what a line about a run shows, where it is measured


@dataclass(frozen=True)
class RunFacts:
    """A run as lists show it. `model`: its version's name, number and aliases, "" without. `start`: ms since 1970.
    `latest`: (step, value) of what was measured last.
    """

    run_id: str
    experiment: str
    name: str
    kind: str
    status: str
    start: int
    latest: Mapping[str, tuple[int, float]]
    model: str


def list_runs(client: MlflowClient, experiment: str | None, asked: str | None) -> list[RunFacts]:
    """Runs, the newest first. `asked`: "metric NAME@STEP >= VALUE", or a filter as MLflow has them."""
    keep, theirs = _filter(client, asked)
    experiments = {each.experiment_id: each.name for each in client.search_experiments()}
    wanted = [number for number, name in experiments.items() if experiment in (None, name)]
    if not wanted:
        raise UserError(f"--name {experiment}: there is no such experiment, but {', '.join(experiments.values())}")
    models = _models_by_run(client)
    try:
        runs = [run for run in _pages(client, wanted, theirs) if keep(run)]
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"--filter {asked}: {str(error).splitlines()[0]}") from None
    return [
        RunFacts(
            run_id=str(run.info.run_id),
            experiment=experiments[run.info.experiment_id],
            name=run.info.run_name or "",
            kind=run.data.tags.get(KIND, ""),
            status=run.info.status,
            start=run.info.start_time,
            latest=_latest(run),
            model=models.get(run.info.run_id, ""),
        )
        for run in runs
    ]


def find(client: MlflowClient, asked: str) -> Run:
    """The run whose id begins so, that a cluster's job made last (of one that came to none: its last training's), or
    that made the model's version. Raises UserError for none and for several."""
    everywhere = [each.experiment_id for each in client.search_experiments()]
    if JOB_ID.fullmatch(asked):
        alike = _pages(client, everywhere, f"tags.`{JOB_TAG}` LIKE '%{asked}%'")
        made = [run for run in alike if asked in run.data.tags[JOB_TAG].split()]
        if made:
            return next((run for run in made if run.data.tags.get(KIND) != "training"), made[0])
    if ID.fullmatch(asked):
        found = [run for run in _pages(client, everywhere, "") if run.info.run_id.startswith(asked)]
        if len(found) > 1:
            raise UserError(f"{asked} begins {len(found)} runs' ids: give more of it")
        if found:
            return found[0]
    try:
        return client.get_run(find_version(client, model_address(asked)).run_id)
    except UserError as error:
        if OUR_JOB_ID.fullmatch(asked):
            raise UserError(f"no run of job {asked} yet: `fot status {asked}` says how far it is") from None
        if ID.fullmatch(asked):
            raise UserError(f"{asked} is no run's id, nor a model: `fot registry list` shows what there is") from None
        if SHORT_ID.fullmatch(asked):
            raise UserError(
                f"{asked} is no model, and too short for a run's id: give four characters or more"
            ) from None
        raise error


def histories(client: MlflowClient, run: Run) -> dict[str, dict[int, float]]:
    """All metrics of a run: name -> {step: value}."""
    return {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in sorted(run.data.metrics)
    }


def children(client: MlflowClient, run: Run) -> list[Run]:
    """The trainings that led to a run, the first first: under whichever recipe's name they were made."""
    everywhere = [each.experiment_id for each in client.search_experiments()]
    keys = run.data.tags.get(TRAININGS, "").split()
    return [found for key in keys for found in _pages(client, everywhere, f"tags.`{KEY}` = '{key}'")]


def _latest(run: Run) -> dict[str, tuple[int, float]]:
    """The last step of the metrics that lists show, and the value there."""
    last = {metric.key: (metric.step, metric.value) for metric in run.data.to_proto().metrics}
    return {name: last[name] for name in LATEST if name in last}


def _pages(client: MlflowClient, experiments: list[str], asked: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(
            experiments, asked, max_results=PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _filter(client: MlflowClient, asked: str | None) -> tuple[Callable[[Run], bool], str]:
    """What a run must fulfil: here, and in MLflow's words."""
    if asked is None:
        return lambda run: True, ""
    if not asked.strip().startswith("metric "):
        return lambda run: True, asked
    found = FILTER.fullmatch(asked.strip())
    if found is None:
        raise UserError(f'--filter {asked}: write it as "metric passkey/exact@65536 >= 0.9"')
    name, step, compare, limit = found[1], found[2], OPERATORS[found[3]], float(found[4])

    def keep(run: Run) -> bool:
        if name not in run.data.metrics:
            return False
        if step is None:
            return compare(run.data.metrics[name], limit)
        history = client.get_metric_history(run.info.run_id, name)
        return any(compare(point.value, limit) for point in history if point.step == int(step))

    return keep, ""


def _models_by_run(client: MlflowClient) -> dict[str, str]:
    """'fot/tiny 3 (candidate, champion)' by the id of the run that made it."""
    made = {}
    for model in registered_models(client):
        held: dict[str, list[str]] = {}
        for alias, version in sorted(client.get_registered_model(model.name).aliases.items()):
            held.setdefault(str(version), []).append(alias)
        for version in client.search_model_versions(f"name = '{model.name}'"):
            aliases = held.get(str(version.version), [])
            shown = f"{model.name.replace('.', '/', 1)} {version.version}"
            made[version.run_id] = shown + (f" ({', '.join(aliases)})" if aliases else "")
    return made
