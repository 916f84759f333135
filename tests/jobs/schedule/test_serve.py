"""`fot schedule serve`: what refuses to begin; and, slow, a real server whose schedules really fire."""

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.schedule import serve as module
from jobs.schedule.history import Firing, history_of
from jobs.schedule.store import Schedule, find_schedule, server_of, serving

PATIENCE = 480.0


def test_without_prefect_it_says_what_to_install(fot_here, work_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused = fot_here("schedule", "serve")
    assert (refused.returncode, refused.stdout) == (
        2,
        "fot: fot schedule serve needs Prefect: pip install 'fot[schedule]'\n",
    )


def test_a_second_one_is_refused_in_one_line(fot_here, work_dir: Path) -> None:
    with serving(work_dir):
        refused = fot_here("schedule", "serve")
    assert (refused.returncode, refused.stdout) == (2, f"fot: {work_dir} is served already, by process {os.getpid()}\n")


def test_a_port_that_is_taken_is_one_line(fot_here, work_dir: Path, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        refused = fot_here("schedule", "serve", "--port", port)
    assert (refused.returncode, refused.stdout) == (2, f"fot: port {port} is taken: try --port with another one\n")


@pytest.fixture
def minutely(fot, recipe: dict, write_recipe, work_dir: Path) -> Callable[..., Schedule]:
    """Adds the tiny recipe, to fire every minute."""
    recipe |= {"registry": {"promote": [{"metric": "perplexity/model", "most": 1e6}]}}

    def add(*options: object) -> Schedule:
        path = write_recipe(recipe)
        added = fot("schedule", "add", path, "--cron", "* * * * *", "--name", "minutely", *options)
        assert added.returncode == 0, added.stdout
        return find_schedule(work_dir, "minutely")

    return add


@pytest.fixture
def serve(start_fot, port: int) -> Iterator[Callable]:
    """Starts `fot schedule serve`; what is left of it at the end is killed."""
    family: list[psutil.Process] = []

    def start() -> psutil.Process:
        process = start_fot("schedule", "serve", "--port", port)
        line = process.stdout.readline()
        assert line.startswith("firing the schedules of "), line
        family.append(psutil.Process(process.pid))
        return family[-1]

    yield start
    for process in family:
        if process.is_running():
            for child in [*process.children(recursive=True), process]:
                child.kill()


def wait_for(found: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if answer := found():
            return answer
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come in {PATIENCE:.0f} seconds")


def ended(schedule: Schedule, *states: str) -> Callable[[], list[Firing]]:
    return lambda: [each for each in history_of(schedule) if each.state in states]


def ask(port: int, what: str, **asked: object) -> list[dict]:
    """Prefect's answer."""
    body = json.dumps({"limit": 100, **asked}).encode()
    url = f"http://127.0.0.1:{port}/api/{what}/filter"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def all_gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_cron_really_fires_and_prefect_shows_every_stage(minutely, serve, fot, port: int, work_dir: Path) -> None:
    schedule = minutely()
    server = serve()
    made = wait_for(ended(schedule, "promoted"), "a firing")[0]
    assert (made.trigger in ("cron", "catch-up"), made.model) == (True, "models:/fot/tiny/1")
    assert made.scheduled is not None
    assert made.scheduled.second == 0

    def firing_of(name: str) -> Callable[[], list[dict]]:
        return lambda: [each for each in ask(port, "flow_runs") if each["state_name"] == name]

    (run,) = wait_for(firing_of("Promoted"), "its state at Prefect's")
    assert run["id"].replace("-", "").endswith(made.firing)
    tasks = ask(port, "task_runs", flow_runs={"id": {"any_": [run["id"]]}})
    assert {"shards", "finetune", "perplexity", "report"} <= {task["name"].rpartition("-")[0] for task in tasks}
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}

    skipped = wait_for(ended(schedule, "skipped"), "the next one")[0]
    assert (skipped.trigger, skipped.reasons) == ("cron", ("no new documents",))
    assert "active" in fot("schedule", "list").stdout
    assert fot("schedule", "serve", "--port", port).stdout.startswith(f"fot: {work_dir} is served already, by process")

    assert fot("schedule", "pause", "minutely").returncode == 0
    wait_for(lambda: not firing_of("Scheduled")(), "taking back what was to come")
    assert fot("schedule", "resume", "minutely").returncode == 0
    wait_for(firing_of("Scheduled"), "planning it again")
    wait_for(lambda: schedule.holder is None, "the end of the firing")
    assert fot("schedule", "remove", "minutely").returncode == 0
    wait_for(lambda: not ask(port, "deployments"), "forgetting it")

    family = [server, *server.children(recursive=True)]
    server.send_signal(signal.SIGTERM)
    wait_for(all_gone(family), "the end")
    assert server_of(work_dir) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_firing_that_fails_is_tried_again_and_shown(minutely, serve, corpus: Path, port: int) -> None:
    schedule = minutely("--retries", 1, "--retry-minutes", 0.05)
    corpus.unlink()
    serve()
    attempts = wait_for(lambda: (failed := ended(schedule, "failed")())[1:] and failed, "both attempts")
    assert attempts[0].firing == attempts[1].firing
    assert [each.attempt for each in attempts[:2]] == [1, 2]
    assert str(corpus) in attempts[0].reasons[0]
    shown = wait_for(
        lambda: [each for each in ask(port, "flow_runs") if each["state_name"] == "Failed"], "its state at Prefect's"
    )
    assert str(corpus) in shown[0]["state"]["message"]
    assert shown[0]["run_count"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_retry_that_waits_when_it_is_ended_comes_at_the_next_start(minutely, serve, corpus: Path) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=2)
    schedule = minutely("--cron", f"{soon.minute} {soon.hour} * * *", "--retry-minutes", 600)
    aside = corpus.rename(corpus.with_name("aside"))
    server = serve()
    (failed,) = wait_for(ended(schedule, "failed"), "a firing that fails")
    server.send_signal(signal.SIGTERM)
    wait_for(all_gone([server]), "the end")
    aside.rename(corpus)
    serve()
    (made,) = wait_for(ended(schedule, "promoted"), "the next attempt")
    assert (made.trigger, made.scheduled) == ("catch-up", failed.scheduled)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_goes_on_after_it_was_killed_and_fires_nothing_twice(minutely, serve, port: int) -> None:
    schedule = minutely()
    server = serve()
    wait_for(lambda: schedule.holder and "finetune" in stages_of(port), "a firing in its training")
    family = server.children(recursive=True)
    server.kill()
    wait_for(all_gone(family), "the end of all that it started")
    (cut,) = history_of(schedule)
    assert (cut.state, schedule.holder) == ("interrupted", None)

    serve()
    made = wait_for(ended(schedule, "promoted"), "a firing")[0]
    assert (made.trigger, made.model) == ("catch-up", "models:/fot/tiny/1")
    assert made.scheduled >= cut.scheduled
    wait_for(ended(schedule, "skipped"), "the next one")
    after = [each for each in history_of(schedule)[1:] if each.state != "missed"]
    scheduled = [each.scheduled for each in after]
    assert sorted(set(scheduled)) == scheduled
    states = {each["state_name"] for each in ask(port, "flow_runs")}
    assert "Crashed" in states


def stages_of(port: int) -> set[str]:
    return {task["name"].rpartition("-")[0] for task in ask(port, "task_runs")}
