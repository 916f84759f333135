"""Cron lines with five fields, read in a time zone, as Debian's cron reads them.

Where clocks go forward, a fixed time that is skipped comes right after the gap; where they go back, a fixed time comes
once. Lines whose minute or hour begins with a star follow the hours as they pass: none in the gap, twice in the
doubled hour.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from pipelines.workflow.errors import UserError

NAMES = "JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC|SUN|MON|TUE|WED|THU|FRI|SAT"
FIELD = rf"(?:[0-9*/,-]|{NAMES})+"
EXAMPLE = '"0 2 * * *"'


def check_cron(cron: str, time_zone: str) -> None:
    """Raises UserError for a line that is none or never fires, and for a time zone that there is not."""
    if not re.fullmatch(rf" *{FIELD}(?: +{FIELD}){{4}} *", cron, re.IGNORECASE):
        raise UserError(f"--cron {cron!r}: give minute, hour, day of month, month and day of week: {EXAMPLE}")
    minute, hour, day, month, weekday = cron.split()
    try:
        CronSim(f"{minute} {hour} {day} * *", datetime.now(UTC))
        CronSim(f"{minute} {hour} * {month} {weekday}", datetime.now(UTC))
    except (CronSimError, ValueError) as error:  # ValueError: of a number with thousands of digits
        raise UserError(
            f"--cron {cron!r}: {str(error).lower()}: give minute, hour, day of month, month and day of week: {EXAMPLE}"
        ) from None
    try:
        next(CronSim(cron, datetime.now(UTC)))
    except (CronSimError, StopIteration):
        raise UserError(f"--cron {cron!r} never fires: no such month has a day {day}") from None
    try:
        ZoneInfo(time_zone)
    except (KeyError, ValueError, OSError):
        raise UserError(f"--time-zone {time_zone}: no such time zone: one like Europe/Berlin or UTC") from None


def firings(cron: str, time_zone: str, after: datetime) -> Iterator[datetime]:
    """The times at which a line fires, later than `after` (aware), in its time zone."""
    for time in CronSim(cron, after.astimezone(ZoneInfo(time_zone))):
        if time.astimezone(UTC) > after:  # CronSim takes the doubled hour's second pass for its first
            yield time


def clock(time: datetime, zone: str) -> str:
    """A time as clocks in the zone show it."""
    return time.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M")
