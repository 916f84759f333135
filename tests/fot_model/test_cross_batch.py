"""Shapes: R rows, L tokens a context, d additional contexts, H heads, D head size, G document groups."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model.cross_batch import cross_batch_attention, cross_batch_plan, pad_plan

CONFORMANCE = Path(__file__).parent / "conformance"
SETS = ["cross_batch_range2_pack1", "cross_batch_range3_pack4_stepping", "cross_batch_range6_pack4_stepping"]
LONGLLAMA_3B = [(0, 0), (1, 1), (2, 1), (3, 0)]


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, L, D], half-split."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles_LD = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles_LD.cos().float()[None], angles_LD.sin().float()[None]


@pytest.mark.parametrize("name", SETS)
def test_output_and_gradients_are_those_of_the_reference_implementation(name: str) -> None:
    data = np.load(CONFORMANCE / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    q_RHLD, k_RHLD, v_RHLD = (
        torch.from_numpy(data[what]).transpose(1, 2).requires_grad_() for what in ("query", "key", "value")
    )
    head_dim = q_RHLD.shape[-1]
    cos, sin = rope_tables(q_RHLD.shape[2], head_dim, meta["rope_theta"])
    rotated_q_RHLD, rotated_k_RHLD = apply_rotary_pos_emb(q_RHLD, k_RHLD, cos, sin)
    plan_Rd = pad_plan(meta["additional_rows"])

    out_RHLD = cross_batch_attention(rotated_q_RHLD, rotated_k_RHLD, v_RHLD, k_RHLD, plan_Rd, head_dim**-0.5)
    out_RHLD.backward(torch.from_numpy(data["grad_output"]).transpose(1, 2))

    got = {"output": out_RHLD, "grad_query": q_RHLD.grad, "grad_key": k_RHLD.grad, "grad_value": v_RHLD.grad}
    for what, tensor in got.items():
        torch.testing.assert_close(tensor.transpose(1, 2).detach(), torch.from_numpy(data[what]), rtol=0, atol=1e-5)


def naive_attention(
    q_RHLD: Tensor, k_RHLD: Tensor, v_RHLD: Tensor, far_k_RHLD: Tensor, plan: list[list[int]], scale: float
) -> Tensor:
    """A softmax a query, over an explicit list of the keys it may see."""
    R, H, L, _ = q_RHLD.shape
    out = []
    for row, head, at in product(range(R), range(H), range(L)):
        keys, values = list(k_RHLD[row, head, : at + 1]), list(v_RHLD[row, head, : at + 1])
        for other in plan[row]:
            if other != -1:
                keys += list(far_k_RHLD[other, head])
                values += list(v_RHLD[other, head])
        weights = torch.stack([q_RHLD[row, head, at] @ key * scale for key in keys]).exp()
        out.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
    return torch.stack(out).view_as(q_RHLD)


def random_tensors(seed: int, R: int, H: int, L: int, D: int) -> list[Tensor]:
    """Queries, local keys, values, keys without position."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(R, H, L, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]


@st.composite
def row_plans(draw: st.DrawFn) -> list[list[int]]:
    """For 1 to 4 rows: which others each sees, in any order, with holes (-1) anywhere."""
    R = draw(st.integers(1, 4))
    width = draw(st.integers(0, 4))
    plan = []
    for row in range(R):
        others = [other for other in range(R) if other != row]
        seen = draw(st.permutations(others))[: draw(st.integers(0, min(width, len(others))))]
        plan.append(draw(st.permutations(seen + [-1] * (width - len(seen)))))
    return plan


