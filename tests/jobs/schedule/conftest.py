"""A schedule in files."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from jobs.schedule.store import RECIPE, SCHEDULES, Schedule, ScheduleSettings

ADDED = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def schedule(work_dir: Path, recipe: dict) -> Schedule:
    """Of the tiny recipe, nightly at 2, added on the 20th at noon."""
    made = Schedule(
        work_dir / SCHEDULES / "nightly",
        ScheduleSettings(name="nightly", cron="0 2 * * *", added=ADDED, since=ADDED),
    )
    made.write()
    recipe |= {"work_dir": str(work_dir), "registry": {"promote": [{"metric": "perplexity/model", "most": 1e6}]}}
    (made.directory / RECIPE).write_text(yaml.safe_dump(recipe))
    return made
