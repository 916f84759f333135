"""What a schedule has fired: a line of history.jsonl when a firing begins, and one more when it has ended."""

import json
import os
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from jobs.common.cron import firings
from jobs.schedule.store import Schedule, ScheduleSettings, now
from pipelines.config import Part
from pipelines.workflow.credentials import hide_credentials

Trigger = Literal["cron", "catch-up", "run-now"]
State = Literal["running", "promoted", "refused", "skipped", "failed", "interrupted", "missed"]
MADE = ("promoted", "refused")  # there is a model
DIED = "its process ended before it did"


class Firing(Part):
    """One attempt at a firing. `firing`: its id, which a retry keeps. `scheduled`: when it was to fire.

    `continued`: the model it went on with, and `model` the one it made, as models:/fot/NAME/VERSION. `run`: of MLflow.
    `outcome`: the hash of all that led to it. `perplexity`: of the model, by tokens of context.
    """

    firing: str
    attempt: int = 1
    trigger: Trigger
    scheduled: datetime | None = None
    began: datetime
    ended: datetime | None = None
    state: State = "running"
    reasons: tuple[str, ...] = ()
    continued: str | None = None
    model: str | None = None
    run: str | None = None
    outcome: str | None = None
    manifest: str | None = None
    documents: int | None = None
    new_documents: int | None = None
    tokens: int | None = None
    perplexity: dict[int, Annotated[float, Field(allow_inf_nan=True)]] = Field(default_factory=dict)

    def changed(self, **values: object) -> "Firing":
        return self.model_copy(update=values)


def told(error: BaseException) -> str:
    """An error in a line, for everybody to read."""
    lines = str(error).strip().splitlines() or ["it says nothing"]
    return hide_credentials(f"{type(error).__name__}: {lines[0]}")


def new_id() -> str:
    return secrets.token_hex(4)


def append(path: Path, firing: Firing) -> None:
    """Add a line, whole, after a line that a crash left unfinished."""
    line = json.dumps(firing.model_dump(mode="json", exclude_defaults=True)) + "\n"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"
        os.write(file, (line if whole else f"\n{line}").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_history(path: Path) -> list[Firing]:
    """Each attempt as it was told last, the first first; lines that are damaged are passed over."""
    told: dict[tuple[str, int], Firing] = {}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            firing = Firing.model_validate_json(line)
        except ValidationError:
            continue
        told[firing.firing, firing.attempt] = firing
    return list(told.values())


def history_of(schedule: Schedule) -> list[Firing]:
    """As `read_history`; what began and has not ended is interrupted, unless it still runs."""
    history = read_history(schedule.history)
    now_running = last_begun(history) if schedule.holder is not None else None
    return [
        firing.changed(state="interrupted", reasons=(DIED,))
        if firing.state == "running" and firing is not now_running
        else firing
        for firing in history
    ]


def last_begun(history: Sequence[Firing]) -> Firing | None:
    """The last that was begun."""
    return next((firing for firing in reversed(history) if firing.state != "missed"), None)


def last_made(history: Sequence[Firing]) -> Firing | None:
    """The last that came to a model."""
    return next((firing for firing in reversed(history) if firing.state in MADE), None)


def passed(settings: ScheduleSettings, history: Sequence[Firing], until: datetime) -> list[datetime]:
    """When it was to fire before `until`, and did not: later than all that it was seen to fire for."""
    seen = max([settings.since, *(firing.scheduled for firing in history if firing.scheduled is not None)])
    times = []
    for time in firings(settings.cron, settings.time_zone, seen):
        if time >= until:
            break
        times.append(time)
    return times


def owed(settings: ScheduleSettings, history: Sequence[Firing], until: datetime) -> datetime | None:
    """The time for which to fire once, where nobody served until then: the last that passed, else that of a firing
    which was interrupted, or waited for its next attempt."""
    if times := passed(settings, history, until):
        return times[-1]
    last = last_begun(history)
    if last is None or last.scheduled is None or last.scheduled < settings.since:
        return None
    cut = last.state == "interrupted" or (last.state == "failed" and last.attempt <= settings.retries)
    return last.scheduled if cut else None


def cut_short(settings: ScheduleSettings, history: Sequence[Firing]) -> datetime | None:
    """The time for which to fire once more, where the process of a firing ended without a word, as often as it may be
    tried again."""
    last = last_begun(history)
    if last is None or last.scheduled is None or last.reasons != (DIED,):
        return None
    begun = sum(firing.scheduled == last.scheduled for firing in history if firing.state != "missed")
    return last.scheduled if begun <= settings.retries else None


def missed(times: list[datetime], reason: str) -> Firing:
    """A line for firings that did not come to pass."""
    counted = "1 firing" if len(times) == 1 else f"{len(times)} firings"
    since = "" if len(times) == 1 else f", the first at {times[0]:%Y-%m-%d %H:%M %Z}"
    return Firing(
        firing=new_id(),
        trigger="cron",
        scheduled=times[-1],
        began=now(),
        ended=now(),
        state="missed",
        reasons=(f"{counted}{since}: {reason}",),
    )
