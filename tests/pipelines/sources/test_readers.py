import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.readers import describe
from pipelines.workflow.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
compressed = pytest.mark.parametrize("codec", COMPRESS)


def line(text="some text", **fields):
    return json.dumps({"text": text, **fields}, ensure_ascii=False)


def ids(items):
    return [item.id for item in items if isinstance(item, Document)]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def dropped(items):
    return [item for item in items if isinstance(item, Dropped)]


def reasons(items):
    return [item.reason for item in dropped(items)]


# Whole files


@compressed
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.tex", "a.thy", "a.py", "Makefile"])
def test_a_text_file_is_one_document(tmp_path, write_tree, read, name, codec):
    content = "first\n\nsecond é\n".encode()
    write_tree(tmp_path, {name + codec: COMPRESS[codec](content)})
    (document,) = read(tmp_path / (name + codec))
    assert (document.id, document.source, document.text) == (f"s/{name}{codec}", "s", "first\n\nsecond é\n")
    assert (document.file, document.start, document.end) == (name + codec, 0, len(content))


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt": b"\xef\xbb\xbfhello"})
    assert texts(read(tmp_path / "a.txt")) == ["hello"]


def test_a_file_of_several_compressed_parts_is_read_to_its_end(tmp_path, write_tree, read):
    write_tree(
        tmp_path, {f"a.txt{codec}": compress(b"one ") + compress(b"two") for codec, compress in COMPRESS.items()}
    )
    assert texts(read(tmp_path)) == ["one two"] * 3


@compressed
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"caf\xe9", "not UTF-8"), (b"a\0b", "binary (NUL bytes)"), (b"", "empty"), (b" \n", "empty")],
)
def test_a_file_that_is_no_text_is_dropped_and_bad_if_it_was_meant_to_be(
    tmp_path, write_tree, read, content, reason, codec
):
    names = ["bad.md", "bad.png", "bad.tex", "bad.txt", "good.txt"]
    write_tree(tmp_path, {name + codec: COMPRESS[codec](b"good" if "good" in name else content) for name in names})
    items = read(tmp_path)
    assert texts(items) == ["good"]
    bad = [] if reason == "empty" else [".md", ".tex", ".txt"]
    assert dropped(items) == [
        Dropped(reason, f"{tmp_path}/bad{suffix}{codec}", None, suffix in bad)
        for suffix in (".md", ".png", ".tex", ".txt")
    ]
    assert describe(dropped(items)[0]) == f"{tmp_path}/bad.md{codec}: {reason}"


def test_a_file_that_is_no_text_leaves_the_rest_of_its_tree(tmp_path, write_tree, read):
    write_tree(tmp_path, {"tree/a.py": "a", "tree/b.bin": b"\xff\0", "tree/c.bin": b"\0", "tree/d.txt": b"\0"})
    items = read(tmp_path)
    assert texts(items) == ["a"]
    assert sorted((item.reason, item.bad) for item in dropped(items)) == [
        ("binary (NUL bytes)", False),
        ("binary (NUL bytes)", True),
        ("not UTF-8", False),
    ]


def test_a_tree_of_empty_files_is_empty(tmp_path, write_tree, read):
    write_tree(tmp_path, {"tree/a.py": "", "tree/b.py": " "})
    assert read(tmp_path) == [Dropped("empty", "tree")]


# Lines


@compressed
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_line_is_a_document(tmp_path, write_tree, read, suffix, codec):
    content = f"{line('one', id='x')}\n{line('two', id=7)}\n".encode()
    write_tree(tmp_path, {"a" + suffix + codec: COMPRESS[codec](content)})
    documents = read(tmp_path / f"a{suffix}{codec}", task_bytes=10)
    assert [(document.id, document.text) for document in documents] == [("s/x", "one"), ("s/7", "two")]
    assert [json.loads(content[d.start : d.end])["text"] for d in documents] == ["one", "two"]


def test_the_fields_of_text_and_id_can_be_named(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"body": "hello", "key": "k", "text": "no", "id": "no"}'})
    (document,) = read(tmp_path / "a.jsonl", text_field="body", id_field="key")
    assert (document.id, document.text) == ("s/k", "hello")


