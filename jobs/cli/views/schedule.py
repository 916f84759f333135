"""Schedules and what they have fired, in the terminal and as a plot."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jobs.common.cron import clock, firings
from jobs.common.plot import plot_times
from jobs.common.terminal import number, sparkline
from jobs.schedule.history import Firing
from jobs.schedule.store import Schedule
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import human

list_header = ("schedule", "cron", "time zone", "next", "state", "last firing", "came to")
history_header = ("firing", "when", "trigger", "state", "documents", "went on with", "made", "perplexity", "reasons")


def next_firing(schedule: Schedule) -> str:
    settings = schedule.settings
    return f"{next(firings(settings.cron, settings.time_zone, datetime.now(UTC))):%Y-%m-%d %H:%M %Z}"


def list_row(schedule: Schedule, history: Sequence[Firing], served: bool) -> Sequence[str]:
    settings = schedule.settings
    last = history[-1] if history else None
    state = "paused" if settings.paused else "active" if served else "not served"
    return (
        schedule.name,
        settings.cron,
        settings.time_zone,
        "-" if settings.paused else next_firing(schedule),
        state,
        "-" if last is None else clock(last.began, settings.time_zone),
        "-" if last is None else came_to(last),
    )


def history_rows(history: Sequence[Firing], zone: str) -> list[Sequence[str]]:
    return [
        (
            firing.firing,
            clock(firing.began, zone),
            firing.trigger,
            came_to(firing),
            _documents(firing),
            (firing.continued or "-").removeprefix("models:/"),
            (firing.model or "-").removeprefix("models:/"),
            number(longest(firing)),
            "; ".join(firing.reasons),
        )
        for firing in history
    ]


def came_to(firing: Firing) -> str:
    """'failed' or, of a retry, 'promoted, attempt 2'."""
    return firing.state if firing.attempt == 1 else f"{firing.state}, attempt {firing.attempt}"


def longest(firing: Firing) -> float | None:
    """The perplexity at the longest context."""
    return firing.perplexity[max(firing.perplexity)] if firing.perplexity else None


def perplexity_line(history: Sequence[Firing]) -> str:
    """A sparkline over the firings, "" without any: 'perplexity ▇▅▂ 4.2 to 1.3 at 64 tokens, 3 firings'."""
    measured = [firing for firing in history if firing.perplexity]
    if not measured:
        return ""
    length = max(measured[-1].perplexity)
    values = [firing.perplexity[length] for firing in measured if length in firing.perplexity]
    ends = f"{number(values[0])} to {number(values[-1])}"
    return f"perplexity {sparkline(values)} {ends} at {length} tokens, {len(values)} firings"


def plot_perplexity(history: Sequence[Firing], target: Path) -> None:
    """A line a context length, over time. Raises UserError where nothing was measured yet."""
    curves: dict[str, dict[datetime, float]] = {}
    for firing in history:
        for length, value in sorted(firing.perplexity.items()):
            curves.setdefault(f"{length} tokens", {})[firing.began] = value
    if not curves:
        raise UserError("--plot: no firing has measured perplexity yet (evaluation.perplexity)")
    plot_times(curves, "perplexity", target)


def _documents(firing: Firing) -> str:
    if firing.documents is None:
        return "-"
    return f"{human(firing.new_documents or 0)} new of {human(firing.documents)}"
