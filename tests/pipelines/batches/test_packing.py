import json
from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.batches.packing import (
    COLUMNS,
    NEW,
    REPLAYED,
    REPORT,
    groups_file,
    join_groups,
    pack,
    pack_dataset,
    pack_source,
    read_groups,
    write_groups,
)

lengths_of_documents = st.lists(st.integers(0, 200), max_size=40)
sizes_of_groups = st.integers(1, 64)


def packed(lengths, group_tokens, numbers=None):
    numbers = range(len(lengths)) if numbers is None else numbers
    groups = pack(np.array(numbers, dtype=np.int64), np.array(lengths, dtype=np.int64), group_tokens)
    return groups, [groups.pieces(number) for number in range(len(groups))]


def test_an_example_worked_by_hand():
    # Full groups of 4: documents 1 (twice) and 2. Tails 3, 2, 1 joined longest first: 000|1 is a group, 1|2 remains.
    groups, pieces = packed([3, 10, 5], 4)
    assert pieces == [[(1, 0, 4)], [(1, 4, 4)], [(2, 0, 4)], [(0, 0, 3), (1, 8, 1)]]
    assert groups.dropped == 2


@given(lengths_of_documents, sizes_of_groups, st.randoms(use_true_random=False))
def test_every_token_is_used_once_but_for_the_counted_remainder(lengths, group_tokens, random):
    numbers = random.sample(range(1000), len(lengths))
    groups, pieces = packed(lengths, group_tokens, numbers)
    used = Counter(
        (document, position)
        for group in pieces
        for document, start, length in group
        for position in range(start, start + length)
    )
    there = {(number, p) for number, length in zip(numbers, lengths, strict=True) for p in range(length)}
    assert set(used.values()) <= {1}
    assert used.keys() <= there
    assert len(used) == len(there) - groups.dropped
    assert 0 <= groups.dropped < group_tokens


@given(lengths_of_documents, sizes_of_groups)
def test_every_group_is_exactly_full(lengths, group_tokens):
    groups, pieces = packed(lengths, group_tokens)
    assert len(groups) == sum(lengths) // group_tokens
    for group in pieces:
        assert sum(length for _, _, length in group) == group_tokens
        assert all(length > 0 for _, _, length in group)


@given(lengths_of_documents, sizes_of_groups)
def test_a_long_document_fills_groups_on_its_own(lengths, group_tokens):
    _, pieces = packed(lengths, group_tokens)
    alone = [
        [(document, start, group_tokens)]
        for document, length in enumerate(lengths)
        for start in range(0, length - group_tokens + 1, group_tokens)
    ]
    assert pieces[: len(alone)] == alone


