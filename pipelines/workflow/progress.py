"""Progress of a stage: bar, rate and ETA on a terminal; one plain line every few seconds elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipelines.workflow.visible import visible

LINE_EVERY = 10.0  # seconds between plain lines

console = Console(stderr=True, highlight=False)  # the program's one voice


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """For the block, everything but `console` (libraries, their child processes, native code) prints to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with os.fdopen(os.dup(saved[1]), "w", buffering=1) as terminal:
            console.file = terminal
            os.dup2(file, 1)
            os.dup2(file, 2)
            yield
    finally:
        try:
            _flush()
        except OSError:  # the log's disk is full: what it cannot take is lost, but not the program's voice
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.close(null)
            _flush()
        for number, original in enumerate(saved, start=1):
            os.dup2(original, number)
            os.close(original)
        os.close(file)
        console.file = None  # type: ignore[assignment]  # whatever sys.stderr is


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def say(message: str) -> None:
    """A line for people; what names and ids in it hold does nothing to the terminal."""
    console.print(visible(message), soft_wrap=True, markup=False)


def human(amount: float) -> str:
    """1234567 -> '1.2M'."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= 0.99995 * limit:
            return f"{amount / limit:.1f}{suffix}"
    return f"{amount:.0f}" if amount >= 10 or amount == int(amount) else f"{amount:.1f}"


class Progress:
    """`with Progress("tokenize", total, "B") as progress: progress.advance(n)`; the unit names what is counted."""

    def __init__(self, name: str, total: float, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._resumed = 0.0
        self._note = ""
        self._begin = self._last_line = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description:>15}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self._name, total=self._total or 1, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line()

    def resume_at(self, done: float) -> None:
        """What an earlier run had done: counted, but not in the rate."""
        self._resumed = done
        self.set(done)

    def advance(self, amount: float) -> None:
        self.set(self._done + amount)

    def set(self, done: float, note: str | None = None) -> None:
        """Set how much is done, with an optional note to show (a loss, say)."""
        self._done = done
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=f"{self._rate_text()} {self._note}")
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._line()

    def _rate(self) -> float:
        return (self._done - self._resumed) / max(time.monotonic() - self._begin, 1e-9)

    def _rate_text(self) -> str:
        return f"{human(self._rate())} {self._unit}/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        left = (self._total - self._done) / self._rate() if self._rate() > 0 else 0.0
        eta = f", eta {int(left) // 60}:{int(left) % 60:02d}" if left >= 1 else ""
        console.print(
            f"{self._name:>15} {human(self._done)}/{human(self._total)} {self._unit}, {self._rate_text()}{eta} "
            f"{self._note}".rstrip(),
            soft_wrap=True,
        )
