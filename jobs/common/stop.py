"""A stop that somebody asks of a job, by `fot stop`, `ray job stop` or Ray's pages: nothing that was done is lost.

Ray sends the job's driver SIGTERM. The driver leaves a file where all workers see it: its path is in FOT_STOP_FILE. A
training that looks for it between steps takes a checkpoint and ends with StoppedError. All other work is interrupted as
by Ctrl-C: stages keep their finished pieces, and go on from there.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from pipelines.workflow.errors import UserError

STOP_FILE = "FOT_STOP_FILE"

_ends_by_itself: ContextVar[bool] = ContextVar("ends_by_itself", default=False)


class StoppedError(UserError):
    """Work that was stopped because somebody asked for it; exit code 3."""


def stop_file() -> Path | None:
    """The file that asks for a stop, there or not; None for what is no job."""
    path = os.environ.get(STOP_FILE)
    return Path(path) if path else None


def stop_requested() -> bool:
    """Whether this job was asked to stop."""
    file = stop_file()
    return file is not None and file.exists()


@contextmanager
def stopping_on_sigterm(file: Path) -> Iterator[None]:
    """For the block, which is a job's, SIGTERM makes the file, and interrupts what does not end by itself then: either
    way it is a StoppedError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    os.environ[STOP_FILE] = str(file)

    def stop(number: int, frame: FrameType | None) -> None:
        file.touch()
        if not _ends_by_itself.get():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if file.exists():
            raise StoppedError("stopped as asked") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        del os.environ[STOP_FILE]


@contextmanager
def ending_by_itself() -> Iterator[None]:
    """For a block whose work looks for the file and ends with StoppedError: it is not interrupted. Raises StoppedError
    where the work was done before it looked again."""
    token = _ends_by_itself.set(True)
    try:
        yield
    finally:
        _ends_by_itself.reset(token)
    if stop_requested():  # from here on a stop interrupts
        raise StoppedError("stopped as asked, with this stage's work done")
