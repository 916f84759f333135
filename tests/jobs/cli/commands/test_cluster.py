"""The commands, on a real Ray head; and what they refuse before they start anything."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.cli.commands import cluster as commands
from jobs.cli.commands.cluster import SubmitRequest, resume, show_job, show_jobs, show_log, stop, submit
from jobs.cluster import package, watch
from jobs.cluster.dashboard import Dashboard, NoJobError
from jobs.cluster.nodes import look_at
from jobs.cluster.preflight import CHECKED
from jobs.cluster.progress import read_progress
from jobs.cluster.watch import was_checked
from jobs.common.stop import StoppedError
from jobs.registry.runs import find
from jobs.registry.server import connect, embedded_uri
from jobs.train.metrics import read_metrics
from pipelines.workflow.errors import UserError

pytestmark = pytest.mark.usefixtures("in_a_directory_of_its_own")


def test_a_tag_and_an_owner_are_looked_at_before_anything_is_asked(recipe, write_recipe) -> None:
    path = write_recipe(recipe)
    with pytest.raises(UserError, match="--tag novalue: write it as key=value"):
        submit(SubmitRequest(path, tags=["novalue"]))
    with pytest.raises(UserError, match="holds credentials"):
        submit(SubmitRequest(path, tags=["bucket=s3://me:secret@b"]))


def test_no_jobs_are_said_to_be_none(serve, ray_pages, details, capsys) -> None:
    answers, _ = serve(ray_pages)
    show_jobs(answers.address)
    assert "no jobs yet" in capsys.readouterr().err
    answers.pages["/api/jobs/"] = [details("tiny-1"), details("tiny-2", "FAILED", driver_exit_code=2)]
    show_jobs(answers.address, owner="bob")
    assert "none of the jobs" in capsys.readouterr().err
    show_jobs(answers.address, owner="ann", name="tiny")
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["job", "name", "owner", "state", "since", "duration", "tags"]
    assert "failed with exit code 2" in rows[1]
    assert rows[0].endswith("project=code")


def test_the_same_recipe_with_other_code_is_not_run_beside_itself(
    serve, ray_pages, details, recipe, write_recipe
) -> None:
    path = write_recipe(recipe)
    running = details("tiny-1")
    running["metadata"]["fot.recipe"] = package.make_submission(path, (), None).text
    answers, _ = serve({**ray_pages, "/api/jobs/": [running]})
    with pytest.raises(UserError, match=r"job tiny-1 of ann runs the same recipe \(running\)"):
        submit(SubmitRequest(path, address=answers.address))
    assert {method for method, _ in answers.asked} == {"GET"}


def test_a_job_that_runs_is_not_run_again_and_one_that_ended_is_not_stopped(serve, ray_pages, details, capsys) -> None:
    jobs = {"tiny-1": details("tiny-1"), "old-1": details("old-1", "SUCCEEDED")}
    jobs["old-1"]["metadata"]["fot.recipe"] = "name: old\n"
    answers, _ = serve(
        {**ray_pages, "/api/jobs/": list(jobs.values()), **{f"/api/jobs/{i}": j for i, j in jobs.items()}}
    )
    with pytest.raises(UserError, match="`fot stop tiny-1`"):
        resume("tiny-1", answers.address)
    stop("old-1", answers.address)
    assert "job old-1 has ended already: succeeded" in capsys.readouterr().err
    assert {method for method, _ in answers.asked} == {"GET"}


@pytest.fixture
def losing(serve, ray_pages, recipe, write_recipe):
    """A recipe and a cluster that hangs up when it is submitted, after `then` has been done with what it answers."""

    def make(then):
        submission = package.make_submission(write_recipe(recipe), (), None)

        def jobs(headers) -> list | None:
            if headers["Content-Type"] is None:
                return []
            then(answers.pages, submission.id)
            return None

        code = f"/api/packages/gcs/{submission.code.uri.removeprefix('gcs://')}"
        answers, _ = serve({**ray_pages, code: {}, "/api/jobs/": jobs})
        return SubmitRequest(write_recipe(recipe), address=answers.address), answers, submission.id

    return make


def test_a_job_is_found_of_which_the_answer_to_its_submission_was_lost(losing, details, capsys) -> None:
    def record(pages: dict, job_id: str) -> None:
        page, log = f"/api/jobs/{job_id}", {"logs": f"{CHECKED} the one node sees what the recipe names\n"}
        pages.update({page: details(job_id), f"{page}/logs": log})

    request, answers, job_id = losing(record)
    submit(request)
    assert capsys.readouterr().out == f"{job_id}\n"
    assert [method for method, page in answers.asked if page == "/api/jobs/"].count("POST") == 1


def test_a_job_that_may_have_been_started_is_named(losing) -> None:
    request, _, job_id = losing(lambda pages, job_id: None)
    with pytest.raises(UserError, match=f"; job {job_id} may have been started: `fot status {job_id}` tells$"):
        submit(request)


def test_a_job_that_was_refused_was_not_started(losing) -> None:
    request, answers, _ = losing(lambda pages, job_id: None)
    asked = answers.pages["/api/jobs/"]
    answers.pages["/api/jobs/"] = lambda headers: (
        (400, "ValueError: runtime_env is invalid") if asked(headers) is None else []
    )
    with pytest.raises(UserError, match=r"answers 400: ValueError: runtime_env is invalid$"):
        submit(request)


def test_it_is_said_once_what_is_waited_for_when_that_takes_long(losing, details, monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "UNSAID", 0.0)
    monkeypatch.setattr(watch, "POLL", 0.01)

    def record(pages: dict, job_id: str) -> None:
        logs = iter(["", "", "", "", f"{CHECKED} all 2 nodes see what the recipe names\n"])
        pages |= {f"/api/jobs/{job_id}": details(job_id), f"/api/jobs/{job_id}/logs": lambda _: {"logs": next(logs)}}

    request, _, job_id = losing(record)
    submit(request)
    assert capsys.readouterr().err.count(f"waiting until job {job_id} is started and every node has looked") == 1


def test_a_job_whose_log_is_away_still_has_its_state(serve, ray_pages, details, capsys) -> None:
    lost = {"/api/jobs/tiny-1": details("tiny-1", "FAILED"), "/api/jobs/tiny-1/logs": (500, "No agent on this node")}
    answers, _ = serve({**ray_pages, **lost})
    show_job("tiny-1", answers.address)
    shown = capsys.readouterr().out
    assert re.search("^state +failed$", shown, re.MULTILINE)
    assert re.search("^last words +its log cannot be had from the node that it runs on$", shown, re.MULTILINE)


@pytest.mark.slow
def test_what_the_cluster_cannot_see_or_does_not_allow_is_refused_before_anything_runs(
    head: str, recipe, write_recipe, tmp_path: Path
) -> None:
    path = write_recipe(recipe)
    assert look_at(Dashboard(head)).free == {"CPU": 4.0, "GPU": 0.0}
    with pytest.raises(
        UserError, match=r"did not start .*does not see data.sources.0.path /nowhere/x.jsonl: put it on"
    ):
        submit(SubmitRequest(path, ["data.sources.0.path=/nowhere/x.jsonl"], head))
    wide = ["resources.workers=4", "finetune.batch.micro_batches=4", "base.pretrain.training.batch.micro_batches=4"]
    with pytest.raises(UserError, match=r"take 4 CPUs, this cluster allows a job 3 \(FOT_MAX_CPUS\)"):
        submit(SubmitRequest(path, wide, head))
    with pytest.raises(UserError, match="never fit the cluster, which has room for 2 and does not grow: lower"):
        submit(SubmitRequest(path, ["resources.cpus_per_worker=2", *wide], head))
    assert not (tmp_path / "runs" / "store").exists()
    refused = Dashboard(head).jobs()[0].id
    with pytest.raises(NoJobError, match=f"did you mean {refused}"):
        show_log(refused[:-1], head)


@pytest.mark.slow
def test_a_job_outlives_who_sent_it_stops_when_asked_and_goes_on_to_its_end(
    head: str, recipe, write_recipe, tmp_path: Path, code: Path, capsys
) -> None:
    recipe["base"]["pretrain"]["training"] |= {"steps": 400, "checkpoints": {"every": 10}}
    recipe |= {"name": "kept", "evaluation": {"perplexity": {"contexts": [1, 2], "windows": 4}, "passkey": None}}
    path, dashboard = write_recipe(recipe), Dashboard(head)
    asked = f"""
