import pytest

from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.readers import describe
from pipelines.workflow.errors import UserError


def texts(items):
    return [(item.id, item.text) for item in items if isinstance(item, Document)]


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_a_row_is_a_document(tmp_path, write_tree, read, suffix, between):
    rows = [["id", "n", "text"], ["x", "1", '"a ""quoted""\n\nline, or\ttwo"'], [], ["", "2", "é"], ["y", "3", ""]]
    content = "\ufeff" + "\r\n".join(between.join(row) for row in rows)
    write_tree(tmp_path, {f"a{suffix}": content})
    items = read(tmp_path / f"a{suffix}", task_bytes=5)
    assert texts(items)[0] == ("s/x", 'a "quoted"\n\nline, or\ttwo')
    assert items[1].id == f"s/{items[1].content_hash[:16]}"
    assert [(item.start, item.end) for item in items[:2]] == [(0, 1), (1, 2)]
    assert items[2] == Dropped("empty", f"{tmp_path}/a{suffix}", 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1,2", "row has another number of fields (2, there are 1 columns)"),
        (b"caf\xe9", "row is not UTF-8"),
        (b"a\0b", "text holds NUL bytes"),
    ],
)
def test_a_bad_row_is_named_and_the_rest_is_read(tmp_path, write_tree, read, row, reason):
    write_tree(tmp_path, {"a.csv": b"text\nbefore\n" + row + b"\nafter\n"})
    before, bad, after = read(tmp_path / "a.csv")
    assert (before.text, after.text) == ("before", "after")
    assert bad.bad
    assert describe(bad) == f"{tmp_path}/a.csv, row 1: {reason}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("body,title\na,b\n", r"has no column 'text', its columns are 'body', 'title': set its source's text_field"),
        ("", r"has no column 'text', its columns are none"),
        ("text,id,text\na,b,c\n", r"has 2 columns 'text': give them different names"),
        ("id,text,id\na,b,c\n", r"has 2 columns 'id': give them different names"),
        ('text\n"never closed\n', r"line 2: unexpected end of data: mend its quotes"),
        ('text\n"a"b\n', r"line 2: ',' expected after '\"': mend its quotes"),
    ],
)
def test_a_file_that_cannot_be_read_so_is_named(tmp_path, write_tree, read, content, message):
    write_tree(tmp_path, {"a.csv": content})
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.csv")


def test_a_long_field_is_read(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.csv": f"text\n{'x' * 10_000_000}\n"})
    assert len(read(tmp_path / "a.csv")[0].text) == 10_000_000
