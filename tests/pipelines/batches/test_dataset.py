import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches.dataset import OPEN_FILES, DamagedShardError, TokenDataset
from pipelines.batches.index import index_documents, is_held_out
from pipelines.config import Data, Source

spans = st.tuples(st.integers(0, 40), st.none() | st.integers(0, 60))


# What is read is what was written


@pytest.mark.parametrize("vocab_size", [1 << 16, 1 << 17])
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    shards=st.integers(1, 4),
    batches=st.integers(1, 3),
    spans=st.lists(spans, min_size=1, max_size=8),
)
def test_any_span_of_tokens_is_what_was_written(dataset_of, vocab_size, lengths, shards, batches, spans):
    dataset = dataset_of(lengths, shards=shards, batches=batches, vocab_size=vocab_size)
    assert len(dataset) == len(lengths)
    assert dataset.length.tolist() == lengths
    first = 0
    for number, length in enumerate(lengths):
        whole = list(range(first, first + length))
        assert dataset.tokens(number).tolist() == whole
        for start, end in spans:
            assert dataset.tokens(number, start).tolist() == whole[start:]
            assert dataset.tokens(number, start, end).tolist() == whole[start:end]
        first += length


@pytest.fixture(scope="module")
def many_shards(dataset_of):
    """More shards than are kept open, a document of three tokens each."""
    n = OPEN_FILES + 20
    return dataset_of([3] * n, shards=n)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_more_shards_than_are_kept_open_are_read_in_any_order(many_shards):
    n, before = len(many_shards), open_files()
    for number in np.random.default_rng(0).permutation([*range(n)] * 3).tolist():
        assert many_shards.tokens(number).tolist() == [3 * number, 3 * number + 1, 3 * number + 2]
    assert before < open_files() <= before + OPEN_FILES


def test_a_forked_process_reads_beside_its_parent(dataset_of):
    dataset = dataset_of([3] * 50)

    def read(numbers):
        return all(
            dataset.tokens(number).tolist() == [3 * number, 3 * number + 1, 3 * number + 2] for number in numbers
        )

    assert read(range(50))  # opened before the fork: both have the same file
    child = os.fork()
    if child == 0:
        os._exit(0 if all(read(range(50)) for _ in range(100)) else 1)
    in_parent = all(read(range(49, -1, -1)) for _ in range(100))
    assert os.waitpid(child, 0)[1] == 0
    assert in_parent


def test_what_is_pickled_are_its_paths_and_files_are_opened_anew(dataset_of, monkeypatch, tmp_path):
    small, large = dataset_of([3] * 50, shards=5), dataset_of([3] * 5000)
    assert abs(len(pickle.dumps(large)) - len(pickle.dumps(small))) < 10
    small.tokens(0)  # a file is open
    monkeypatch.chdir(small.directory.parent)
    relative = TokenDataset(*[Path(small.directory.name)] * 2)
    sent = [pickle.dumps(dataset) for dataset in (small, relative)]
    monkeypatch.chdir(tmp_path)
    before, received = open_files(), [pickle.loads(each) for each in sent]
    for dataset in received:
        for number in range(50):
            assert dataset.tokens(number).tolist() == [3 * number, 3 * number + 1, 3 * number + 2]
        assert dataset.id(7) == small.id(7)
    assert open_files() >= before + 10


def test_ids_sources_and_clusters_are_those_of_the_documents(dataset_of):
    names = [f"{number} é" for number in range(20)]
    signatures = [*range(10), *range(10)]
    dataset = dataset_of([2] * 20, ids=names, signatures=signatures, sources={"a": 12, "b": 8}, shards=2, batches=3)
    order = np.random.default_rng(0).permutation(20).tolist()
    assert [dataset.id(number) for number in order] == [names[number] for number in order]
    assert dataset.source.tolist() == [0] * 12 + [1] * 8
    assert dataset.cluster.tolist() == signatures