import sys
from pathlib import Path
from jobs.cluster import package
from jobs.cli.commands.cluster import SubmitRequest, submit
package.ROOT = Path({str(code)!r})
submit(SubmitRequest(Path({str(path)!r}), address={head!r}, owner="ann", tags=["project=code"], log=True))
"""
    client = subprocess.Popen([sys.executable, "-c", asked], stdout=subprocess.PIPE, text=True, start_new_session=True)
    job_id = client.stdout.readline().strip()
    wait_until(lambda: any(row.stage == "base" for row in read_progress(dashboard.log(job_id))))
    os.kill(client.pid, signal.SIGKILL)
    client.communicate()

    capsys.readouterr()
    submit(SubmitRequest(path, address=head))
    again = capsys.readouterr()
    assert again.out.strip() == job_id
    assert "the same recipe and code were submitted by ann" in again.err
    with pytest.raises(UserError, match=f"job {job_id} of ann runs the same recipe"):
        resume(job_id, head)
    show_job(job_id, head)
    shown = capsys.readouterr().out
    assert "running" in shown
    assert "shards" in shown
    assert "project=code" in shown

    stop(job_id, head)
    said = capsys.readouterr().err
    stopped = re.search(
        rf"stopped at step (\d+) of 400, with a checkpoint; `fot resume {job_id}` goes on from here", said
    )
    assert stopped, said
    assert dashboard.job(job_id).state == "STOPPED"
    assert (tmp_path / "runs" / "jobs" / f"{job_id}.stop").exists()
    with pytest.raises(StoppedError, match=f"job {job_id} was stopped"):
        show_log(job_id, head, log=True)

    capsys.readouterr()
    resume(job_id, head, log=True)
    resumed = capsys.readouterr()
    assert resumed.out.startswith(f"{job_id}-2\n")
    log = dashboard.log(f"{job_id}-2")
    assert resumed.out == f"{job_id}-2\n{log}"
    assert was_checked(log)
    assert "shards found" in log
    assert "report done in" in log
    metrics = next((tmp_path / "runs" / "store" / "base").glob("*/metrics.jsonl"))
    assert [entry["step"] for entry in read_metrics(metrics)] == list(range(1, 401))
    assert f"step-{int(stopped[1]):08d} restored" in worker_log(tmp_path)
    client = connect(embedded_uri(tmp_path / "runs"))
    trained, whole = find(client, job_id), find(client, f"{job_id}-2")
    assert (trained.info.run_name, trained.data.tags["fot.job"]) == ("kept: base", f"{job_id} {job_id}-2")
    assert (whole.info.run_name, whole.data.tags["fot.job"]) == ("kept", f"{job_id}-2")
    again = dashboard.job(f"{job_id}-2")
    assert (again.state, again.first, again.attempt, again.owner) == ("SUCCEEDED", job_id, 2, "ann")
    assert yaml.safe_load(again.recipe)["work_dir"] == str(tmp_path / "runs")

    submit(SubmitRequest(path, address=head, wait=True))  # there is nothing to do
    assert f"fot resume {job_id}-2" in capsys.readouterr().err
    show_jobs(head, name="kept")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["job", f"{job_id}-2", job_id]
    told = str(dashboard.get("/api/jobs/")) + log
    assert os.environ["RAY_AUTH_TOKEN_PATH"] not in told
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() not in told


def worker_log(tmp_path: Path) -> str:
    """What rank 0 of the base's training printed."""
    return next((tmp_path / "runs" / "logs").glob("base-*/rank0.log")).read_text()


def wait_until(holds, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.5)
