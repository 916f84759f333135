"""Outcomes to record, and a tracking server of MLflow's own that can be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from jobs.registry.record import Outcome
from jobs.tracking import TrainingFacts

FINISHED = 1_700_000_000.0


@pytest.fixture
def port() -> int:
    """A free one."""
    return free_port()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")


class Server:
    """`mlflow server` on a port of its own, with a database and files that outlive it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        database, files = self.directory / "mlflow.db", self.directory / "files"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}"),
                *("--artifacts-destination", str(files)),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self.uri, self._process)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory, empty_database: Path):
    """Not started: a test starts it, and may kill it."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "mlflow.db").write_bytes(empty_database.read_bytes())
    server = Server(directory)
    yield server
    server.kill()


@pytest.fixture
def make_outcome(work_dir: Path):
    """An outcome whose files lie in the work directory as a store's do."""

    def make(key: str = "one", passkey: float = 0.95, **changes: object) -> Outcome:
        output = work_dir / "store" / "register" / key
        model, training = work_dir / "store" / "finetune" / key / "model", work_dir / "store" / "finetune" / key
        for directory in (output, model):
            directory.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(f"weights of {key}".encode())
        facts = TrainingFacts(f"finetune-{key}", "tiny", "tiny: finetune", {}, {"steps": 3}, {"seed": 0})
        facts.write(training)
        lines = "".join(f'{{"step": {n}, "loss": {4 - n}, "time": {FINISHED + n - 1}}}\n' for n in (1, 2, 3))
        (training / "metrics.jsonl").write_text(lines)
        (output / "report.html").write_text(f"report of {key}")
        points = {("perplexity/model", 512): 10.05, ("perplexity/base", 512): 10.0, ("perplexity/model", 2048): 9.5}
        points |= {("passkey/exact", 512): 1.0, ("passkey/exact", 2048): passkey}
        values: dict = {
            "key": key,
            "name": "tiny",
            "tags": {"fot.manifest": "abc", "fot.base": "a llama", "fot.tokens_seen": "12"},
            "params": {"seed": 0, "steps": 3},
            "metrics": [(name, value, step, FINISHED) for (name, step), value in points.items()],
            "artifacts": {"report.html": output / "report.html"},
            "model": model,
            "trainings": [training],
        }
        return Outcome(**values | changes)

    return make
