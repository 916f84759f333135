"""Schedules in files, and the lock that keeps two firings apart."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.schedule.store import (
    SETTINGS,
    Schedule,
    find_schedule,
    read_schedule,
    remove,
    schedules,
    server_of,
    serving,
)
from pipelines.workflow.errors import UserError


def refuse(error: UserError) -> None:
    raise error


def test_what_is_written_is_read_again(schedule: Schedule, work_dir: Path) -> None:
    assert schedules(work_dir, refuse) == [schedule]
    schedule.changed(paused=True).write()
    assert find_schedule(work_dir, "nightly") == schedule.changed(paused=True)


def test_a_name_that_is_not_there_is_one_line_that_says_what_is(schedule: Schedule, work_dir: Path) -> None:
    with pytest.raises(UserError, match=r"has no schedule weekly, but nightly$"):
        find_schedule(work_dir, "weekly")
    remove(schedule)
    with pytest.raises(UserError, match="has no schedule nightly, but none at all"):
        find_schedule(work_dir, "nightly")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ('{"name": "x"}', "cron"),
        ('{"name": "x", "cron": "0 2 * * *", "time_zone": "Mars", "added": 0, "since": 0}', "Mars: no such time zone"),
    ],
)
def test_a_file_that_is_none_is_one_line_and_no_harm_to_others(
    schedule: Schedule, work_dir: Path, text: str, message: str
) -> None:
    other = schedule.directory.with_name("other")
    other.mkdir()
    (other / SETTINGS).write_text(text)
    with pytest.raises(UserError, match=rf"{message}.* remove {other}"):
        read_schedule(other)
    told: list[UserError] = []
    assert schedules(work_dir, told.append) == [schedule]
    assert len(told) == 1
    assert find_schedule(work_dir, "nightly") == schedule


def test_a_file_that_may_not_be_read_is_one_line(schedule: Schedule, monkeypatch) -> None:
    def refuse_to_read(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_text", refuse_to_read)
    with pytest.raises(UserError, match=r"schedule\.json cannot be read \(Permission denied\)"):
        read_schedule(schedule.directory)


def test_the_lock_is_held_once_and_says_by_whom(schedule: Schedule) -> None:
    assert schedule.holder is None
    with schedule.lock() as held, schedule.lock() as again:
        assert (held, again) == (True, False)
        assert schedule.holder is not None
    assert schedule.holder is None


def test_a_holder_that_is_killed_frees_the_lock(schedule: Schedule) -> None:
    code = (
        "import sys, time; from pathlib import Path; from jobs.schedule.store import read_schedule\n"
        "with read_schedule(Path(sys.argv[1])).lock() as held: print(held, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, schedule.directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    assert schedule.holder == process.pid
    with pytest.raises(UserError, match=f"a firing runs, in process {process.pid}"):
        remove(schedule)
    process.kill()
    process.wait()
    with schedule.lock() as held:
        assert held


def test_what_is_removed_lies_aside_with_its_history_and_its_name_is_free(schedule: Schedule, work_dir: Path) -> None:
    schedule.history.write_text("kept\n")
    target = remove(schedule)
    assert (target / "history.jsonl").read_text() == "kept\n"
    assert schedules(work_dir, refuse) == []
    assert read_schedule(schedule.directory) is None
    time.sleep(1)  # the second is in the name of what was removed
    schedule.write()
    assert remove(schedule) != target


def test_one_process_serves_a_work_dir(work_dir: Path) -> None:
    assert server_of(work_dir) is None
    with serving(work_dir) as held, serving(work_dir) as again:
        assert (held, again) == (True, False)
        assert server_of(work_dir) is not None
