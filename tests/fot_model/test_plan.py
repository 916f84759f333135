"""Shapes: R rows, L tokens a context, d additional contexts, G document groups."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fot_model.plan import c_prev_plan, check_plan, cross_batch_plan, longllama_plan, pad_plan

SETS = ["cross_batch_range2_pack1", "cross_batch_range3_pack4_stepping", "cross_batch_range6_pack4_stepping"]
LONGLLAMA_3B = [(0, 0), (1, 1), (2, 1), (3, 0)]
TWO_APART = [[True, False], [False, True]]


def refusal(*parts: str) -> str:
    """Matches one line that holds these parts in this order."""
    return "^" + "".join(f".*{re.escape(part)}" for part in parts) + "[^\n]*$"


def unpadded(plan_Rd: Tensor) -> list[list[int]]:
    """The rows that each row sees. Padding must come last, and no wider than needed."""
    assert plan_Rd.dtype == torch.long
    seen_R = [[row for row in seen if row != -1] for seen in plan_Rd.tolist()]
    assert plan_Rd.equal(pad_plan(seen_R))
    return seen_R


class Batch:
    """Groups of consecutive contexts in rows of any order, some of them related, and what is asked of them.

    `in_order`: rows of a group stand in the batch in the order of its contexts."""

    def __init__(self, draw: st.DrawFn, in_order: bool = False) -> None:
        G = draw(st.integers(1, 5))
        self.segments = [
            (draw(st.integers(0, segment)), draw(st.integers(0, 5))) for segment in range(draw(st.integers(1, 4)))
        ]
        contexts = [draw(st.integers(0, len(self.segments))) for _ in range(G)]
        contexts[draw(st.integers(0, G - 1))] = len(self.segments)
        rows = draw(st.permutations([(group, at) for group in range(G) for at in range(contexts[group])]))
        self.group_R = [group for group, _ in rows]
        self.segment_R = [at for _, at in rows]
        if in_order:
            self.segment_R = [self.group_R[:row].count(group) for row, group in enumerate(self.group_R)]
        self.related_GG = [[False] * G for _ in range(G)]
        for a in range(G):
            self.related_GG[a][a] = draw(st.booleans())
            for b in range(a):
                self.related_GG[a][b] = self.related_GG[b][a] = draw(st.integers(0, 3)) == 0
        self.d = draw(st.integers(1, len(set(self.group_R))))

    def __repr__(self) -> str:
        return (
            f"Batch(group_R={self.group_R}, segment_R={self.segment_R}, related_GG={self.related_GG}, "
            f"segments={self.segments}, d={self.d})"
        )

    def by_segments(self) -> Tensor:
        return cross_batch_plan(self.group_R, self.segment_R, self.related_GG, self.segments)

    def by_c_prev(self) -> Tensor:
        return c_prev_plan(self.group_R, self.segment_R, self.related_GG, self.d)

    def places(self, rows: list[int]) -> list[tuple[int, int]]:
        """(group, segment) of each."""
        return [(self.group_R[row], self.segment_R[row]) for row in rows]

    def rows(self) -> list[tuple[int, int, list[int], list[int]]]:
        """(group, segment, positives, negatives) by row."""
        found = []
        for group, at, seen in zip(self.group_R, self.segment_R, unpadded(self.by_segments()), strict=True):
            positives = self.segments[at][0]
            found.append((group, at, seen[:positives], seen[positives:]))
        return found


batches = st.composite(Batch)()
ordered_batches = st.composite(lambda draw: Batch(draw, in_order=True))()


def test_pad_plan_pads_rows_of_unequal_length_with_minus_one() -> None:
    plan_Rd = pad_plan([[], [0], [1, 0]])
    assert plan_Rd.dtype == torch.long
    assert plan_Rd.tolist() == [[-1, -1], [0, -1], [1, 0]]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_plan_without_additional_contexts_has_width_zero(rows: int) -> None:
    assert pad_plan([[]] * rows).shape == (rows, 0)


def test_the_plan_of_longllama_3b_for_two_documents() -> None:
    plan_Rd = cross_batch_plan([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2, TWO_APART, LONGLLAMA_3B)
    assert plan_Rd.tolist() == [
        [-1, -1, -1],
        [0, 4, -1],
        [1, 0, 5],
        [2, 1, 0],
        [-1, -1, -1],
        [4, 0, -1],
        [5, 4, 1],
        [6, 5, 4],
    ]


def test_negatives_are_the_previous_contexts_of_the_next_documents_around_the_batch() -> None:
    unrelated = [[False] * 4 for _ in range(4)]
    plan_Rd = cross_batch_plan([0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, unrelated, [(0, 0), (1, 2)])
    assert plan_Rd[1::2].tolist() == [[0, 2, 4], [2, 4, 6], [4, 6, 0], [6, 0, 2]]


def test_groups_that_share_a_document_do_not_serve_each_other() -> None:
    related = [[True, True, False], [True, True, False], [False, False, True]]
    plan_Rd = cross_batch_plan([0, 0, 1, 1, 2, 2], [0, 1] * 3, related, [(0, 0), (1, 1)])
    assert plan_Rd[1::2].tolist() == [[0, 4], [2, 4], [4, 0]]


@given(batch=batches)
@settings(deadline=None)
def test_positives_are_the_contexts_right_before_in_the_own_group_nearest_first(batch: Batch) -> None:
    for group, at, positives, _ in batch.rows():
        assert batch.places(positives) == [(group, at - back) for back in range(1, batch.segments[at][0] + 1)]


@given(batch=batches)
@settings(deadline=None)
def test_negatives_are_never_from_the_own_nor_a_related_group(batch: Batch) -> None:
    for group, _, _, negatives in batch.rows():
        for row in negatives:
            assert batch.group_R[row] != group
            assert not batch.related_GG[group][batch.group_R[row]]


@given(batch=batches)
@settings(deadline=None)
def test_no_row_sees_itself_or_a_later_context_of_its_group_or_a_row_twice(batch: Batch) -> None:
    for plan_Rd in (batch.by_segments(), batch.by_c_prev()):
        for row, seen in enumerate(unpadded(plan_Rd)):
            assert len(set(seen)) == len(seen)
            assert row not in seen
            for group, at in batch.places(seen):
                assert group != batch.group_R[row] or at < batch.segment_R[row]


@given(batch=batches)
@settings(deadline=None)
def test_a_row_gets_as_many_negatives_as_asked_while_there_are_unrelated_rows(batch: Batch) -> None:
    for group, at, _, negatives in batch.rows():
        available = sum(other != group and not batch.related_GG[group][other] for other in batch.group_R)
        assert len(negatives) == min(batch.segments[at][1], available)


@given(batch=batches)
@settings(deadline=None)
def test_negatives_are_previous_contexts_first_then_earlier_then_later_ones(batch: Batch) -> None:
    for group, at, _, negatives in batch.rows():
        chosen = [batch.segment_R[row] for row in negatives]
        unrelated = [
            segment
            for other, segment in zip(batch.group_R, batch.segment_R, strict=True)
            if other != group and not batch.related_GG[group][other]
        ]
        previous = Counter(unrelated)[at - 1]
        assert chosen[:previous] == [at - 1] * min(previous, len(chosen))
        earlier = sum(segment < at for segment in unrelated)
        assert all(segment < at for segment in chosen[:earlier])
        assert chosen[:earlier] == sorted(chosen[:earlier], reverse=True)
        assert all(segment >= at for segment in chosen[earlier:])
        assert chosen[earlier:] == sorted(chosen[earlier:])


@given(batch=batches)
@settings(deadline=None)
def test_negatives_of_one_place_go_round_the_batch_from_the_own_document_on(batch: Batch) -> None:
    G = len(batch.related_GG)
    for group, _, _, negatives in batch.rows():
        for place in set(batch.segment_R):
            onward = [(other - group) % G for other, at in batch.places(negatives) if at == place]
            assert onward == sorted(onward)


@given(segments=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=4))
@settings(deadline=None)
def test_more_positives_than_contexts_before_are_refused_naming_both(segments: list[tuple[int, int]]) -> None:
    assume(any(positives > at for at, (positives, _) in enumerate(segments)))
    at, asked = next((at, positives) for at, (positives, _) in enumerate(segments) if positives > at)
    with pytest.raises(ValueError, match=refusal(f"segment {at} asks for {asked} positives, but only {at} contexts")):
        cross_batch_plan([0] * len(segments), list(range(len(segments))), [[True]], segments)


def test_c_prev_of_the_own_and_of_the_next_documents_round_the_batch() -> None:
    unrelated = [[False] * 4 for _ in range(4)]
    plan_Rd = c_prev_plan([0, 1, 2, 3] * 3, [0] * 4 + [1] * 4 + [2] * 4, unrelated, d=3)
    assert plan_Rd.tolist() == [
        *[[-1, -1, -1]] * 4,
        *[[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]],
        *[[4, 5, 6], [5, 6, 7], [6, 7, 4], [7, 4, 5]],
    ]


def test_c_prev_passes_over_related_documents_and_those_that_are_too_short() -> None:
    related = [[False, True, False, False], [True, False, False, False], [False] * 4, [False] * 4]
    group_R, segment_R = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3], [0, 1, 2, 0, 1, 2, 0, 0, 1, 2]
    assert unpadded(c_prev_plan(group_R, segment_R, related, d=2)) == [
        *[[], [0, 6], [1]],  # document 1 is related, document 2 has no second context
        *[[], [3, 6], [4]],
        [],
        *[[], [7, 0], [8, 1]],
    ]


@given(batch=batches)
@settings(deadline=None)
def test_first_contexts_see_none_and_later_ones_first_the_context_before_them(batch: Batch) -> None:
    for group, at, seen in zip(batch.group_R, batch.segment_R, unpadded(batch.by_c_prev()), strict=True):
        assert batch.places(seen[:1]) == ([(group, at - 1)] if at else [])
        assert at or not seen


@given(batch=batches)
@settings(deadline=None)
def test_c_prev_negatives_are_at_the_same_place_in_the_next_unrelated_documents(batch: Batch) -> None:
    G, held = len(batch.related_GG), batch.places(list(range(len(batch.group_R))))
    for group, at, seen in zip(batch.group_R, batch.segment_R, unpadded(batch.by_c_prev()), strict=True):
        onward = [(group + step) % G for step in range(1, G)]
        unrelated = [g for g in onward if not batch.related_GG[group][g] and g in batch.group_R]
        assert batch.places(seen[1:]) == [(g, at - 1) for g in unrelated[: batch.d - 1] if (g, at - 1) in held]


@given(batch=batches)
@settings(deadline=None)
def test_with_d_of_one_a_row_sees_its_own_previous_context_alone(batch: Batch) -> None:
    only_own = [(min(at, 1), 0) for at in range(len(batch.segments))]
    alone = c_prev_plan(batch.group_R, batch.segment_R, batch.related_GG, 1)
    assert alone.equal(cross_batch_plan(batch.group_R, batch.segment_R, batch.related_GG, only_own))


@pytest.mark.parametrize("d", [-1, 0, 3])
def test_a_d_that_the_documents_cannot_fill_is_refused(d: int) -> None:
    with pytest.raises(ValueError, match=refusal(f"d is {d}", "2 document groups", "d of 1 to 2")):
        c_prev_plan([0, 0, 1, 1], [0, 1, 0, 1], TWO_APART, d)


Arguments = tuple[list[int], list[int], list[list[bool]]]


def both_rules(group_R: list[int], segment_R: list[int], related_GG: list[list[bool]]) -> list[Any]:
    return [
        lambda: cross_batch_plan(group_R, segment_R, related_GG, [(0, 0), (1, 1), (2, 1)]),
        lambda: c_prev_plan(group_R, segment_R, related_GG, 1),
    ]


@pytest.mark.parametrize("rule", [0, 1], ids=["cross_batch_plan", "c_prev_plan"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([0, 0, 2], [0, 1, 0], TWO_APART), ["row 2 is segment 0 of group 2", "2 groups"]),
        (([0, 0, -1], [0, 1, 0], TWO_APART), ["row 2 is segment 0 of group -1", "2 groups"]),
        (([0, 0, 1], [0, -1, 0], TWO_APART), ["row 1 is segment -1 of group 0", "segments"]),
        (([0, 1, 0], [0, 0, 0], TWO_APART), ["rows 0 and 2 are both segment 0 of group 0"]),
        (([0, 0, 1], [0, 1], TWO_APART), ["group_R", "3", "segment_R", "2"]),
        (([0, 1], [0, 0, 1], TWO_APART), ["group_R", "2", "segment_R", "3"]),
        (([0, 0, 1, 1], [0, 1, 0, 1], [[True], [True]]), ["related_GG"]),
        (([0, 0, 1, 1], [0, 2, 0, 1], TWO_APART), ["row 1 is segment 2 of group 0", "segment 1"]),
    ],
    ids=["group", "negative group", "negative segment", "twice", "few segments", "few groups", "square", "gap"],
)
def test_rows_that_the_tables_do_not_have_are_refused(arguments: Arguments, named: list[str], rule: int) -> None:
    with pytest.raises(ValueError, match=refusal(*named)):
        both_rules(*arguments)[rule]()


def test_a_segment_beyond_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=refusal("row 2 is segment 2 of group 0", "2 segments")):
        cross_batch_plan([0, 0, 0], [0, 1, 2], [[True]], [(0, 0), (1, 1)])


@pytest.mark.parametrize("counts", [(-1, 0), (0, -1)])
def test_negative_counts_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=refusal("segment 1", "-1")):
        cross_batch_plan([0, 0, 1, 1], [0, 1, 0, 1], TWO_APART, [(0, 0), counts])


@pytest.mark.parametrize("name", SETS)
def test_longllama_plan_is_that_of_the_reference_implementation(conformance, name: str) -> None:
    meta = json.loads(str(np.load(conformance / f"{name}.npz")["meta"]))
    rows = meta["additional_rows"]
    plan_Rd = longllama_plan(
        len(rows), meta["cross_batch_range"], meta["dataset_packing"], meta["cross_batch_stepping"]
    )
    assert unpadded(plan_Rd) == rows


@given(packings=st.integers(1, 4), packing=st.integers(1, 5), reach=st.integers(1, 9), stepping=st.booleans())
@settings(deadline=None)
def test_longllama_rows_see_the_rows_right_before_them_nearest_first(
    packings: int, packing: int, reach: int, stepping: bool
) -> None:
    rows = packings * packing
    seen_R = unpadded(longllama_plan(rows, reach, packing, stepping))
    assert len(seen_R) == rows
    for row, seen in enumerate(seen_R):
        assert seen == [row - back for back in range(1, len(seen) + 1)]
        assert all(other >= 0 for other in seen)
        assert len(seen) <= reach
        if not stepping or packing == 1:
            assert len(seen) == min(reach, row)


@given(packings=st.integers(1, 3), packing=st.integers(2, 6), reach=st.integers(1, 9))
@settings(deadline=None)
def test_with_stepping_the_reach_grows_from_none_to_all_within_a_packing(
    packings: int, packing: int, reach: int
) -> None:
    seen_R = unpadded(longllama_plan((packings + reach) * packing, reach, packing, stepping=True))
    reached = [len(seen) for seen in seen_R[reach * packing :]]  # rows with enough rows before them
    assert reached == reached[:packing] * packings, "every packing steps alike"
    assert reached[0] == 0
    assert reached[packing - 1] == reach
    step = reached[1]
    assert reached[:packing] == [min(place * step, reach) for place in range(packing)]
    assert step == reach or (step - 1) * (packing - 1) <= reach < step * (packing - 1), "no smaller step gets there"


@pytest.mark.parametrize(
    ("rows", "reach", "packing"), [(6, 2, 4), (0, 1, 1), (-4, 1, 4), (4, 0, 1), (4, -1, 1), (4, 1, 0), (4, 1, -2)]
)
def test_longllama_plans_that_do_not_come_out_even_are_refused(rows: int, reach: int, packing: int) -> None:
    named = [f"{rows} rows", f"reach {reach}", f"packing {packing}", "rows a multiple of packing"]
    with pytest.raises(ValueError, match=refusal(*named)):
        longllama_plan(rows, reach, packing)


@given(batch=ordered_batches, L=st.integers(1, 3))
@settings(deadline=None)
def test_the_plans_of_all_rules_are_accepted(batch: Batch, L: int) -> None:
    R = len(batch.group_R)
    document_ids_RL = torch.tensor(batch.group_R)[:, None].expand(R, L)
    for plan_Rd in (batch.by_segments(), batch.by_c_prev(), longllama_plan(R, batch.d)):
        check_plan(plan_Rd, R)
        check_plan(plan_Rd, R, document_ids_RL)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_whole_numbers_of_any_kind_make_a_plan(dtype: torch.dtype) -> None:
    check_plan(torch.tensor([[-1, 1], [0, -1]], dtype=dtype), 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_plan_of_width_zero_is_accepted(rows: int) -> None:
    check_plan(pad_plan([[]] * rows), rows, torch.zeros(rows, 4, dtype=torch.long))


@st.composite
def plans_with_a_place(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A plan that is accepted without documents, and a place in it."""
    R, d = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    seen_R = [
        draw(st.lists(st.sampled_from([other for other in range(R) if other != row]), max_size=d, unique=True))
        for row in range(R)
    ]
    plan = [draw(st.permutations(seen + [-1] * (d - len(seen)))) for seen in seen_R]
    return torch.tensor(plan), draw(st.integers(0, R - 1)), draw(st.integers(0, d - 1))


