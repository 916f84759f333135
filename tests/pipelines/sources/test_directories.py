import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines.sources import listing
from pipelines.sources.corpus import Document, Dropped
from pipelines.workflow.errors import UserError

LONG = "A text that is somewhat longer than what lies beside it. " * 9


def lines(*texts, field="text"):
    return "".join(json.dumps({"id": text, field: f"{text} {LONG}"}) + "\n" for text in texts)


def table(path, *texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": texts, field: [f"{text} {LONG}" for text in texts]}), path)


def names(items):
    return [item.id.removeprefix("s/") for item in items if isinstance(item, Document)]


@pytest.fixture
def said(monkeypatch):
    """What was said while listing."""
    heard = []
    monkeypatch.setattr(listing, "say", heard.append)
    return heard


# Records


PACKED = {
    "a.jsonl": bytes,
    "A.JSONL": bytes,
    "a.ndjson": bytes,
    "a.jsonlines": bytes,
    "a.json": bytes,
    "a.jsonl.gz": gzip.compress,
    "A.NDJSON.GZ": gzip.compress,
    "a.jsonl.zst": zstandard.compress,
    "a.jsonl.zstd": zstandard.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.json.xz": lzma.compress,
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("beside", [{}, {"README.md": "What this is.\n"}, {"notes.txt": "What this is.\n"}])
def test_lines_are_records_under_every_name(tmp_path, write_tree, read, name, beside):
    content = PACKED[name](lines("x", "y", "z").encode() * (9 if beside else 1))
    write_tree(tmp_path, {name: content, f"d/{name}": content})
    write_tree(tmp_path / "d", beside)
    assert names(read(tmp_path))[:3] == ["x", "y", "z"]
    assert {item.file for item in read(tmp_path)} == {name, f"d/{name}"}
    assert names(read(tmp_path / name))[:3] == ["x", "y", "z"]


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.pq", "a.snappy.parquet"])
def test_tables_are_records_under_every_name(tmp_path, read, name):
    table(tmp_path / "d" / "year=2023" / name, "x", "y")
    (tmp_path / "d" / "year=2023" / "_SUCCESS").touch()
    assert names(read(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "a.arrows", "a.ipc"])
def test_arrow_tables_are_records_under_every_name(tmp_path, read, name):
    rows = pa.table({"id": ["x"], "text": ["one"]})
    with (pa.ipc.new_stream if name.endswith("s") else pa.ipc.new_file)(tmp_path / name, rows.schema) as writer:
        writer.write_table(rows)
    assert names(read(tmp_path)) == ["x"]


def test_partitions_with_what_their_writers_leave_are_records(tmp_path, write_tree, read, said):
    for year in (2023, 2024):
        table(tmp_path / f"t/year={year}/month=1/part-0.parquet", f"{year}a", f"{year}b")
        write_tree(tmp_path, {f"t/year={year}/month=1/part-0.parquet.crc": b"crc\0", f"t/year={year}/_SUCCESS": ""})
    write_tree(tmp_path, {"t/_delta_log/0.json": '{"text": "no"}', "t/_metadata": b"PAR1", "t/preview.png": b"\x89PNG"})
    write_tree(tmp_path, {"t/README.md": "About it. " * 999, "t/LICENSE": "Mine. " * 999, "t/part-0.csv.md5": "0"})
    assert names(read(tmp_path)) == ["2023a", "2023b", "2024a", "2024b"]
    assert said == [
        "source 's': left out: texts about records: 2, such as t/LICENSE",
        "source 's': left out: marks and logs of what wrote records: 4, such as t/_delta_log/0.json",
        "source 's': left out: checksums: 3, such as t/part-0.csv.md5",
        "source 's': left out: pictures, sound and fonts: t/preview.png",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
def test_separated_values_are_records(tmp_path, write_tree, read, name):
    between = "," if ".csv" in name else "\t"
    content = f"id{between}text\nx{between}one\ny{between}two\n".encode()
    content = gzip.compress(content) if name.endswith(".gz") else content
    write_tree(tmp_path, {f"d/{name}": content, "d/README.md": "What this is.", name: content})
    assert names(read(tmp_path)) == ["x", "y", "x", "y"]


def test_small_files_beside_records_are_left_out_and_named(tmp_path, write_tree, read, said):
    write_tree(tmp_path, {"d/a.jsonl": lines(*"abcdefghij"), "d/load.py": "pass", "d/labels.csv": "label\nx\n"})
    write_tree(tmp_path, {"d/dataset_infos.json": '{"n": 10}', "d/stats.jsonl": '{"rows": 10}\n'})
    assert names(read(tmp_path)) == list("abcdefghij")
    assert said == ["source 's': not read as what they are: other files beside records: 4, such as d/load.py"]


def test_what_is_damaged_beside_text_is_named_when_it_is_read(tmp_path, write_tree, read):
    write_tree(tmp_path, {"d/a.jsonl": "{bad\n" + lines("x"), "d/notes.txt": "notes"})
    assert [item.reason for item in read(tmp_path) if isinstance(item, Dropped)] == ["line is not JSON"]
    write_tree(tmp_path, {"d/a.parquet": b"PAR1 damaged" * 99})
    with pytest.raises(UserError, match=r"d/a\.parquet cannot be read"):
        read(tmp_path)


def test_separated_values_alone_have_to_have_the_column(tmp_path, write_tree, read):
    write_tree(tmp_path, {"d/a.csv": "body\nx\n", "d/README.md": "What this is."})
    with pytest.raises(UserError, match=r"d/a\.csv has no column 'text', its columns are 'body'"):
        read(tmp_path)
    assert [item.text for item in read(tmp_path, text_field="body")] == ["x"]


# Documents


def test_a_repository_is_one_document_with_the_files_it_always_had(tmp_path, write_tree, read, said):
    kept = {
        "main.py": "import os\n" * 300,
        "README.md": "About",
        "setup.cfg": "[a]\n",
        "_own.py": "x = 1",
        "e.py": "",
    }
    kept |= {"tests/data.jsonl": lines("x"), "tests/table.csv": "text\na\n", "package.json": '{"text": "one line"}'}
    kept |= {"NOTES.TXT": b"caf\xe9", "notes.jsonl.md5": "0", "app.NDJSON": '{"a": 1}', "docs/x.txt.gz": b""}
    packed = {"data.txt.bz2": bz2.compress(b"no"), "data.txt.xz": lzma.compress(b"no"), "a.zip": b"PK\0"}
    write_tree(tmp_path / "repository", {**kept, "docs/x.txt.gz": gzip.compress(b"yes"), **packed})
    table(tmp_path / "repository" / "t.parquet", "x")
    items = read(tmp_path, max_left_out=1)
    (document,) = [item for item in items if isinstance(item, Document)]
    assert document.id == "s/repository"
    expected = [text for name, text in kept.items() if name not in ("NOTES.TXT", "docs/x.txt.gz")]
    assert sorted(document.text.split("\n")) == sorted("\n".join([*expected, "yes"]).split("\n"))
    dropped = [item for item in items if isinstance(item, Dropped)]
    assert sorted(item.path.rpartition("/")[2] for item in dropped) == [
        "NOTES.TXT",
        "a.zip",
        "data.txt.bz2",
        "data.txt.xz",
        "t.parquet",
    ]
    assert not any(item.bad for item in dropped)


def test_files_of_settings_are_a_document(tmp_path, write_tree, read, said):
    write_tree(tmp_path, {"d/a.json": '{\n "text": "x"\n}\n', "d/b.json": '{"name": "y"}', "d/README.md": "About"})
    (document,) = read(tmp_path)
    assert document.id == "s/d"
    assert "About" in document.text
    assert said == []


def test_records_in_a_document_are_named(tmp_path, write_tree, read, said):
    write_tree(tmp_path, {"r/a.jsonl": lines("x"), "r/b.py": f"{LONG}\n", "other.txt": LONG * 99})
    assert names(read(tmp_path)) == ["other.txt", "r"]
    kind = "files of records in a directory that is read as one document"
    assert said == [f"source 's': not read as what they are: {kind}: r/a.jsonl"]


# Too much left out


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"d/a.jsonl": lines("x"), "d/b.txt": LONG}, "files of records in a directory .*: d/a.jsonl"),
        ({"a.jsonl": lines("x"), "b.jsonl.lz4": "x" * 999}, "files compressed in a way that is not read: b.jsonl.lz4"),
        ({"a.jsonl": lines("x"), "b.jsonl.foo": "x" * 999}, "records under an ending that is not known: b.jsonl.foo"),
        ({"a.jsonl": lines("x"), "d/b.jsonl": lines("y"), "d/c.zip": "x" * 999}, "archives: d/c.zip"),
        ({"a.jsonl": lines("x"), "d/c.avro": "x" * 999}, "data of other formats: d/c.avro"),
        ({"a.pdf": "x", "b.pdf": "y"}, "documents of other formats: 2, such as a.pdf"),
    ],
)
def test_much_that_would_be_left_out_is_a_mistake_before_anything_is_read(tmp_path, write_tree, read, files, kind):
    write_tree(tmp_path, files)
    with pytest.raises(UserError, match=rf"source 's': \d+ % of its bytes are data that would be left out .*{kind}"):
        read(tmp_path)
    assert read(tmp_path, max_left_out=1.0)


def test_a_table_without_the_column_beside_text_is_a_mistake(tmp_path, write_tree, read):
    table(tmp_path / "d/a.parquet", "x", "y", field="body")
    write_tree(tmp_path, {"d/load.py": "pass", "b.jsonl": lines("z")})
    assert names(read(tmp_path, text_field="body", exclude=("b.jsonl",))) == ["x", "y"]


def test_what_is_chosen_by_suffix_is_all_there_is(tmp_path, write_tree, read, said):
    write_tree(tmp_path, {"d/a.jsonl": lines("x"), "d/b.txt": LONG, "c.zip": "x" * 9999})
    assert names(read(tmp_path, suffixes=(".jsonl",))) == ["x"]
    assert said == []
