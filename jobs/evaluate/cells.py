"""An evaluation as independent cells, one for each (length, draw): Ray tasks whose results are kept as they come.

A result is a JSON file in the output; what an interrupted evaluation had measured is not measured again. Each task asks
Ray for the memory that it will hold, so no more run at once than fit.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipelines.cluster import run_tasks
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.progress import Progress

CELLS = "cells"
WORKER_BYTES = 700_000_000  # a worker that has imported torch and transformers
Json = Any


@dataclass(frozen=True)
class Cell:
    """`function(*arguments)`, run as a Ray task, gives JSON. `key` names the result; `tokens`: how many are read, for
    progress; `bytes`: memory it holds at its peak, beside the worker itself; `what`: in words, for errors."""

    key: str
    function: Callable[..., Json]
    arguments: tuple[Any, ...]
    tokens: int
    bytes: int
    what: str


def run_cells(name: str, cells: Sequence[Cell], output: Path) -> dict[str, Json]:
    """{key: result} of all cells; those with a result in `output` are not run.

    Raises UserError where a cell needs more memory than any node has.
    """
    check_memory(cells)
    directory = output / CELLS
    done = {cell.key: _read(directory / f"{cell.key}.json") for cell in cells}
    todo = [cell for cell in cells if done[cell.key] is None]
    tasks = run_tasks(
        _run,
        [(cell.function, cell.arguments) for cell in todo],
        gpus=1 if _nodes("GPU") else 0,
        memory=[WORKER_BYTES + cell.bytes for cell in todo],
    )
    with Progress(name, sum(cell.tokens for cell in cells), "tokens") as progress, closing(tasks):
        progress.resume_at(sum(cell.tokens for cell in cells) - sum(cell.tokens for cell in todo))
        for number, result in tasks:
            cell = todo[number]
            write_atomically(directory / f"{cell.key}.json", json.dumps(result).encode())
            done[cell.key] = result
            progress.advance(cell.tokens)
    return {cell.key: done[cell.key] for cell in cells}


def check_memory(cells: Sequence[Cell]) -> None:
    """Raises UserError where a cell needs more than the largest node has."""
    largest = max(_nodes("memory"), default=0.0)
    for cell in cells:
        if WORKER_BYTES + cell.bytes > largest:
            raise UserError(
                f"{cell.what} needs about {(WORKER_BYTES + cell.bytes) / 1e9:.1f} GB, the largest node has "
                f"{largest / 1e9:.1f} GB for tasks: shorten it, hold memory in 16 bits "
                f"(evaluation.memory.dtype=bfloat16), or use a larger node"
            )


def _nodes(kind: str) -> list[float]:
    """What each node that has it has of a resource."""
    there = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    return [amount for amount in there if amount]


def _run(function: Callable[..., Json], arguments: tuple[Any, ...]) -> Json:
    """In a task."""
    import torch

    with torch.inference_mode():
        return function(*arguments)


def _read(file: Path) -> Json:
    """A result that is there whole, else None."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
