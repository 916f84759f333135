"""Ray: the cluster of RAY_ADDRESS or one started on this machine, and running many tasks on it."""

import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from pipelines.environment import WORKERS
from pipelines.errors import UserError

Result = TypeVar("Result")
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


def check_workers(workers: int, cpus: int, gpus: int) -> None:
    """Raises UserError where the cluster cannot hold this many training workers at once."""
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        there = int(ray.cluster_resources().get(kind, 0))
        if workers * each > there:
            fit = there // each
            remedy = f"lower resources.workers (--set resources.workers={fit}) or " if fit else ""
            raise UserError(
                f"resources: {workers} workers with {each} {kind} each need {workers * each}, Ray has {there}: "
                f"{remedy}use a larger machine"
            )


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
