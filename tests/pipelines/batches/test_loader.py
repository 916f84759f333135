import gc
import itertools
import multiprocessing
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches.dataset import DamagedShardError
from pipelines.batches.loader import rank_batches
from pipelines.batches.packing import pack
from pipelines.batches.sampler import BatchShape, CrossBatchSampler
from pipelines.config import Source

SHAPE = BatchShape(context=4, contexts_per_group=2, groups_per_micro_batch=2, micro_batches=4)


def sampler(dataset, shape=SHAPE):
    own = dataset.training
    groups = [pack(own, dataset.length[own], shape.group_tokens)]
    return CrossBatchSampler(dataset, groups, [Source(name="s", path="x")], shape, seed=0)


@pytest.fixture(scope="module")
def batches(dataset_of):
    return sampler(dataset_of([70, 3, 41, 8, 100, 1, 33, 64, 17], shards=3))


def same(tensors, batch):
    for name in ("input_ids", "labels", "document_ids"):
        one, other = getattr(tensors, name), getattr(batch, name)
        assert (one.dtype, one.shape) == (torch.int64, other.shape)
        assert np.array_equal(one.numpy(), other)
    assert all(getattr(tensors, name) == getattr(batch, name) for name in ("group", "segment", "related", "first"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_rank_reads_its_stride_of_every_step_in_order(batches, world, workers):
    for rank in range(world):
        read = list(rank_batches(batches, range(5, 8), rank, world, workers))
        expected = [(step, number) for step in range(5, 8) for number in range(rank, 4, world)]
        assert len(read) == len(expected)
        for tensors, place in zip(read, expected, strict=True):
            same(tensors, batches.micro_batch(*place))


@given(teams=st.integers(1, 5), spread=st.integers(1, 4), each=st.integers(1, 2), first=st.integers(0, 100))
@settings(max_examples=20)
def test_all_ranks_together_read_every_step_however_micro_batches_are_spread(dataset_of, teams, spread, each, first):
    shape = replace(SHAPE, groups_per_micro_batch=each * spread)
    batches = sampler(dataset_of([70, 3, 41, 8, 100, 1, 33, 64, 17]), shape)
    steps, M, world = range(first, first + 2), shape.micro_batches, teams * spread
    read = [list(rank_batches(batches, steps, rank, world, spread=spread)) for rank in range(world)]
    whole = [batches.micro_batch(step, number) for step in steps for number in range(M)]
    for team in range(teams):
        own = [batch for place, batch in enumerate(whole) if place % M % teams == team]
        members = read[team * spread : (team + 1) * spread]
        assert [len(of_rank) for of_rank in members] == [len(own)] * spread
        for batch, *parts in zip(own, *members, strict=True):
            assert [part.first for part in parts] == [rank * each * 2 for rank in range(spread)]
            for name in ("input_ids", "labels", "document_ids"):
                assert np.array_equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
            for part in parts:
                same_plan = [getattr(part, name) == getattr(batch, name) for name in ("group", "segment", "related")]
                assert all(same_plan)


def test_ranks_that_do_not_make_whole_teams_are_a_bug(batches):
    with pytest.raises(AssertionError):
        next(rank_batches(batches, range(1), 0, 3, spread=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_goes_on_from_any_step(batches, workers):
    whole = list(rank_batches(batches, range(12), 1, 2, workers))
    rest = list(rank_batches(batches, range(7, 12), 1, 2, workers))
    assert len(whole) == 24
    assert len(rest) == 10
    for one, other in zip(whole[14:], rest, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(whole[0].input_ids, rest[0].input_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_steps_are_no_batches(batches, workers):
    assert list(rank_batches(batches, range(3, 3), 0, 1, workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_an_error_of_one_line_at_its_turn(dataset_of, workers):
    dataset = dataset_of([64] * 4, shards=4)
    batches = sampler(dataset)
    path = dataset.directory / dataset.manifest.shards[2].file
    tokens = np.arange(128, 192, dtype=np.uint32).tobytes()
    path.write_bytes(path.read_bytes().replace(tokens, tokens[:-1] + b"x"))
    places = [(step, number) for step in range(4) for number in range(4)]
    groups = [batches.group_numbers(*place) for place in places]
    bad = next(place for place, own in enumerate(groups) if any(16 <= group < 24 for _, group in own))
    assert bad > 0
    reading = rank_batches(batches, range(4), 0, 1, workers)
    for place, tensors in zip(places[:bad], reading, strict=False):
        same(tensors, batches.micro_batch(*place))
    with pytest.raises(DamagedShardError) as error:
        next(reading)
    assert type(error.value) is DamagedShardError
    assert str(error.value) == f"{path} is corrupt: rebuild it with `fot data repair RECIPE`"


def test_a_worker_that_is_not_forked_reads_the_same(dataset_of, monkeypatch):
    """As all are from Python 3.14 on: the sampler comes to it pickled."""
    dataset = dataset_of([70, 3, 41, 8, 100, 1, 33, 64, 17, 80], sources={"a": 5, "b": 5}, shards=3)
    own = [dataset.training[dataset.source[dataset.training] == number] for number in range(2)]
    groups = [pack(numbers, dataset.length[numbers], SHAPE.group_tokens) for numbers in own]
    sources = [Source(name=name, path="x", weight=weight) for name, weight in (("a", 1), ("b", 3))]
    mixed = CrossBatchSampler(dataset, groups, sources, SHAPE, seed=0)
    expected = [
        mixed.micro_batch(step, number) for step in range(2) for number in range(4)
    ]  # opens files, deals blocks
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", get_context("forkserver"))
    for tensors, batch in zip(rank_batches(mixed, range(2), 0, 1, workers=1), expected, strict=True):
        same(tensors, batch)


def test_without_workers_nothing_is_read_ahead(batches, monkeypatch):
    asked = []
    read = batches.micro_batch
    monkeypatch.setattr(batches, "micro_batch", lambda *place: asked.append(place) or read(*place))
    reading = rank_batches(batches, range(3), 0, 1)
    assert asked == []
    next(reading)
    assert asked == [(0, 0, (0, 1))]
    next(reading)
    assert asked == [(0, 0, (0, 1)), (0, 1, (0, 1))]


def test_no_worker_is_left_when_reading_stops_early(batches):
    def workers():
        gc.collect()
        return set(psutil.Process().children(recursive=True)) - before

    before = set(psutil.Process().children(recursive=True))
    reading = rank_batches(batches, range(1000), 0, 1, workers=2)
    assert len(list(itertools.islice(reading, 3))) == 3
    started = workers()
    assert len(started) == 2
    del reading
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert not workers()
