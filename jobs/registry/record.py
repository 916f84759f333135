"""An outcome as an MLflow run with everything that led to it, and as a version of a registered model.

The model `fot/NAME` is registered as `fot.NAME`, for MLflow refuses the slash. Every version gets the alias
`candidate`; `champion` only what passes the recipe's gate. An outcome is found again by its key: recording it once more
completes what is missing, and while MLflow is down it waits in the outbox.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.common.version import JOB_TAG
from jobs.config.registry import Condition, Registry
from jobs.registry.gate import Decision, Metrics, decide, metrics_by_name, passkey_length
from jobs.registry.outbox import Entry, Outbox, settled, within
from jobs.registry.server import (
    KIND,
    TAG_LENGTH,
    Point,
    TrackingDownError,
    connect,
    embedded_uri,
    files_in,
    find_run,
    locked,
    log_facts,
    log_points,
    open_run,
    talking_to,
    tracking_uri,
)
from jobs.registry.tracking import RUN, TrainingFacts, upload_training
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

CANDIDATE, CHAMPION = "candidate", "champion"
GATE, REASONS, PASSKEY = "fot.gate", "fot.gate_reasons", "fot.passkey_90"
CONTENT, TIME = "fot.content", "fot.time"  # of a version: the hash of its model, and when it was measured last
VERSION, TRAININGS = "fot.version", "fot.trainings"  # of a run: its model's, and the keys of what trained it
PROMOTED, NOT_PROMOTED = "promoted", "not promoted"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DEFAULT = Registry()
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"


@dataclass(frozen=True)
class Outcome:
    """What a run is about. `key` identifies it: recording the same key again continues the same run.

    `metrics`: (name, value, step, seconds since 1970). `artifacts`: files by the path that MLflow shows them under,
    which ends with the file's name. `model`: a Hugging Face directory; None where the run is of evaluations alone.
    `trainings`: the outputs of the stages that trained it, whose runs become children; those without a training.json
    are passed over. `content`: the hash of the model, which is one version however many outcomes come to it.
    """

    key: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[Point]
    artifacts: Mapping[str, Path]
    model: Path | None
    trainings: Sequence[Path]
    content: str | None = None

    @property
    def time(self) -> str:
        """When the last of it was measured; the later time is the greater text."""
        newest = max((seconds for *_, seconds in self.metrics), default=0.0)
        return datetime.fromtimestamp(newest, UTC).isoformat(timespec="microseconds")


def registered_name(name: str) -> str:
    """What MLflow calls the model of a recipe."""
    return f"fot.{name}"


def register(outcome: Outcome, work_dir: Path, registry: Registry = DEFAULT) -> dict[str, str | None]:
    """As `record`, of an outcome that may have been recorded: what MLflow has of it is looked up and left as it is, but
    that it has now come of this job, too."""
    uri = tracking_uri(work_dir, registry.tracking_uri)
    try:
        with talking_to(uri):
            known = _recorded(client := connect(uri), outcome)
            if known is not None:
                jobs = {tag: value for tag, value in outcome.tags.items() if tag == JOB_TAG}
                log_facts(client, str(known["run_id"]), {}, jobs)
    except TrackingDownError:
        known = None
    return known or record(outcome, work_dir, registry)


def record(outcome: Outcome, work_dir: Path, registry: Registry = DEFAULT) -> dict[str, str | None]:
    """Record the outcome as a finished run and, where it has a model, as a version that the gate has judged.

    Returns {"run_id", "model", "version", "gate"}: all but the model's name are None while MLflow is down; then an
    entry in the outbox holds the outcome, and one line says so. Raises UserError for weights that are no safetensors.
    """
    if outcome.model is not None:
        check_safetensors(outcome.model)
    uri, outbox = tracking_uri(work_dir, registry.tracking_uri), Outbox(work_dir)
    try:
        recorded = upload(outcome, work_dir, uri, registry.promote)
    except TrackingDownError as error:
        outbox.keep(outcome.key, _entry(outcome, work_dir, uri, registry.promote))
        say(f"{error}: the results of {outcome.name} are kept, `fot registry sync --work-dir {work_dir}` uploads them")
        name = None if outcome.model is None else registered_name(outcome.name)
        return {"run_id": None, "model": name, "version": None, "gate": None}
    outbox.remove(outcome.key)
    return recorded


def upload(outcome: Outcome, work_dir: Path, uri: str, conditions: Sequence[Condition] = ()) -> dict[str, str | None]:
    """As `record`, but raises TrackingDownError while MLflow is down."""
    outbox = Outbox(work_dir)
    with locked(work_dir / "outbox" / "registry.lock"), talking_to(uri):
        client = connect(uri)
        run = open_run(client, work_dir, outcome.name, outcome.key, outcome.name)
        run_id = str(run.info.run_id)
        trainings = _trainings(outcome)
        for key, training in trainings.items():
            with locked(outbox.lock_of(key)):
                child = upload_training(work_dir, uri, training, "FINISHED")
                outbox.remove(key)
            if PARENT not in client.get_run(child).data.tags:
                client.set_tag(child, PARENT, run_id)
        metrics = metrics_by_name(outcome.metrics)
        tags = dict(outcome.tags)
        if (longest := passkey_length(metrics)) is not None:
            tags[PASSKEY] = str(longest)
        made_by = {TRAININGS: " ".join(trainings)} if trainings else {}
        log_facts(client, run_id, outcome.params, {KIND: "recipe", **tags, **made_by})
        _log_metrics(client, run, outcome.metrics)
        for name, path in outcome.artifacts.items():
            assert PurePosixPath(name).name == path.name, f"{path} cannot be shown as {name}"
            folder = str(PurePosixPath(name).parent)
            with files_in(run.info.artifact_uri):
                client.log_artifact(run_id, str(path), None if folder == "." else folder)
        model = version = gate = decision = None
        if outcome.model is not None:
            decision, model = decide(conditions, metrics), registered_name(outcome.name)
            version = _model_version(client, run, outcome)
            gate = _pass_gate(client, run, model, version, decision, tags, outcome.time)
        client.set_tag(run_id, NOTE, _summary(outcome, metrics, version, decision))
        client.set_terminated(run_id, "FINISHED")
    return {"run_id": run_id, "model": model, "version": version, "gate": gate}


def check_safetensors(model: Path) -> None:
    """Raises UserError where a model's directory holds weights that would have to be unpickled, or none at all."""
    if not model.is_dir():
        raise UserError(f"{model} is no directory: a model to register is a Hugging Face directory")
    files = sorted(path for path in model.rglob("*") if path.is_file())
    if pickled := [path for path in files if path.suffix in PICKLES]:
        raise UserError(
            f"{pickled[0]} is pickled, which runs whatever code is in it: registered models are safetensors alone, "
            f"remove it or save the model with save_pretrained"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{model} holds no safetensors: registered models are Hugging Face directories with weights")


def read_entry(entry: Entry, work_dir: Path) -> tuple[Outcome, tuple[Condition, ...]]:
    """An outcome, and what its recipe asks of a champion, from the outbox. Raises UserError where a file is gone."""
    kept = entry["outcome"]
    outcome = Outcome(
        key=entry["key"],
        name=kept["name"],
        tags=kept["tags"],
        params=kept["params"],
        metrics=[(name, value, step, seconds) for name, value, step, seconds in kept["metrics"]],
        artifacts={name: settled(path, work_dir) for name, path in kept["artifacts"].items()},
        model=None if kept["model"] is None else settled(kept["model"], work_dir),
        trainings=[settled(path, work_dir) for path in kept["trainings"]],
        content=kept["content"],
    )
    for path in (*outcome.artifacts.values(), *([outcome.model] if outcome.model else [])):
        Outbox(work_dir).check(path, outcome.key)
    return outcome, tuple(Condition.model_validate(condition) for condition in entry["promote"])


def _entry(outcome: Outcome, work_dir: Path, uri: str, conditions: Sequence[Condition]) -> Entry:
    kept = {
        "name": outcome.name,
        "tags": dict(outcome.tags),
        "params": dict(outcome.params),
        "metrics": [list(point) for point in outcome.metrics],
        "artifacts": {name: within(path, work_dir) for name, path in outcome.artifacts.items()},
        "model": None if outcome.model is None else within(outcome.model, work_dir),
        "trainings": [within(path, work_dir) for path in outcome.trainings],
        "content": outcome.content,
    }
    promote = [condition.model_dump(mode="json") for condition in conditions]
    where = None if uri == embedded_uri(work_dir) else hide_credentials(uri)
    return {"kind": "outcome", "time": outcome.time, "outcome": kept, "promote": promote, "uri": where}


def _trainings(outcome: Outcome) -> dict[str, Path]:
    """The outputs of its trainings by their runs' keys."""
    return {TrainingFacts.read(path).key: path for path in outcome.trainings if (path / RUN).exists()}


def _log_metrics(client: MlflowClient, run: Run, metrics: Sequence[Point]) -> None:
    there = {
        name: {point.step for point in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics
    }
    new = [(name, value, step, seconds) for name, value, step, seconds in metrics if step not in there.get(name, ())]
    log_points(client, run.info.run_id, new)


def _recorded(client: MlflowClient, outcome: Outcome) -> dict[str, str | None] | None:
    """What `record` returned, if MLflow has all of it."""
    run = find_run(client, outcome.name, outcome.key)
    facts = [TrainingFacts.read(path) for path in _trainings(outcome).values()]
    for each in (run, *(find_run(client, training.experiment, training.key) for training in facts)):
        if each is None or each.info.status != "FINISHED":
            return None
    assert run is not None
    made: dict[str, str | None] = {"run_id": run.info.run_id, "model": None, "version": None, "gate": None}
    if outcome.model is None:
        return made
    model, version, gate = registered_name(outcome.name), run.data.tags.get(VERSION), run.data.tags.get(GATE)
    if gate is None or version not in {str(each.version) for each in _versions(client, model)}:
        return None
    return {**made, "model": model, "version": version, "gate": gate}


def _versions(client: MlflowClient, model: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{model}'"))


def _model_version(client: MlflowClient, run: Run, outcome: Outcome) -> str:
    """The version that this run made, or that another one made of the same content; a new one without."""
    model, run_id = registered_name(outcome.name), str(run.info.run_id)
    try:
        client.create_registered_model(model, description=f"The recipe {outcome.name}: models:/fot/{outcome.name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    content = {} if outcome.content is None else {CONTENT: outcome.content}
    for version in _versions(client, model):
        if version.run_id == run_id or (content and version.tags.get(CONTENT) == outcome.content):
            return str(version.version)
    with files_in(run.info.artifact_uri):
        client.log_artifacts(run_id, str(outcome.model), "model")
    source, described = f"{run.info.artifact_uri}/model", f"Of the recipe {outcome.name}, run {run_id}."
    return str(client.create_model_version(model, source, run_id, tags=content, description=described).version)


def _pass_gate(
    client: MlflowClient,
    run: Run,
    model: str,
    version: str,
    decision: Decision,
    tags: Mapping[str, str],
    time: str,
) -> str:
    """Give the version its aliases, and tell run and version why. Done once a run: an alias moved by hand later stays.

    What was measured at an earlier `time` than what is there, for it waited, changes nothing of that. Returns
    "promoted" or "not promoted".
    """
    run_id, known = str(run.info.run_id), run.data.tags
    if known.get(VERSION) == version and GATE in known:
        return str(known[GATE])
    gate = PROMOTED if decision.promote else NOT_PROMOTED
    told = {"gate": gate, "model": model, "version": version, "reasons": list(decision.reasons)}
    with files_in(run.info.artifact_uri):
        client.log_dict(run_id, told, "gate.json")
    judged = {GATE: gate, REASONS: "\n".join(decision.reasons)}
    if time >= _time(client, model, version):
        for name, value in {**tags, **judged, TIME: time}.items():
            client.set_model_version_tag(model, version, name, value[:TAG_LENGTH])
    for alias in (CANDIDATE, CHAMPION) if decision.promote else (CANDIDATE,):
        holder = client.get_registered_model(model).aliases.get(alias)
        if holder is None or (time, int(version)) > (_time(client, model, holder), int(holder)):
            client.set_registered_model_alias(model, alias, version)
    log_facts(client, run_id, {}, {VERSION: version, **judged})
    return gate


def _time(client: MlflowClient, model: str, version: str) -> str:
    """When the version was measured last; "" for one that was not told yet."""
    return str(client.get_model_version(model, version).tags.get(TIME, ""))


def _summary(outcome: Outcome, metrics: Metrics, version: str | None, decision: Decision | None) -> str:
    """The run's description on MLflow's page, in Markdown: the gate, and a table of metrics by tokens of context."""
    lines = [f"**{outcome.name}**" + (f", version {version} of `models:/fot/{outcome.name}`" if version else ""), ""]
    if decision is not None:
        lines += [f"Gate: {PROMOTED if decision.promote else NOT_PROMOTED}", ""]
        lines += [*(f"- {reason}" for reason in decision.reasons), ""]
    shown = {name: metrics[name] for name in sorted(metrics) if name.startswith(("perplexity/", "passkey/exact"))}
    if shown:
        steps = sorted({step for values in shown.values() for step in values})
        rows = [("tokens", *map(str, steps)), ("---", *("---:" for _ in steps))]
        for name, values in shown.items():
            rows.append((name, *(f"{values[step]:.4g}" if step in values else "" for step in steps)))
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)[:TAG_LENGTH]
