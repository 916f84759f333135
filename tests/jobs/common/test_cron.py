"""Cron lines: which are taken, and when they fire, also where clocks change."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.common.cron import check_cron, firings
from pipelines.workflow.errors import UserError

BERLIN = ZoneInfo("Europe/Berlin")  # clocks go from 2 to 3 on 2026-03-29, from 3 to 2 on 2026-10-25


@pytest.mark.parametrize(
    ("cron", "time_zone", "message"),
    [
        ("0 2 * *", "UTC", "--cron '0 2 \\* \\*': give minute, hour, day of month, month and day of week"),
        ("0 0 2 * * *", "UTC", "give minute, hour"),
        ("@daily", "UTC", "give minute, hour"),
        ("TZ=UTC 0 2 * *", "UTC", "give minute, hour"),
        ("0 2 L * *", "UTC", "give minute, hour"),
        ("", "UTC", "give minute, hour"),
        ("60 2 * * *", "UTC", "bad minute: give minute, hour"),
        ("0 24 * * *", "UTC", "bad hour"),
        ("0 2 0 * *", "UTC", "bad day-of-month"),
        ("0 2 * * 8", "UTC", "bad day-of-week"),
        ("5-1 2 * * *", "UTC", "bad minute"),
        (f"{'1' * 5000} 2 * * *", "UTC", "give minute, hour"),
        ("*/0 2 * * *", "UTC", "bad minute"),
        ("0 0 30 2 *", "UTC", "^--cron '0 0 30 2 \\*' never fires: no such month has a day 30$"),
        ("0 0 31 2,4,6 *", "UTC", "never fires"),
        ("0 2 * * *", "Europe/Berlim", "^--time-zone Europe/Berlim: no such time zone"),
        ("0 2 * * *", "../etc/passwd", "no such time zone"),
        ("0 2 * * *", "", "no such time zone"),
    ],
)
def test_what_is_no_line_or_no_zone_is_refused_in_one_line(cron: str, time_zone: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_cron(cron, time_zone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cron", ["* * * * *", "*/5 1-3,7 * jan-mar mon-fri", "0 0 29 2 *", "0 0 30 2 1", "0 2 * * 7"])
def test_what_is_a_line_fires_again_and_again(cron: str) -> None:
    check_cron(cron, "Europe/Berlin")
    times = list(islice(firings(cron, "Europe/Berlin", datetime(2026, 1, 1, tzinfo=UTC)), 3))
    assert len(times) == 3
    assert all(time.tzinfo is not None for time in times)


def local(cron: str, day: str, count: int) -> list[str]:
    times = islice(firings(cron, "Europe/Berlin", datetime.fromisoformat(f"{day}T00:00").replace(tzinfo=BERLIN)), count)
    return [f"{time:%d %H:%M %Z}" for time in times]


def test_a_fixed_time_that_is_skipped_comes_right_after_the_gap() -> None:
    assert local("30 2 * * *", "2026-03-28", 3) == ["28 02:30 CET", "29 03:00 CEST", "30 02:30 CEST"]


def test_a_fixed_time_in_the_doubled_hour_comes_once() -> None:
    assert local("30 2 * * *", "2026-10-24", 3) == ["24 02:30 CEST", "25 02:30 CEST", "26 02:30 CET"]


def test_what_goes_by_the_hour_has_no_firing_in_the_gap_and_two_in_the_doubled_hour() -> None:
    assert local("0 * * * *", "2026-03-29", 3) == ["29 01:00 CET", "29 03:00 CEST", "29 04:00 CEST"]
    assert local("0 * * * *", "2026-10-25", 4) == ["25 01:00 CEST", "25 02:00 CEST", "25 02:00 CET", "25 03:00 CET"]


@pytest.mark.parametrize("cron", ["45 2 * * *", "*/15 * * * *", "0 * * * *"])
def test_times_come_after_a_beginning_in_the_doubled_hours_second_pass(cron: str) -> None:
    after = datetime(2026, 10, 25, 1, 20, tzinfo=UTC)  # 2:20, for the second time
    times = [time.astimezone(UTC) for time in islice(firings(cron, "Europe/Berlin", after), 3)]
    assert [after, *times] == sorted({after, *times})


@given(
    st.sampled_from(["* * * * *", "*/7 * * * *", "30 2 * * *", "0 0 1 * 1", "15 */3 * * *"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]),
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)),
)
def test_times_come_later_and_later_and_after_the_beginning(cron: str, time_zone: str, after: datetime) -> None:
    times = [after, *islice(firings(cron, time_zone, after), 5)]
    assert all(later.astimezone(UTC) > earlier.astimezone(UTC) for earlier, later in pairwise(times))
    assert times[1] - after <= timedelta(days=32)