@given(plan=row_plans(), H=st.integers(1, 2), L=st.integers(1, 4), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_attention_and_its_gradients_are_a_softmax_over_the_keys_each_query_may_see(
    plan: list[list[int]], H: int, L: int, seed: int
) -> None:
    plan_Rd = torch.tensor(plan, dtype=torch.long)
    ours, theirs = random_tensors(seed, len(plan), H, L, 2), random_tensors(seed, len(plan), H, L, 2)
    out_RHLD = cross_batch_attention(*ours, plan_Rd, scale=0.7)
    expected_RHLD = naive_attention(*theirs, plan, scale=0.7)
    torch.testing.assert_close(out_RHLD, expected_RHLD)

    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out_RHLD.backward(grad_RHLD)
    expected_RHLD.backward(grad_RHLD)
    for mine, reference in zip(ours, theirs, strict=True):
        none = torch.zeros_like(reference)
        torch.testing.assert_close(
            none if mine.grad is None else mine.grad, none if reference.grad is None else reference.grad
        )


@pytest.mark.parametrize("plan", [[[], [], []], [[-1, -1]] * 3])
def test_without_additional_contexts_it_is_causal_attention(plan: list[list[int]]) -> None:
    q_RHLD, k_RHLD, v_RHLD, far_k_RHLD = random_tensors(0, 3, 2, 5, 4)
    out_RHLD = cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, pad_plan(plan), scale=0.5)
    causal_RHLD = functional.scaled_dot_product_attention(q_RHLD, k_RHLD, v_RHLD, is_causal=True, scale=0.5)
    torch.testing.assert_close(out_RHLD, causal_RHLD)


def test_padding_is_not_attended() -> None:
    q_RHLD, k_RHLD, v_RHLD, far_k_RHLD = (x.detach() for x in random_tensors(0, 3, 2, 4, 4))
    plan_Rd = torch.tensor([[1, 2], [2, -1], [-1, -1]])
    before_RHLD = cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, plan_Rd, scale=0.5)
    for x in (k_RHLD, v_RHLD, far_k_RHLD):
        x[0] += 100  # the row that a clamped or wrapped -1 would be taken for
    after_RHLD = cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, plan_Rd, scale=0.5)
    torch.testing.assert_close(after_RHLD[1:], before_RHLD[1:], rtol=0, atol=0)
    k_RHLD[2] += 100
    v_RHLD[2] += 100
    far_k_RHLD[2] += 100
    seen_RHLD = cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, plan_Rd, scale=0.5)
    assert not torch.allclose(seen_RHLD[1], before_RHLD[1])


def test_gradient_flows_to_the_additional_contexts_and_to_no_others() -> None:
    q_RHLD, k_RHLD, v_RHLD, far_k_RHLD = random_tensors(0, 4, 2, 3, 4)
    plan_Rd = torch.tensor([[2, 1], [-1, -1], [-1, -1], [0, -1]])
    cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, plan_Rd, scale=0.5)[0].pow(2).sum().backward()
    for x_RHLD, reached in ((far_k_RHLD, [1, 2]), (v_RHLD, [0, 1, 2]), (k_RHLD, [0]), (q_RHLD, [0])):
        flows_RL = (x_RHLD.grad != 0).any(3).any(1)
        assert flows_RL.any(1).nonzero().flatten().tolist() == reached
    assert (far_k_RHLD.grad[[1, 2]] != 0).all(), "a token of an additional context got no gradient"


def test_the_first_query_sees_an_additional_context_to_its_end_but_not_its_own() -> None:
    q_RHLD, k_RHLD, v_RHLD, far_k_RHLD = random_tensors(0, 2, 1, 4, 2)
    plan_Rd = torch.tensor([[1], [-1]])
    cross_batch_attention(q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, plan_Rd, scale=0.5)[0, 0, 0].sum().backward()
    assert (v_RHLD.grad[:, 0, :, 0] != 0).tolist() == [[True, False, False, False], [True, True, True, True]]


def test_pad_plan_pads_rows_of_unequal_length_with_minus_one() -> None:
    plan_Rd = pad_plan([[], [0], [1, 0]])
    assert plan_Rd.dtype == torch.long
    assert plan_Rd.tolist() == [[-1, -1], [0, -1], [1, 0]]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_plan_without_additional_contexts_has_width_zero(rows: int) -> None:
    assert pad_plan([[]] * rows).shape == (rows, 0)


def test_a_row_that_sees_itself_is_refused() -> None:
    with pytest.raises(AssertionError, match="row 1 sees itself"):
        pad_plan([[1], [0, 1]])


