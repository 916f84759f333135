import os
import signal

import pytest

from pipelines.workflow.files import complete_or_invisible, write_atomically

KILLED_WHILE_WRITING = """
import time
from pathlib import Path
from pipelines.workflow.files import complete_or_invisible
with complete_or_invisible(Path("file")) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_file_appears_complete_with_its_directory(tmp_path, contents):
    write_atomically(tmp_path / "new" / "file", b"content")
    assert contents(tmp_path) == {"new/file": b"content"}


def test_an_error_leaves_what_was_there_before(tmp_path, contents):
    write_atomically(tmp_path / "file", b"before")

    def write_half():
        with complete_or_invisible(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert contents(tmp_path) == {"file": b"before"}


def test_a_killed_writer_leaves_what_was_there_before(tmp_path, python):
    write_atomically(tmp_path / "file", b"before")
    process = python(KILLED_WHILE_WRITING)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "file").read_bytes() == b"before"
    write_atomically(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"


def test_two_writers_of_one_file_do_not_write_over_each_other(tmp_path, contents, monkeypatch):
    """Not even where they have the same number, as in two containers that share a disk."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with complete_or_invisible(tmp_path / "file") as first:
        first.write_bytes(b"first, begun before")
        with complete_or_invisible(tmp_path / "file") as second:
            second.write_bytes(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert contents(tmp_path) == {"file": b"first, begun before"}
