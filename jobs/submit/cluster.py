"""What a cluster is: versions, nodes, what is free, whether it grows."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jobs.submit.dashboard import Dashboard
from pipelines.errors import UserError

WORKER_COMMAND = re.compile(r"--python_worker_command=(\S+)")
UNNAMED = re.compile(r"node_?[0-9a-f]{56}", re.IGNORECASE)  # how Ray names the type of a node no autoscaler started

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """`nodes`: the resources of each; `free`: of all together, now. `grows`: whether an autoscaler adds nodes.
    `python`: the interpreter that the head runs Ray with, and jobs."""

    ray: str
    python_version: str
    python: str
    nodes: tuple[Resources, ...]
    free: Resources
    grows: bool

    @property
    def total(self) -> Resources:
        return {kind: sum(node.get(kind, 0.0) for node in self.nodes) for kind in ("CPU", "GPU")}


def look_at(dashboard: Dashboard) -> Cluster:
    """Ask a dashboard what its cluster is. Raises UserError where Ray or Python are of other versions than here."""
    ours = version("ray")
    if dashboard.ray_version != ours:
        raise UserError(
            f"the cluster at {dashboard.address} runs Ray {dashboard.ray_version}, this machine has {ours}: install "
            f"the same version on both"
        )
    python_version = str(dashboard.get("/api/v0/cluster_metadata")["pythonVersion"])
    if _minor(python_version) != _minor(platform.python_version()):
        raise UserError(
            f"the cluster at {dashboard.address} runs Python {python_version}, this machine has "
            f"{platform.python_version()}: use the same one on both, but for the last number"
        )
    nodes = [
        node for node in dashboard.get("/api/v0/nodes?limit=10000")["result"]["result"] if node["state"] == "ALIVE"
    ]
    if not nodes:
        raise UserError(f"the cluster at {dashboard.address} has no node yet: it is just starting, try again")
    status = dashboard.get("/api/cluster_status")["clusterStatus"] or {}
    return Cluster(
        dashboard.ray_version,
        python_version,
        _interpreter(dashboard, next((node["node_id"] for node in nodes if node["is_head_node"]), None)),
        tuple(node["resources_total"] for node in nodes),
        free_resources(status, nodes),
        grows(status),
    )


def free_resources(status: Mapping[str, Any], nodes: list[dict[str, Any]]) -> Resources:
    """CPUs and GPUs that nothing uses, by Ray's last report; all of them while there is none."""
    usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
    total = {kind: sum(node["resources_total"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    return {kind: usage[kind][1] - usage[kind][0] if kind in usage else total[kind] for kind in total}


def grows(status: Mapping[str, Any]) -> bool:
    """Whether an autoscaler manages the nodes: it names their types. Before its first report that counts as yes."""
    active = (status.get("autoscalerReport") or {}).get("activeNodes")
    return active is None or not all(UNNAMED.fullmatch(name) for name in active)


def _interpreter(dashboard: Dashboard, head: str | None) -> str:
    """The interpreter that Ray's workers on the head are started with: a bare `python` is that of its PATH, if any."""
    if head is None:
        return "python"
    raylet = (dashboard.get(f"/nodes/{head}").get("detail") or {}).get("cmdline") or ()
    commands = (WORKER_COMMAND.match(argument) for argument in raylet)
    return next((command[1] for command in commands if command), "python")


def _minor(python: str) -> list[str]:
    return python.split(".")[:2]
