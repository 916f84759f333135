"""`fot registry ...`: what was run and what came of it, in the terminal; MLflow's pages; what waits to be uploaded."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from jobs.cli.views.registry import curve, differing, lineage_lines, list_rows, metric_rows
from jobs.common.child import HOST, answers, end, interrupt_when_asked_to_end, is_taken
from jobs.common.terminal import print_lines, print_table
from jobs.config.registry import SERVERS, RunsPlace, check_tracking_uri
from jobs.config.settings import read_yaml, validated
from jobs.registry.record import GATE, REASONS
from jobs.registry.runs import children, find, histories, list_runs
from jobs.registry.server import KIND, connect, database_file, embedded_uri, files_in, talking_to, tracking_uri
from jobs.registry.sync import sync
from pipelines.workflow.credentials import hide_credentials
from pipelines.workflow.errors import UserError


def show_list(work_dir: Path, uri: str | None, name: str | None, asked: str | None) -> None:
    """Print the runs, the newest first."""
    with _registry(work_dir, uri) as client:
        runs = list_runs(client, name, asked)
    if not runs:
        print("no runs")
        return
    print_table("", *list_rows(runs))


def show_run(work_dir: Path, uri: str | None, asked: str) -> None:
    """Print all there is to know of a run, or of the run that made a model."""
    with _registry(work_dir, uri) as client:
        run = find(client, asked)
        tags = run.data.tags
        print_lines([f"{run.info.run_name}: {tags.get(KIND, 'run')} {run.info.run_id}, {run.info.status.lower()}"])
        print_table("", ("setting", "value"), sorted([*run.data.params.items(), *_own(tags)]))
        trainings, metrics = children(client, run), histories(client, run)
        losses = {"loss": metrics.pop("loss")} if "loss" in metrics else {}
        losses |= {f"loss of {child.info.run_name}": histories(client, child).get("loss", {}) for child in trainings}
        for what, history in losses.items():
            print_lines([f"{what}: {curve(history)}"])
        if tags.get(KIND) == "training":
            metrics = {name: {max(steps): steps[max(steps)]} for name, steps in metrics.items()}
        if metrics:
            print_table("", ("metric", "at", "value"), metric_rows(metrics))
        if GATE in tags:
            print_lines([f"gate: {tags[GATE]}", *(f"  {reason}" for reason in tags[REASONS].splitlines())])
        lineage = _artifact(client, run, "lineage.json")
        if lineage:
            recipe, manifest = (_artifact(client, run, name) for name in ("recipe.json", "manifest.json"))
            print_lines(["lineage", *(f"  {line}" for line in lineage_lines(lineage, recipe, manifest))])
        for child in trainings:
            print_lines([f"  training run {child.info.run_id}: {child.info.run_name}, {child.info.status.lower()}"])


def compare(work_dir: Path, uri: str | None, asked: Sequence[str]) -> None:
    """Print runs side by side: what they were told, what was measured, how they were trained."""
    if len(asked) < 2:
        raise UserError("fot registry compare: give two runs or more (`fot registry list` shows their ids)")
    with _registry(work_dir, uri) as client:
        runs = [find(client, each) for each in asked]
        metrics = [histories(client, run) for run in runs]
        losses = [_loss(client, run, own) for run, own in zip(runs, metrics, strict=True)]
    names = [f"{run.info.run_name} {run.info.run_id[:8]}" for run in runs]
    rows = differing([run.data.params for run in runs])
    print_table("settings that differ", ("setting", *names), rows) if rows else print("the same settings")
    shown = [
        {name: steps for name, steps in own.items() if run.data.tags.get(KIND) != "training"}
        or {name: {max(steps): steps[max(steps)]} for name, steps in own.items()}
        for run, own in zip(runs, metrics, strict=True)
    ]
    rows = metric_rows(shown[0], shown[1:])
    print_table("metrics (difference to the first)", ("metric", "at", *names), rows)
    for name, loss, own in zip(names, losses, metrics, strict=True):
        print_lines([name])
        print(f"  training loss  {curve(loss)}")
        if perplexity := own.get("perplexity/model"):
            print(f"  perplexity     {curve(perplexity)}")


def open_pages(work_dir: Path, uri: str | None, port: int) -> None:
    """MLflow's pages on this machine alone, until Ctrl-C. No process stays behind."""
    uri = _address(work_dir, uri)
    if uri.partition("://")[0] in SERVERS:
        connect(uri)
        print(f"MLflow's pages are at {hide_credentials(uri)}")
        return
    connect(uri)
    if is_taken(port):
        raise UserError(f"port {port} is taken, by other pages perhaps: try --port with another one")
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", (work_dir / "mlartifacts").resolve().as_uri()]
    interrupt_when_asked_to_end()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            if not answers(server, f"http://{HOST}:{port}/health"):
                log.seek(0)
                last = (log.read().decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
                why = hide_credentials(last)
                raise UserError(f"MLflow's pages do not start on port {port} ({why}): try --port with another one")
            print(f"MLflow's pages are at http://{HOST}:{port} (Ctrl-C ends them)", flush=True)
            server.wait()
            raise UserError("MLflow's pages ended by themselves: start them again")
        except KeyboardInterrupt:
            print("ended")
        finally:
            end(server)


def sync_all(work_dir: Path, uri: str | None) -> None:
    """Upload what waits in the outbox, and say what. To `uri`, or where each was to go: the credentials that entries do
    not hold are those of the recipe's address or of MLFLOW_TRACKING_URI."""
    _sync(work_dir, uri, None)


def sync_recipe(recipe: Path, uri: str | None) -> None:
    """As `sync_all`, of a recipe's work directory, whatever kind of recipe it is."""
    content = read_yaml(recipe)
    told = {name: content[name] for name in RunsPlace.model_fields if name in content}
    place = validated(RunsPlace, told, f"recipe {recipe}")
    _sync(Path(place.work_dir), uri, place.registry.tracking_uri)


def _sync(work_dir: Path, uri: str | None, recipes: str | None) -> None:
    if not work_dir.is_dir():
        raise UserError(f"{work_dir}: there is no such directory: give --work-dir DIR, where a recipe's work_dir is")
    to, known = None if uri is None else _checked(uri), [tracking_uri(work_dir)]
    if recipes is not None:
        known.append(recipes)
    done = 0
    for line in sync(work_dir.resolve(), to, known):
        print(line, flush=True)
        done += 1
    if not done:
        print(f"nothing waits in {work_dir / 'outbox'}")


def _address(work_dir: Path, uri: str | None) -> str:
    """The store asked for. Raises UserError where there is none: who reads makes none."""
    found = tracking_uri(work_dir) if uri is None else _checked(uri)
    file = database_file(found)
    if file is not None and not file.exists():
        what = f"{work_dir} holds no runs" if found == embedded_uri(work_dir) else f"there is no database {file}"
        raise UserError(f"{what}: give --work-dir DIR (where a recipe's work_dir is), or --uri URI")
    return found


def _checked(uri: str) -> str:
    """What --uri says. Raises UserError where it is no address."""
    try:
        return check_tracking_uri(uri)
    except ValueError as error:
        raise UserError(f"--uri: {error}") from None


@contextmanager
def _registry(work_dir: Path, uri: str | None) -> Iterator[MlflowClient]:
    address = _address(work_dir, uri)
    with talking_to(address):
        yield connect(address)


def _own(tags: Mapping[str, str]) -> list[tuple[str, str]]:
    """Our tags, but for those that have lines of their own."""
    return [(name, value) for name, value in tags.items() if name.startswith("fot.") and name not in (GATE, REASONS)]


def _artifact(client: MlflowClient, run: Run, name: str) -> dict[str, Any]:
    """A JSON file of a run, {} without."""
    with tempfile.TemporaryDirectory() as directory:
        with files_in(run.info.artifact_uri):
            if name not in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}:
                return {}
            fetched = client.download_artifacts(run.info.run_id, name, directory)
        return dict(json.loads(Path(fetched).read_text()))


def _loss(client: MlflowClient, run: Run, metrics: Mapping[str, Mapping[int, float]]) -> Mapping[int, float]:
    """A training's loss; of a run with trainings, that of the last one."""
    if "loss" in metrics:
        return metrics["loss"]
    trainings = children(client, run)
    return histories(client, trainings[-1]).get("loss", {}) if trainings else {}
