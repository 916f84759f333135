"""A stop that is asked of a job: what is interrupted, what ends by itself."""

import os
import signal
import time
from pathlib import Path

import pytest

from jobs.common.stop import StoppedError, ending_by_itself, stop_file, stop_requested, stopping_on_sigterm


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs" / "x.stop"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the signal's handler runs before this ends


def test_without_a_job_nothing_asks_for_a_stop() -> None:
    assert stop_file() is None
    assert not stop_requested()


def test_sigterm_leaves_the_file_and_interrupts_what_runs(file: Path) -> None:
    before, went_on = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        assert stop_file() == file
        assert not stop_requested()
        terminate()
        went_on.append(True)

    with pytest.raises(StoppedError, match="stopped as asked"), stopping_on_sigterm(file):
        work()
    assert not went_on
    assert file.exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop_file() is None


def test_work_that_ends_by_itself_is_not_interrupted_and_sees_the_file(file: Path) -> None:
    seen = []

    def train() -> None:
        terminate()
        seen.append(stop_requested())
        raise StoppedError("stopped at step 7")

    with pytest.raises(StoppedError, match="at step 7"), stopping_on_sigterm(file), ending_by_itself():
        train()
    assert seen == [True]


def test_work_that_was_done_before_it_looked_is_not_gone_on_from(file: Path) -> None:
    with (
        pytest.raises(StoppedError, match="with this stage's work done"),
        stopping_on_sigterm(file),
        ending_by_itself(),
    ):
        terminate()


def test_after_work_that_ends_by_itself_a_stop_interrupts_again(file: Path) -> None:
    def work() -> None:
        with ending_by_itself():
            pass
        terminate()

    with pytest.raises(StoppedError, match="stopped as asked"), stopping_on_sigterm(file):
        work()


def test_a_file_of_an_earlier_attempt_asks_for_nothing(file: Path) -> None:
    file.parent.mkdir()
    file.touch()
    with stopping_on_sigterm(file):
        assert not stop_requested()


def test_ctrl_c_stays_ctrl_c(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stopping_on_sigterm(file):
        raise KeyboardInterrupt
