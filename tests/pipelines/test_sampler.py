"""Laws 2, 3 and 4. The data sets number their tokens through, so a token tells its document and position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import Data, Source
from pipelines.errors import UserError
from pipelines.sampler import IGNORE, CrossBatchSampler, is_held_out, permute, split

LENGTHS = [70, 3, 41, 8, 100, 1, 33, 64, 17, 5, 90, 2, 58]
SHAPE = {"context": 4, "contexts_per_group": 2, "groups_per_micro_batch": 3, "micro_batches": 4, "seed": 0}


def sampler(dataset, **shape):
    return CrossBatchSampler(dataset, dataset.admitted, **{**SHAPE, **shape})


def same(one, other):
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "labels"))
    rest = all(getattr(one, name) == getattr(other, name) for name in ("group", "segment", "related", "documents"))
    return arrays and rest


@pytest.fixture(scope="module")
def dataset(dataset_of):
    return dataset_of(LENGTHS, shards=3)


corpora = st.lists(st.integers(1, 60), min_size=2, max_size=15)
shapes = st.fixed_dictionaries(
    {
        "context": st.integers(1, 8),
        "contexts_per_group": st.integers(1, 4),
        "groups_per_micro_batch": st.integers(1, 4),
        "micro_batches": st.integers(1, 4),
        "seed": st.integers(0, 2**40),
    }
)


def made(dataset_of, lengths, shape):
    """A data set long enough for a micro-batch of this shape, with its sampler."""
    needed = shape["context"] * shape["contexts_per_group"] * shape["groups_per_micro_batch"]
    lengths = [*lengths, max(0, needed - sum(lengths))]
    dataset = dataset_of(lengths)
    return lengths, dataset, sampler(dataset, **shape)


# Law 2: a pure function of data set, shape, seed and step


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=12), st.randoms())
def test_a_micro_batch_does_not_depend_on_what_was_read_before(dataset, places, random):
    one = sampler(dataset)
    in_order = {place: one.micro_batch(*place) for place in sorted(places)}
    random.shuffle(places)
    another = sampler(dataset)
    for place in places:
        assert same(another.micro_batch(*place), in_order[place])
        assert same(sampler(dataset).micro_batch(*place), in_order[place])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_same_step_however_many_they_are(dataset, world):
    alone = [sampler(dataset).micro_batch(5, number) for number in range(4)]
    read = {}
    for rank in reversed(range(world)):
        own = sampler(dataset)
        read |= {number: own.micro_batch(5, number) for number in range(4)[rank::world]}
    assert sorted(read) == [0, 1, 2, 3]
    assert all(same(read[number], alone[number]) for number in range(4))


@pytest.mark.parametrize(("micro_batches", "groups"), [(12, 1), (6, 2), (2, 6), (1, 12)])
def test_a_step_holds_the_same_groups_however_it_is_split(dataset, micro_batches, groups):
    def of_step(sampler, micro_batches):
        return [group for number in range(micro_batches) for group in sampler.group_numbers(7, number)]

    other = sampler(dataset, groups_per_micro_batch=groups, micro_batches=micro_batches)
    assert of_step(other, micro_batches) == of_step(sampler(dataset), 4)
    assert other.tokens_per_step == sampler(dataset).tokens_per_step == 12 * 8


def test_any_step_is_as_near_as_the_first(dataset):
    far = sampler(dataset).micro_batch(10**15, 3)
    assert far.input_ids.shape == (6, 4)


def test_another_seed_or_another_data_set_gives_another_order(dataset, dataset_of):
    def order(sampler):
        return [sampler.group_numbers(step, number) for step in range(4) for number in range(4)]

    other_tokens = dataset_of(LENGTHS[::-1], shards=3)
    assert order(sampler(dataset)) == order(sampler(dataset))
    assert order(sampler(dataset)) != order(sampler(dataset, seed=1))
    assert order(sampler(dataset)) != order(sampler(other_tokens))


# Permutation


@given(st.integers(1, 200), st.text(max_size=10))
def test_a_permutation_reaches_every_index_once(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(st.integers(1, 2**48).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=50))))
def test_a_huge_permutation_keeps_indices_apart_and_in_range(drawn):
    size, indices = drawn
    images = {permute(index, size, "key") for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


def test_a_permutation_is_not_the_identity_and_depends_on_its_key():
    orders = [[permute(index, 500, key) for index in range(500)] for key in ("a", "b", "c")]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sum(place == index for index, place in enumerate(order)) < 20
        assert 200 < np.mean(np.abs(np.diff(order))) * 3 / 2 < 300  # neighbours are a third of the range apart


# Law 3: an epoch


@given(corpora, shapes)
def test_in_every_epoch_each_group_appears_once(dataset_of, lengths, shape):
    _, _, batches = made(dataset_of, lengths, shape)
    groups, per_step = len(batches.groups), shape["groups_per_micro_batch"] * shape["micro_batches"]
    steps = -(-2 * groups // per_step)
    order = [g for t in range(steps) for m in range(shape["micro_batches"]) for g in batches.group_numbers(t, m)]
    assert sorted(order[:groups]) == sorted(order[groups : 2 * groups]) == list(range(groups))


def test_every_epoch_has_an_order_of_its_own(dataset):
    one = sampler(dataset, groups_per_micro_batch=1, micro_batches=1)
    n = len(one.groups)
    orders = {tuple(one.group_numbers(epoch * n + step, 0)[0] for step in range(n)) for epoch in range(5)}
    assert len(orders) == 5


@settings(max_examples=30)
@given(corpora, shapes)
def test_an_epoch_reads_every_token_once_but_for_the_counted_remainder(dataset_of, lengths, shape):
    shape = shape | {"groups_per_micro_batch": 1, "micro_batches": 1}
    lengths, _, batches = made(dataset_of, lengths, shape)
    read = Counter()
    for step in range(len(batches.groups)):
        read.update(batches.micro_batch(step, 0).input_ids.flatten().tolist())
    assert set(read.values()) == {1}
    assert read.keys() <= set(range(sum(lengths)))
    assert len(read) == sum(lengths) - batches.groups.dropped
    assert batches.groups.dropped < shape["context"] * shape["contexts_per_group"]


# Law 4 and the content of a micro-batch


def document_of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


@given(corpora, shapes, st.integers(0, 1000))
def test_a_label_is_the_next_token_of_the_same_document(dataset_of, lengths, shape, step):
    lengths, _, batches = made(dataset_of, lengths, shape)
    ends = set((np.cumsum(lengths) - 1).tolist())
    batch = batches.micro_batch(step, 0)
    assert batch.input_ids.shape == batch.labels.shape
    for token, label in zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True):
        assert label == (IGNORE if token in ends else token + 1)


@given(corpora, shapes, st.integers(0, 1000))
def test_groups_are_related_exactly_where_they_share_a_document(dataset_of, lengths, shape, step):
    lengths, dataset, batches = made(dataset_of, lengths, shape)
    batch = batches.micro_batch(step, shape["micro_batches"] - 1)
    G, k = shape["groups_per_micro_batch"], shape["contexts_per_group"]
    held = [set(document_of(lengths)[tokens]) for tokens in batch.input_ids.reshape(G, -1)]
    assert batch.related == [[not one.isdisjoint(other) for other in held] for one in held]
    assert [set(names) for names in batch.documents] == [{dataset.ids[d] for d in group} for group in held]
    assert batch.group == np.repeat(np.arange(G), k).tolist()
    assert batch.segment == np.tile(np.arange(k), G).tolist()
    assert batch.input_ids.shape == (G * k, shape["context"])


def test_the_rows_of_a_group_follow_each_other_in_the_document(dataset_of):
    one_document = dataset_of([96])
    batch = sampler(one_document, groups_per_micro_batch=4).micro_batch(0, 0)
    for group in batch.input_ids.reshape(4, 8):
        assert np.diff(group).tolist() == [1] * 7
    assert batch.related == [[True] * 4] * 4


def test_documents_too_short_for_a_micro_batch_are_a_mistake(dataset_of):
    assert sampler(dataset_of([20, 4])).micro_batch(0, 0).input_ids.shape == (6, 4)
    with pytest.raises(UserError, match="hold 23 tokens, fewer than one micro-batch of 24"):
        sampler(dataset_of([20, 3]))
    with pytest.raises(UserError, match="hold 0 tokens"):
        sampler(dataset_of([]))


# Held-out documents


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_held_out(name, one, other):
    smaller, larger = sorted([one, other])
    assert is_held_out(name, larger) >= is_held_out(name, smaller)
    assert not is_held_out(name, 0.0)
    assert is_held_out(name, 1.0)


def test_the_share_is_held_out():
    held_out = sum(is_held_out(f"s/{number}", 0.2) for number in range(5000))
    assert 850 < held_out < 1150


def test_training_and_held_out_documents_make_up_the_admitted_ones(dataset_of):
    names = [f"s/{number % 150}" for number in range(200)]  # 50 copies
    dataset = dataset_of([4] * 200, ids=names)
    data = Data(sources=(Source(name="s", path="x", held_out=0.3),))
    training, held_out = split(dataset, data)
    assert sorted([*training, *held_out]) == list(range(150)) == dataset.admitted.tolist()
    assert {dataset.ids[n] for n in held_out} == {name for name in names if is_held_out(name, 0.3)}
    assert 20 < len(held_out) < 70


def test_a_growing_corpus_moves_no_document_across_the_split(dataset_of):
    data = Data(sources=(Source(name="s", path="x", held_out=0.3),))
    small, large = dataset_of([4] * 50), dataset_of([4] * 100)
    assert set(split(small, data)[1]) == {number for number in split(large, data)[1] if number < 50}
