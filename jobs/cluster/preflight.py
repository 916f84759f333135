"""What is looked at on the cluster before a job does anything: its code, its limits, the paths its nodes see."""

import glob
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.cluster.needs import of_variant, per_worker, workers
from jobs.cluster.package import READ, WORK_DIR, WRITTEN, Recipes, local_paths
from jobs.common.version import code_version
from jobs.config.settings import Content
from pipelines.workflow.cluster import LIMITS, job_limit
from pipelines.workflow.errors import UserError

CHECKED = "checked:"  # how the line begins that says that all is well
PATIENCE = 10.0  # seconds until a node sees, through a shared file system, what was written on another
ANSWER = 300.0  # seconds for all nodes to look: one that mounts a file system which is away hangs for ever


def check_limits(recipes: Recipes) -> None:
    """Raises UserError where a job's training workers ask for more than this cluster lets a job take."""
    for name, recipe in recipes.items():
        for kind, count in per_worker(recipe).items():
            total, limit = int(workers(recipe) * count), job_limit(kind)
            if limit is not None and total > limit:
                raise UserError(
                    f"{of_variant(name, recipes)}resources: the training workers take {total} {kind}s, this cluster "
                    f"allows a job {limit} ({LIMITS[kind]}): lower resources.workers, or ask who runs the cluster"
                )


def check_code(version: str) -> None:
    """Raises UserError where this machine has other code than the job was submitted with."""
    if (ours := code_version()) != version:
        raise UserError(f"the cluster has fot {ours}, who submitted has {version}: install the same version on both")


def check_places(content: Content) -> None:
    """Raises UserError where what a recipe writes has no place on this machine."""
    for key, path in local_paths(content, WRITTEN):
        place = Path(path) if Path(path).exists() else Path(path).parent
        if not place.is_dir():
            raise UserError(
                f"{key} {path}: the cluster has no directory {place}: set {key} to one on a file system that all its "
                f"nodes share"
            )
        if not os.access(place, os.W_OK):
            raise UserError(f"{key} {path}: the cluster may not write to {place}: set {key} to another place")


def unseen(paths: Iterable[tuple[str, str]], probe: Path) -> str | None:
    """What this machine does not see of the paths that a recipe reads, by key, and of a file that was just written to
    its work_dir; None where it sees all."""
    for key, path in paths:
        if not os.path.exists(path) and not any(glob.iglob(path, recursive=True)):
            return f"{key} {path}"
    until = time.monotonic() + PATIENCE
    while not probe.exists():
        if time.monotonic() > until:
            return f"{WORK_DIR} {probe.parents[1]}, as the head has it"
        time.sleep(0.5)
    return None


def check_nodes(content: Content, probe: Path) -> int:
    """Have every node look at the paths. Returns how many see all. Raises UserError for the first that misses one or is
    silent for too long; nodes that die meanwhile are passed over. Ray must be connected."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def living() -> dict[str, str]:
        return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}

    paths, task = list(local_paths(content, READ)), ray.remote(num_cpus=0)(unseen)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths, probe): node
        for node in living()
    }
    until, seeing = time.monotonic() + ANSWER, 0
    while asked:
        done, _ = ray.wait(list(asked), timeout=max(0.0, until - time.monotonic()))
        if not done:
            silent = [host for node, host in living().items() if node in asked.values()]
            if not silent:
                break
            raise UserError(
                f"node {silent[0]} of the cluster has not said for {ANSWER / 60:g} minutes whether it sees what the "
                f"recipe names: mend the file systems that it mounts, or take it out of the cluster"
            )
        if (host := living().get(asked.pop(done[0]))) is None:
            continue
        try:
            missed = ray.get(done[0])
        except ray.exceptions.RayError as error:
            raise UserError(f"node {host} cannot run this job's code: {_last_line(error)}") from None
        if missed is not None:
            raise UserError(
                f"node {host} of the cluster does not see {missed}: put it on a file system that all nodes share, or "
                f"at a URL (s3://, gs://)"
            )
        seeing += 1
    return seeing


def _last_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]