def test_training_and_held_out_documents_make_up_all_but_copies(dataset_of):
    names = [f"s/{number % 150}" for number in range(200)]  # 50 copies
    dataset = dataset_of([4] * 200, ids=names, signatures=[number % 150 for number in range(200)], held_out=0.3)
    assert sorted([*dataset.training, *dataset.held_out]) == list(range(150))
    assert {dataset.id(number) for number in dataset.held_out} == {name for name in names if is_held_out(name, 0.3)}
    assert 20 < len(dataset.held_out) < 70
    assert dataset.training.tolist() == sorted(dataset.training)


# Damage


TOKENS = np.arange(10, 15, dtype=np.uint32).tobytes()  # of the first document of shard 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(TOKENS) + 8] ^= 1  # 12 becomes 13
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.read_bytes().index(TOKENS) + 10)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "what", "read"),
    [
        (flip, "is corrupt", TokenDataset.tokens),
        (truncate, "is corrupt", TokenDataset.tokens),
        (remove, "is missing", TokenDataset.tokens),
        (remove, "is missing", TokenDataset.id),
    ],
)
def test_a_damaged_shard_is_named_at_the_first_read_from_it_and_not_before(dataset_of, damage, what, read):
    whole = dataset_of([5] * 6, shards=3)
    path = whole.directory / whole.manifest.shards[1].file
    damage(path)
    dataset = TokenDataset(whole.directory, whole.directory)
    for number in (0, 1, 4, 5):
        assert dataset.tokens(number).tolist() == list(range(5 * number, 5 * number + 5))
    for number in (2, 3, 2):  # each time, also after the first
        with pytest.raises(DamagedShardError) as error:
            read(dataset, number)
        assert str(error.value) == f"{path} {what}: rebuild it with `fot data repair RECIPE`"
    assert dataset.tokens(5).tolist() == list(range(25, 30))


def test_a_repaired_shard_is_read_again(dataset_of):
    dataset = dataset_of([5] * 6, shards=3)
    path = dataset.directory / dataset.manifest.shards[1].file
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DamagedShardError):
        dataset.tokens(2)
    path.write_bytes(content)
    assert dataset.tokens(2).tolist() == list(range(10, 15))


def test_a_shard_is_checked_once(dataset_of, monkeypatch):
    monkeypatch.setattr("pipelines.batches.dataset.OPEN_FILES", 1)
    dataset = dataset_of([5] * 6, shards=3)
    for number in (0, 2, 4):
        dataset.tokens(number)
    path = dataset.directory / dataset.manifest.shards[1].file
    flip(path)
    assert dataset.tokens(2).tolist() == [10, 11, 13, 13, 14]


# Memory

READ_EVERYTHING = """
from pathlib import Path
import numpy as np
import psutil
from pipelines.batches.dataset import TokenDataset

dataset = TokenDataset(Path({directory!r}), Path({index!r}))
process, peak, total = psutil.Process(), 0, 0
dataset.tokens(0)
before = process.memory_info().rss
for number in np.random.default_rng(0).permutation(len(dataset)).tolist():
    tokens = dataset.tokens(number)
    assert tokens[0] == tokens[-1] == number
    total += tokens.nbytes
    peak = max(peak, process.memory_info().rss)
print(total, peak - before)
"""


def test_memory_does_not_grow_with_what_is_read(fresh, encoded, write_shards, python):
    shards = [
        ("s", [[encoded(f"s/{number}", np.full(1 << 18, number), signature=number)] for number in range(n, n + 8)])
        for n in range(0, 256, 8)
    ]
    directory, index = write_shards(shards), fresh()
    index_documents(directory, Data(sources=(Source(name="s", path="x"),)), index)
    process = python(READ_EVERYTHING.format(directory=str(directory), index=str(index)))
    total, grown = map(int, process.communicate()[0].split())
    assert total == 256 << 20
    assert grown < 16 << 20
