"""An evaluation as independent cells, one for each (length, draw): Ray tasks whose results are kept as they come.

A result is a JSON file in the output; what an interrupted evaluation had measured is not measured again. Each task asks
Ray for the memory that it will hold, so no more run at once than fit.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipelines.workflow.cluster import run_tasks
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically
from pipelines.workflow.progress import Progress

CELLS = "cells"
WORKER_BYTES = 700_000_000  # a worker that has imported torch and transformers
Json = Any


@dataclass(frozen=True)
class Cell:
    """`function(*arguments)`, run as a Ray task, gives JSON. `key` names the result; `tokens`: how many are read, for
    progress; `bytes`: memory it holds at its peak, beside the worker itself; `what`: in words, for errors. `keeps`: the
    function's last argument is a directory of its own, where it keeps what it has so far. `weights`: those of `bytes`
    that are the model's weights. With GPUs these alone go through the node's memory, and all must fit the GPU's."""

    key: str
    function: Callable[..., Json]
    arguments: tuple[Any, ...]
    tokens: int
    bytes: int
    what: str
    keeps: bool = False
    weights: int = 0


def run_cells(name: str, cells: Sequence[Cell], output: Path) -> dict[str, Json]:
    """{key: result} of all cells; those with a result in `output` are not run.

    Raises UserError where a cell needs more memory than any node, or than its GPU, has.
    """
    check_memory(cells)
    directory = output / CELLS
    done = {cell.key: _read(directory / f"{cell.key}.json") for cell in cells}
    left, gpus = [cell for cell in cells if done[cell.key] is None], _gpus()
    tasks = run_tasks(
        _run,
        [(cell, (*cell.arguments, *([directory / cell.key] if cell.keeps else []))) for cell in left],
        gpus=gpus,
        memory=[_node_bytes(cell, gpus) for cell in left],
    )
    with Progress(name, sum(cell.tokens for cell in cells), "tokens") as progress, closing(tasks):
        progress.resume_at(sum(cell.tokens for cell in cells) - sum(cell.tokens for cell in left))
        for number, result in tasks:
            cell = left[number]
            write_atomically(directory / f"{cell.key}.json", json.dumps(result).encode())
            done[cell.key] = result
            progress.advance(cell.tokens)
    return {cell.key: done[cell.key] for cell in cells}


def check_memory(cells: Sequence[Cell]) -> None:
    """Raises UserError where a cell needs more than the largest node that it can run on has."""
    gpus, largest = _gpus(), max((node.get("memory", 0.0) for node in _nodes()), default=0.0)
    for cell in cells:
        _check_room(cell, _node_bytes(cell, gpus), largest, "largest node")


def check_gpu(cell: Cell) -> None:
    """In a task: raises UserError where a cell needs more than its GPU has, less what others hold there."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        _check_room(cell, cell.bytes, free + torch.cuda.memory_reserved(), "GPU")


def _check_room(cell: Cell, needed: int, room: float, where: str) -> None:
    if needed > room:
        raise UserError(
            f"{cell.what} needs about {needed / 1e9:.1f} GB, the {where} has {room / 1e9:.1f} GB for it: shorten it, "
            f"hold memory in 16 bits (evaluation.memory.dtype=bfloat16), or use a larger one"
        )


def _node_bytes(cell: Cell, gpus: int) -> int:
    """What a cell needs of its node's memory."""
    return WORKER_BYTES + (cell.weights if gpus else cell.bytes)


def _gpus() -> int:
    """GPUs of each cell's task."""
    return 1 if any(node.get("GPU") for node in _nodes()) else 0


def _nodes() -> list[Mapping[str, float]]:
    """The resources of each node that cells can run on: where any has a GPU, those that have one."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in there if node.get("GPU")] or there


def _run(cell: Cell, arguments: tuple[Any, ...]) -> Json:
    """In a task."""
    import torch

    check_gpu(cell)
    with torch.inference_mode():
        return cell.function(*arguments)


def _read(file: Path) -> Json:
    """A result that is there whole, else None."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