def test_a_document_without_id_is_named_by_its_content(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": "\n".join([line("one"), line("two"), line("one", id=None), line("one", more=1)])})
    first, second, third, fourth = ids(read(tmp_path / "a.jsonl"))
    assert first == third == fourth != second


junk = st.sampled_from([b"{", b"\xff\xfe", b"[]", b'{"text": 3}', b"\xe2\x80\xa8", b"not json \r at all"])
blank = st.sampled_from([b"", b"  ", b"\t"])
good = st.builds(
    lambda text: line(f"x{text}").encode(),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
)


@given(
    lines=st.lists(st.tuples(st.one_of(good, good, junk, blank), st.sampled_from([b"\n", b"\r\n"])), max_size=30),
    last=st.one_of(good, st.just(b"")),
    task_bytes=st.integers(1, 200),
    codec=st.sampled_from(list(COMPRESS)),
)
def test_every_line_is_read_once_whatever_the_byte_ranges(fresh, write_tree, read, lines, last, task_bytes, codec):
    content = b"".join(piece for pair in lines for piece in pair) + last
    if not content:
        return
    root = write_tree(fresh(), {"a.jsonl": content, f"b.jsonl{codec}": COMPRESS[codec](content)})
    items = read(root / f"b.jsonl{codec}", task_bytes=task_bytes)
    documents = [item for item in items if isinstance(item, Document)]
    written = [text for text, _ in [*lines, (last, b"")] if text.startswith(b'{"text": "x')]
    assert [content[document.start : document.end] for document in documents] == written
    assert [document.text for document in documents] == [json.loads(text)["text"] for text in written]
    whole = read(root / "a.jsonl", task_bytes=10**9)
    assert [(item.reason, item.at, item.bad) for item in dropped(items)] == [
        (item.reason, item.at, item.bad) for item in dropped(whole)
    ]
    assert len(reasons(items)) == len([text for text, _ in lines if text.strip() and text not in written])


@pytest.mark.parametrize("task_bytes", [20, 10**6])
@compressed
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "line is not JSON"),
        (b'{"text": "cut', "line is not JSON"),
        (b'{"text": "\xff"}', "line is not UTF-8"),
        (b'{"other": "x", "title": "y"}', "line has no text in field 'text' (its fields: 'other', 'title')"),
        (b"{}", "line has no text in field 'text' (its fields: none)"),
        (b'{"text": 3}', "line has no text in field 'text' (it holds int)"),
        (b'{"text": null}', "line has no text in field 'text' (it holds NoneType)"),
        (b'["text"]', "line has no text in field 'text' (it is no object)"),
        (b'{"\\ud800": 1}', "line has no text in field 'text' (its fields: '\\ud800')"),
        (b'{"text": "\\ud800"}', "text is not Unicode (lone surrogates)"),
        (b'{"text": "x", "id": "\\udfff"}', "text is not Unicode (lone surrogates)"),
        (b'{"text": "a\\u0000b"}', "text holds NUL bytes"),
        (b"[" * 100_000, "line is not JSON"),
    ],
    ids=range(13),
)
def test_a_bad_line_is_named_with_its_number_and_the_rest_is_read(
    tmp_path, write_tree, read, bad, reason, codec, task_bytes
):
    content = b"\n".join([line("before").encode(), b"", bad, line("after").encode()])
    write_tree(tmp_path, {"a.jsonl" + codec: COMPRESS[codec](content)})
    items = read(tmp_path / f"a.jsonl{codec}", task_bytes=task_bytes)
    assert texts(items) == ["before", "after"]
    (found,) = dropped(items)
    assert found.bad
    assert reason.startswith(found.reason)
    assert "(" not in found.reason or not found.detail
    assert describe(found) == f"{tmp_path}/a.jsonl{codec}, line 3: {reason}"


def test_the_fields_of_a_bad_line_are_shortened(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": json.dumps({f"{number}{'x' * 1000}": 1 for number in range(1000)})})
    (found,) = dropped(read(tmp_path / "a.jsonl"))
    assert found.reason == "line has no text in field 'text'"
    assert found.detail.endswith("and 992 more")
    assert len(found.detail) < 500


def test_a_paired_surrogate_is_a_character(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"text": "\\ud83d\\ude00"}'})
    assert texts(read(tmp_path / "a.jsonl")) == ["😀"]


def test_a_line_without_text_is_dropped_but_not_bad(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"text": " \\n"}'})
    assert read(tmp_path / "a.jsonl") == [Dropped("empty", f"{tmp_path}/a.jsonl", 0)]


# Rows


def write_table(path, columns, part=1000):
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=part)
        return
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=part)


tables = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


@tables
@compressed
def test_a_row_is_a_document(tmp_path, read, suffix, codec):
    path = tmp_path / f"a{suffix}"
    write_table(path, {"id": [7, -8, 10**15, None], "text": ["one", "two", "é", "four"]}, part=3)
    path.with_name(path.name + codec).write_bytes(COMPRESS[codec](path.read_bytes()))
    documents = read(f"{path}{codec}", task_bytes=1)
    assert [(d.id, d.text) for d in documents][:3] == [("s/7", "one"), ("s/-8", "two"), (f"s/{10**15}", "é")]
    assert [(d.start, d.end, d.file) for d in documents] == [(row, row + 1, f"a{suffix}{codec}") for row in range(4)]
    assert documents[3].id == f"s/{documents[3].content_hash[:16]}"


