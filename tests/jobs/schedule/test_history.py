"""The history of a schedule: lines that survive crashes, and what was missed."""

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.schedule.history import (
    DIED,
    Firing,
    append,
    cut_short,
    history_of,
    last_made,
    missed,
    owed,
    passed,
    read_history,
)
from jobs.schedule.store import Schedule, ScheduleSettings

ADDED = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def firing(number: int, **facts: object) -> Firing:
    return Firing(firing=f"f{number}", trigger="cron", began=ADDED + timedelta(hours=number), **facts)


def test_a_firing_is_as_it_was_told_last(schedule: Schedule) -> None:
    began = firing(1)
    full = began.changed(
        state="promoted", ended=ADDED, reasons=("pass: ä",), perplexity={16: 3.5, 1024: math.inf}, documents=3
    )
    for told in (began, firing(2), full):
        append(schedule.history, told)
    assert read_history(schedule.history) == [full, firing(2)]


@given(st.integers(1, 200))
def test_a_line_that_a_crash_cut_costs_nothing_but_itself(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    append(path, firing(1))
    whole = path.read_bytes()
    append(path, firing(2, reasons=("x" * 200,)))
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    append(path, firing(3))
    assert [each.firing for each in read_history(path)] == ["f1", "f3"]


def test_what_began_and_has_not_ended_is_interrupted_unless_it_runs(schedule: Schedule) -> None:
    append(schedule.history, firing(1))
    append(schedule.history, firing(2))
    assert [each.state for each in history_of(schedule)] == ["interrupted", "interrupted"]
    with schedule.lock():
        assert [each.state for each in history_of(schedule)] == ["interrupted", "running"]


def day(number: int, hour: int = 2) -> datetime:
    return datetime(2026, 11, number, hour, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seen", "until", "expected"),
    [
        ([], day(21, 1), []),
        ([], day(21), []),  # what fires now did not pass
        ([], day(21, 3), [day(21)]),
        ([], day(24, 3), [day(21), day(22), day(23), day(24)]),
        ([day(22)], day(24, 3), [day(23), day(24)]),
        ([day(23), None, day(21)], day(24, 3), [day(24)]),
    ],
)
def test_what_passed_is_later_than_all_that_was_fired_for(
    schedule: Schedule, seen: list, until: datetime, expected: list
) -> None:
    history = [firing(number, scheduled=time) for number, time in enumerate(seen)]
    assert passed(schedule.settings, history, until) == expected


def test_what_passed_before_it_was_added_or_resumed_does_not_count(schedule: Schedule) -> None:
    settings: ScheduleSettings = schedule.changed(since=day(23, 12)).settings
    assert passed(settings, [firing(1, scheduled=day(21))], day(25, 3)) == [day(24), day(25)]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"state": "interrupted"}, day(21)),
        ({"state": "failed"}, day(21)),
        ({"state": "failed", "attempt": 2}, day(21)),
        ({"state": "failed", "attempt": 3}, None),  # 2 retries
        ({"state": "promoted"}, None),
        ({"state": "interrupted", "scheduled": None}, None),
        ({"state": "interrupted", "scheduled": day(20)}, None),  # before it was resumed
    ],
)
def test_what_was_cut_is_owed_until_the_next_time_has_passed(schedule: Schedule, facts: dict, expected) -> None:
    settings = schedule.changed(since=day(20, 12)).settings
    history = [firing(0, state="promoted", scheduled=day(20)), firing(1, **{"scheduled": day(21), **facts})]
    assert owed(settings, history, day(21)) == expected
    assert owed(settings, history, day(22, 3)) == day(22)
    assert owed(settings, history[:1], day(21)) is None
    assert owed(settings, [], day(21)) is None


def test_what_died_is_tried_again_as_often_as_what_failed(schedule: Schedule) -> None:
    dead = [firing(number, state="interrupted", reasons=(DIED,), scheduled=day(21)) for number in range(3)]
    assert [cut_short(schedule.settings, dead[:count]) for count in range(4)] == [None, day(21), day(21), None]
    stopped = firing(4, state="interrupted", reasons=("it was ended",), scheduled=day(21))
    assert cut_short(schedule.settings, [stopped]) is None
    assert cut_short(schedule.settings, [dead[0], missed([day(22)], "x")]) == day(21)
    assert cut_short(schedule.settings, [dead[0].changed(scheduled=None)]) is None


def test_a_line_for_what_was_missed_hides_no_firing_that_runs(schedule: Schedule) -> None:
    append(schedule.history, firing(1))
    append(schedule.history, missed([day(21)], "x"))
    with schedule.lock():
        assert [each.state for each in history_of(schedule)] == ["running", "missed"]
    assert [each.state for each in history_of(schedule)] == ["interrupted", "missed"]


def test_a_line_for_what_was_missed_counts_and_is_seen(schedule: Schedule) -> None:
    told = missed([day(21), day(22)], "the machine was off")
    assert told.reasons == ("2 firings, the first at 2026-11-21 02:00 UTC: the machine was off",)
    assert missed([day(21)], "x").reasons == ("1 firing: x",)
    assert passed(schedule.settings, [told], day(23)) == []


def test_the_last_that_made_a_model_is_found() -> None:
    history = [firing(number, state=state) for number, state in enumerate(["promoted", "refused", "skipped", "failed"])]
    assert last_made(history) == history[1]
    assert last_made(history[2:]) is None
