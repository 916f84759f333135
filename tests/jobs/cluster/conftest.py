"""A server that answers as Ray's dashboard does, or as it should not; and a real Ray head."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs.cluster import package
from jobs.cluster.job import make_metadata

ROOT = Path(__file__).parents[3]
NODE = {
    "node_id": "n1",
    "state": "ALIVE",
    "is_head_node": True,
    "resources_total": {"CPU": 4.0, "GPU": 2.0},
    "labels": {"ray.io/node-id": "n1"},
}


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


@pytest.fixture(scope="module")
def head(real_cluster):
    """The address of a real Ray with four CPUs, and at most three for a job, as `ray up` starts it on machines that are
    there: with the second generation of its autoscalers."""
    launched = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_NODE_TYPE_NAME": "local.cluster.node",
        "RAY_CLOUD_INSTANCE_ID": "1",
    }
    cluster = real_cluster(4, {"FOT_MAX_CPUS": "3", **launched})
    with pytest.MonkeyPatch.context() as patched:
        cluster.give_to_user(patched)
        cluster.start_head()
        yield cluster.address
        cluster.end()


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The working tree's code as it is now: others may be editing it."""
    root = tmp_path_factory.mktemp("code")
    for name in package.PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").touch()
    return root
