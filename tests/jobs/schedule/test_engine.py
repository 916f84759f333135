"""What Prefect is told of schedules, by a stand-in for its server; and what its pages are told of stages."""

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from jobs.schedule import engine as module
from jobs.schedule.engine import ASLEEP, NOBODY_THERE, FailedStageError, Plans, as_task, slept_through
from jobs.schedule.history import Firing, append, history_of
from jobs.schedule.store import SETTINGS, Schedule
from jobs.train.batches import NothingNewError


@dataclass
class Prefect:
    """A server that keeps deployments, and runs by their key."""

    deployments: list[UUID] = field(default_factory=list)
    runs: dict[str, SimpleNamespace] = field(default_factory=dict)
    loses: int = 0  # so many answers
    refuses: int = 0  # so many questions

    def deploy(self, schedule: Schedule) -> UUID:
        self.deployments.append(uuid4())
        return self.deployments[-1]

    def create_flow_run_from_deployment(self, deployment, parameters, state, name, idempotency_key):
        if self.refuses:
            self.refuses -= 1
            raise httpx.ConnectError("refused")
        if deployment not in self.deployments:
            raise ObjectNotFound(Exception(deployment))
        run = SimpleNamespace(id=uuid4(), state_type=StateType.SCHEDULED, **parameters, at=state.state_details)
        run = self.runs.setdefault(idempotency_key, run)
        if self.loses:
            self.loses -= 1
            raise httpx.ReadTimeout("lost")
        return run

    def read_flow_run(self, run_id):
        return next(run for run in self.runs.values() if run.id == run_id)

    def delete_flow_run(self, run_id) -> None:
        self.runs = {key: run for key, run in self.runs.items() if run.id != run_id}

    def delete_deployment(self, deployment) -> None:
        if deployment not in self.deployments:
            raise ObjectNotFound(Exception(deployment))
        self.deployments.remove(deployment)

    def asked(self) -> list[tuple[str, datetime]]:
        return [(run.trigger, datetime.fromisoformat(run.scheduled)) for run in self.runs.values()]


@pytest.fixture
def prefect() -> Prefect:
    return Prefect()


@pytest.fixture
def plans(schedule: Schedule, work_dir: Path, prefect: Prefect) -> Plans:
    """Of the nightly schedule, which was added some days ago."""
    return Plans(work_dir, prefect, prefect.deploy)


def at_two(days: int) -> datetime:
    """2 o'clock, so many nights from the next."""
    now = datetime.now(UTC)
    today = now.replace(hour=2, minute=0, second=0, microsecond=0)
    return today + timedelta(days=days + (today <= now))


def test_what_passed_is_caught_up_and_one_run_is_to_come(plans: Plans, prefect: Prefect) -> None:
    for _ in range(3):
        plans.follow()
    assert prefect.asked() == [("catch-up", at_two(-1)), ("cron", at_two(0))]
    assert len(prefect.deployments) == 1


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_answer_neither_loses_nor_doubles_a_firing(plans: Plans, prefect: Prefect, lost: int) -> None:
    prefect.loses = lost
    for _ in range(lost):
        with pytest.raises(httpx.HTTPError):
            plans.follow()
    plans.follow()
    assert prefect.asked() == [("catch-up", at_two(-1)), ("cron", at_two(0))]


def test_what_passed_is_a_line_where_it_is_skipped(schedule: Schedule, plans: Plans, prefect: Prefect) -> None:
    schedule.changed(missed="skip").write()
    plans.follow()
    assert prefect.asked() == [("cron", at_two(0))]
    (line,) = history_of(schedule)
    assert (line.state, line.scheduled, NOBODY_THERE in line.reasons[0]) == ("missed", at_two(-1), True)


def test_what_came_due_between_resuming_and_the_next_look_fires(
    schedule: Schedule, plans: Plans, prefect: Prefect
) -> None:
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    every = {"cron": "* * * * *", "missed": "skip"}
    schedule.changed(**every, paused=True).write()
    plans.follow()
    assert prefect.asked() == []
    schedule.changed(**every, since=minute - timedelta(seconds=1)).write()
    plans.follow()
    asked = prefect.asked()
    assert [trigger for trigger, _ in asked] == ["catch-up", "cron"]
    assert minute <= asked[0][1] < asked[1][1]
    assert history_of(schedule) == []