@given(lengths_of_documents, sizes_of_groups)
def test_what_is_left_is_joined_longest_first(lengths, group_tokens):
    _, pieces = packed(lengths, group_tokens)
    joined = [piece for group in pieces[sum(length // group_tokens for length in lengths) :] for piece in group]
    order = list(dict.fromkeys(document for document, _, _ in joined))
    tails = [lengths[document] % group_tokens for document in order]
    assert tails == sorted(tails, reverse=True)
    for document in order:  # a document cut at a group's end goes on in the next group
        run = [(start, length) for owner, start, length in joined if owner == document]
        assert run[0][0] == lengths[document] - lengths[document] % group_tokens
        assert all(start + length == following for (start, length), (following, _) in pairwise(run))


def test_no_documents_make_no_groups():
    groups, pieces = packed([], 8)
    assert (len(groups), pieces, groups.dropped) == (0, [], 0)


# Few documents a group


@given(lengths_of_documents, sizes_of_groups)
def test_no_cut_is_made_without_need(lengths, group_tokens):
    """A shared piece begins where a document's tail does or a group does; at the first group's beginning both do."""
    groups, _ = packed(lengths, group_tokens)
    own = sum(length // group_tokens for length in lengths)
    tails = sum(length % group_tokens > 0 for length in lengths)
    shared = len(groups) - own
    assert len(groups.document) - own <= tails + max(0, shared - 1)


@given(lengths_of_documents, sizes_of_groups)
def test_a_group_holds_no_more_documents_than_the_fewest_that_could_fill_it(lengths, group_tokens):
    """The fewest of the tails that no earlier group has begun, and the one that the group before it has.

    Proof: what follows that one in the group are the longest tails not begun, longest first. So as soon as the fewest
    of them that hold group_tokens have been placed the group is full.
    """
    _, pieces = packed(lengths, group_tokens)
    begun = set()
    for group in pieces[sum(length // group_tokens for length in lengths) :]:
        left = [n % group_tokens for number, n in enumerate(lengths) if n % group_tokens and number not in begun]
        sums = accumulate(sorted(left, reverse=True))
        fewest = next((count for count, total in enumerate(sums, 1) if total >= group_tokens), len(left))
        assert len(group) <= fewest + (group[0][0] in begun)
        begun |= {document for document, _, _ in group}


# On disk


def same(one, other):
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("offsets", *COLUMNS))
    return arrays and one.dropped == other.dropped


@given(lengths_of_documents, sizes_of_groups)
def test_groups_read_back_are_the_same(fresh, lengths, group_tokens):
    groups, pieces = packed(lengths, group_tokens)
    path = fresh() / "new" / groups_file(0)
    write_groups(groups, path)
    again = read_groups(path)
    assert same(again, groups)
    assert [again.pieces(number) for number in range(len(again))] == pieces


@pytest.mark.parametrize("lengths", [[], [0], [7], [3, 4]])
def test_no_groups_read_back_are_no_groups(tmp_path, lengths):
    write_groups(packed(lengths, 8)[0], tmp_path / "groups.arrow")
    again = read_groups(tmp_path / "groups.arrow")
    assert (len(again), again.offsets.tolist(), again.document.tolist(), again.dropped) == (0, [0], [], sum(lengths))


# A data set

SOURCES = {"b": 30, "none": 1, "a": 20}


@pytest.fixture(scope="module")
def dataset(dataset_of):
    """With held-out documents, with copies of the first of "b" at the end of "a", with one document of "none"."""
    first = [1 + number * 7 % 50 for number in range(30)]
    lengths = [*first, 5, *(1 + number * 11 % 50 for number in range(13)), *first[:7]]
    kinds = [*range(44), *range(7)]
    return dataset_of(lengths, [f"id {kind}" for kind in kinds], None, kinds, sources=SOURCES, held_out=0.3)


def test_the_training_documents_of_every_source_are_packed_alone(local_ray, dataset, fresh):
    output = fresh()
    report = pack_dataset(dataset.directory, dataset.directory, [*SOURCES], 16, output)
    assert list(report) == [*SOURCES]
    assert json.loads((output / REPORT).read_text()) == report
    ends = np.cumsum([0, *SOURCES.values()]).tolist()
    for number, (name, (first, end)) in enumerate(zip(SOURCES, pairwise(ends), strict=True)):
        own = [document for document in dataset.training.tolist() if first <= document < end]
        assert len(own) < SOURCES[name] or name == "none"
        lengths = [int(dataset.length[document]) for document in own]
        expected, _ = packed(lengths, 16, own)
        assert same(read_groups(output / groups_file(number)), expected)
        counts = {"tokens": sum(lengths), "groups": len(expected), "pieces": len(expected.document)}
        assert report[name] == counts | {"dropped": expected.dropped}
        assert report[name]["tokens"] == report[name]["groups"] * 16 + report[name]["dropped"]
    assert report["none"] == {"tokens": 5, "groups": 0, "pieces": 0, "dropped": 5}


def test_the_same_data_set_makes_the_same_groups(dataset, fresh, contents):
    directories = [fresh(), fresh()]
    for directory in directories:
        pack_source(dataset.directory, dataset.directory, 0, 16, directory)
    assert contents(directories[0]) == contents(directories[1])
    assert contents(directories[0]).keys() == {groups_file(0)}


def test_what_an_earlier_data_set_lacks_is_packed_apart(local_ray, dataset, dataset_of, fresh):
    kinds = range(0, 44, 2)  # every other document was there, under another id
    hashes = [f"hash of id {kind}" for kind in kinds]
    earlier = dataset_of([9] * len(kinds), [f"other id {kind}" for kind in kinds], hashes).directory
    output = fresh()
    report = pack_dataset(dataset.directory, dataset.directory, [*SOURCES], 16, output, earlier)
    assert list(report) == [f"{name}, {age}" for name in SOURCES for age in (NEW, REPLAYED)]
    numbers = [*range(44), *range(7)]
    for number in range(len(SOURCES)):
        for age in (NEW, REPLAYED):
            own = [
                document
                for document in dataset.training.tolist()
                if dataset.source[document] == number and (numbers[document] % 2 == 0) == (age == REPLAYED)
            ]
            expected, _ = packed([int(dataset.length[document]) for document in own], 16, own)
            assert same(read_groups(output / groups_file(number, age)), expected)


@given(st.lists(lengths_of_documents, min_size=1, max_size=4), sizes_of_groups)
def test_joined_groups_are_those_of_each_part_in_turn(parts, group_tokens):
    made = [packed(lengths, group_tokens, range(100 * n, 100 * n + len(lengths))) for n, lengths in enumerate(parts)]
    joined = join_groups([groups for groups, _ in made])
    assert [joined.pieces(group) for group in range(len(joined))] == [piece for _, pieces in made for piece in pieces]
    assert joined.dropped == sum(groups.dropped for groups, _ in made)
