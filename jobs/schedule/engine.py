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
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

import httpx
from prefect import Task, flow, get_client
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.context import FlowRunContext
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runner import Runner
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Scheduled, State

from jobs.common.child import die_with_parent
from jobs.common.cron import clock, firings
from jobs.common.stop import StoppedError
from jobs.schedule.history import Firing, Trigger, append, cut_short, history_of, missed, owed, passed, told
from jobs.schedule.store import Schedule, ScheduleSettings, find_schedule, now, schedules
from pipelines.workflow.errors import UserError
from pipelines.workflow.store import Output

WORK_DIR, SERVED_BY = "FOT_SCHEDULES_OF", "FOT_SERVED_BY"  # environment variables: what a firing is told of who serves
START_SECONDS = 60.0
SILENT_SECONDS = 150.0  # without a look at what is due, while Prefect's client tries again
QUERY_SECONDS, PREFETCH_SECONDS = 2, 1
UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
ON_TIME = timedelta(minutes=5)  # what begins no later than that was not missed
CRASHED = timedelta(seconds=30)  # in which Prefect sees that a run's process has ended
ASK_ONCE = partial(temporary_settings, {PREFECT_CLIENT_MAX_RETRIES: 0})  # a tick is asked again by the next
NOBODY_THERE, ASLEEP = "nobody was there to fire", "this machine slept"


class FailedFiringError(Exception):
    """A firing failed: Prefect tries it again, and shows why."""


class FailedStageError(Exception):
    """A stage failed: Prefect shows why."""


