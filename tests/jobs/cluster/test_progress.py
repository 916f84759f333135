"""How far a job is, from what the program prints where no terminal is."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.cluster.progress import StageRow, read_made, read_progress
from jobs.workflow import workspace
from pipelines.workflow import progress
from pipelines.workflow.store import Output


@pytest.fixture
def printed(monkeypatch) -> io.StringIO:
    """What the program's one voice says."""
    file = io.StringIO()
    for module in (progress, workspace):
        monkeypatch.setattr(module, "console", Console(file=file, highlight=False, width=160))
    return file


def output(stage: str, reused: bool = False) -> Output:
    return Output(stage, "k", Path(f"/runs/store/{stage}/k"), {}, 75.0, "h", {}, {}, stage, reused)


def test_stages_are_read_from_what_the_program_really_prints(printed: io.StringIO) -> None:
    workspace._report(output("tokenizer", reused=True))
    with progress.Progress("shards", 2_000_000, "B") as bar:
        bar.set(2_000_000)
    workspace._report(output("shards"))
    bar = progress.Progress("base", 4000, "steps")
    bar.set(172, "loss 3.896, 1.8k tokens/s, 0.7 GB")
    bar._line()
    made = "tiny: 10 stages; library output goes to /runs/logs/tiny.log\n" + printed.getvalue()
    *done, running = read_progress("2026-11-22 INFO job_manager.py:581 -- Runtime env is setting up.\n" + made)
    assert done == [
        StageRow("tiny", "tokenizer", "found", "/runs/store/tokenizer/k"),
        StageRow("tiny", "shards", "done in 1:15", "/runs/store/shards/k"),
    ]
    assert (running.of, running.stage, running.state) == ("tiny", "base", "running")
    assert running.detail.startswith("172/4.0k steps, ")
    assert running.detail.endswith("loss 3.896, 1.8k tokens/s, 0.7 GB")


def test_the_header_is_read_from_what_the_program_really_prints(printed: io.StringIO, tmp_path: Path) -> None:
    workspace.WorkDir("base-lines.2", str(tmp_path)).run(lambda: [])
    (row,) = read_progress(printed.getvalue() + "   base found /x\n")
    assert row.of == "base-lines.2"


def test_variants_are_told_apart_and_remarks_are_no_stages() -> None:
    log = """\
words: 16 training, 8 held out
x-standard: 10 stages; library output goes to /l
         shards found /s
                24 documents, 23.7k tokens, 1.61 characters a token, 1 shards (1 new)
dictionary seed 0 1.2k/4.0k tokens, 3 tokens/s, eta 1:00
x-fot: 10 stages; library output goes to
/a/long/path
         shards found /s
checked: the one node sees what the recipe names
"""
    assert [(row.of, row.stage) for row in read_progress(log)] == [("x-standard", "shards"), ("x-fot", "shards")]
    running = StageRow("x-standard", "dictionary seed 0", "running", "1.2k/4.0k tokens, 3 tokens/s, eta 1:00")
    assert read_progress(log.partition("x-fot")[0])[-1] == running
    assert read_progress("") == []


def test_what_was_made_is_read_from_the_last_lines() -> None:
    log = (
        "tiny: done in 3:22\n  report      /r.html\n  MLflow run      5001\n"
        "  registered model  models:/fot/tiny/1 (candidate)\n"
    )
    assert dict(read_made(log)) == {
        "report": "/r.html",
        "MLflow run": "5001",
        "registered model": "models:/fot/tiny/1 (candidate)",
    }
