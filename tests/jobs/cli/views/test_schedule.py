"""Schedules and histories as people see them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.cli.views.schedule import (
    history_header,
    history_rows,
    list_header,
    list_row,
    perplexity_line,
    plot_perplexity,
)
from jobs.schedule.history import Firing
from jobs.schedule.store import Schedule
from pipelines.workflow.errors import UserError

ADDED = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def history() -> list[Firing]:
    first = Firing(firing="a", trigger="run-now", began=ADDED, state="promoted", model="models:/fot/tiny/1")
    first = first.changed(perplexity={16: 5.0, 64: 4.0}, documents=16, new_documents=16, reasons=("pass: x", "pass: y"))
    second = Firing(firing="b", trigger="cron", began=ADDED + timedelta(days=1), state="failed", reasons=("no",))
    third = second.changed(attempt=2, state="refused", perplexity={16: 5.5, 64: 4.5}, continued="models:/fot/tiny/1")
    return [first, second, third]


def test_a_row_says_when_it_fires_next_and_what_came_last(schedule: Schedule, history: list[Firing]) -> None:
    schedule = schedule.changed(time_zone="Europe/Berlin")
    row = dict(zip(list_header, list_row(schedule, history, served=True), strict=True))
    assert row["next"].endswith((" 02:00 CET", " 02:00 CEST"))
    assert (row["state"], row["last firing"]) == ("active", "2026-11-21 13:00")
    assert row["came to"] == "refused, attempt 2"
    assert list_row(schedule, [], served=False)[3:] == (row["next"], "not served", "-", "-")
    assert list_row(schedule.changed(paused=True), [], served=True)[3:5] == ("-", "paused")


def test_a_history_has_a_row_a_firing(history: list[Firing]) -> None:
    rows = [dict(zip(history_header, row, strict=True)) for row in history_rows(history, "UTC")]
    assert [row["state"] for row in rows] == ["promoted", "failed", "refused, attempt 2"]
    assert rows[0]["documents"] == "16 new of 16"
    assert (rows[0]["made"], rows[2]["went on with"]) == ("fot/tiny/1", "fot/tiny/1")
    assert (rows[0]["perplexity"], rows[1]["perplexity"]) == ("4", "-")
    assert rows[0]["reasons"] == "pass: x; pass: y"


def test_perplexity_over_time_is_a_line_and_a_plot(history: list[Firing], tmp_path: Path) -> None:
    assert perplexity_line(history) == "perplexity ▁█ 4 to 4.5 at 64 tokens, 2 firings"
    plot_perplexity(history, tmp_path / "a.png")
    plot_perplexity(history, tmp_path / "b.png")
    plot_perplexity(history[:1], tmp_path / "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert perplexity_line(history[1:2]) == ""
    with pytest.raises(UserError, match="no firing has measured perplexity"):
        plot_perplexity(history[1:2], tmp_path / "d.png")
