import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipelines.batches.mixture import Mixture
from pipelines.shares import BLOCK, share_out
from pipelines.workflow.errors import UserError

WEIGHTS = {"a": 1, "b": 3, "c": 2.5}
weights = st.lists(st.integers(1, 10**6), min_size=1, max_size=12)
places = st.integers(0, 3 * BLOCK) | st.integers(0, 10**15)
mixtures = st.builds(
    lambda weights, seed: Mixture({str(number): weight for number, weight in enumerate(weights)}, seed),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.integers(0, 2**64),
)


def sources_of(mixture, first, last):
    return [mixture.at(place)[0] for place in range(first, last)]


# Shares


@given(weights, st.integers(0, 5000))
def test_shares_are_within_one_slot_of_the_exact_ones_and_sum_to_all(weights, total):
    slots = share_out(weights, total)
    assert slots.sum() == total
    exact = [Fraction(weight * total, sum(weights)) for weight in weights]
    assert all(abs(int(slot) - share) < 1 for slot, share in zip(slots, exact, strict=True))


@given(weights, st.integers(0, 5000))
def test_the_largest_remainders_get_the_slots_that_are_left(weights, total):
    exact = [Fraction(weight * total, sum(weights)) for weight in weights]
    more = [int(slot) > share for slot, share in zip(share_out(weights, total), exact, strict=True)]
    remainders = [share - int(share) for share in exact]
    rounded_up = [remainder for remainder, up in zip(remainders, more, strict=True) if up]
    rounded_down = [remainder for remainder, up in zip(remainders, more, strict=True) if not up]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0)


@given(weights, st.integers(0, 5000), st.randoms(use_true_random=False))
def test_a_share_depends_on_the_order_of_the_weights_only_where_remainders_are_equal(weights, total, random):
    exact = [Fraction(weight * total, sum(weights)) for weight in weights]
    assume(len({share - int(share) for share in exact}) == len(exact))
    order = random.sample(range(len(weights)), len(weights))
    shuffled = share_out([weights[number] for number in order], total)
    assert shuffled.tolist() == share_out(weights, total)[order].tolist()


@given(weights, st.integers(-20, 20))
def test_only_the_ratio_of_the_weights_counts(weights, exponent):
    scaled = [weight * 2.0**exponent for weight in weights]
    assert share_out(scaled, BLOCK).tolist() == share_out(weights, BLOCK).tolist()


def test_an_example_worked_by_hand():
    assert share_out([1, 1, 1], 10).tolist() == [4, 3, 3]  # equal remainders: the first
    assert share_out([5, 3, 1], 4).tolist() == [2, 1, 1]  # 2.22, 1.33, 0.44
    assert Mixture(WEIGHTS, 0).slots.tolist() == [154, 461, 385]  # 153.85, 461.54, 384.62


def test_a_weight_too_small_for_a_slot_is_a_mistake_that_names_source_and_share():
    assert Mixture({"a": 999, "b": 1}, 0).slots.tolist() == [999, 1]
    with pytest.raises(UserError, match=r"the weight of 'b' \(0\.25\) is less than 0\.001 of all: .*leave the source"):
        Mixture({"a": 999, "b": 0.25}, 0)


# Places


@given(mixtures, places)
def test_the_group_at_a_place_is_the_next_of_its_source(mixture, place):
    """With count(0) = 0 this says everything: turns of a source are 0, 1, 2, ... without a gap, and counted right."""
    source, turn = mixture.at(place)
    before, after = mixture.count(place), mixture.count(place + 1)
    assert turn == before[source]
    assert (after - before).tolist() == [int(number == source) for number in range(len(before))]
    assert before.sum() == place


@given(mixtures)
def test_before_the_first_place_there_is_nothing(mixture):
    assert not mixture.count(0).any()


def test_places_read_in_order_give_each_source_its_groups_in_order():
    mixture = Mixture(WEIGHTS, 7)
    read = [mixture.at(place) for place in range(2500)]
    for source in range(3):
        turns = [turn for own, turn in read if own == source]
        assert turns == list(range(len(turns)))
        assert len(turns) == mixture.count(2500)[source]


@given(mixtures, st.integers(0, 10**12))
def test_every_block_holds_the_shares(mixture, block):
    held = mixture.count((block + 1) * BLOCK) - mixture.count(block * BLOCK)
    assert held.tolist() == mixture.slots.tolist()


def test_blocks_have_orders_of_their_own():
    mixture = Mixture(WEIGHTS, 0)
    orders = {tuple(sources_of(mixture, block * BLOCK, (block + 1) * BLOCK)) for block in range(6)}
    assert len(orders) == 6


def test_seeds_have_orders_of_their_own():
    assert len({tuple(sources_of(Mixture(WEIGHTS, seed), 0, BLOCK)) for seed in range(6)}) == 6


def test_sources_are_mixed_within_a_block():
    first = np.array(sources_of(Mixture({"a": 1, "b": 1}, 0), 0, BLOCK))
    assert 430 < np.count_nonzero(np.diff(first)) < 570
    assert 200 < np.count_nonzero(first[: BLOCK // 2]) < 300


def test_the_order_is_the_same_on_every_machine():
    order = bytes(sources_of(Mixture(WEIGHTS, 5), 3 * BLOCK, 4 * BLOCK))
    assert hashlib.sha256(order).hexdigest()[:16] == "059417905f0f78a9"


def test_any_place_is_as_near_as_the_first():
    mixture = Mixture(WEIGHTS, 0)
    far = 10**15 * BLOCK
    assert mixture.count(far).tolist() == [slots * 10**15 for slots in mixture.slots.tolist()]
    source, turn = mixture.at(far)
    assert turn == mixture.slots[source] * 10**15


@given(st.lists(st.integers(0, 20 * BLOCK), max_size=10), st.randoms(use_true_random=False))
def test_a_place_does_not_depend_on_what_was_read_before(places, random):
    one = Mixture(WEIGHTS, 1)
    read = {place: one.at(place) for place in places}
    another = Mixture(WEIGHTS, 1)
    assert {place: another.at(place) for place in random.sample(places, len(places))} == read
