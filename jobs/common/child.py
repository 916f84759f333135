"""A server that runs as a child process, for this machine alone: MLflow's pages, Prefect's."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1


def interrupt_when_asked_to_end() -> None:
    """Have SIGTERM and SIGHUP, unless that is ignored as `nohup` has it, raise KeyboardInterrupt as Ctrl-C does."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) is not signal.SIG_IGN:
            signal.signal(sign, signal.default_int_handler)


def is_taken(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return True
    return False


def answers(server: "subprocess.Popen[bytes]", url: str) -> bool:
    """Whether the server answers before it ends, or two minutes are over."""
    for _ in range(600):
        if server.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(url, timeout=2):
                return server.poll() is None
        except OSError:
            time.sleep(0.2)
    return False


def end(server: "subprocess.Popen[bytes]") -> None:
    """End the server, which leads a session, and the processes it started, whatever signals come meanwhile."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(server.pid, sign)
            server.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def die_with_parent(sign: signal.Signals) -> None:
    """Have the system send this process a signal when its parent has died, however that was. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
