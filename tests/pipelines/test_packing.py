from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.packing import pack

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