def test_the_plan_of_longllama_3b_for_two_documents() -> None:
    plan_Rd = cross_batch_plan([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2, [[True, False], [False, True]], LONGLLAMA_3B)
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


class Batch:
    """Groups of consecutive contexts in rows of any order, and what is asked of them."""

    def __init__(self, draw: st.DrawFn) -> None:
        G = draw(st.integers(1, 5))
        self.segments = [
            (draw(st.integers(0, segment)), draw(st.integers(0, 5))) for segment in range(draw(st.integers(1, 4)))
        ]
        contexts = [draw(st.integers(1, len(self.segments))) for _ in range(G)]
        rows = draw(st.permutations([(group, at) for group in range(G) for at in range(contexts[group])]))
        self.group_R = [group for group, _ in rows]
        self.segment_R = [at for _, at in rows]
        self.related_GG = [[False] * G for _ in range(G)]
        for a in range(G):
            self.related_GG[a][a] = draw(st.booleans())
            for b in range(a):
                self.related_GG[a][b] = self.related_GG[b][a] = draw(st.integers(0, 3)) == 0
        self.plan = cross_batch_plan(self.group_R, self.segment_R, self.related_GG, self.segments).tolist()

    def __repr__(self) -> str:
        return (
            f"Batch(group_R={self.group_R}, segment_R={self.segment_R}, related_GG={self.related_GG}, {self.segments})"
        )

    def rows(self) -> list[tuple[int, int, list[int], list[int]]]:
        """(group, segment, positives, negatives) by row."""
        found = []
        for group, at, seen in zip(self.group_R, self.segment_R, self.plan, strict=True):
            positives = self.segments[at][0]
            real = [row for row in seen if row != -1]
            found.append((group, at, real[:positives], real[positives:]))
        return found


batches = st.composite(Batch)


@given(batch=batches())
@settings(deadline=None)
def test_positives_are_the_contexts_right_before_in_the_own_group_nearest_first(batch: Batch) -> None:
    for group, at, positives, _ in batch.rows():
        places = [(batch.group_R[row], batch.segment_R[row]) for row in positives]
        assert places == [(group, at - back) for back in range(1, batch.segments[at][0] + 1)]


@given(batch=batches())
@settings(deadline=None)
def test_negatives_are_never_from_the_own_nor_a_related_group(batch: Batch) -> None:
    for group, _, _, negatives in batch.rows():
        for row in negatives:
            assert batch.group_R[row] != group
            assert not batch.related_GG[group][batch.group_R[row]]


@given(batch=batches())
@settings(deadline=None)
def test_no_row_sees_itself_or_a_later_context_of_its_group_or_a_row_twice(batch: Batch) -> None:
    for row, seen in enumerate(batch.plan):
        real = [other for other in seen if other != -1]
        assert len(set(real)) == len(real)
        assert row not in real
        for other in real:
            assert batch.group_R[other] != batch.group_R[row] or batch.segment_R[other] < batch.segment_R[row]


@given(batch=batches())
@settings(deadline=None)
def test_a_row_gets_as_many_negatives_as_asked_while_there_are_unrelated_rows(batch: Batch) -> None:
    for group, at, _, negatives in batch.rows():
        available = sum(other != group and not batch.related_GG[group][other] for other in batch.group_R)
        assert len(negatives) == min(batch.segments[at][1], available)


@given(batch=batches())
@settings(deadline=None)
def test_padding_comes_last_and_no_wider_than_needed(batch: Batch) -> None:
    lengths = [sum(row != -1 for row in seen) for seen in batch.plan]
    assert all(-1 not in seen[:length] for seen, length in zip(batch.plan, lengths, strict=True))
    assert {len(seen) for seen in batch.plan} == {max(lengths)}


@given(batch=batches())
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


@given(segments=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=4))
@settings(deadline=None)
def test_more_positives_than_contexts_before_are_refused_naming_both(segments: list[tuple[int, int]]) -> None:
    assume(any(positives > at for at, (positives, _) in enumerate(segments)))
    at, asked = next((at, positives) for at, (positives, _) in enumerate(segments) if positives > at)
    with pytest.raises(ValueError, match=f"segment {at} asks for {asked} positives, but only {at} contexts"):
        cross_batch_plan([0] * len(segments), list(range(len(segments))), [[True]], segments)
