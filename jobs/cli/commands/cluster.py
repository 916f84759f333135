"""`fot submit`, `fot jobs`, `fot status ID`, `fot logs`, `fot stop`, `fot resume`."""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.cli.views.cluster import JOBS, clock, columns, job_row, job_view, state_of
from jobs.cluster.dashboard import (
    AnswerLostError,
    Dashboard,
    DashboardDownError,
    JobExistsError,
    NoJobError,
    dashboard_address,
)
from jobs.cluster.job import ENTRY, STOP_SECONDS, Job, login
from jobs.cluster.needs import check_fits, needs_view
from jobs.cluster.nodes import look_at
from jobs.cluster.package import Submission, code_here, load_all, make_submission, refuse_credentials
from jobs.cluster.watch import follow, last_words, was_checked
from jobs.common.errors import INTERRUPTED, STOPPED
from jobs.common.stop import StoppedError
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

UNSAID = 60.0  # seconds of a job's first looks that are not worth a word


@dataclass(frozen=True)
class SubmitRequest:
    """What `fot submit` is asked. `wait`: until the job has ended; `log`: the same, printing what it prints."""

    recipe: Path
    overrides: Sequence[str] = ()
    address: str | None = None
    name: str | None = None
    owner: str | None = None
    tags: Sequence[str] = ()
    log: bool = False
    wait: bool = False


def submit(request: SubmitRequest) -> None:
    """Send a recipe to a cluster, unless it is there; print the job's id.

    Raises UserError for what is wrong in the recipe, with the address or on the cluster, and where a job that is waited
    for fails.
    """
    submission = make_submission(request.recipe, request.overrides, request.name)
    owner, tags = request.owner or login("give --owner NAME"), dict(map(_tag, request.tags))
    refuse_credentials({"owner": owner, "tag": tags}, "submit")
    unnamed = any(recipe.registry.tracking_uri is None for recipe in submission.recipes.values())
    if unnamed and "MLFLOW_TRACKING_URI" in os.environ:
        say("MLFLOW_TRACKING_URI stays here: the job uses registry.tracking_uri, or what the cluster's nodes have")
    dashboard = Dashboard(dashboard_address(request.address))
    jobs = dashboard.jobs()
    last = next((job for job in jobs if job.first == submission.id), None)
    if last is None:
        _refuse_beside(jobs, submission.text)
        _send(dashboard, submission, submission.id, submission.metadata(submission.id, 1, owner, tags))
        _attend(dashboard, submission.id, request.log, request.wait)
        return
    print(last.id, flush=True)
    say(f"the same recipe and code were submitted by {last.owner} at {clock(last.began)}: {state_of(last)}")
    if last.has_ended:
        say(f"to run them again, with what is done reused: fot resume {last.id}")
    _attend(dashboard, last.id, request.log, request.wait)


def resume(job_id: str, address: str | None, log: bool = False, wait: bool = False) -> None:
    """Submit what a job ran again: its stages go on from where they are. Raises UserError while an attempt runs."""
    dashboard = Dashboard(dashboard_address(address))
    job = dashboard.job(job_id)
    jobs = dashboard.jobs()
    _refuse_beside(jobs, job.recipe)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{job.first}.yaml"
        path.write_text(job.recipe)
        recipes = load_all(path)
    again = Submission(job.name, yaml.safe_load(job.recipe), recipes, code_here())
    before = json.loads(job.code)
    if before["hash"] != again.code.hash:
        say(f"with this machine's code, which is not what {job.id} had ({before['version']})")
    number = max(each.attempt for each in jobs if each.first == job.first) + 1
    new = f"{job.first}-{number}"
    _send(dashboard, again, new, again.metadata(job.first, number, job.owner, job.tags))
    _attend(dashboard, new, log, wait)


def show_jobs(address: str | None, owner: str | None = None, name: str | None = None) -> None:
    """Print our jobs on a cluster, the newest first."""
    jobs = Dashboard(dashboard_address(address)).jobs()
    chosen = [job for job in jobs if owner in (None, job.owner) and name in (None, job.name)]
    if not chosen:
        say("none of the jobs there are such" if jobs else "no jobs yet")
        return
    print(*columns([JOBS, *map(job_row, chosen)]), sep="\n")


def show_job(job_id: str, address: str | None) -> None:
    """Print a job's state, its stages with how far they are, and what it made."""
    dashboard = Dashboard(dashboard_address(address))
    print(*job_view(dashboard.job(job_id), _log_of(dashboard, job_id)), sep="\n")


def show_log(job_id: str, address: str | None, log: bool = False) -> None:
    """Print what a job has printed; with `log` also what it will, until it ends, and its outcome is this command's."""
    dashboard = Dashboard(dashboard_address(address))
    dashboard.job(job_id)
    if log:
        _attend(dashboard, job_id, log=True, wait=True)
    else:
        _write(dashboard.log(job_id))


