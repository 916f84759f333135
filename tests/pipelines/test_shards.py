from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus import Document
from pipelines.errors import UserError
from pipelines.shards import Manifest, Shard, TokenDataset, write_shard

SHARD = Shard("shard-0.arrow", "0" * 64, documents=2, tokens=10, characters=30, dropped={"empty": 1})
MANIFEST = Manifest("fingerprint", {"task_bytes": 5, "sources": [{"name": "s"}]}, (SHARD,))


def document(number, text="text"):
    return Document(f"s/{number}", "s", text, "file.jsonl", 3, 9, f"hash of {number}")


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
@given(batches=st.lists(st.lists(st.lists(st.integers(0, (1 << 16) - 1), max_size=20), min_size=1, max_size=5)))
def test_a_shard_gives_back_the_tokens_written(fresh, vocab_size, batches):
    directory, number, columns = fresh(), 0, []
    for batch in batches:
        columns.append(([document(number + row) for row in range(len(batch))], batch))
        number += len(batch)
    counts = write_shard(directory / "shard.arrow", iter(columns), vocab_size)
    rows = [tokens for batch in batches for tokens in batch]
    assert counts == (len(rows), sum(map(len, rows)), 4 * len(rows))
    Manifest("t", {}, (Shard("shard.arrow", "", *counts, {}),)).write(directory)
    dataset = TokenDataset(directory)
    assert dataset.ids == [f"s/{number}" for number in range(len(rows))]
    assert dataset.sources == ["s"] * len(rows)
    assert dataset.lengths.tolist() == [len(tokens) for tokens in rows]
    assert [dataset.tokens(number).tolist() for number in range(len(rows))] == rows


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, pa.uint16()), ((1 << 16) + 1, pa.uint32())])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, width):
    write_shard(tmp_path / "shard.arrow", [([document(0)], [[vocab_size - 1]])], vocab_size)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard.arrow"))).read_all()
    assert table.schema.field("tokens").type.value_type == width
    assert table.column("tokens").to_pylist() == [[vocab_size - 1]]


def test_a_shard_keeps_where_its_documents_came_from(tmp_path):
    write_shard(tmp_path / "shard.arrow", [([document(0)], [[1, 2]])], 100)
    (row,) = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard.arrow"))).read_all().to_pylist()
    assert row == {
        "document_id": "s/0",
        "source": "s",
        "file": "file.jsonl",
        "start": 3,
        "end": 9,
        "content_hash": "hash of 0",
        "tokens": [1, 2],
    }


def test_an_error_while_writing_leaves_no_shard(tmp_path, contents):
    def batches():
        yield [document(0)], [[1, 2]]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "shard.arrow", batches(), 100)
    assert contents(tmp_path) == {}


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    shards=st.integers(1, 4),
    start=st.integers(0, 30),
    size=st.integers(0, 40),
)
def test_a_span_of_tokens_ends_where_the_document_ends(dataset_of, lengths, shards, start, size):
    dataset = dataset_of(lengths, shards=shards)
    first = 0
    for number, length in enumerate(lengths):
        start_here = min(start, length)
        whole = list(range(first, first + length))
        assert dataset.tokens(number).tolist() == whole
        assert dataset.tokens(number, start_here).tolist() == whole[start_here:]
        assert dataset.tokens(number, start_here, start_here + size).tolist() == whole[start_here : start_here + size]
        first += length


def test_copies_of_a_document_are_used_once(dataset_of):
    dataset = dataset_of(
        [5, 3, 5, 5], ids=["a", "b", "a", "a"], hashes=["x" * 64, "y" * 64, "x" * 64, "x" * 64], shards=2
    )
    assert dataset.admitted.tolist() == [0, 1]


def test_one_text_under_two_ids_is_two_documents(dataset_of):
    assert dataset_of([5, 5], ids=["a", "b"], hashes=["x" * 64] * 2).admitted.tolist() == [0, 1]


@pytest.mark.parametrize("shards", [1, 2])
def test_two_texts_under_one_id_are_a_mistake(dataset_of, shards):
    with pytest.raises(UserError, match="two documents have the id 'a' but different text"):
        dataset_of([5, 5], ids=["a", "a"], hashes=["x" * 64, "y" * 64], shards=shards)


def test_a_data_set_without_documents_is_empty(dataset_of):
    dataset = dataset_of([])
    assert (dataset.ids, dataset.admitted.tolist(), dataset.lengths.sum()) == ([], [], 0)
    assert dataset.lengths.dtype == dataset.admitted.dtype == np.int64


def test_a_manifest_read_back_has_the_same_hash(tmp_path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    assert Manifest.read(tmp_path).hash == MANIFEST.hash


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "other"},
        {"recipe": {"task_bytes": 6, "sources": [{"name": "s"}]}},
        {"shards": (replace(SHARD, sha256="1" * 64),)},
        {"shards": (replace(SHARD, dropped={"empty": 2}),)},
        {"shards": (SHARD, SHARD)},
        {"shards": ()},
        {"format": 2},
    ],
)
def test_the_manifest_hash_knows_everything_the_manifest_says(change):
    assert replace(MANIFEST, **change).hash != MANIFEST.hash


def test_a_manifest_sums_its_shards():
    other = Shard("shard-1.arrow", "1" * 64, documents=1, tokens=5, characters=7, dropped={"empty": 2, "not UTF-8": 1})
    both = Manifest("t", {}, (SHARD, other))
    assert (both.documents, both.tokens, both.characters) == (3, 15, 37)
    assert both.dropped == {"empty": 3, "not UTF-8": 1}
