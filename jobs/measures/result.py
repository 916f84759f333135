"""What every evaluation gives: points (a metric by context length), tables and plots, in one JSON file beside the PNGs.

Whatever shows results (the terminal, MLflow, the report, the registry) needs no more than this.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.workflow.files import write_atomically

RESULT = "result.json"
Value = str | int | float | None


class Point(NamedTuple):
    """`metric` ("perplexity/model") at `step`: tokens of context, or 0 where there is no such thing."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class Table:
    """Rows as people read them; numbers stay numbers. `note` says what they need to know."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""


@dataclass(frozen=True)
class Result:
    """`plots`: names of the PNG files, in the order to show them."""

    task: str
    settings: Mapping[str, Any]
    points: Sequence[Point]
    tables: Sequence[Table]
    plots: Sequence[str] = field(default=())

    def write(self, directory: Path) -> None:
        write_atomically(directory / RESULT, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, directory: Path) -> "Result":
        content = json.loads((directory / RESULT).read_text())
        return cls(
            content["task"],
            content["settings"],
            [Point(*point) for point in content["points"]],
            [Table(**table) for table in content["tables"]],
            content["plots"],
        )
