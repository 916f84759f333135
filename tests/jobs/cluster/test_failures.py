"""What fails under a submitted job: nodes in every stage, the head, the dashboard, the tracking server. The job ends
right, and its user sees what happened.

pytest tests/jobs/cluster/test_failures.py -m slow -s                     # prints what was seen
SERVER_AWAY=600 pytest ... -k dashboard_and_tracking_server_away      # ten minutes without tracking server
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

from jobs.cli.commands.cluster import SubmitRequest, submit
from jobs.cluster.dashboard import Dashboard, NoJobError
from jobs.config.train_spec import METRICS
from jobs.train.metrics import last_metrics, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.usefixtures("in_a_directory_of_its_own")]
TRAININGS = ("base", "finetune")
STAGES = ("shards", *TRAININGS, "perplexity")
DASHBOARD_AWAY = 60  # seconds
SERVER_AWAY = float(os.environ.get("SERVER_AWAY", "60"))  # the tracking server's, at least the dashboard's


@pytest.fixture
def path(recipe, write_recipe, corpus: Path) -> Path:
    """A recipe whose stages last some seconds each."""
    draw = random.Random(0)
    texts = ("".join(draw.choices("abcdefgh     ", k=500_000)) for _ in range(40))
    corpus.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    recipe["data"]["task_bytes"] = 1_000_000
    recipe["base"]["pretrain"]["training"] |= {"steps": 200, "checkpoints": {"every": 20}}
    recipe["finetune"] |= {"steps": 400, "checkpoints": {"every": 20}}
    recipe["evaluation"] = {"perplexity": {"contexts": [1, 2, 4, 8, 16, 32, 64], "windows": 200}, "passkey": None}
    return write_recipe(recipe)


@pytest.fixture
def expected(path: Path, fot, tmp_path: Path) -> dict[str, object]:
    """What comes of the recipe where nothing fails: run without a cluster."""
    answer = fot("run", path, "--set", "work_dir=undisturbed")
    assert answer.returncode == 0, answer.stdout
    return results(tmp_path / "undisturbed")


def results(work_dir: Path) -> dict[str, object]:
    made = {
        stage: next(found for found in (work_dir / "store" / stage).iterdir() if not found.suffix) for stage in STAGES
    }
    losses = {
        stage: [(entry["step"], entry["loss"]) for entry in read_metrics(made[stage] / METRICS)] for stage in TRAININGS
    }
    points = json.loads((made["perplexity"] / "result.json").read_text())["points"]
    return {"keys": {stage: path.name for stage, path in made.items()}, "losses": losses, "points": points}


def submit_and_leave(path: Path, address: str, *overrides: str) -> str:
    submit(SubmitRequest(path, overrides, address))
    return Dashboard(address).jobs()[0].id


def wait_until(holds: Callable[[], bool], dashboard: Dashboard, job_id: str) -> None:
    until = time.monotonic() + 900
    while not holds():
        assert not dashboard.job(job_id).has_ended, dashboard.log(job_id)
        assert time.monotonic() < until, dashboard.log(job_id)
        time.sleep(0.2)


def is_in(stage: str, work_dir: Path) -> bool:
    """Whether it has begun and not ended; a training, whether it has made 30 steps."""
    for begun in (work_dir / "store" / stage).glob("*.partial"):
        last = last_metrics(begun / METRICS)
        return last is not None and last["step"] >= 30 if stage in TRAININGS else any(begun.iterdir())
    return False


def is_done(stage: str, work_dir: Path) -> bool:
    return any(not found.suffix for found in (work_dir / "store" / stage).glob("*"))


@contextmanager
def following(address: str, job_id: str, lines: list[str]) -> Iterator[subprocess.Popen]:
    """What its user sees: `fot logs JOB -f`."""
    command = [str(Path(sys.executable).with_name("fot")), "logs", job_id, "-f", "--address", address]
    user = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield user
        lines += user.communicate(timeout=900)[0].splitlines()
    finally:
        user.kill()


def test_a_node_killed_in_every_stage(expected, cluster, path: Path, tmp_path: Path) -> None:
    dashboard, work_dir, seen = Dashboard(cluster.address), tmp_path / "runs", []
    began = time.monotonic()
    job_id = submit_and_leave(path, cluster.address)
    lines: list[str] = []
    with following(cluster.address, job_id, lines):
        for stage in STAGES:
            wait_until(partial(is_in, stage, work_dir), dashboard, job_id)
            time.sleep(2)
            assert is_in(stage, work_dir), "the kill came too late to matter"
            cluster.kill(cluster.nodes.pop(0))
            killed = time.monotonic()
            cluster.add_node(1)
            wait_until(partial(is_done, stage, work_dir), dashboard, job_id)
            seen.append(f"{stage}: killed at {killed - began:.0f} s, done {time.monotonic() - killed:.0f} s later")
    assert dashboard.job(job_id).state == "SUCCEEDED", lines
    print("", *seen, *lines, sep="\n")
    assert not any("cannot be used" in line for line in lines)
    assert results(work_dir) == expected


def test_the_head_killed_under_a_running_job(expected, cluster, path: Path, tmp_path: Path) -> None:
    dashboard, work_dir = Dashboard(cluster.address), tmp_path / "runs"
    job_id = submit_and_leave(path, cluster.address)
    wait_until(partial(is_in, "finetune", work_dir), dashboard, job_id)
    lines: list[str] = []
    with following(cluster.address, job_id, lines) as user:
        time.sleep(3)
        for process in (cluster.head, *cluster.nodes):
            cluster.kill(process)
        cluster.nodes.clear()
        cluster.start_head()
        for _ in range(2):
            cluster.add_node(1)
    assert user.returncode == 2
    assert "was started anew and no longer knows job" in lines[-1]
    with pytest.raises(NoJobError, match=f"no job {job_id}"):
        dashboard.job(job_id)
    submit(SubmitRequest(path, (), cluster.address, log=True))
    log = dashboard.log(job_id)
    print("", *lines, log, sep="\n")
    assert "base found" in log
    assert results(work_dir) == expected


def test_dashboard_and_tracking_server_away(cluster, path: Path, tmp_path: Path, tracking_server) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe["registry"] = {"tracking_uri": tracking_server.uri}
    recipe["base"]["pretrain"]["training"]["steps"] = int(100 * SERVER_AWAY)
    path.write_text(yaml.safe_dump(recipe))
    dashboard, work_dir = Dashboard(cluster.address), tmp_path / "runs"
    tracking_server.start()
    job_id = submit_and_leave(path, cluster.address)
    wait_until(partial(is_in, "base", work_dir), dashboard, job_id)
    children = psutil.Process(cluster.head.pid).children(recursive=True)
    pages = next(child for child in children if any("dashboard.py" in part for part in child.cmdline()))
    lines: list[str] = []
    with following(cluster.address, job_id, lines):
        time.sleep(5)
        tracking_server.kill()
        pages.send_signal(signal.SIGSTOP)
        time.sleep(DASHBOARD_AWAY)
        pages.send_signal(signal.SIGCONT)
        time.sleep(SERVER_AWAY - DASHBOARD_AWAY)
        tracking_server.start()
        assert not is_done("base", work_dir), "they were back too late to matter"
    print("", *lines, sep="\n")
    for said in ("does not answer", "answers again", "the training goes on and tries again"):
        assert any(said in line for line in lines), said
    assert dashboard.job(job_id).state == "SUCCEEDED"
    client = mlflow.MlflowClient(tracking_server.uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 3
    for stage, losses in results(work_dir)["losses"].items():
        history = client.get_metric_history(runs[f"tiny: {stage}"].info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == losses
