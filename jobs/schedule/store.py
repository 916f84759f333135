"""The schedules of a work_dir, in files: `schedules/NAME/` with schedule.json, recipe.yaml and history.jsonl.

Whatever fires them follows these files. A lock that the system frees however its holder ends keeps two firings of a
schedule apart.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from jobs.common.cron import check_cron
from jobs.config.settings import validated
from pipelines.config import Part
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically

SCHEDULES = "schedules"  # of work_dir
REMOVED = "removed"  # beside the schedules: what was removed, with its history
PREFECT = "prefect"
SERVED, OWN_RAY = "serve.lock", "own-ray.lock"
RESERVED = (REMOVED, PREFECT, SERVED, OWN_RAY)
SETTINGS, RECIPE, HISTORY, LOCK = "schedule.json", "recipe.yaml", "history.jsonl", "lock"
LOOK = 0.5  # seconds in which who only looks whether a lock is held has let go of it
Missed = Literal["catch_up", "skip"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class ScheduleSettings(Part):
    """`missed`: what becomes of firings that nobody was there for. `retries`: of one that failed, `retry_minutes`
    apart. `since`: when it was added or resumed; what was to fire earlier is no concern of it."""

    name: Name
    cron: str
    time_zone: str = "UTC"
    missed: Missed = "catch_up"
    retries: Annotated[int, Field(ge=0)] = 2
    retry_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    paused: bool = False
    added: datetime
    since: datetime


@dataclass(frozen=True)
class Schedule:
    """A schedule as its files say it."""

    directory: Path
    settings: ScheduleSettings

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def recipe(self) -> Path:
        return self.directory / RECIPE

    @property
    def history(self) -> Path:
        return self.directory / HISTORY

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Holds the lock for the block, and says who does; yields whether it could."""
        with _locked(self.directory / LOCK) as held:
            yield held

    @property
    def holder(self) -> int | None:
        """The process in which a firing runs."""
        return holder(self.directory / LOCK)

    @contextmanager
    def own_ray(self) -> Iterator[None]:
        """The turn of this work_dir's firings: a Ray of this machine's own would be given the same CPUs and GPUs."""
        with _locked(self.directory.parent / OWN_RAY, math.inf):
            yield

    def write(self) -> None:
        """Keep the settings."""
        write_atomically(self.directory / SETTINGS, (self.settings.model_dump_json(indent=1) + "\n").encode())

    def changed(self, **settings: object) -> "Schedule":
        return Schedule(self.directory, self.settings.model_copy(update=settings))


def now() -> datetime:
    """To the second, as files and tables say it."""
    return datetime.now(UTC).replace(microsecond=0)


def schedules(work_dir: Path, broken: Callable[[UserError], None]) -> list[Schedule]:
    """All of a work_dir that can be read, by name; `broken` is told why another cannot."""
    found = []
    for directory in _directories(work_dir):
        try:
            schedule = read_schedule(directory)
        except UserError as error:
            broken(error)
            continue
        if schedule is not None:
            found.append(schedule)
    return found


def find_schedule(work_dir: Path, name: str) -> Schedule:
    """Raises UserError, which says what there is instead, or what is wrong with it."""
    there = {directory.name: directory for directory in _directories(work_dir)}
    schedule = read_schedule(there[name]) if name in there else None
    if schedule is None:
        names = ", ".join(there) or "none at all: see fot schedule add, or give --work-dir"
        raise UserError(f"{work_dir} has no schedule {name}, but {names}")
    return schedule


def read_schedule(directory: Path) -> Schedule | None:
    """None where there is none (any more). Raises UserError for a file that is none."""
    path = directory / SETTINGS
    try:
        settings = validated(ScheduleSettings, json.loads(path.read_text()), str(path))
        check_cron(settings.cron, settings.time_zone)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError:
        raise UserError(f"{path} is no JSON: remove {directory} and add the schedule again") from None
    except UserError as error:
        raise UserError(f"{error}: mend {path}, or remove {directory} and add the schedule again") from None
    return Schedule(directory, settings)


def remove(schedule: Schedule) -> Path:
    """Move it aside; its name is free then. Returns where it is. Raises UserError while a firing runs."""
    with schedule.lock() as held:
        if not held:
            raise UserError(f"schedule {schedule.name}: a firing runs, in process {schedule.holder}: wait for its end")
        aside = schedule.directory.parent / REMOVED
        aside.mkdir(exist_ok=True)
        target = aside / f"{schedule.name}-{now():%Y%m%dT%H%M%SZ}"
        os.rename(schedule.directory, target)
    return target


def holder(path: Path) -> int | None:
    """The process that holds a lock."""
    try:
        with open(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0)
    except FileNotFoundError:
        pass
    return None


@contextmanager
def serving(work_dir: Path) -> Iterator[bool]:
    """As `Schedule.lock`, of what fires all schedules of a work_dir."""
    directory = work_dir.resolve() / SCHEDULES
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / SERVED) as held:
        yield held


def server_of(work_dir: Path) -> int | None:
    """The process that fires a work_dir's schedules."""
    return holder(work_dir.resolve() / SCHEDULES / SERVED)


def _directories(work_dir: Path) -> list[Path]:
    return sorted(path.parent for path in (work_dir.resolve() / SCHEDULES).glob(f"*/{SETTINGS}"))


@contextmanager
def _locked(path: Path, patience: float = LOOK) -> Iterator[bool]:
    """Holds the lock, as soon as it can be had in so many seconds."""
    until = time.monotonic() + patience
    with open(path, "a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    yield False
                    return
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield True
