"""Ray: the cluster of RAY_ADDRESS or one started on this machine, and running many tasks on it."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from pipelines.environment import WORKERS
from pipelines.errors import UserError
from pipelines.progress import say

Result = TypeVar("Result")
SAY_EVERY = 30.0  # seconds between lines that say what is waited for
CANCELS = 10  # attempts to stop a task, a second each
OBJECT_STORE_BYTES = 200_000_000  # tasks pass paths and counts, not data


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray for the block: the one this process is connected to, or RAY_ADDRESS's, or a local one, which ends with it.

    Raises UserError where RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            runtime_env={"env_vars": WORKERS},
            **local,
        )
    except (ConnectionError, ValueError) as error:
        if address == "local":
            raise
        raise UserError(f"no Ray cluster at RAY_ADDRESS={address}: start it or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def wait_for_workers(workers: int, cpus: int, gpus: int, patience: float) -> None:
    """Wait until the cluster can hold this many training workers at once, at most `patience` seconds, and say so.

    Raises UserError where it still cannot then; at once on a Ray of this machine alone, which does not grow.
    """
    grows = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    end, said = time.monotonic() + (patience if grows else 0), 0.0
    while (lacking := _lacking(workers, cpus, gpus)) is not None:
        if time.monotonic() >= end:
            kind, each, there = lacking
            fit = there // each
            remedy = f"lower resources.workers (--set resources.workers={fit}) or " if fit else ""
            waited = f" after {patience / 60:g} minutes" if grows else ""
            raise UserError(
                f"resources: {workers} workers with {each} {kind} each need {workers * each}, Ray has {there}{waited}: "
                f"{remedy}use a larger machine"
            )
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            kind, each, there = lacking
            say(f"waiting for {workers * each} {kind} in the cluster, it has {there}")
        time.sleep(1)


def _lacking(workers: int, cpus: int, gpus: int) -> tuple[str, int, int] | None:
    """(kind, how many of it a worker takes, how many there are) of what the cluster has too few of."""
    there = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if workers * each > int(there.get(kind, 0)):
            return kind, each, int(there.get(kind, 0))
    return None


def run_tasks(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]
) -> Generator[tuple[int, Result], None, None]:
    """Run `function(*arguments[i])` for every i as Ray tasks of one CPU; yields (i, result) as done.

    Few are handed to Ray at a time, so there may be millions. A task whose worker or node died is run again. Raises
    what a task raised; those still running are then stopped.
    """
    task = ray.remote(num_cpus=1, max_retries=5)(function)
    at_once = 2 * int(ray.cluster_resources().get("CPU", 1))
    running: dict[ray.ObjectRef, int] = {}
    pending = iter(range(len(arguments)))
    try:
        for _ in arguments:
            for number in itertools.islice(pending, at_once - len(running)):
                running[task.remote(*arguments[number])] = number
            (done,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), ray.get(done)
    finally:
        _stop(list(running))


def _stop(tasks: list[ray.ObjectRef]) -> None:
    for _ in range(CANCELS):
        if not tasks:
            return
        for task in tasks:  # again and again: it is lost on a task that is just being sent to its worker
            ray.cancel(task, force=True)
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=1)
