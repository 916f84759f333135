"""Following a job from afar: its log as it grows, and its end. The job needs nobody to watch it.

The log is fetched whole and what is new of it is printed, so that nothing is lost or doubled when the dashboard was
away meanwhile; a longer log is fetched less often.
"""

import time
from collections.abc import Callable

from jobs.cluster.dashboard import Dashboard, DashboardDownError, NoJobError
from jobs.cluster.job import Job
from jobs.cluster.preflight import CHECKED
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

POLL = 1.0  # seconds between looks
CHARACTERS_A_SECOND = 200_000  # of a log, at most
UNSAID = 5.0  # seconds without an answer that are not worth a word
PATIENCE = 600.0  # seconds without an answer after which nobody waits any longer
LOG_PATIENCE = 15.0  # the same, for the log of a job that has ended: it is lost with the node that the job ran on
AWAY = "its log cannot be had from the node that it runs on"


def follow(
    dashboard: Dashboard,
    job_id: str,
    write: Callable[[str], None],
    until: Callable[[str], bool] = lambda log: False,
) -> Job:
    """Write what a job prints, whole lines, until it has ended or `until` holds of its log. Returns the job.

    Raises DashboardDownError where nothing answers for very long, UserError where there is no such job, or no more.
    """
    seen, silent_since, said, job = 0, None, False, None
    while True:
        try:
            job = dashboard.job(job_id)  # before the log: all that it printed until its end is then there
            log = dashboard.log(job_id)
        except NoJobError:
            if job is None:
                raise
            raise UserError(
                f"the cluster at {dashboard.address} was started anew and no longer knows job {job_id}: submit its "
                f"recipe again, what is done is reused"
            ) from None
        except DashboardDownError as error:
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if job is not None and job.has_ended and now - silent_since > LOG_PATIENCE:
                say(f"job {job_id} has ended, the end of its log cannot be had: {error}")
                return job
            if now - silent_since > PATIENCE:
                raise
            if now - silent_since > UNSAID and not said:
                said = True
                say(f"{dashboard.address} does not answer; job {job_id} needs nobody to watch it: waiting")
            time.sleep(POLL)
            continue
        if said:
            say(f"{dashboard.address} answers again")
        silent_since, said = None, False
        if len(log) < seen:
            say(f"the log of job {job_id} begins anew")
            seen = 0
        new = log[seen:] if job.has_ended else log[seen : log.rfind("\n") + 1]
        write(new)
        seen += len(new)
        if job.has_ended or until(log):
            return job
        time.sleep(max(POLL, len(log) / CHARACTERS_A_SECOND))


def last_words(log: str | None) -> str:
    """What a job's log ends with: its own last line, or the last there is. None: the log is away."""
    if log is None:
        return AWAY
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("fot: ")]
    return (own or lines or ["it printed nothing"])[-1].removeprefix("fot: ")


def was_checked(log: str) -> bool:
    """Whether a job has found all that its recipe names."""
    return any(line.startswith(CHECKED) for line in log.splitlines())
