"""Jobs in the terminal."""

import time
from collections.abc import Iterator, Sequence

from jobs.cluster.job import Job
from jobs.cluster.progress import StageRow, read_made, read_progress
from jobs.cluster.watch import last_words
from jobs.workflow.workspace import duration
from pipelines.workflow.visible import visible

JOBS = ("job", "name", "owner", "state", "since", "duration", "tags")


def state_of(job: Job) -> str:
    """In words: 'running', 'failed with exit code 2'."""
    state = job.state.lower()
    return f"{state} with exit code {job.exit_code}" if job.state == "FAILED" and job.exit_code else state


def clock(seconds: float) -> str:
    """A time since 1970, as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def taken(job: Job) -> str:
    """How long it took, or has taken so far."""
    return duration(max(0.0, (job.ended or time.time()) - job.began))


def job_row(job: Job) -> Sequence[str]:
    tags = ", ".join(f"{tag}={value}" for tag, value in job.tags.items())
    return (job.id, job.name, job.owner, state_of(job), clock(job.began), taken(job), tags)


def job_view(job: Job, log: str | None) -> Iterator[str]:
    """A job's state and what it made, then its stages with how far they are: what its log tells, if it can be had."""
    facts = {"job": job.id, "owner": job.owner, "state": state_of(job), "since": f"{clock(job.began)}, {taken(job)}"}
    if job.tags:
        facts["tags"] = job_row(job)[-1]
    if log is None or job.state in ("FAILED", "STOPPED"):
        facts["last words"] = last_words(log)
    yield from columns([*facts.items(), *read_made(log or "")])
    if rows := read_progress(log or ""):
        yield ""
        yield from columns([("recipe", "stage", "state", "progress"), *(_stage_row(row, job) for row in rows)])


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns as wide as they need."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _stage_row(row: StageRow, job: Job) -> Sequence[str]:
    state = "unfinished" if row.state == "running" and job.has_ended else row.state
    return (row.of, row.stage, state, row.detail)
