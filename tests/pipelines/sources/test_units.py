import gzip

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.units import group_units


@given(
    kinds=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.one_of(st.none(), st.integers(1, 50))), max_size=20),
    task_bytes=st.integers(1, 200),
)
def test_units_are_the_entries_in_order_of_about_task_bytes(fresh, write_tree, list_of, kinds, task_bytes):
    """`kinds`: (source, size of a whole document or None for a file of records)."""
    root, files = fresh(), {"a/0.txt": "x", "b/0.txt": "x"}
    for number, (source, size) in enumerate(kinds, 1):
        files[f"{source}/{number:02d}.{'jsonl' if size is None else 'txt'}"] = "x" * (size or 70)
    entries = list_of({name: write_tree(root, files) / name for name in "ab"})
    units = group_units(entries, task_bytes)
    assert list(dict.fromkeys(entry for unit in units for entry in unit.entries)) == entries
    for unit, following in zip(units, [*units[1:], None], strict=True):
        assert {entry.source for entry in unit.entries} == {unit.source}
        if unit.span is not None:
            assert unit.entries[0].records
            assert unit.bytes == unit.span[1] - unit.span[0] <= task_bytes
            continue
        assert not any(entry.records for entry in unit.entries)
        sizes = [file.size for entry in unit.entries for file in entry.files]
        assert unit.bytes == sum(sizes)
        assert sum(sizes[:-1]) < task_bytes
        if following is not None and following.span is None and following.source == unit.source:
            assert unit.bytes >= task_bytes


@given(rows=st.integers(1, 40), part=st.integers(1, 10), task_bytes=st.integers(1, 4000))
def test_a_table_is_cut_between_its_parts(fresh, list_of, rows, part, task_bytes):
    root = fresh()
    table = pa.table({"text": ["x" * 100] * rows})
    pq.write_table(table, root / "a.parquet", row_group_size=part, compression="none", use_dictionary=False)
    with pa.ipc.new_stream(root / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=part)
    with pa.ipc.new_file(root / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=part)
    units = group_units(list_of({"s": root}), task_bytes)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        own = [unit for unit in units if unit.entries[0].name == name]
        spans = [unit.span for unit in own]
        assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
        assert (spans[0][0], spans[-1][1]) == (0, -(-rows // part))
        assert all(unit.bytes >= task_bytes for unit in own[:-1])
        largest = part * 100 * 3 + 500
        assert all(unit.bytes <= task_bytes + largest for unit in own)


def test_a_compressed_file_of_records_is_one_unit(tmp_path, write_tree, list_of):
    write_tree(tmp_path, {"a.jsonl.gz": gzip.compress(b"x" * 99), "b.parquet.zst": b"not looked at", "c.arrow.gz": b""})
    units = group_units(list_of({"s": tmp_path}), 3)
    assert [unit.span for unit in units] == [(0, 1)] * 3
    assert [unit.bytes for unit in units] == [unit.entries[0].files[0].size for unit in units]


def test_units_depend_on_names_and_contents_alone(fresh, write_tree, data_of, units_of):
    files = {"a.txt": "a", "b/c.txt": "c", "b/d.txt": "d", "e.jsonl": '{"text": "e"}'}
    first = write_tree(fresh(), files)
    second = write_tree(fresh() / "elsewhere", dict(reversed(files.items())))
    one, other = ([unit.identity() for unit in units_of(data_of(root, task_bytes=4))] for root in (first, second))
    assert one == other
    write_tree(second, {"b/d.txt": "D"})
    assert [unit.identity() for unit in units_of(data_of(second, task_bytes=4))] != one
