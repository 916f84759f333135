"""A job as Ray's Jobs API tells of it. What is ours of it is in its metadata, for everybody to read."""

import getpass
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.workflow.errors import UserError

FIRST, ATTEMPT, NAME, OWNER, CODE, RECIPE = (
    f"fot.{name}" for name in ("job", "attempt", "name", "owner", "code", "recipe")
)
TAG = "fot.tag."  # and the tag's name
SUBMISSION = "job_submission_id"  # in the metadata that Ray hands the job
ENTRY = "jobs.cluster.entry"  # the module that a job runs
STOP_SECONDS = 300  # that Ray leaves a job between SIGTERM and SIGKILL
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """`id`: Ray's submission id. `first`: that of the first of its attempts; `recipe`: the YAML text that it runs;
    `code`: version and hash of what it was submitted with. `began`, `ended`: seconds since 1970. `exit_code`: the
    driver's, where it ended by itself. `message`: Ray's remark on its state."""

    id: str
    first: str
    attempt: int
    name: str
    owner: str
    tags: Mapping[str, str]
    code: str
    recipe: str
    state: str
    began: float
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def login(remedy: str) -> str:
    """Who asks, by the name on this machine. Raises UserError, with the remedy, where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise UserError(f"who you are here, and so the job's owner, has no name: {remedy}") from None


def make_metadata(
    first: str, attempt: int, name: str, owner: str, tags: Mapping[str, str], code: str, recipe: str
) -> dict[str, str]:
    """What Ray keeps of a job of ours, and gives to it."""
    own = {FIRST: first, ATTEMPT: str(attempt), NAME: name, OWNER: owner, CODE: code, RECIPE: recipe}
    return {**own, **{TAG + tag: value for tag, value in tags.items()}}


def read_job(details: Mapping[str, Any]) -> Job | None:
    """The job from the Jobs API's answer; None for one that is not ours."""
    metadata, job_id = details.get("metadata") or {}, details.get("submission_id")
    if job_id is None or FIRST not in metadata:
        return None
    ended = details.get("end_time")
    return Job(
        id=job_id,
        first=metadata[FIRST],
        attempt=int(metadata[ATTEMPT]),
        name=metadata[NAME],
        owner=metadata[OWNER],
        tags={key.removeprefix(TAG): value for key, value in sorted(metadata.items()) if key.startswith(TAG)},
        code=metadata[CODE],
        recipe=metadata[RECIPE],
        state=details["status"],
        began=(details.get("start_time") or 0) / 1000,
        ended=ended / 1000 if ended else None,
        exit_code=details.get("driver_exit_code"),
        message=details.get("message") or "",
    )
