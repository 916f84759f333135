"""`fot schedule serve`: Prefect's server as a child process, and what fires beside it. No process stays behind."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from jobs.common.child import HOST, answers, die_with_parent, end, interrupt_when_asked_to_end, is_taken
from jobs.schedule.store import PREFECT, SCHEDULES, server_of, serving
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

TICK = 1.0  # seconds between looks at the schedules' files
PATIENCE = 180.0  # seconds that a server may leave questions unanswered
STOP_SECONDS = 300.0  # that a training has for its checkpoint


def serve(work_dir: Path, port: int) -> None:
    """Fire a work_dir's schedules until Ctrl-C or SIGTERM; firings that run then are stopped, trainings with a
    checkpoint. Raises UserError where this cannot begin, and where the server ends."""
    if importlib.util.find_spec("prefect") is None:
        raise UserError("fot schedule serve needs Prefect: pip install 'fot[schedule]'")
    with serving(work_dir) as held:
        if not held:
            raise UserError(f"{work_dir} is served already, by process {server_of(work_dir)}")
        if is_taken(port):
            raise UserError(f"port {port} is taken: try --port with another one")
        interrupt_when_asked_to_end()
        os.environ.update(_environment(work_dir, port))  # before anything of Prefect is imported
        tempfile.tempdir = os.environ["PREFECT_HOME"]  # in the common one its runner's place is another user's
        try:
            with _prefect_server(work_dir, port) as server:
                _fire_all(work_dir, server, f"http://{HOST}:{port}")
        except KeyboardInterrupt:
            say("ended")


def _fire_all(work_dir: Path, server: "subprocess.Popen[bytes]", pages: str) -> None:
    from jobs.schedule.engine import Engine

    broken: set[str] = set()  # what was said of schedules that cannot be read, as long as it holds

    with Engine(work_dir) as engine:
        say(f"firing the schedules of {work_dir}; Prefect's pages are at {pages} (Ctrl-C ends both)")
        answered = time.monotonic()
        try:
            while True:
                try:
                    now_broken = set(map(str, engine.tick()))
                    for message in now_broken - broken:
                        say(message)
                    answered, broken = time.monotonic(), now_broken
                except engine.unreachable as error:
                    if server.poll() is not None or time.monotonic() - answered > PATIENCE:
                        raise UserError(f"Prefect's server is gone ({error}): start this again") from None
                time.sleep(TICK)
        finally:
            try:
                if server.poll() is None:
                    engine.withdraw()
            finally:
                _stop_firings()


def _stop_firings() -> None:
    """Have the firings, each a process that multiprocessing started, stop, and wait until they have."""
    if not (running := multiprocessing.active_children()):
        return
    say("a firing runs: its training takes a checkpoint first (Ctrl-C again does not wait for it)")
    for process in running:
        process.terminate()
    until = time.monotonic() + STOP_SECONDS
    for process in running:
        process.join(max(0.0, until - time.monotonic()))


@contextmanager
def _prefect_server(work_dir: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    home = work_dir / SCHEDULES / PREFECT
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    path = home / "server.log"
    with open(path, "ab") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
        try:
            if not answers(server, f"{os.environ['PREFECT_API_URL']}/health"):
                raise UserError(f"Prefect's server does not start on port {port}: {path} says why")
            yield server
        finally:
            children = psutil.Process().children(recursive=True)
            end(server)
            for process in children:
                if process.is_running() and process.pid != server.pid:
                    process.kill()


def _environment(work_dir: Path, port: int) -> dict[str, str]:
    """Prefect's settings: all it keeps is in work_dir, and it tells nobody."""
    return {
        "PREFECT_HOME": str(work_dir / SCHEDULES / PREFECT),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",  # not of any page
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # what its server answers while its database is busy
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }
