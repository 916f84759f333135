"""The log of a training: a JSON line a step, what everything that shows a training reads."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from pipelines.workflow.files import write_atomically


class MetricsFile:
    """The log of a training that goes on after `done` steps: later ones are of a run that died, and are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        self._path, self._done = path, done
        self._file: IO[str] | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line, of the rank that writes; the first call drops what is to be dropped."""
        if self._file is None:
            kept = [entry for entry in read_metrics(self._path) if entry["step"] <= self._done]
            write_atomically(self._path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 - open for the worker's life, a line at a time
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite, "time": time.time()}) + "\n")
        os.fsync(self._file.fileno())  # a checkpoint must not know of steps that the log does not


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class MetricsReader:
    """Reads on where it stopped; from the beginning in a file that was written anew."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None  # open between the calls: no other file can have its number meanwhile
        self._offset = 0

    def new(self, path: Path) -> list[dict[str, float]]:
        """The complete lines that were not read yet."""
        if not path.exists():
            return []
        if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
            if self._file is not None:
                self._file.close()
            self._file, self._offset = open(path, "rb"), 0  # noqa: SIM115 - see above
        self._file.seek(self._offset)
        lines = [line for line in self._file.readlines() if line.endswith(b"\n")]
        self._offset += sum(map(len, lines))
        return [json.loads(line) for line in lines]


def last_metrics(path: Path) -> dict[str, float] | None:
    """The last complete line of a metrics file, None while there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16384))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1]) if lines else None
