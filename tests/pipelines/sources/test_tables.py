import gzip
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.tables import part_sizes, read_rows
from pipelines.workflow.errors import UserError

EVERYTHING = (0, 10**9)


def write(path, table, kind, part=1000):
    """`kind`: parquet, file or stream."""
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=part)
        return
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=part)


def suffix(kind):
    return ".parquet" if kind == "parquet" else ".arrow"


def rows_of(path, parts=EVERYTHING, text_field="text", id_field="id"):
    return [
        (row, text.as_py(), None if identity is None else identity.as_py())
        for row, text, identity in read_rows(str(path), parts, text_field, id_field)
    ]


kinds = pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
texts = st.lists(st.one_of(st.none(), st.text(max_size=9)), max_size=40)


@given(texts=texts, part=st.integers(1, 10), kind=st.sampled_from(["parquet", "file", "stream"]), data=st.data())
def test_every_row_is_read_once_in_order_whatever_the_parts(fresh, texts, part, kind, data):
    path = fresh() / f"a{suffix(kind)}"
    write(path, pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string())}), kind, part)
    count = len(part_sizes(str(path), path.stat().st_size))
    assert count == -(-len(texts) // part) or not texts
    cuts = sorted(data.draw(st.sets(st.integers(0, count)))) if count else []
    cuts = sorted({0, *cuts, count})
    read = [row for start, end in pairwise(cuts) for row in rows_of(path, (start, end), id_field="n")]
    assert read == [(number, text, number) for number, text in enumerate(texts)]


@kinds
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_table_is_one_part(tmp_path, kind, compress):
    path = tmp_path / f"a{suffix(kind)}"
    write(path, pa.table({"text": list("abcde")}), kind, 2)
    compressed = path.with_name(path.name + (".gz" if compress is gzip.compress else ".zst"))
    compressed.write_bytes(compress(path.read_bytes()))
    assert part_sizes(str(compressed), 77) == [77]
    assert [text for _, text, _ in rows_of(compressed, (0, 1))] == list("abcde")


@kinds
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_table_compressed_inside_is_read(tmp_path, kind, codec):
    path, table = tmp_path / f"a{suffix(kind)}", pa.table({"text": [f"{number} " * 500 for number in range(9)]})
    if kind == "parquet":
        pq.write_table(table, path, compression=codec, row_group_size=2)
    else:
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)
    assert rows_of(path, (1, 3)) == [(n, f"{n} " * 500, None) for n in range(2, 6)]