@given(place=plans_with_a_place())
@settings(deadline=None)
def test_a_row_that_sees_itself_is_refused(place: tuple[Tensor, int, int]) -> None:
    plan_Rd, row, column = place
    check_plan(plan_Rd, len(plan_Rd))
    plan_Rd[row, column] = row
    with pytest.raises(ValueError, match=refusal(f"row {row} sees itself", "leave it out (-1)")):
        check_plan(plan_Rd, len(plan_Rd))


@given(place=plans_with_a_place(), beyond=st.integers(0, 10), below=st.booleans())
@settings(deadline=None)
def test_a_row_that_is_not_there_is_refused(place: tuple[Tensor, int, int], beyond: int, below: bool) -> None:
    plan_Rd, row, column = place
    R = len(plan_Rd)
    wrong = -2 - beyond if below else R + beyond
    plan_Rd[row, column] = wrong
    with pytest.raises(ValueError, match=refusal(f"row {row} sees row {wrong}", f"rows 0 to {R - 1}")):
        check_plan(plan_Rd, R)


@given(place=plans_with_a_place())
@settings(deadline=None)
def test_a_row_named_twice_is_refused(place: tuple[Tensor, int, int]) -> None:
    plan_Rd, row, _ = place
    assume((plan_Rd[row] >= 0).any())
    other = int(plan_Rd[row].max())
    twice_Rd = torch.cat([plan_Rd, torch.full((len(plan_Rd), 1), -1)], dim=1)
    twice_Rd[row, -1] = other
    with pytest.raises(ValueError, match=refusal(f"row {row} sees row {other}", "twice")):
        check_plan(twice_Rd, len(plan_Rd))


