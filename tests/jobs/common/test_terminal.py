from pathlib import Path

import pytest

from jobs.common.terminal import print_lines, print_table
from jobs.measures.result import Result, Table
from jobs.measures.tables import print_results
from pipelines.workflow.progress import console

NAME, SHOWN = "\x1b[31mred\nnext", r"\x1b[31mred\nnext"


def test_what_names_hold_is_shown_and_does_nothing_to_the_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "file", None)
    monkeypatch.setenv("COLUMNS", "250")
    print_lines([f"id {NAME}", "second"])
    assert capsys.readouterr().out == f"id {SHOWN}\nsecond\n"
    print_table("title", ("name", "n"), [(NAME, "1")])
    assert capsys.readouterr().out.splitlines()[-1] == f"{SHOWN}  1"
    print_results([(Result("task", {}, [], [Table(NAME, [NAME], [[NAME]], note=NAME)], []), Path())])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert shown.count("31mred") == 4
