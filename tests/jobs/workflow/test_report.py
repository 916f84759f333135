import base64
from pathlib import Path

from jobs.measures.result import Point, Result, Table
from jobs.measures.tables import shown
from jobs.workflow.report import write_report


def test_the_page_holds_facts_tables_plots_and_texts_and_escapes_them(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"\x89PNG bytes")
    table = Table("by <length>", ["model", "512"], [["fot & co", 8.29712], ["base", None]], note="a note")
    result = Result("perplexity", {}, [Point("perplexity/model", 512, 8.29712)], [table], ["curve.png"])
    texts = {"settings": '{"name": "<b>"}'}
    write_report(tmp_path / "report.html", "A <run>", {"base": "pre-trained"}, [(result, tmp_path)], texts)
    page = (tmp_path / "report.html").read_text()
    for expected in (
        "A &lt;run&gt;", "<dt>base</dt><dd>pre-trained</dd>", "by &lt;length&gt;", "fot &amp; co", "<td>8.297</td>",
        "<td>-</td>", "a note", base64.b64encode(b"\x89PNG bytes").decode(),
        "{&quot;name&quot;: &quot;&lt;b&gt;&quot;}",
    ):  # fmt: skip
        assert expected in page
    assert "<run>" not in page
    assert "http" not in page.replace("http-equiv", "")  # needs nothing from anywhere else


def test_what_names_hold_is_shown_and_does_nothing(tmp_path: Path) -> None:
    table = Table("t\x1b[31m", ["a\u202eb"], [["x\nid"]])
    result = Result("perplexity", {}, [], [table], [])
    texts = {"lineage": "one\x07\ntwo"}
    write_report(tmp_path / "report.html", "run\x1b", {"base": "a\x9b"}, [(result, tmp_path)], texts)
    page = (tmp_path / "report.html").read_text()
    for expected in ("run\\x1b", "a\\x9b", "t\\x1b[31m", "a\\u202eb", "<td>x\\nid</td>", "one\\x07\ntwo"):
        assert expected in page
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(page)


def test_numbers_are_shown_as_people_read_them() -> None:
    assert [shown(cell) for cell in (16384, 0.9, 0.0, 0.00001, "x", None)] == [
        "16,384", "0.900", "0.000", "1e-05", "x", "-",
    ]  # fmt: skip
