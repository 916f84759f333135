import os
import pty
import subprocess
import sys

import pytest

from pipelines.workflow.progress import human

EVERY_VOICE = """
import os, subprocess, sys
from pathlib import Path
from pipelines.workflow.progress import console, quiet

def speak(when):
    print(f"python {when}", flush={flush})
    print(f"python error {when}", file=sys.stderr)
    os.write(1, f"native {when}\\n".encode())
    os.write(2, f"native error {when}\\n".encode())
    subprocess.run(["sh", "-c", f"echo child {when}; echo child error {when} >&2"], check=True)
    console.print(f"console {when}")

speak("before")
try:
    with quiet(Path("logs/log.txt")):
        speak("inside")
        {within}
except ValueError:
    pass
speak("after")
"""

PROGRESS = """
import sys
from pathlib import Path
from pipelines.workflow import progress
from pipelines.workflow.progress import Progress, quiet
{before}
with quiet(Path("log.txt")), Progress("shards", 2000, "B") as bar:
{block}
"""


def run(script, tmp_path, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"capture_output": True, "text": True, "check": True, "timeout": 60, "env": environment, **options}
    return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, **options)


def every_voice(within, flush):
    return EVERY_VOICE.replace("{within}", within).replace("{flush}", str(flush))


def said(text):
    return sorted(text.splitlines())


@pytest.mark.parametrize("within", ["pass", "raise ValueError"])
@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "buffered"])
def test_inside_quiet_only_the_console_is_heard(tmp_path, within, flush):
    process = run(every_voice(within, flush), tmp_path)
    inside, voices = (tmp_path / "logs/log.txt").read_text(), ("python", "native", "child")
    assert said(process.stdout) == sorted(f"{who} {when}" for who in voices for when in ("before", "after"))
    errors = [f"{who} error {when}" for who in voices for when in ("before", "after")]
    assert said(process.stderr) == sorted([*errors, *(f"console {when}" for when in ("before", "inside", "after"))])
    assert said(inside) == sorted(f"{who}{error} inside" for who in voices for error in ("", " error"))


def test_the_log_grows_from_run_to_run(tmp_path):
    for _ in range(2):
        run(every_voice("pass", True), tmp_path)
    assert (tmp_path / "logs/log.txt").read_text().count("native inside") == 2


def test_a_log_on_a_full_disk_takes_no_voice_away(tmp_path):
    script = """
import sys
from pathlib import Path
from pipelines.workflow.progress import quiet, say
try:
    with quiet(Path("/dev/full")):
        print("for the log")
        raise RuntimeError("what happened")
except RuntimeError as error:
    print(error, file=sys.stderr)
say("after")
"""
    finished = run(script, tmp_path)
    assert finished.stderr.splitlines() == ["what happened", "after"]
    assert finished.stdout == ""
    assert finished.returncode == 0


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    block = "    for _ in range(4):\n        bar.advance(500)"
    process = run(PROGRESS.format(before="progress.LINE_EVERY = 0", block=block), tmp_path)
    lines = process.stderr.splitlines()
    assert [line.split(",")[0].split() for line in lines] == [
        ["shards", f"{done}/2.0k", "B"] for done in ("500", "1.0k", "1.5k", "2.0k", "2.0k")
    ]
    assert "\x1b" not in process.stderr
    assert "\r" not in process.stderr


def test_plain_lines_are_rare_but_the_last_one_comes(tmp_path):
    block = "    for step in range(2001):\n        bar.set(step, f'loss {step}')"
    (line,) = run(PROGRESS.format(before="", block=block), tmp_path).stderr.splitlines()
    assert line.strip().startswith("shards 2.0k/2.0k B, ")
    assert line.endswith("B/s loss 2000")


def test_what_an_earlier_run_did_is_counted_but_not_in_the_rate(tmp_path):
    block = "    bar.resume_at(1990)\n    time.sleep(1)\n    bar.advance(5)"
    (line,) = run(PROGRESS.format(before="import time", block=block), tmp_path).stderr.splitlines()
    done, rate = line.split(", ")[:2]
    assert done.split() == ["shards", "2.0k/2.0k", "B"]
    assert float(rate.split()[0]) <= 5


def test_an_error_ends_progress_without_a_last_line(tmp_path):
    process = run(PROGRESS.format(before="", block="    raise SystemExit(3)"), tmp_path, check=False)
    assert (process.returncode, process.stderr) == (3, "")


def test_on_a_terminal_progress_is_a_bar_even_inside_quiet(tmp_path):
    terminal, end = pty.openpty()
    try:
        block = "    bar.advance(2000)\n    print('library', flush=True)"
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        script = PROGRESS.format(before="", block=block)
        run(script, tmp_path, capture_output=False, stdout=end, stderr=end, env=environment)
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert "100%" in shown
    assert "library" not in shown
    assert (tmp_path / "log.txt").read_text() == "library\n"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (7, "7"), (0.25, "0.2"), (12.7, "13"), (1000, "1.0k"), (1234567, "1.2M"), (5.5e9, "5.5G")],
)
def test_amounts_for_people(amount, text):
    assert human(amount) == text
