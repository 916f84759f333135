"""`fot schedule serve`: what refuses to begin; and, slow, a real server whose schedules really fire."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.schedule import serve as module
from jobs.schedule.history import DIED, Firing, history_of
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
def add(fot, recipe: dict, write_recipe, work_dir: Path) -> Callable[..., Schedule]:
    """Adds the tiny recipe; `due`: as if a day ago."""
    recipe |= {"registry": {"promote": [{"metric": "perplexity/model", "most": 1e6}]}}

    def add(name: str, cron: str, *options: object, due: bool = False) -> Schedule:
        added = fot("schedule", "add", write_recipe(recipe), "--cron", cron, "--name", name, *options)
        assert added.returncode == 0, added.stdout
        schedule = find_schedule(work_dir, name)
        if due:
            schedule.changed(since=schedule.settings.since - timedelta(days=1)).write()
        return schedule

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
def test_cron_really_fires_and_prefect_shows_every_stage(add, serve, fot, port: int, work_dir: Path) -> None:
    schedule = add("minutely", "* * * * *")
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
def test_a_firing_that_fails_is_tried_again_and_shown(add, serve, corpus: Path, port: int) -> None:
    schedule = add("minutely", "* * * * *", "--retries", 1, "--retry-minutes", 0.05)
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
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_retry_that_waits_when_serving_ends_comes_at_the_next_start(
    add, serve, corpus: Path, port: int, sign: signal.Signals
) -> None:
    schedule = add("nightly", "0 2 * * *", "--retry-minutes", 600, due=True)
    aside = corpus.rename(corpus.with_name("aside"))
    server = serve()
    wait_for(lambda: "AwaitingRetry" in states(port), "a firing that waits for its next attempt")
    (failed,) = history_of(schedule)
    family = [server, *server.children(recursive=True)]
    server.send_signal(sign)
    wait_for(all_gone(family), "the end")
    aside.rename(corpus)
    serve()
    (made,) = wait_for(ended(schedule, "promoted"), "the next attempt")
    assert (failed.state, made.trigger, made.scheduled) == ("failed", "catch-up", failed.scheduled)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_has_a_training_take_a_checkpoint_from_which_the_next_start_goes_on(
    add, serve, recipe: dict, work_dir: Path
) -> None:
    recipe["finetune"] |= {"steps": 3000, "checkpoints": {"every": 3000}}
    schedule = add("nightly", "0 2 * * *", due=True)
    server = serve()
    trained = work_dir / "store" / "finetune"
    wait_for(lambda: any(path.stat().st_size for path in trained.glob("*.partial/metrics.jsonl")), "a training")
    server.terminate()
    wait_for(all_gone([server]), "the end")
    (cut,) = history_of(schedule)
    assert cut.state == "interrupted"
    step = re.fullmatch(r"stopped at step (\d+) of 3000, with a checkpoint.*", cut.reasons[0])
    assert step is not None, cut.reasons

    serve()
    (made,) = wait_for(ended(schedule, "promoted"), "the rest")
    assert (made.trigger, made.scheduled) == ("catch-up", cut.scheduled)
    (metrics,) = trained.glob("*/metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 3001))
    (log,) = (work_dir / "logs").glob("finetune-*/rank0.log")
    assert f"checkpoint step-{int(step[1]):08} restored" in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_comes_due_beside_a_firing_of_another_process_is_left_out(add, serve, port: int) -> None:
    schedule = add("minutely", "* * * * *")
    with schedule.lock():
        serve()
        wait_for(lambda: "Cancelled" in states(port), "a run that finds the schedule taken")
        assert history_of(schedule) == []
    wait_for(lambda: [each.state for each in history_of(schedule)][1:], "the next ones")
    left_out = history_of(schedule)[0]
    assert left_out.state == "missed"
    assert left_out.reasons[0].startswith("1 firing: an earlier one was not done yet")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_firing_that_dies_is_tried_again(add, serve, port: int) -> None:
    schedule = add("nightly", "0 2 * * *", due=True)
    serve()
    os.kill(wait_for(lambda: schedule.holder, "a firing"), signal.SIGKILL)
    (made,) = wait_for(ended(schedule, "promoted"), "the next attempt")
    (dead,) = ended(schedule, "interrupted")()
    assert (dead.reasons, made.scheduled) == ((DIED,), dead.scheduled)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_person_fires_in_prefects_pages_and_sees_it_stage_by_stage(add, serve, browser, port: int) -> None:
    schedule = add("nightly", "0 2 * * *")
    serve()
    browser.open(f"http://127.0.0.1:{port}/deployments")
    browser.click("nightly")
    browser.wait_for_texts("Concurrency Limit")
    browser.click("Run")
    browser.click("Quick run")
    browser.wait_for_texts("Run Deployment")
    browser.click("Run")
    (made,) = wait_for(ended(schedule, "promoted"), "a firing")
    assert made.trigger == "run-now"
    (run,) = [each for each in ask(port, "flow_runs") if each["state_type"] == "COMPLETED"]
    browser.open(f"http://127.0.0.1:{port}/runs/flow-run/{run['id']}")
    browser.wait_for_texts("Promoted")
    browser.click("Task Runs")
    browser.wait_for_texts("shards-", "finetune-", "report-")


@pytest.fixture
def postgres(monkeypatch) -> Iterator[None]:
    """A server of it, of this user's or of nobody's, whose database has what Prefect wants, in the environment."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        if os.environ.get("CI"):
            pytest.fail("Prefect's pages are to be kept in Postgres: install postgresql")
        pytest.skip("no Postgres here: Prefect's pages are not kept in it")
    programs, own = found[-1].parent, Path(tempfile.mkdtemp(dir="/tmp"))
    as_user = {"user": "nobody"} if os.getuid() == 0 else {}  # it refuses root
    if as_user:
        shutil.chown(own, "nobody")
    run = partial(subprocess.run, check=True, capture_output=True, cwd=own, **as_user)
    run([programs / "initdb", "-D", own / "data", "-U", "fot", "-A", "trust"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        own_port = free.getsockname()[1]
    place = [f"--port={own_port}", "--listen_addresses=127.0.0.1", f"--unix_socket_directories={own}"]
    server = subprocess.Popen([programs / "postgres", "-D", own / "data", *place], cwd=own, **as_user)
    try:
        at = ["-h", str(own), "-p", str(own_port), "-U", "fot"]
        wait_for(lambda: subprocess.run([programs / "pg_isready", *at], stdout=-3).returncode == 0, "Postgres")
        run([programs / "createdb", *at, "pages"])
        run([programs / "psql", *at, "pages", "-c", "CREATE EXTENSION pg_trgm"])
        url = f"postgresql+asyncpg://fot@127.0.0.1:{own_port}/pages"
        monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", url)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        shutil.rmtree(own)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prefects_pages_are_kept_in_postgres(postgres, add, serve, port: int, work_dir: Path) -> None:
    schedule = add("nightly", "0 2 * * *", due=True)
    serve()
    wait_for(ended(schedule, "promoted"), "a firing")
    wait_for(lambda: "Promoted" in states(port), "its state at Prefect's")
    assert not list((work_dir / "schedules" / "prefect").glob("*.db"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_goes_on_after_it_was_killed_and_fires_nothing_twice(add, serve, port: int) -> None:
    schedule = add("minutely", "* * * * *")
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
    assert "Crashed" in states(port)


def states(port: int) -> set[str]:
    """Of all runs, by Prefect's names."""
    return {each["state_name"] for each in ask(port, "flow_runs")}


def stages_of(port: int) -> set[str]:
    return {task["name"].rpartition("-")[0] for task in ask(port, "task_runs")}