def stop(job_id: str, address: str | None) -> None:
    """Have a job stop, a training after a checkpoint, and wait until it has."""
    dashboard = Dashboard(dashboard_address(address))
    job = dashboard.job(job_id)
    if job.has_ended:
        say(f"job {job_id} has ended already: {state_of(job)}")
        return
    dashboard.stop(job_id)
    say(f"job {job_id} was asked to stop: a training takes a checkpoint first, in at most {STOP_SECONDS // 60} minutes")
    with _leaving(f"job {job_id} will stop: `fot status {job_id}` shows whether it has"):
        job = follow(dashboard, job_id, lambda text: None)
    if job.state == "STOPPED":
        say(last_words(_log_of(dashboard, job_id)))
    else:
        say(f"job {job_id} has ended by itself: {state_of(job)}")


def _send(dashboard: Dashboard, submission: Submission, job_id: str, metadata: Mapping[str, str]) -> None:
    """Say what it needs, start it, and wait until it has found all that it needs on the cluster.

    Raises UserError where it cannot run there.
    """
    cluster = look_at(dashboard)
    remark = check_fits(submission.recipes, cluster)
    for line in columns([*needs_view(submission.recipes, cluster), *([("room", remark)] if remark else [])]):
        say(line)
    environment: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    if submission.code.content is not None:
        dashboard.upload(submission.code.uri, submission.code.content)
        environment["working_dir"] = submission.code.uri
    request = {
        "entrypoint": f"exec {shlex.quote(cluster.python)} -m {ENTRY}",
        "submission_id": job_id,
        "runtime_env": environment,
        "metadata": metadata,
    }
    try:
        dashboard.submit(request)
    except JobExistsError:
        raise UserError(f"job {job_id} was submitted by somebody else at this moment: `fot logs {job_id} -f`") from None
    except AnswerLostError as error:
        _find(dashboard, job_id, error)
    print(job_id, flush=True)
    with _leaving(_goes_on(job_id)):
        job = follow(dashboard, job_id, _waiting(job_id), until=was_checked)
    log = _log_of(dashboard, job_id) if job.has_ended else ""
    if job.has_ended and not was_checked(log or ""):
        raise UserError(f"job {job_id} did not start ({state_of(job)}): {_why(job, log)}")
    say("its paths are there; it needs nobody to watch it")
    say(f"  fot logs {job_id} -f    fot status {job_id}    fot stop {job_id}")


def _find(dashboard: Dashboard, job_id: str, lost: AnswerLostError) -> None:
    """Wait until a job is seen, of which Ray's answer to its submission was lost. Raises UserError where it is not."""
    perhaps = f"job {job_id} may have been started: `fot status {job_id}` tells"
    try:
        with _leaving(perhaps):
            follow(dashboard, job_id, lambda text: None, until=lambda log: True)
    except (DashboardDownError, NoJobError):
        raise UserError(f"{lost}; {perhaps}") from None


def _waiting(job_id: str) -> Callable[[str], None]:
    """What is told of a job's log as it grows, and says once, where that takes long, what is waited for."""
    until, said = time.monotonic() + UNSAID, False

    def look(text: str) -> None:
        nonlocal said
        if not said and time.monotonic() > until:
            said = True
            say(f"waiting until job {job_id} is started and every node has looked for its paths: `fot logs {job_id}`")

    return look


def _attend(dashboard: Dashboard, job_id: str, log: bool, wait: bool) -> None:
    """Stay until the job has ended. Raises UserError where it failed, StoppedError where it was stopped."""
    if not log and not wait:
        return
    with _leaving(_goes_on(job_id)):
        job = follow(dashboard, job_id, _write if log else lambda text: None)
    if job.state == "SUCCEEDED":
        say(f"job {job_id} is done")
        return
    if job.state == "STOPPED" or job.exit_code == STOPPED:
        raise StoppedError(f"job {job_id} was stopped: `fot resume {job_id}` goes on with it")
    raise UserError(f"job {job_id} {state_of(job)}: {_why(job, _log_of(dashboard, job_id))}")


def _refuse_beside(jobs: Sequence[Job], recipe: str) -> None:
    """Raises UserError where a job is under way with the same recipe, and so with the same outputs."""
    for job in jobs:
        if not job.has_ended and job.recipe == recipe:
            raise UserError(
                f"job {job.id} of {job.owner} runs the same recipe ({state_of(job)}): wait for it, or stop it by "
                f"`fot stop {job.id}`"
            )


def _why(job: Job, log: str | None) -> str:
    """Why a job failed: what it said itself, else what Ray says."""
    said = last_words(log)
    if job.exit_code is None and job.message:
        return job.message.strip().splitlines()[0]
    return said


def _tag(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--tag {text}: write it as key=value, for example --tag project=code")
    return key, value


@contextmanager
def _leaving(words: str) -> Iterator[None]:
    """Ctrl-C in the block leaves the job alone: the words and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(words)
        sys.exit(INTERRUPTED)


def _goes_on(job_id: str) -> str:
    return f"job {job_id} goes on: `fot logs {job_id} -f` follows it, `fot stop {job_id}` stops it"


def _log_of(dashboard: Dashboard, job_id: str) -> str | None:
    """What a job has printed; None where that is away with the node that it ran on."""
    try:
        return dashboard.log(job_id)
    except DashboardDownError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
