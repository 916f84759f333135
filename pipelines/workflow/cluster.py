"""Ray: the cluster of RAY_ADDRESS or one started on this machine, and running many tasks on it."""

import itertools
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from pipelines.workflow.environment import WORKERS
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

Result = TypeVar("Result")
SAY_EVERY = 30.0  # seconds between lines that say what is waited for
CANCELS = 10  # attempts to stop a task, a second each
OBJECT_STORE_BYTES = 200_000_000  # tasks pass paths and counts, not data
AHEAD = 256  # tasks that a cluster which grows is shown: it launches nodes for those that wait
LIMITS = {"CPU": "FOT_MAX_CPUS", "GPU": "FOT_MAX_GPUS"}  # environment variables, for what a job may take
NODE_TYPE = "ray.io/node-group"  # label of a node with its type, where a launcher or KubeRay started it
UNNAMED = re.compile(r"node_?[0-9a-f]{56}", re.IGNORECASE)  # a type in Ray's report that nobody gave the node
FIXED = "local.cluster.node"  # the launcher's type for machines that are there
KUBERAY_HEAD = "headgroup"
KEEP_OFF = {"role": "!training"}  # tasks without GPUs stay away from nodes labelled so


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray for the block: the one this process is connected to, or RAY_ADDRESS's, or a local one, which ends with it.

    Raises UserError where RAY_ADDRESS names a cluster that does not answer, and where none starts on this machine.
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
    except (OSError, ValueError, RuntimeError, RayError) as error:
        if address == "local":
            place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"Ray does not start on this machine ({why}): its logs are in {place}") from error
        if not isinstance(error, ConnectionError | ValueError):
            raise
        raise UserError(f"no Ray cluster at RAY_ADDRESS={address}: start it or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


class WantedWorkers:
    """Training workers that the cluster should be large enough for; where it is not, it has `patience` seconds to grow.

    `grows`: a Ray of this machine alone does not: there is no waiting.
    """

    def __init__(self, workers: int, cpus: int, gpus: int, patience: float) -> None:
        self._workers, self._each = workers, {"CPU": cpus, "GPU": gpus}
        self.grows = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
        self._patience = patience if self.grows else 0.0
        self._since: float | None = None
        self._said = -SAY_EVERY

    def check(self) -> bool:
        """Whether there is room for all of them; where there is not, says so now and then. Raises UserError where that
        has lasted too long."""
        fit = sum(self._fitting(node["Resources"]) for node in ray.nodes() if node["Alive"])
        if fit >= self._workers:
            self._since = None
            return True
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        want = " and ".join(f"{each} {kind}" for kind, each in self._each.items() if each)
        if now - self._since >= self._patience:
            waited = f" after {self._patience / 60:g} minutes" if self.grows else ""
            remedy = f"lower resources.workers (--set resources.workers={fit}) or " if fit else ""
            raise UserError(
                f"resources: {self._workers} workers with {want} each do not fit, Ray has room for {fit}{waited}: "
                f"{remedy}use a larger machine or cluster"
            )
        if now - self._said >= SAY_EVERY:
            self._said = now
            say(f"waiting for room for {self._workers} workers with {want} each, the cluster has room for {fit}")
        return False

    def wait(self) -> None:
        """Until there is room. Raises UserError as `check` does."""
        while not self.check():
            time.sleep(1)

    def _fitting(self, there: Mapping[str, float]) -> int:
        """How many fit on a node."""
        return min((int(there.get(kind, 0)) // each for kind, each in self._each.items() if each), default=0)


def run_tasks(
    function: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],
    gpus: int = 0,
    memory: Sequence[int] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Run `function(*arguments[i])` for every i as Ray tasks of one CPU; yields (i, result) as done.

    `gpus`: for each; `memory[i]`: bytes that Ray reserves for it. Few are handed to Ray at a time, so there may be
    millions. Without GPUs they keep off nodes labelled for training, so that these come and go with trainings alone. A
    task whose worker or node died is run again. Raises what a task raised; those still running are then stopped.
    """
    where = {} if gpus else {"label_selector": KEEP_OFF}
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=5, **where)(function)
    running: dict[ray.ObjectRef, int] = {}
    pending, grows = iter(range(len(arguments))), autoscales()
    try:
        for _ in arguments:
            for number in itertools.islice(pending, max(0, _at_once(gpus, grows) - len(running))):
                asked = task if memory is None else task.options(memory=memory[number])
                running[asked.remote(*arguments[number])] = number
            (done,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):  # one line, without Ray's account of it
                    raise error.cause from None
                raise
            yield number, result
    finally:
        _stop(list(running))


def autoscales() -> bool:
    """Whether the cluster launches nodes for what waits for them, or may do so."""
    reported = (json.loads(_report() or "{}").get("autoscaler_report") or {}).get("active_nodes") or ()
    return grows([*reported, *(node["Labels"].get(NODE_TYPE) for node in ray.nodes() if node["Alive"])]) is not False


def _report() -> bytes | None:
    """What an autoscaler of the first generation says of itself, as JSON."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray._private.worker import global_worker

    answer: bytes | None = global_worker.gcs_client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)
    return answer


def grows(types: Iterable[str | None]) -> bool | None:
    """Whether an autoscaler adds nodes, by the types of those there are: the first generation of Ray's names them in
    its report, the second in labels. None where they do not tell: KubeRay labels nodes without an autoscaler, too."""
    named = {kind for kind in types if kind and not UNNAMED.fullmatch(kind)} - {FIXED}
    return None if KUBERAY_HEAD in named else bool(named)


def job_limit(kind: str) -> int | None:
    """How many CPUs or GPUs a job may take, where the cluster limits that. Raises UserError for what is no number."""
    text = os.environ.get(LIMITS[kind])
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{LIMITS[kind]}={text} in the environment of the cluster's nodes: make it a number above 0")
    return int(text)


def _at_once(gpus: int, grows: bool) -> int:
    """Tasks that Ray holds at a time, of one CPU and so many GPUs each."""
    most = [max(AHEAD if grows else 2, 2 * int(ray.cluster_resources().get("CPU", 0)))]
    for kind, each in (("CPU", 1), ("GPU", gpus)):
        if each and (limit := job_limit(kind)) is not None:
            most.append(max(1, limit // each))
    return min(most)


def _stop(tasks: list[ray.ObjectRef]) -> None:
    """Those that are about to end may do so first: Ray 2.60 aborts this process where a task ends in the very moment in
    which it is cancelled."""
    for _ in range(CANCELS):
        if not tasks:
            return
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=1)
        for task in tasks:  # again and again: it is lost on a task that is just being sent to its worker
            ray.cancel(task, force=True)