@given(place=plans_with_a_place(), data=st.data())
@settings(deadline=None)
def test_the_future_of_its_own_document_is_refused_and_that_of_others_is_not(
    place: tuple[Tensor, int, int], data: Any
) -> None:
    plan_Rd, _, _ = place
    R, L = len(plan_Rd), 3
    documents = [data.draw(st.lists(st.integers(0, 3), min_size=L, max_size=L)) for _ in range(R)]
    document_ids_RL = torch.tensor(documents)
    future = [
        (row, other, sorted(set(documents[row]) & set(documents[other])))
        for row, seen in enumerate(plan_Rd.tolist())
        for other in seen
        if other > row and set(documents[row]) & set(documents[other])
    ]
    if not future:
        check_plan(plan_Rd, R, document_ids_RL)
        return
    row, other, shared = future[0]
    named = [f"row {row} sees row {other}", f"future of its own document {shared[0]}", "earlier rows"]
    with pytest.raises(ValueError, match=refusal(*named)):
        check_plan(plan_Rd, R, document_ids_RL)


@given(batch=ordered_batches, data=st.data())
@settings(deadline=None)
def test_each_part_of_a_plan_is_checked_as_it_is_in_the_whole(batch: Batch, data: Any) -> None:
    plan_Rd, R = batch.by_segments(), len(batch.group_R)
    document_ids_RL = torch.tensor(batch.group_R)[:, None].expand(R, 2)
    first = data.draw(st.integers(0, R - 1))
    own = range(first, data.draw(st.integers(first + 1, R)))
    lines, documents = slice(own.start, own.stop), document_ids_RL[own.start : own.stop]
    check_plan(plan_Rd[lines], R, documents, own)
    row = data.draw(st.sampled_from(own))
    seen = data.draw(st.just(row + 1) | st.integers(-3, R + 2))
    wrong_Rd = torch.cat([plan_Rd, torch.full((R, 1), -1)], dim=1)
    wrong_Rd[row, -1] = seen
    messages = []
    for part in ((wrong_Rd, R, document_ids_RL), (wrong_Rd[lines], R, documents, own)):
        try:
            check_plan(*part)
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    whole, alone = messages
    if "future" in whole and seen not in own:  # which documents the rows of others hold is not known
        assert alone == "accepted"
    else:
        assert alone == whole
    with pytest.raises(ValueError, match=refusal(f"give whole numbers [{len(own)}, d]")):
        check_plan(torch.cat([plan_Rd, plan_Rd])[: len(own) + 1], R, None, own)
    with pytest.raises(ValueError, match=refusal(f"give [{len(own)}, L]")):
        check_plan(plan_Rd[lines], R, torch.zeros(len(own) + 1, 2, dtype=torch.long), own)