def test_pausing_and_removing_take_back_what_is_to_come(schedule: Schedule, plans: Plans, prefect: Prefect) -> None:
    schedule = schedule.changed(since=datetime.now(UTC))
    schedule.write()
    plans.follow()
    assert [trigger for trigger, _ in prefect.asked()] == ["cron"]
    schedule.changed(paused=True).write()
    plans.follow()
    assert prefect.asked() == []
    schedule.write()
    plans.follow()
    assert [trigger for trigger, _ in prefect.asked()] == ["cron"]
    plans.withdraw()
    assert prefect.asked() == []
    plans.follow()
    shutil.rmtree(schedule.directory)
    plans.follow()
    assert prefect.asked() == []


def test_a_schedule_that_cannot_be_read_is_no_harm_to_others(
    schedule: Schedule, plans: Plans, prefect: Prefect
) -> None:
    broken = schedule.directory.with_name("broken")
    broken.mkdir()
    (broken / SETTINGS).write_text("{")
    (told,) = plans.follow()
    assert [trigger for trigger, _ in prefect.asked()] == ["catch-up", "cron"]
    assert str(broken) in str(told)
    shutil.rmtree(broken)
    assert plans.follow() == []


def test_what_is_deleted_in_the_pages_is_made_again(schedule: Schedule, prefect: Prefect, work_dir: Path) -> None:
    gone = [uuid4()]
    plans = Plans(work_dir, prefect, lambda each: gone.pop() if gone else prefect.deploy(each))
    plans.follow()
    assert prefect.asked() == []
    plans.follow()
    assert [trigger for trigger, _ in prefect.asked()] == ["catch-up", "cron"]
    prefect.deployments.clear()
    shutil.rmtree(schedule.directory)
    plans.follow()


def test_a_firing_whose_process_died_is_tried_again(schedule: Schedule, plans: Plans, prefect: Prefect) -> None:
    schedule = schedule.changed(since=at_two(-1), retries=1)
    schedule.write()
    plans.follow()
    for number in range(3):
        began = Firing(firing=f"f{number}", trigger="cron", scheduled=at_two(-1), began=datetime.now(UTC))
        with schedule.lock():
            append(schedule.history, began)
            plans.follow()
        if number == 0:
            prefect.refuses = 1
            with pytest.raises(httpx.HTTPError):
                plans.follow()
        plans.follow()
        plans.follow()
        assert prefect.asked() == [("cron", at_two(0)), ("catch-up", at_two(-1))]


def test_what_comes_late_is_missed_where_such_is_skipped(schedule: Schedule) -> None:
    now = datetime.now(UTC)
    assert slept_through(schedule, now - timedelta(hours=5)) is None
    skipping = schedule.changed(missed="skip", since=at_two(-2) - timedelta(hours=1))
    assert slept_through(skipping, now - timedelta(minutes=1)) is None
    late = slept_through(skipping, at_two(-2))
    assert (late.state, late.scheduled) == ("missed", at_two(-1))
    assert late.reasons[0].startswith("2 firings, the first at ")
    assert late.reasons[0].endswith(ASLEEP)
    append(schedule.history, Firing(firing="f", trigger="cron", scheduled=at_two(-2), began=now, state="failed"))
    assert slept_through(skipping, at_two(-2)) is None  # its next attempt


@pytest.fixture
def shown(monkeypatch) -> list[BaseException]:
    """What Prefect sees a task raise."""
    seen: list[BaseException] = []

    def task(run, **_: object):
        def call() -> object:
            try:
                return run()
            except Exception as error:
                seen.append(error)
                raise

        return call

    monkeypatch.setattr(module, "Task", task)
    return seen


def test_an_error_shows_prefect_no_credentials_and_stays_itself(shown: list) -> None:
    error = RuntimeError("403 for https://me:secret@host/x\nand more")

    def build() -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        as_task("shards", build)
    assert caught.value is error
    (seen,) = shown
    assert isinstance(seen, FailedStageError)
    assert (str(seen), seen.__suppress_context__) == ("RuntimeError: 403 for https://host/x", True)


def test_nothing_new_is_no_failure_for_prefect(shown: list) -> None:
    def build() -> None:
        raise NothingNewError("none")

    with pytest.raises(NothingNewError):
        as_task("groups", build)
    assert shown == []
