"""An outcome as an MLflow run with everything that led to it, and as a version of a registered model.

The model `fot/NAME` is registered as `fot.NAME`, for MLflow refuses the slash. Every version gets the alias
`candidate`; `champion` only what passes the recipe's gate. An outcome is found again by its key: recording it once more
completes what is missing, and while MLflow is down it waits in the outbox.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from jobs.registry.config import Condition, Registry, hide_credentials
from jobs.registry.gate import Decision, Metrics, decide, metrics_by_name, passkey_length
from jobs.registry.outbox import Entry, Outbox, settled, within
from jobs.registry.server import (
    KIND,
    TAG_LENGTH,
    Point,
    TrackingDownError,
    connect,
    embedded_uri,
    find_run,
    locked,
    log_facts,
    log_points,
    open_run,
    talking_to,
    tracking_uri,
)
from jobs.tracking import RUN, upload_training
from pipelines.errors import UserError
from pipelines.progress import say

CANDIDATE, CHAMPION = "candidate", "champion"
GATE, REASONS, PASSKEY = "fot.gate", "fot.gate_reasons", "fot.passkey_90"
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
    are passed over.
    """

    key: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    metrics: Sequence[Point]
    artifacts: Mapping[str, Path]
    model: Path | None
    trainings: Sequence[Path]


def registered_name(name: str) -> str:
    """What MLflow calls the model of a recipe."""
    return f"fot.{name}"


def register(outcome: Outcome, work_dir: Path, registry: Registry = DEFAULT) -> dict[str, str | None]:
    """As `record`, of an outcome that may have been recorded: what MLflow has of it is looked up and left as it is."""
    uri = tracking_uri(work_dir, registry.tracking_uri)
    try:
        with talking_to(uri):
            known = _recorded(connect(uri), outcome)
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
        for training in outcome.trainings:
            if (training / RUN).exists():
                child = upload_training(work_dir, uri, training, "FINISHED")
                client.set_tag(child, PARENT, run_id)
                outbox.remove(json.loads((training / RUN).read_text())["key"])
        log_facts(client, run_id, outcome.params, {KIND: "recipe", **outcome.tags})
        _log_metrics(client, run, outcome.metrics)
        for name, path in outcome.artifacts.items():
            assert PurePosixPath(name).name == path.name, f"{path} cannot be shown as {name}"
            folder = str(PurePosixPath(name).parent)
            client.log_artifact(run_id, str(path), None if folder == "." else folder)
        metrics = metrics_by_name(outcome.metrics)
        model = version = gate = None
        if outcome.model is not None:
            decision, model = decide(conditions, metrics), registered_name(outcome.name)
            version = _model_version(client, run, outcome, metrics)
            gate = _pass_gate(client, run_id, model, version, decision)
        client.set_tag(run_id, NOTE, _summary(outcome, metrics, version))
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
    """An outcome, and what its recipe asks of a champion, from the outbox."""
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
    )
    for path in (*outcome.artifacts.values(), *([outcome.model] if outcome.model else [])):
        if not path.exists():
            raise UserError(f"{path} is gone, which {outcome.name} ({outcome.key}) needs: run its recipe again")
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
    }
    promote = [condition.model_dump(mode="json") for condition in conditions]
    where = None if uri == embedded_uri(work_dir) else hide_credentials(uri)
    return {"kind": "outcome", "outcome": kept, "promote": promote, "uri": where}


def _log_metrics(client: MlflowClient, run: Run, metrics: Sequence[Point]) -> None:
    there = {
        name: {point.step for point in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics
    }
    new = [(name, value, step, seconds) for name, value, step, seconds in metrics if step not in there.get(name, ())]
    log_points(client, run.info.run_id, new)


def _versions(client: MlflowClient, model: str, run_id: str) -> list[str]:
    """The versions of a model that a run made: one, if any."""
    found = client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
    return [str(version.version) for version in found]


def _recorded(client: MlflowClient, outcome: Outcome) -> dict[str, str | None] | None:
    """What `record` returned, if MLflow has all of it."""
    run = find_run(client, outcome.name, outcome.key)
    if run is None or run.info.status != "FINISHED":
        return None
    made: dict[str, str | None] = {"run_id": run.info.run_id, "model": None, "version": None, "gate": None}
    if outcome.model is None:
        return made
    model = registered_name(outcome.name)
    versions = _versions(client, model, run.info.run_id)
    gate = client.get_model_version(model, versions[0]).tags.get(GATE) if versions else None
    return {**made, "model": model, "version": versions[0], "gate": gate} if gate is not None else None


def _model_version(client: MlflowClient, run: Run, outcome: Outcome, metrics: Metrics) -> str:
    model, run_id = registered_name(outcome.name), str(run.info.run_id)
    try:
        client.create_registered_model(model, description=f"The recipe {outcome.name}: models:/fot/{outcome.name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if existing := _versions(client, model, run_id):
        return existing[0]
    client.log_artifacts(run_id, str(outcome.model), "model")
    tags = {name: value[:TAG_LENGTH] for name, value in outcome.tags.items()}
    if (longest := passkey_length(metrics)) is not None:
        tags[PASSKEY] = str(longest)
        client.set_tag(run_id, PASSKEY, str(longest))
    source, described = f"{run.info.artifact_uri}/model", f"Of the recipe {outcome.name}, run {run_id}."
    return str(client.create_model_version(model, source, run_id, tags=tags, description=described).version)


def _pass_gate(client: MlflowClient, run_id: str, model: str, version: str, decision: Decision) -> str:
    """Give the version its aliases and tell run and version why. Done once: an alias moved by hand later stays.

    Returns "promoted" or "not promoted".
    """
    if (known := client.get_model_version(model, version).tags.get(GATE)) is not None:
        return str(known)
    gate = PROMOTED if decision.promote else NOT_PROMOTED
    reasons = "\n".join(decision.reasons)[:TAG_LENGTH]
    told = {"gate": gate, "model": model, "version": version, "reasons": list(decision.reasons)}
    client.log_dict(run_id, told, "gate.json")
    log_facts(client, run_id, {}, {GATE: gate, REASONS: reasons})
    client.set_model_version_tag(model, version, REASONS, reasons)
    for alias in (CANDIDATE, CHAMPION) if decision.promote else (CANDIDATE,):
        holder = client.get_registered_model(model).aliases.get(alias, "0")
        if int(version) > int(holder):  # an outcome that waited comes after newer ones
            client.set_registered_model_alias(model, alias, version)
    client.set_model_version_tag(model, version, GATE, gate)
    return gate


def _summary(outcome: Outcome, metrics: Metrics, version: str | None) -> str:
    """The run's description on MLflow's page, in Markdown."""
    lines = [f"**{outcome.name}**" + (f", version {version} of `models:/fot/{outcome.name}`" if version else ""), ""]
    for name in sorted(metrics):
        if name.startswith(("perplexity/", "passkey/exact")):
            lines.append(f"- {name}: " + ", ".join(f"{metrics[name][at]:.4g} at {at}" for at in sorted(metrics[name])))
    return "\n".join(lines)[:TAG_LENGTH]