@given(
    rows=st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "bb\n", "c\0"])), min_size=1, max_size=30),
    part=st.integers(1, 10),
    task_bytes=st.integers(1, 3000),
    suffix=st.sampled_from([".parquet", ".arrow"]),
    codec=st.sampled_from(list(COMPRESS)),
)
def test_every_row_is_read_once_whatever_the_units(fresh, read, rows, part, task_bytes, suffix, codec):
    path = fresh() / f"a{suffix}"
    write_table(path, {"text": pa.array(rows, pa.string())}, part)
    if codec:
        path.with_name(path.name + codec).write_bytes(COMPRESS[codec](path.read_bytes()))
    items = read(f"{path}{codec}", task_bytes=task_bytes)
    assert [item.at if isinstance(item, Dropped) else item.start for item in items] == list(range(len(rows)))
    for item, text in zip(items, rows, strict=True):
        if isinstance(item, Document):
            assert item.text == text
        else:
            assert (item.reason, item.bad) == {
                None: ("row has null in column 'text'", True),
                "": ("empty", False),
                "c\0": ("text holds NUL bytes", True),
            }[text]


@tables
def test_a_bad_row_is_named_with_its_number(tmp_path, read, suffix):
    bad = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    write_table(tmp_path / f"a{suffix}", {"text": bad}, part=1)
    items = read(tmp_path / f"a{suffix}", task_bytes=1)
    assert texts(items) == ["a", "b"]
    assert describe(dropped(items)[0]) == f"{tmp_path}/a{suffix}, row 1: row is not UTF-8"
    assert dropped(items)[0].bad


@tables
def test_a_table_without_the_text_column_is_a_mistake(tmp_path, read, suffix):
    write_table(tmp_path / f"a{suffix}", {"body": ["x"], "title": ["y"]})
    with pytest.raises(
        UserError, match="has no column 'text', its columns are 'body', 'title': set its source's text_field"
    ):
        read(tmp_path / f"a{suffix}")
    assert texts(read(tmp_path / f"a{suffix}", text_field="title")) == ["y"]


def test_records_without_an_ending_are_named_and_no_document(tmp_path, read):
    lines = f'{{"text": "{"long " * 40_000}"}}\n\n{{"text": "two"}}\n'
    for name, content in {
        "part-00000": lines,
        "log.out": lines,
        "code.rs": '{"text": 1}, x\n',
        "b": '{"a": 1}\n',
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "notes.txt").write_text(lines)  # which can only be meant as text
    items = read(tmp_path)
    assert sorted(document.file for document in items if isinstance(document, Document)) == [
        "b",
        "code.rs",
        "notes.txt",
    ]
    assert sorted(describe(each) for each in dropped(items)) == [
        f"{tmp_path / name}: records, JSON lines, without an ending that says so (name it .jsonl)"
        for name in ("log.out", "part-00000")
    ]
    assert all(each.bad for each in dropped(items))


# Damage


def cut(compressed):
    return compressed[: len(compressed) // 2]


def cut_last(compressed):
    return compressed[:-1]


def flip(compressed):
    return compressed[:40] + bytes(255 - byte for byte in compressed[40:80]) + compressed[80:]


@pytest.mark.parametrize("codec", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    "damage", [cut, cut_last, flip, lambda _: b"not compressed at all"], ids=["cut", "cut last", "flipped", "no codec"]
)
def test_a_damaged_compressed_file_is_named(tmp_path, write_tree, read, name, codec, damage):
    content = "\n".join(line(f"text {n} {n**9}", id=n) for n in range(200)).encode()
    compressor = zstandard.ZstdCompressor(write_checksum=True).compress if codec == ".zst" else gzip.compress
    write_tree(tmp_path, {name + codec: damage(compressor(content))})
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/{name}{codec} cannot be read \([^\n]*\): mend or remove the file$"
    ):
        read(tmp_path / f"{name}{codec}")


# Size


def test_a_line_of_a_hundred_megabytes_is_read(tmp_path, read):
    with open(tmp_path / "a.jsonl", "w") as file:
        for text in ("before", "x" * 100_000_000, "after"):
            file.write(line(text) + "\n")
    assert [len(text) for text in texts(read(tmp_path / "a.jsonl"))] == [6, 100_000_000, 5]


@compressed
def test_a_long_file_of_lines_is_read_in_little_memory(tmp_path, python, codec):
    content = line("x" * 1000).encode() + b"\n"
    (tmp_path / f"a.jsonl{codec}").write_bytes(COMPRESS[codec](content * 100_000))
    script = f"""if True:
        import resource
        from pathlib import Path
        from pipelines.config import Data, Source
        from pipelines.sources.file_hashes import FileHashes
        from pipelines.sources.listing import list_entries
        from pipelines.sources.units import group_units
        from pipelines.sources.readers import read_unit
        data = Data(sources=(Source(name="s", path="a.jsonl{codec}"),))
        units = group_units(list_entries(data, 0, FileHashes(Path("none"))), 10**9)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        before = peak()
        assert sum(len(item.text) for unit in units for item in read_unit(unit, data.sources[0])) == 100_000_000
        print(peak() - before)"""
    assert int(python(script).communicate()[0]) < 30