@kinds
@pytest.mark.parametrize(
    "type_",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_every_kind_of_text_column_is_read(tmp_path, kind, type_):
    values = ["one", None, "two", "a text longer than the twelve bytes of a view", "one"]
    path = tmp_path / f"a{suffix(kind)}"
    column = (
        pa.array(values).dictionary_encode().cast(type_) if pa.types.is_dictionary(type_) else pa.array(values, type_)
    )
    write(path, pa.table({"other": range(5), "text": column}), kind, 2)
    assert [text for _, text, _ in rows_of(path)] == values
    assert [text for _, text, _ in rows_of(path, (1, 2))] == values[2:4]


@kinds
def test_a_column_of_nothing_but_null_is_read(tmp_path, kind):
    write(tmp_path / f"a{suffix(kind)}", pa.table({"text": pa.nulls(3)}), kind)
    assert rows_of(tmp_path / f"a{suffix(kind)}") == [(row, None, None) for row in range(3)]


@kinds
def test_the_columns_are_chosen_by_name(tmp_path, kind):
    path = tmp_path / f"a{suffix(kind)}"
    write(path, pa.table({"id": ["no"], "body": ["b"], "key": [7], "text": [1.5], "a.b": ["dot"]}), kind)
    assert rows_of(path, text_field="body", id_field="key") == [(0, "b", 7)]
    assert rows_of(path, text_field="body", id_field="body") == [(0, "b", "b")]
    assert rows_of(path, text_field="body", id_field="none") == [(0, "b", None)]
    assert rows_of(path, text_field="a.b", id_field="none") == [(0, "dot", None)]


@kinds
def test_a_table_without_a_column_of_text_is_a_mistake(tmp_path, kind):
    path = tmp_path / f"a{suffix(kind)}"
    write(path, pa.table({"n": [1], **{f"{number:02d}{'x' * 99}": ["a"] for number in range(20)}}), kind)
    with pytest.raises(
        UserError, match=r"a\.\w+ has no column 'text', its columns are 'n', '00x+\.\.\.', .* and 13 more"
    ) as caught:
        rows_of(path)
    assert len(str(caught.value)) < 600
    with pytest.raises(UserError, match="holds int64 in column 'n', not text; its columns are 'n', "):
        rows_of(path, text_field="n")


@kinds
@pytest.mark.parametrize(
    "read", [rows_of, lambda path: part_sizes(str(path), path.stat().st_size)], ids=["read", "cut"]
)
@pytest.mark.parametrize("length", [0, 3, 60, -1])
def test_a_truncated_table_is_named(tmp_path, kind, read, length):
    path = tmp_path / f"a{suffix(kind)}"
    write(path, pa.table({"text": ["x" * 100] * 100}), kind, 10)
    content = path.read_bytes()
    if kind == "stream" and length < 0:
        length = -500  # within a batch; without the marker of its end a stream is whole
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match=rf"^{path} cannot be read \(.*\): mend or remove the file$"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst"])
def test_a_truncated_compressed_table_is_named(tmp_path, name):
    kind = "parquet" if "parquet" in name else "stream"
    write(tmp_path / f"a{suffix(kind)}", pa.table({"text": [f"{n**9}" for n in range(999)]}), kind)
    content = (tmp_path / f"a{suffix(kind)}").read_bytes()
    compressed = gzip.compress(content) if name.endswith("gz") else zstandard.compress(content)
    (tmp_path / name).write_bytes(compressed[:-10])
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_column_that_leads_out_of_its_memory_is_named(tmp_path, kind):
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": ["abc", "def", "ghi"]}), kind)
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6, 9))
    damaged = b"".join(number.to_bytes(4, "little") for number in (0, 3, 2**30, 9))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, damaged))
    with pytest.raises(UserError, match=r"a\.arrow cannot be read"):
        rows_of(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_damaged_name_of_a_column_is_a_mistake(tmp_path, kind):
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": ["abc"], "other": [1]}), kind)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xffr"))
    with pytest.raises(UserError, match=r"a\.arrow cannot be read"):
        rows_of(path)


def test_a_truncated_stream_gives_what_came_before_and_then_fails(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": ["x" * 100] * 100}), "stream", 10)
    path.write_bytes(path.read_bytes()[:-500])
    rows = read_rows(str(path), EVERYTHING, "text", "id")
    assert [next(rows)[0] for _ in range(90)] == list(range(90))
    with pytest.raises(UserError):
        next(rows)


def test_a_large_row_group_is_read_in_little_memory(tmp_path, python):
    texts = [f"{number:06d}" * 5000 for number in range(8000)]  # 240 MB
    pq.write_table(
        pa.table({"text": texts}),
        tmp_path / "a.parquet",
        row_group_size=10**6,
        compression="zstd",
        use_dictionary=False,
    )
    script = """if True:
        import resource
        from pipelines.sources.tables import read_rows
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        before = peak()
        assert sum(len(text.as_py()) for _, text, _ in read_rows("a.parquet", (0, 1), "text", "id")) == 240_000_000
        print(peak() - before)"""
    assert int(python(script).communicate()[0]) < 100


@given(
    kind=st.sampled_from(["parquet", "file", "stream"]), at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255)
)
def test_a_damaged_byte_gives_rows_or_a_mistake(fresh, kind, at, bits):
    path = fresh() / f"a{suffix(kind)}"
    write(path, pa.table({"id": range(20), "text": [f"text {number}" for number in range(20)]}), kind, 7)
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= bits
    path.write_bytes(content)
    try:
        part_sizes(str(path), len(content))
        for _, text, identity in read_rows(str(path), EVERYTHING, "text", "id"):
            assert isinstance(text, pa.Scalar)
            assert identity is None or isinstance(identity, pa.Scalar)
    except UserError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (rows are fine, too)


@kinds
def test_two_columns_of_one_name_are_a_mistake(tmp_path, kind):
    path = tmp_path / f"a{suffix(kind)}"
    texts = pa.array(["a"])
    for names, read in ((["text", "text"], "text"), (["id", "text", "id"], "id")):
        write(path, pa.Table.from_arrays([texts] * len(names), names), kind)
        with pytest.raises(UserError, match=rf"has 2 columns '{read}': give them different names"):
            rows_of(path)
    write(path, pa.Table.from_arrays([texts] * 3, ["text", "other", "other"]), kind)
    assert rows_of(path) == [(0, "a", None)]
