"""What a cluster is: versions, nodes, what is free, whether it grows. Ray has two generations of autoscalers, which
report in different places; what neither tells is not known."""

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jobs.cluster.dashboard import Dashboard
from pipelines.workflow.cluster import NODE_TYPE, grows
from pipelines.workflow.errors import UserError

WORKER_COMMAND = re.compile(r"--python_worker_command=(\S+)")
USAGE = re.compile(  # of a node, a resource a line: '1.0/4.0 CPU (0.0 used of 2.0 reserved in placement groups)'
    r"^(\S+)/(\S+) (CPU|GPU)(?: \((\S+) used of (\S+) reserved in placement groups\))?$", re.MULTILINE
)

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """`python`: the interpreter that the head runs Ray with, and jobs. `nodes`: the resources of each; `free`: of all
    together, now. `grows`: whether an autoscaler adds nodes. None: not known."""

    python: str
    nodes: tuple[Resources, ...]
    free: Resources | None
    grows: bool | None

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
    usage = dashboard.get("/nodes?view=summary&nocache=1")["nodeLogicalResources"].values()
    return Cluster(
        _interpreter(dashboard, next((node["node_id"] for node in nodes if node["is_head_node"]), None)),
        tuple(node["resources_total"] for node in nodes),
        free_resources(usage) if usage else None,
        grows(_types(dashboard, nodes)) if usage else None,
    )


def free_resources(usage: Iterable[str]) -> Resources:
    """CPUs and GPUs that nothing uses or has reserved, from what Ray says of each node."""
    free = {"CPU": 0.0, "GPU": 0.0}
    for used, total, kind, used_of_reserved, reserved in USAGE.findall("\n".join(usage)):
        free[kind] += float(total) - float(used) - (float(reserved or 0) - float(used_of_reserved or 0))
    return free


def _types(dashboard: Dashboard, nodes: Iterable[Mapping[str, Any]]) -> Iterator[str | None]:
    """Of the nodes: as they are labelled, and as an autoscaler of the first generation names them."""
    yield from (node["labels"].get(NODE_TYPE) for node in nodes)
    status = dashboard.get("/api/cluster_status")["clusterStatus"] or {}
    yield from (status.get("autoscalerReport") or {}).get("activeNodes") or ()


def _interpreter(dashboard: Dashboard, head: str | None) -> str:
    """The interpreter that Ray's workers on the head are started with: a bare `python` is that of its PATH, if any."""
    if head is None:
        return "python"
    raylet = (dashboard.get(f"/nodes/{head}").get("detail") or {}).get("cmdline") or ()
    commands = (WORKER_COMMAND.match(argument) for argument in raylet)
    return next((command[1] for command in commands if command), "python")


def _minor(python: str) -> list[str]:
    return python.split(".")[:2]
