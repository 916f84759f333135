"""Laws 2, 3 and 4. The data sets number their tokens through, so a token tells its document and position."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_model import cross_batch_plan
from pipelines.batches.packing import pack
from pipelines.batches.sampler import IGNORE, BatchShape, CrossBatchSampler, permute
from pipelines.config import Source
from pipelines.workflow.errors import UserError

LENGTHS = [70, 3, 41, 8, 100, 1, 33, 64, 17, 5, 90, 2, 58]
SHAPE = {"context": 4, "contexts_per_group": 2, "groups_per_micro_batch": 3, "micro_batches": 4}
ARRAYS = ("input_ids", "labels", "document_ids")
REST = ("group", "segment", "related", "documents", "sources", "first")


def sampler(dataset, weights=None, seed=0, first=0, **shape):
    """Over all training documents, sources by number: {name: weight or None}."""
    weights = weights or {"s": None}
    shape = BatchShape(**{**SHAPE, **shape})
    groups = []
    for number in range(len(weights)):
        own = dataset.training[dataset.source[dataset.training] == number]
        groups.append(pack(own, dataset.length[own], shape.group_tokens))
    sources = [Source(name=name, path="x", weight=weight) for name, weight in weights.items()]
    return CrossBatchSampler(dataset, groups, sources, shape, seed, first)


def same(one, other):
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
    return arrays and all(getattr(one, name) == getattr(other, name) for name in REST)


@pytest.fixture(scope="module")
def dataset(dataset_of):
    return dataset_of(LENGTHS, shards=3)


@pytest.mark.parametrize("weights", [None, {"s": 1.0}])
def test_an_order_that_begins_later_is_the_same_order(dataset, weights):
    plain, later = sampler(dataset, weights), sampler(dataset, weights, first=1000)
    for step in range(3):
        assert same(plain.micro_batch(step, 1), later.micro_batch(1000 + step, 1))
    with pytest.raises(AssertionError):
        later.micro_batch(999, 0)


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


@given(corpora, shapes, st.integers(1, 4), st.integers(0, 1000))
def test_the_parts_of_a_micro_batch_are_together_the_whole(dataset_of, lengths, shape, parts, step):
    shape = shape | {"groups_per_micro_batch": shape["groups_per_micro_batch"] * parts}
    _, _, batches = made(dataset_of, lengths, shape)
    whole = batches.micro_batch(step, 0)
    split = [batches.micro_batch(step, 0, (at, parts)) for at in range(parts)]
    rows = len(whole.input_ids) // parts
    for name in ARRAYS:
        arrays = [getattr(part, name) for part in split]
        assert all(array.dtype == np.int64 and len(array) == rows for array in arrays)
        assert np.array_equal(np.concatenate(arrays), getattr(whole, name))
    assert [row for part in split for row in part.documents] == whole.documents
    assert [part.first for part in split] == [at * rows for at in range(parts)]
    for part in split:  # every part knows all that a plan is made of
        assert all(getattr(part, name) == getattr(whole, name) for name in ("group", "segment", "related", "sources"))


def test_of_a_part_only_its_own_tokens_are_read(dataset_of):
    dataset = dataset_of([16] * 6)
    batches = sampler(dataset, groups_per_micro_batch=6, contexts_per_group=4)
    read, tokens = [], dataset.tokens
    dataset.tokens = lambda document, *span: read.append(document) or tokens(document, *span)
    whole = batches.micro_batch(0, 0)
    read.clear()
    part = batches.micro_batch(0, 0, (1, 3))
    assert read == [documents[0] for documents in whole.documents[8:16:4]]
    assert part.first == 8


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 2), (0, 0)])
def test_a_part_that_there_is_not_is_a_bug(dataset, part):
    with pytest.raises(AssertionError):
        sampler(dataset, groups_per_micro_batch=3 if part == (0, 2) else 4).micro_batch(0, 0, part)


@pytest.mark.parametrize(("micro_batches", "groups"), [(12, 1), (6, 2), (2, 6), (1, 12)])
def test_a_step_holds_the_same_groups_however_it_is_split(dataset, micro_batches, groups):
    def of_step(sampler, micro_batches):
        return [group for number in range(micro_batches) for group in sampler.group_numbers(7, number)]

    other = sampler(dataset, groups_per_micro_batch=groups, micro_batches=micro_batches)
    assert of_step(other, micro_batches) == of_step(sampler(dataset), 4)
    assert other.shape.tokens_per_step == sampler(dataset).shape.tokens_per_step == 12 * 8


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
    groups, per_step = len(batches.groups[0]), shape["groups_per_micro_batch"] * shape["micro_batches"]
    steps = -(-2 * groups // per_step)
    order = [g for t in range(steps) for m in range(shape["micro_batches"]) for g in batches.group_numbers(t, m)]
    assert sorted(order[:groups]) == sorted(order[groups : 2 * groups]) == [(0, number) for number in range(groups)]


def test_every_epoch_has_an_order_of_its_own(dataset):
    one = sampler(dataset, groups_per_micro_batch=1, micro_batches=1)
    n = len(one.groups[0])
    orders = {tuple(one.group_numbers(epoch * n + step, 0)[0] for step in range(n)) for epoch in range(5)}
    assert len(orders) == 5


@settings(max_examples=30)
@given(corpora, shapes)
def test_an_epoch_reads_every_token_once_but_for_the_counted_remainder(dataset_of, lengths, shape):
    shape = shape | {"groups_per_micro_batch": 1, "micro_batches": 1}
    lengths, _, batches = made(dataset_of, lengths, shape)
    read = Counter()
    for step in range(len(batches.groups[0])):
        read.update(batches.micro_batch(step, 0).input_ids.flatten().tolist())
    assert set(read.values()) == {1}
    assert read.keys() <= set(range(sum(lengths)))
    assert len(read) == sum(lengths) - batches.groups[0].dropped
    assert batches.groups[0].dropped < shape["context"] * shape["contexts_per_group"]


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
def test_the_labels_of_a_step_are_counted_without_its_tokens(dataset_of, lengths, shape, step):
    _, _, batches = made(dataset_of, lengths, shape)
    read = [batches.micro_batch(step, number) for number in range(shape["micro_batches"])]
    assert batches.labels(step) == sum(int((batch.labels != IGNORE).sum()) for batch in read)


@given(corpora, shapes, st.integers(0, 1000))
def test_document_ids_name_the_document_of_every_token(dataset_of, lengths, shape, step):
    lengths, _, batches = made(dataset_of, lengths, shape)
    batch = batches.micro_batch(step, 0)
    assert np.array_equal(batch.document_ids, document_of(lengths)[batch.input_ids])


@given(corpora, shapes, st.integers(0, 1000))
def test_groups_are_related_exactly_where_they_share_a_document(dataset_of, lengths, shape, step):
    lengths, _, batches = made(dataset_of, lengths, shape)
    batch = batches.micro_batch(step, shape["micro_batches"] - 1)
    G, k = shape["groups_per_micro_batch"], shape["contexts_per_group"]
    held = [set(document_of(lengths)[tokens]) for tokens in batch.input_ids.reshape(G, -1)]
    assert batch.related == [[not one.isdisjoint(other) for other in held] for one in held]
    rows = batch.input_ids.reshape(G * k, -1)
    assert [list(row) for row in batch.documents] == [list(dict.fromkeys(document_of(lengths)[row])) for row in rows]
    assert batch.sources == ["s"] * G
    assert batch.group == np.repeat(np.arange(G), k).tolist()
    assert batch.segment == np.tile(np.arange(k), G).tolist()
    assert batch.input_ids.shape == (G * k, shape["context"])


def test_the_rows_of_a_group_follow_each_other_in_the_document(dataset_of):
    one_document = dataset_of([96])
    batch = sampler(one_document, groups_per_micro_batch=4).micro_batch(0, 0)
    for group in batch.input_ids.reshape(4, 8):
        assert np.diff(group).tolist() == [1] * 7
    assert batch.related == [[True] * 4] * 4


def test_groups_with_near_duplicates_are_related(dataset_of):
    apart = sampler(dataset_of([16] * 6), groups_per_micro_batch=6, contexts_per_group=4).micro_batch(0, 0)
    assert apart.related == np.eye(6, dtype=bool).tolist()
    signatures = [0, 1, 0, 2, 1, 0]
    batch = sampler(
        dataset_of([16] * 6, signatures=signatures), groups_per_micro_batch=6, contexts_per_group=4
    ).micro_batch(0, 0)
    kinds = [signatures[documents[0]] for documents in batch.documents[::4]]
    assert sorted(kinds) == [0, 0, 0, 1, 1, 2]
    assert batch.related == [[one == other for other in kinds] for one in kinds]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12),
    st.integers(0, 100),
)
def test_a_negative_is_neither_of_the_rows_document_nor_of_a_near_duplicate(dataset_of, documents, step):
    lengths, signatures, texts = zip(*documents, (24, 5, 5), strict=True)
    dataset = dataset_of(lengths, signatures=signatures, hashes=[f"text {text}" for text in texts])
    batch = sampler(dataset).micro_batch(step, 0)
    plan = cross_batch_plan(batch.group, batch.segment, batch.related, [(0, 4), (1, 4)]).tolist()
    near = {
        (a, b)
        for a in range(len(lengths))
        for b in range(len(lengths))
        if signatures[a] == signatures[b] or texts[a] == texts[b]
    }
    for row, seen in enumerate(plan):
        for other in seen:
            if other >= 0 and batch.group[other] != batch.group[row]:
                group = [r for r in range(len(plan)) if batch.group[r] == batch.group[row]]
                own = {document for r in group for document in batch.documents[r]}
                assert not {(mine, theirs) for mine in own for theirs in batch.documents[other]} & near


def test_groups_with_equal_texts_are_related(dataset_of):
    batch = sampler(
        dataset_of([16] * 3, hashes=["one", "two", "one"]), groups_per_micro_batch=3, contexts_per_group=4
    ).micro_batch(0, 0)
    kinds = [documents[0] % 2 for documents in batch.documents[::4]]
    assert batch.related == [[one == other for other in kinds] for one in kinds]


def test_documents_too_short_for_a_micro_batch_are_a_mistake(dataset_of):
    assert sampler(dataset_of([20, 4])).micro_batch(0, 0).input_ids.shape == (6, 4)
    with pytest.raises(UserError, match="fill 2 groups of 2 x 4 tokens, a micro-batch takes 3"):
        sampler(dataset_of([20, 3]))
    with pytest.raises(UserError, match="fill 0 groups"):
        sampler(dataset_of([3]))


# Mixtures

SOURCES = {"long": 3, "short": 12}
MIXED = [320, 240, 80, *[20] * 12]


@pytest.fixture(scope="module")
def mixed(dataset_of):
    return dataset_of(MIXED, sources=SOURCES)


def sources_of(sampler, steps):
    return [source for t in range(steps) for m in range(4) for source, _ in sampler.group_numbers(t, m)]


def test_weights_give_each_source_its_share(mixed):
    one = sampler(mixed, {"long": 1, "short": 3})
    drawn = sources_of(one, 1000)
    assert len(drawn) == 12_000
    assert drawn.count(0) == 3000
    for first in range(0, 12_000, 1000):  # in every block
        assert drawn[first : first + 1000].count(0) == 250
    assert 150 < sum(a != b for a, b in pairwise(drawn[:1001])) < 500  # mixed, not in turns


def test_with_weights_each_source_has_epochs_of_its_own(mixed):
    one = sampler(mixed, {"long": 1, "short": 3})
    for source, size in enumerate((80, 30)):
        assert len(one.groups[source]) == size
        drawn = [n for t in range(400) for m in range(4) for s, n in one.group_numbers(t, m) if s == source]
        epochs = [tuple(drawn[first : first + size]) for first in range(0, len(drawn) - size, size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)


def test_epochs_count_how_often_each_source_is_read(mixed):
    for weights in ({"long": 1, "short": 3}, {"long": None, "short": None}):
        one = sampler(mixed, weights)
        drawn = Counter(sources_of(one, 123))
        expected = {"long": drawn[0] / 80, "short": drawn[1] / 30}
        if weights["long"] is None:  # one epoch of both together
            expected = dict.fromkeys(expected, 123 * 12 / 110)
        assert one.epochs(123) == expected


def test_without_weights_an_epoch_holds_every_group_of_every_source_once(mixed):
    one = sampler(mixed, {"long": None, "short": None}, groups_per_micro_batch=1, micro_batches=1)
    drawn = [one.group_numbers(step, 0)[0] for step in range(220)]
    everything = [(0, n) for n in range(80)] + [(1, n) for n in range(30)]
    assert sorted(drawn[:110]) == sorted(drawn[110:]) == everything
    assert drawn[:110] != drawn[110:]


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_mixed_micro_batch_does_not_depend_on_what_was_read_before(mixed, places):
    one = sampler(mixed, {"long": 2, "short": 1})
    for place in places:
        batch = one.micro_batch(*place)
        assert same(batch, sampler(mixed, {"long": 2, "short": 1}).micro_batch(*place))
        names = [["long", "short"][int(mixed.source[documents[0]])] for documents in batch.documents[::2]]
        assert batch.sources == names


def test_a_source_with_a_weight_but_without_a_group_is_a_mistake(dataset_of):
    dataset = dataset_of([80, 7], sources={"long": 1, "short": 1})
    assert sampler(dataset, {"long": None, "short": None}).micro_batch(0, 0).sources == ["long"] * 3
    with pytest.raises(UserError, match="source 'short' has a weight but not the 8 training tokens of one group"):
        sampler(dataset, {"long": 1, "short": 1})
