"""Prefect fires the schedules; the one module that knows it.

A schedule is a deployment, a firing a run of it, a stage a task. When to fire is said here, by our cron: Prefect's own
takes a time that daylight saving skips an hour early, and leaves the doubled hour out. So each schedule has one run
that is to come, and all that Prefect waits for can be thrown away and made again from our files.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

import httpx
from prefect import Task, flow, get_client
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.context import FlowRunContext
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runner import Runner
from prefect.states import Cancelled, Completed, Crashed, Scheduled, State

from jobs.child import die_with_parent
from jobs.cron import firings
from jobs.schedule.history import Trigger, append, history_of, missed, owed, passed
from jobs.schedule.store import SCHEDULES, Schedule, Settings, now, read_schedule, schedules
from jobs.schedule.views import clock
from jobs.stop import StoppedError
from pipelines.store import Output

WORK_DIR = "FOT_SCHEDULES_OF"  # the environment variable by which a firing finds the files
START_SECONDS = 60.0
QUERY_SECONDS, PREFETCH_SECONDS = 2, 1
UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
NOBODY_THERE = "nobody was there to fire"


class FailedFiringError(Exception):
    """A firing failed: Prefect tries it again, and shows why."""


@flow(name="fire", persist_result=False)
def fire_schedule(name: str, trigger: Trigger = "run-now", scheduled: str | None = None) -> State:
    """A firing, in a process of its own, which ends with the one that serves."""
    from jobs.schedule.firing import FiringRunsError, fire

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who serves, and stops this then
    die_with_parent(signal.SIGTERM)
    schedule = read_schedule(Path(os.environ[WORK_DIR]) / SCHEDULES / name)
    if schedule is None or (schedule.settings.paused and trigger != "run-now"):
        return Cancelled(message="the schedule is paused" if schedule else "the schedule was removed")
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "a flow runs in its context"  # noqa: PT018
    when = None if scheduled is None else datetime.fromisoformat(scheduled)
    try:
        firing = fire(schedule, trigger, when, _as_task, context.flow_run.id.hex[-8:])
    except FiringRunsError as error:
        return Cancelled(message=str(error))
    except StoppedError as error:
        return Cancelled(name="Stopped", message=str(error))
    if firing.state == "failed":
        raise FailedFiringError(firing.reasons[0])
    return Completed(name=firing.state.capitalize(), message="; ".join(firing.reasons))


def _as_task(stage: str, build: Callable[[], Output]) -> Output:
    """A stage as a task; what is made is in our store, and Prefect keeps nothing of it. That there is nothing new to
    read is no failure of it."""
    from jobs.data.batches import NothingNewError

    def run() -> Output | NothingNewError:
        try:
            return build()
        except NothingNewError as error:
            return error

    made = Task(run, name=stage, cache_policy=NO_CACHE, persist_result=False)()
    if isinstance(made, NothingNewError):
        raise made
    return made


@dataclass(frozen=True)
class _Planned:
    """What Prefect was told of a schedule: its deployment, and the run that is to come, by time."""

    settings: Settings
    deployment: UUID
    run: UUID | None = None
    time: datetime | None = None


class Engine:
    """Fires schedules as their files say, while it is entered and `tick` is called."""

    unreachable = (httpx.HTTPError, PrefectException, TimeoutError)  # the server, for now

    def __init__(self, work_dir: Path) -> None:
        os.environ[WORK_DIR] = str(work_dir)
        self._work_dir = work_dir
        self._planned: dict[str, _Planned] = {}
        self._seen: set[str] = set()
        self._runner = Runner("fot", QUERY_SECONDS, PREFETCH_SECONDS, limit=None, pause_on_shutdown=False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "Engine":
        self._client = get_client(sync_client=True).__enter__()
        self._forget_unfinished()
        self._thread.start()
        began = time.monotonic()
        while not self._runner.started and self._thread.is_alive() and time.monotonic() - began < START_SECONDS:
            time.sleep(0.1)
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner.started:
            self._in_loop(self._runner.astop())
        self._thread.join(30)
        self._client.__exit__(None, None, None)

    def tick(self) -> None:
        """Bring Prefect to where the files are. Raises one of `unreachable` while the server does not answer."""
        self._check()
        found = {schedule.name: schedule for schedule in schedules(self._work_dir)}
        for name in [name for name in self._planned if name not in found]:
            self._delete(name)
        for name, schedule in found.items():
            planned = self._planned.get(name)
            if planned is None or planned.settings != schedule.settings:
                self._deploy(schedule)
            if not schedule.settings.paused:
                self._plan(schedule)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._runner.start())
        except BaseException as error:
            self._error = error

    def _check(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("Prefect's runner has ended") from self._error

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)

    def _forget_unfinished(self) -> None:
        """What an earlier server left: runs that waited are made again, those that ran have ended with it."""
        known = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)))
        while runs := self._client.read_flow_runs(flow_run_filter=known, limit=100):
            for run in runs:
                if run.run_count:
                    state: State[Any] = Crashed(message="fot schedule serve was ended meanwhile")
                    self._client.set_flow_run_state(run.id, state, force=True)
                else:
                    self._client.delete_flow_run(run.id)

    def _deploy(self, schedule: Schedule) -> None:
        settings = schedule.settings
        if (before := self._planned.pop(schedule.name, None)) is not None:
            self._withdraw(before)
        own = fire_schedule.with_options(
            retries=settings.retries, retry_delay_seconds=round(60 * settings.retry_minutes)
        )
        deployment = self._in_loop(
            self._runner.aadd_flow(
                own,
                name=schedule.name,
                description=f"{settings.cron} in {settings.time_zone}",
                parameters={"name": schedule.name},
                concurrency_limit=ConcurrencyLimitConfig(
                    limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
                ),
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
        )
        self._planned[schedule.name] = _Planned(settings, deployment)
        if schedule.name not in self._seen:
            self._seen.add(schedule.name)
            self._catch_up(schedule, deployment)

    def _catch_up(self, schedule: Schedule, deployment: UUID) -> None:
        """See to what was to fire while nobody served."""
        settings, history, current = schedule.settings, history_of(schedule), datetime.now(UTC)
        if settings.paused:
            return
        if settings.missed == "catch_up":
            if (time := owed(settings, history, current)) is not None:
                self._ask(schedule, deployment, "catch-up", time, now())
        elif times := passed(settings, history, current):
            append(schedule.history, missed(times, NOBODY_THERE))

    def _plan(self, schedule: Schedule) -> None:
        planned = self._planned[schedule.name]
        current = datetime.now(UTC)
        if planned.time is not None and planned.time > current:
            return
        settings = schedule.settings
        coming = next(firings(settings.cron, settings.time_zone, max(current, settings.since)))
        run = self._ask(schedule, planned.deployment, "cron", coming, coming)
        self._planned[schedule.name] = _Planned(settings, planned.deployment, run, coming)

    def _ask(self, schedule: Schedule, deployment: UUID, trigger: Trigger, scheduled: datetime, at: datetime) -> UUID:
        run = self._client.create_flow_run_from_deployment(
            deployment,
            parameters={"name": schedule.name, "trigger": trigger, "scheduled": scheduled.isoformat()},
            state=Scheduled(scheduled_time=at),
            name=f"{schedule.name}, {trigger} of {clock(scheduled, schedule.settings.time_zone)}",
            idempotency_key=f"{schedule.name} {trigger} {scheduled.isoformat()} {at.isoformat()}",
        )
        return run.id

    def _withdraw(self, planned: _Planned) -> None:
        """Take back the run that is to come, unless it has begun."""
        if planned.run is None:
            return
        try:
            if self._client.read_flow_run(planned.run).state_type == StateType.SCHEDULED:
                self._client.delete_flow_run(planned.run)
        except ObjectNotFound:
            pass

    def _delete(self, name: str) -> None:
        planned = self._planned.pop(name)
        self._seen.discard(name)
        self._withdraw(planned)
        self._client.delete_deployment(planned.deployment)
