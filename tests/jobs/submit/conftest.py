"""A server that answers as Ray's dashboard does, or as it should not; and a real Ray head."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from jobs.submit import package
from jobs.submit.dashboard import DEFAULT, Dashboard, DashboardDownError
from jobs.submit.job import make_metadata

ROOT = Path(__file__).parents[3]
NODE = {
    "node_id": "n1",
    "state": "ALIVE",
    "is_head_node": True,
    "resources_total": {"CPU": 4.0, "GPU": 2.0},
    "labels": {"ray.io/node-id": "n1"},
}
TOKEN = "a-token-of-thirty-two-characters"


@dataclass
class Answers:
    """What a server answers by page: JSON, (code, text), or what a function of the request's headers gives; to None it
    hangs up."""

    port: int
    pages: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def serve():
    """Starts a server, on a port if one is given; returns its answers and what stops it."""
    stops: list[Callable[[], None]] = []

    def start(pages: dict[str, object], port: int = 0) -> tuple[Answers, Callable[[], None]]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers.asked.append((self.command, self.path))
                if length := int(self.headers.get("Content-Length") or 0):
                    self.rfile.read(length)
                answer = answers.pages.get(self.path, (404, "no such page"))
                if callable(answer):
                    answer = answer(self.headers)
                if answer is None:
                    return
                code, text = answer if isinstance(answer, tuple) else (200, json.dumps(answer))
                content = text.encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        answers = Answers(server.server_address[1], dict(pages))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        stops.append(stop)
        return answers, stop

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def ray_pages() -> dict[str, object]:
    """Those of a cluster of one node, with this machine's versions and no jobs."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "/api/version": {"ray_version": version("ray")},
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}},
        "/api/v0/nodes?limit=10000": {"data": {"result": {"result": [NODE]}}},
        "/api/cluster_status": {"data": {"clusterStatus": None}},
        "/nodes?view=summary&nocache=1": {"data": {"nodeLogicalResources": {"n1": "0.0/4.0 CPU\n0.0/2.0 GPU"}}},
        "/nodes/n1": {"data": {"detail": {"cmdline": ["raylet", "--python_worker_command=/opt/bin/python x.py"]}}},
        "/api/jobs/": [],
    }


@pytest.fixture
def details():
    """A job as the Jobs API tells of it."""

    def make(job_id: str, state: str = "RUNNING", **changes: object) -> dict:
        code = json.dumps({"version": "0.1.0", "hash": "h"})
        metadata = make_metadata(job_id, 1, "tiny", "ann", {"project": "code"}, code, "name: tiny\n")
        began = {"start_time": 1_700_000_000_000, "end_time": None, "driver_exit_code": None, "message": ""}
        return {"submission_id": job_id, "status": state, "metadata": metadata, **began, **changes}

    return make


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class RealCluster:
    """Ray with token authentication: a head and nodes, every one by a `ray start` of its own, on the loopback address.

    `environment`: what whoever runs the cluster says to it; `client`: what its users' environment holds.
    """

    def __init__(self, head_cpus: int, environment: dict[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fot", dir="/tmp"))  # its sockets have no room for a longer path
        token = self.directory / "token"
        token.write_text(TOKEN)
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {**given, **self.client, "RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}
        self._head_cpus, self._port, self._pages, self._agent = head_cpus, free_port(), free_port(), free_port()
        self.address = DEFAULT.rpartition(":")[0] + f":{self._pages}"
        self.nodes: list[subprocess.Popen] = []
        self._added = 0

    def start_head(self) -> None:
        self.head = self._start(
            "--head",
            f"--num-cpus={self._head_cpus}",
            f"--port={self._port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._pages}",
            f"--dashboard-agent-listen-port={self._agent}",
            f"--temp-dir={self.directory / 'ray'}",
        )
        self.wait_for_nodes(1)

    def add_node(self, cpus: int) -> None:
        self._added += 1
        own = f"--temp-dir={self.directory / f'n{self._added}'}"  # in a common one, nodes clear away each other's code
        agent = f"--dashboard-agent-listen-port={free_port()}"
        self.nodes.append(self._start(f"--address=127.0.0.1:{self._port}", f"--num-cpus={cpus}", agent, own))
        self.wait_for_nodes(1 + len(self.nodes))

    def wait_for_nodes(self, count: int) -> None:
        until = time.monotonic() + 180
        while self._alive() != count:
            for process in (self.head, *self.nodes):
                assert process.poll() is None, self.printed()
            assert time.monotonic() < until, self.printed()
            time.sleep(0.5)

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL for a node, whose processes are all those of its session, and what they started."""
        for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(30)

    def end(self) -> None:
        for process in (*self.nodes, self.head):
            process.send_signal(signal.SIGTERM)
        for process in (*self.nodes, self.head):
            process.wait(60)
        shutil.rmtree(self.directory, ignore_errors=True)

    def printed(self) -> str:
        return (self.directory / "log").read_text()

    def _alive(self) -> int:
        try:
            nodes = Dashboard(self.address).get("/api/v0/nodes?limit=10000")["result"]["result"]
        except DashboardDownError:
            return 0
        return sum(node["state"] == "ALIVE" for node in nodes)

    def _start(self, *options: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += ["--object-store-memory=100000000", *options]
        with open(self.directory / "log", "a") as log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def head():
    """The address of a real Ray with four CPUs, and at most three for a job, as `ray up` starts it on machines that are
    there: with the second generation of its autoscalers."""
    launched = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_NODE_TYPE_NAME": "local.cluster.node",
        "RAY_CLOUD_INSTANCE_ID": "1",
    }
    cluster = RealCluster(4, {"FOT_MAX_CPUS": "3", **launched})
    with pytest.MonkeyPatch.context() as patched:
        as_its_user(cluster, patched)
        cluster.start_head()
        yield cluster.address
        cluster.end()


@pytest.fixture
def cluster(monkeypatch):
    """A head that only drives, and two nodes with a CPU each."""
    cluster = RealCluster(0)
    as_its_user(cluster, monkeypatch)
    cluster.start_head()
    for _ in range(2):
        cluster.add_node(1)
    yield cluster
    cluster.end()


def as_its_user(cluster: RealCluster, patched: pytest.MonkeyPatch) -> None:
    patched.delenv("RAY_AUTH_TOKEN", raising=False)
    for name, value in cluster.client.items():
        patched.setenv(name, value)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The working tree's code as it is now: others may be editing it."""
    root = tmp_path_factory.mktemp("code")
    for name in package.PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").touch()
    return root
