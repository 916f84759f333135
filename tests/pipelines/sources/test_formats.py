import pytest

from pipelines.sources.formats import companion, holds_records, suffix_and_codec, unread


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", (".jsonl", None)),
        ("a.jsonl.gz", (".jsonl", "gzip")),
        ("A.JSONL.GZ", (".jsonl", "gzip")),
        ("a.ndjson.zstd", (".jsonl", "zstd")),
        ("a.jsonlines.xz", (".jsonl", "xz")),
        ("b/a.parquet.zst", (".parquet", "zstd")),
        ("a.feather", (".arrow", None)),
        ("a.gz", ("", "gzip")),
        ("a.tar.bz2", (".tar", "bzip2")),
        ("Makefile", ("", None)),
        ("d.x/a", ("", None)),
    ],
)
def test_a_name_says_format_and_compression(name, expected):
    assert suffix_and_codec(name) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_SUCCESS", "marks and logs of what wrote records"),
        ("year=2023/_metadata", "marks and logs of what wrote records"),
        ("_delta_log/0.json", "marks and logs of what wrote records"),
        ("part-0.parquet.crc", "checksums"),
        ("SHA256SUMS.txt", "checksums"),
        ("README.md", "texts about records"),
        ("d/licence", "texts about records"),
        ("plot.PNG", "pictures, sound and fonts"),
        ("_private.py", None),
        ("authors.csv", None),
        ("a.jsonl", None),
        ("notes.txt", None),
    ],
)
def test_what_lies_beside_records_is_known_by_its_name(name, kind):
    assert companion(name, 9) == kind
    assert companion(name, 0) == (kind if kind or name == "a.jsonl" else "empty files")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.zip", "archives"),
        ("a.tar.gz", "archives"),
        ("a.jsonl.lz4", "files compressed in a way that is not read"),
        ("a.AVRO", "data of other formats"),
        ("a.pdf", "documents of other formats"),
        ("a.parquet.tmp", "records under an ending that is not known"),
        ("a.csv.txt", None),
        ("values.json.j2", None),
        ("a.jsonl.gz", None),
        ("a.jsonl", None),
        ("a.py", None),
    ],
)
def test_data_that_is_not_read_is_known_by_its_name(name, kind):
    assert unread(name) == kind


def test_records_are_known_by_their_names():
    names = ["a.jsonl", "a.json.gz", "A.PARQUET", "a.csv", "a.tsv.zst", "a.ndjson.bz2", "a.txt", "a.gz", "json"]
    assert [holds_records(name) for name in names] == [True] * 6 + [False] * 3