@pytest.mark.parametrize(
    "plan",
    [
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([[1], [0]], dtype=torch.bfloat16),
        torch.tensor([[False, True], [True, False]]),
        torch.tensor([[1], [0]], dtype=torch.complex64),
        torch.tensor([1, 0]),
        torch.tensor([[[1]], [[0]]]),
        torch.tensor([[1], [0], [-1]]),
        torch.tensor([[1]]),
    ],
    ids=["float32", "bfloat16", "bool", "complex", "one dimension", "three dimensions", "too many", "too few"],
)
def test_a_tensor_of_another_form_is_refused(plan: Tensor) -> None:
    named = [str(plan.dtype), str(list(plan.shape)), "give whole numbers [2, d]"]
    with pytest.raises(ValueError, match=refusal(*named)):
        check_plan(plan, 2)


def test_a_list_for_a_plan_is_refused() -> None:
    plan: Any = [[1], [0]]
    with pytest.raises(ValueError, match=refusal("plan", "list", "tensor")):
        check_plan(plan, 2)


@pytest.mark.parametrize("shape", [(2,), (1, 3), (3, 3), (2, 3, 1)])
def test_document_ids_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    plan_Rd = torch.tensor([[1], [-1]])
    with pytest.raises(ValueError, match=refusal("document_ids", str(list(shape)), "[2, L]")):
        check_plan(plan_Rd, 2, torch.zeros(shape, dtype=torch.long))