@flow(name="fire", persist_result=False)
def fire_schedule(name: str, trigger: Trigger = "run-now", scheduled: str | None = None) -> State:
    """A firing, in a process of its own, which ends with the one that serves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who serves, and stops this then
    die_with_parent(signal.SIGTERM)
    if os.getppid() != int(os.environ[SERVED_BY]):
        return Cancelled(message="who served has ended")
    from jobs.schedule.firing import FiringRunsError, fire

    try:
        schedule = find_schedule(Path(os.environ[WORK_DIR]), name)
    except UserError as error:
        return Cancelled(message=str(error))
    if schedule.settings.paused and trigger != "run-now":
        return Cancelled(message="the schedule is paused")
    when = None if scheduled is None else datetime.fromisoformat(scheduled)
    if trigger == "cron" and when is not None and (late := slept_through(schedule, when)):
        append(schedule.history, late)
        return Cancelled(message=late.reasons[0])
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "a flow runs in its context"  # noqa: PT018
    try:
        firing = fire(schedule, trigger, when, as_task, context.flow_run.id.hex[-8:])
    except FiringRunsError as error:
        return Cancelled(message=str(error))
    except StoppedError as error:
        return Cancelled(name="Stopped", message=str(error))
    if firing.state == "failed":
        raise FailedFiringError(firing.reasons[0])
    return Completed(name=firing.state.capitalize(), message="; ".join(firing.reasons))


def slept_through(schedule: Schedule, when: datetime) -> Firing | None:
    """The line for a firing that comes so late that it was missed, where such are skipped; a later attempt is not."""
    current, history = datetime.now(UTC), history_of(schedule)
    begun = any(firing.scheduled == when for firing in history)
    if schedule.settings.missed == "catch_up" or current - when <= ON_TIME or begun:
        return None
    return missed(passed(schedule.settings, history, current) or [when], ASLEEP)


def as_task(stage: str, build: Callable[[], Output]) -> Output:
    """A stage as a task; what is made is in our store, and Prefect keeps nothing of it, nor credentials that an error
    shows. That there is nothing new to read is no failure of it."""
    from jobs.train.batches import NothingNewError

    raised: list[Exception] = []

    def run() -> Output | None:
        try:
            return build()
        except Exception as error:
            raised.append(error)
            if isinstance(error, NothingNewError):
                return None
            raise FailedStageError(told(error)) from None

    try:
        made = Task(run, name=stage, cache_policy=NO_CACHE, persist_result=False)()
    except FailedStageError:
        made = None
    if made is None:
        raise raised[0]
    return made


@dataclass(frozen=True)
class _Planned:
    """What Prefect was told of a schedule: its deployment, and the run that is to come, by time."""

    settings: ScheduleSettings
    deployment: UUID
    run: UUID | None = None
    time: datetime | None = None


class Plans:
    """What Prefect is told of a work_dir's schedules: of each a deployment, and one run that is to come.

    `deploy`: makes a schedule's deployment.
    """

    def __init__(self, work_dir: Path, client: SyncPrefectClient, deploy: Callable[[Schedule], UUID]) -> None:
        self._work_dir, self._client, self._deploy = work_dir, client, deploy
        self._planned: dict[str, _Planned] = {}
        self._seen: dict[str, int] = {}  # the size of each history when it was last looked at
        self._began = datetime.now(UTC).isoformat()

    def follow(self) -> list[UserError]:
        """Bring Prefect to where the files are. Returns why some cannot be read; these schedules do not fire."""
        broken: list[UserError] = []
        found = {schedule.name: schedule for schedule in schedules(self._work_dir, broken.append)}
        for name in [name for name in self._planned if name not in found]:
            with suppress(ObjectNotFound):
                self._delete(name)
        for name, schedule in found.items():
            try:
                self._follow(schedule)
            except ObjectNotFound:  # somebody deleted the deployment in Prefect's pages
                self._planned.pop(name, None)
        return broken

    def withdraw(self) -> None:
        """Take back all that is to come."""
        for planned in self._planned.values():
            self._withdraw(planned)
        self._planned.clear()

    def _follow(self, schedule: Schedule) -> None:
        name, settings, current = schedule.name, schedule.settings, datetime.now(UTC)
        planned = self._planned.get(name)
        if planned is None or planned.settings != settings:
            if planned is not None:
                self._withdraw(planned)
            planned = self._planned[name] = _Planned(settings, self._deploy(schedule))
        if settings.paused:
            return
        if planned.time is None:
            self._catch_up(schedule, planned.deployment, current)
        else:
            self._see_to_what_died(schedule, planned.deployment)
        if planned.time is None or planned.time <= current:
            coming = next(firings(settings.cron, settings.time_zone, max(current, settings.since)))
            run = self._ask(schedule, planned.deployment, "cron", coming, coming)
            self._planned[name] = replace(planned, run=run, time=coming)

    def _catch_up(self, schedule: Schedule, deployment: UUID, current: datetime) -> None:
        """See to what was to fire while nobody served."""
        settings, history = schedule.settings, history_of(schedule)
        time = owed(settings, history, current)
        if time is None:
            return
        if settings.missed == "catch_up" or current - time <= ON_TIME:
            self._ask(schedule, deployment, "catch-up", time, now())
        elif times := passed(settings, history, current):
            append(schedule.history, missed(times, NOBODY_THERE))

    def _see_to_what_died(self, schedule: Schedule, deployment: UUID) -> None:
        """Have a firing tried again whose process ended without a word, looking only where its history has grown."""
        size = schedule.history.stat().st_size if schedule.history.exists() else 0
        if size == self._seen.get(schedule.name) or schedule.holder is not None:
            return
        if (again := cut_short(schedule.settings, history_of(schedule))) is not None:
            self._ask(schedule, deployment, "catch-up", again, now() + CRASHED)
        self._seen[schedule.name] = size

    def _ask(self, schedule: Schedule, deployment: UUID, trigger: Trigger, scheduled: datetime, at: datetime) -> UUID:
        """Have a firing run at a time: once, also where the answer is lost and this is asked again."""
        asked = f"{self._began} {len(history_of(schedule))}" if trigger == "catch-up" else ""
        run = self._client.create_flow_run_from_deployment(
            deployment,
            parameters={"name": schedule.name, "trigger": trigger, "scheduled": scheduled.isoformat()},
            state=Scheduled(scheduled_time=at),
            name=f"{schedule.name}, {trigger} of {clock(scheduled, schedule.settings.time_zone)}",
            idempotency_key=f"{deployment} {trigger} {scheduled.isoformat()} {asked}",
        )
        return run.id

    def _withdraw(self, planned: _Planned) -> None:
        """Take back the run that is to come, unless it has begun."""
        if planned.run is None:
            return
        with suppress(ObjectNotFound):
            if self._client.read_flow_run(planned.run).state_type == StateType.SCHEDULED:
                self._client.delete_flow_run(planned.run)

    def _delete(self, name: str) -> None:
        planned = self._planned.pop(name)
        self._withdraw(planned)
        self._client.delete_deployment(planned.deployment)


class Engine:
    """Fires schedules as their files say, while it is entered and `tick` is called."""

    unreachable = (httpx.HTTPError, PrefectException, TimeoutError)  # the server, for now

    def __init__(self, work_dir: Path) -> None:
        os.environ[WORK_DIR], os.environ[SERVED_BY] = str(work_dir), str(os.getpid())
        self._client = get_client(sync_client=True)
        self._plans = Plans(work_dir, self._client, self._deploy)
        self._runner = Runner("fot", QUERY_SECONDS, PREFETCH_SECONDS, limit=None, pause_on_shutdown=False)
        self._polled: tuple[datetime | None, float] = (None, time.monotonic())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "Engine":
        self._client.__enter__()
        forget_unfinished(self._client)
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

    def tick(self) -> list[UserError]:
        """As `Plans.follow`. Raises one of `unreachable` while the server does not answer, UserError where what looks
        for due runs has ended."""
        self._check()
        with ASK_ONCE():
            return self._plans.follow()

    def withdraw(self) -> None:
        """Have no firing begin any more."""
        with suppress(*self.unreachable), ASK_ONCE():
            self._plans.withdraw()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._runner.start())
        except BaseException as error:
            self._error = error

    def _check(self) -> None:
        """Prefect's runner gives up after some answers that do not come, and says so only in its log."""
        polled, seen = self._polled
        if self._runner.last_polled != polled:
            self._polled = self._runner.last_polled, time.monotonic()
        elif time.monotonic() - seen > SILENT_SECONDS:
            raise UserError(f"Prefect's runner looks for nothing since {SILENT_SECONDS:.0f} seconds: start this again")
        if not self._thread.is_alive():
            raise UserError(f"Prefect's runner has ended ({self._error!r}): start this again")

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)

    def _deploy(self, schedule: Schedule) -> UUID:
        settings = schedule.settings
        own = fire_schedule.with_options(
            retries=settings.retries, retry_delay_seconds=round(60 * settings.retry_minutes)
        )
        deployment: UUID = self._in_loop(
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
        return deployment


def forget_unfinished(client: SyncPrefectClient) -> None:
    """What an earlier server left: runs that waited are made again, those that ran have ended with it, and none holds a
    schedule's one place, which a run keeps between its attempts."""
    known = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED)))
    while runs := client.read_flow_runs(flow_run_filter=known, limit=100):
        for run in runs:
            if run.run_count:
                state: State[Any] = Crashed(message="fot schedule serve was ended meanwhile")
                client.set_flow_run_state(run.id, state, force=True)
            else:
                client.delete_flow_run(run.id)
    seen = 0
    while limits := client.read_global_concurrency_limits(limit=100, offset=seen):
        for limit in limits:
            client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
        seen += len(limits)
