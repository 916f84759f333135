"""One softmax over the local context and what the plan names, against a softmax a query.

Every test runs both ways of doing a part on CPU (`way`).

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size.
"""

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model import cross_batch
from fot_model.cross_batch import CONTEXTS_AT_ONCE, cross_batch_attention, merged_cross_batch, same_document
from fot_model.plan import pad_plan

SCALE = 0.7  # that of the cases drawn, too
SETS = ["cross_batch_range2_pack1", "cross_batch_range3_pack4_stepping", "cross_batch_range6_pack4_stepping"]

pytestmark = pytest.mark.usefixtures("way")


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, L, D], half-split."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles_LD = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles_LD.cos().float()[None], angles_LD.sin().float()[None]


@pytest.mark.parametrize("name", SETS)
def test_output_and_gradients_are_those_of_the_reference_implementation(conformance, name: str) -> None:
    data = np.load(conformance / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    q_RHLD, k_RHLD, v_RHLD = (
        torch.from_numpy(data[what]).transpose(1, 2).requires_grad_() for what in ("query", "key", "value")
    )
    D = q_RHLD.shape[-1]
    cos, sin = rope_tables(q_RHLD.shape[2], D, meta["rope_theta"])
    rotated_q_RHLD, rotated_k_RHLD = apply_rotary_pos_emb(q_RHLD, k_RHLD, cos, sin)
    plan_Rd = pad_plan(meta["additional_rows"])

    out_RHLD = cross_batch_attention(rotated_q_RHLD, rotated_k_RHLD, v_RHLD, k_RHLD, v_RHLD, plan_Rd, D**-0.5)
    out_RHLD.backward(torch.from_numpy(data["grad_output"]).transpose(1, 2))

    got = {"output": out_RHLD, "grad_query": q_RHLD.grad, "grad_key": k_RHLD.grad, "grad_value": v_RHLD.grad}
    for what, tensor in got.items():
        torch.testing.assert_close(tensor.transpose(1, 2).detach(), torch.from_numpy(data[what]), rtol=0, atol=1e-5)


def naive_attention(
    q_RHLD: Tensor,
    k_RHkLD: Tensor,
    v_RHkLD: Tensor,
    far_k_RHkLD: Tensor,
    far_v_RHkLD: Tensor,
    plan: list[list[int]],
    documents: list[list[int]] | None = None,
    local: bool = True,
) -> Tensor:
    """A softmax a query, over an explicit list of the keys it may see; zeros where there are none."""
    R, H, L, _ = q_RHLD.shape
    out = []
    for row, head, at in product(range(R), range(H), range(L)):
        q_D, of_keys = q_RHLD[row, head, at], head // (H // k_RHkLD.shape[1])
        keys, values = [], []
        for before in range(at + 1 if local else 0):
            if documents is None or documents[row][before] == documents[row][at]:
                keys.append(k_RHkLD[row, of_keys, before])
                values.append(v_RHkLD[row, of_keys, before])
        for other in plan[row]:
            if other != -1:
                keys += far_k_RHkLD[other, of_keys]
                values += far_v_RHkLD[other, of_keys]
        if keys:
            weights = torch.stack([q_D @ key * SCALE for key in keys]).exp()
            out.append((weights[:, None] * torch.stack(values)).sum(0) / weights.sum())
        else:
            out.append(torch.zeros_like(q_D))
    return torch.stack(out).view_as(q_RHLD)


def detached(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(x.dtype if dtype is None else dtype, copy=True) for x in tensors]


def gradients(out: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, tensors, grad, materialize_grads=True))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_attention_and_its_gradients_are_a_softmax_over_the_keys_each_query_may_see(
    cross_batch_cases, data: Any
) -> None:
    case = data.draw(cross_batch_cases)
    tensors = case.tensors(D=2)
    out_RHLD = cross_batch_attention(*tensors, *case.how())
    expected_RHLD = naive_attention(*tensors, case.plan, case.documents, case.local)
    torch.testing.assert_close(out_RHLD, expected_RHLD)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    expected_RHLD = expected_RHLD + 0 * sum(x.sum() for x in tensors)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@given(frozen=st.sets(st.integers(0, 4), min_size=1), data=st.data())
@settings(deadline=None, max_examples=30)
def test_frozen_inputs_get_no_gradient_and_the_others_get_theirs(
    cross_batch_cases, frozen: set[int], data: Any
) -> None:
    case = data.draw(cross_batch_cases)
    tensors = case.tensors(D=2)
    for at in frozen:
        tensors[at].requires_grad_(False)
    trained = [x for x in tensors if x.requires_grad]
    out_RHLD = cross_batch_attention(*tensors, *case.how())
    assert out_RHLD.requires_grad == bool(trained)
    if trained:
        expected_RHLD = naive_attention(*tensors, case.plan, case.documents, case.local)
        expected_RHLD = expected_RHLD + 0 * sum(x.sum() for x in trained)
        ones_RHLD = torch.ones_like(out_RHLD)
        torch.testing.assert_close(
            gradients(out_RHLD, trained, ones_RHLD), gradients(expected_RHLD, trained, ones_RHLD)
        )


@pytest.mark.parametrize("local", [True, False])
def test_the_gradient_is_that_of_finite_differences(cross_batch_tensors, local: bool) -> None:
    plan_Rd, documents_RL = torch.tensor([[1, 2], [-1, 0], [-1, -1]]), torch.tensor([[0, 0], [0, 1], [2, 2]])
    tensors = cross_batch_tensors(0, 3, 2, 1, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: cross_batch_attention(*x, plan_Rd, SCALE, documents_RL, local), tensors)


@given(more=st.integers(0, 3), data=st.data())
@settings(deadline=None, max_examples=30)
def test_there_may_be_more_additional_contexts_than_rows(cross_batch_cases, more: int, data: Any) -> None:
    """As on a rank that holds a part of the rows: all rows' far keys and values, the queries of some."""
    case = data.draw(cross_batch_cases)
    first = data.draw(st.integers(0, len(case.plan) - 1))
    mine = slice(first, data.draw(st.integers(first + 1, len(case.plan))))
    plan_Rd, scale, documents_RL, local = case.how()
    tensors = detached(case.tensors(D=4), torch.float32)
    expected_RHLD = merged_cross_batch(*tensors, plan_Rd, scale, documents_RL, local)[mine]
    own = [x[mine] for x in tensors[:3]]
    far = [torch.cat([x, torch.full((more, *x.shape[1:]), 9.0)]) for x in tensors[3:]]
    how = (plan_Rd[mine], scale, None if documents_RL is None else documents_RL[mine], local)
    torch.testing.assert_close(merged_cross_batch(*own, *far, *how), expected_RHLD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [[[], [], []], [[-1, -1]] * 3])
def test_without_additional_contexts_it_is_causal_attention(cross_batch_tensors, plan: list[list[int]]) -> None:
    tensors = cross_batch_tensors(0, 3, 2, 2, 5, 4)
    out_RHLD = cross_batch_attention(*tensors, pad_plan(plan), SCALE)
    causal_RHLD = functional.scaled_dot_product_attention(*tensors[:3], is_causal=True, scale=SCALE)
    torch.testing.assert_close(out_RHLD, causal_RHLD)


def test_padding_is_not_attended(cross_batch_tensors) -> None:
    q_RHLD, *others = detached(cross_batch_tensors(0, 3, 2, 2, 4, 4))
    plan_Rd = torch.tensor([[1, 2], [2, -1], [-1, -1]])
    before_RHLD = cross_batch_attention(q_RHLD, *others, plan_Rd, SCALE)
    for x_RHLD in others:
        x_RHLD[0] += 100  # the row that a clamped -1 would be taken for
    after_RHLD = cross_batch_attention(q_RHLD, *others, plan_Rd, SCALE)
    torch.testing.assert_close(after_RHLD[1:], before_RHLD[1:], rtol=0, atol=0)
    for x_RHLD in others:
        x_RHLD[2] += 100  # the row that a wrapped -1 would be taken for
    seen_RHLD = cross_batch_attention(q_RHLD, *others, plan_Rd, SCALE)
    assert not torch.allclose(seen_RHLD[1], before_RHLD[1])


def test_gradient_flows_to_the_additional_contexts_and_to_no_others(cross_batch_tensors) -> None:
    tensors = cross_batch_tensors(0, 4, 2, 2, 3, 4)
    plan_Rd = torch.tensor([[2, 1], [-1, -1], [-1, -1], [0, -1]])
    cross_batch_attention(*tensors, plan_Rd, SCALE)[0].pow(2).sum().backward()
    for x_RHLD, reached in zip(tensors, ([0], [0], [0], [1, 2], [1, 2]), strict=True):
        flows_RL = (x_RHLD.grad != 0).any(3).any(1)
        assert flows_RL.any(1).nonzero().flatten().tolist() == reached
        assert flows_RL[reached].all(), "a token got no gradient"


def test_the_first_query_sees_an_additional_context_to_its_end_but_of_its_own_only_itself(cross_batch_tensors) -> None:
    tensors = cross_batch_tensors(0, 2, 1, 1, 4, 2)
    cross_batch_attention(*tensors, torch.tensor([[1], [-1]]), SCALE)[0, 0, 0].sum().backward()
    assert (tensors[2].grad[:, 0, :, 0] != 0).tolist() == [[True, False, False, False], [False] * 4]
    assert (tensors[4].grad[:, 0, :, 0] != 0).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("undifferentiated", ["keys", "values", "both"])
def test_detached_additional_contexts_get_no_gradient_though_queries_attend_to_them(
    cross_batch_tensors, undifferentiated: str
) -> None:
    q_RHLD, k_RHLD, v_RHLD, *_ = tensors = cross_batch_tensors(0, 3, 2, 1, 3, 2)[:3]
    plan = [[1, 2], [0, -1], [-1, -1]]
    far_k_RHLD = k_RHLD.detach() if undifferentiated in ("keys", "both") else k_RHLD
    far_v_RHLD = v_RHLD.detach() if undifferentiated in ("values", "both") else v_RHLD
    inputs = (q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, far_v_RHLD)
    out_RHLD, expected_RHLD = cross_batch_attention(*inputs, torch.tensor(plan), SCALE), naive_attention(*inputs, plan)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@pytest.mark.parametrize("documents", [None, [[0, 0, 1]] * 3])
def test_without_local_context_rows_that_see_nothing_give_zeros_and_no_gradient(
    cross_batch_tensors, documents: Any
) -> None:
    tensors = cross_batch_tensors(0, 3, 2, 1, 3, 4)
    documents_RL = None if documents is None else torch.tensor(documents)
    for plan_Rd in (torch.tensor([[1], [-1], [-1]]), torch.full((3, 2), -1), torch.empty(3, 0, dtype=torch.long)):
        out_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE, documents_RL, local=False)
        sees_R = (plan_Rd >= 0).any(1)
        assert out_RHLD[~sees_R].eq(0).all()
        assert out_RHLD[sees_R].ne(0).all()
        of_q, of_k, of_v, of_far_k, of_far_v = gradients(out_RHLD, tensors, torch.ones_like(out_RHLD))
        assert all(x.isfinite().all() for x in (of_q, of_far_k, of_far_v))
        assert not of_q[~sees_R].any()
        assert not of_k.any()
        assert not of_v.any()


def test_local_attention_stays_inside_each_document_and_additional_contexts_are_seen_whole(cross_batch_tensors) -> None:
    tensors = cross_batch_tensors(0, 2, 1, 1, 4, 2)
    documents_RL = torch.tensor([[5, 5, 8, 8], [1, 2, 3, 4]])
    reached = []
    for at in range(4):
        out_RHLD = cross_batch_attention(*tensors, torch.tensor([[1], [-1]]), SCALE, documents_RL)
        of_k, of_far_k = gradients(out_RHLD[0, 0, at].sum(), [tensors[1], tensors[3]], torch.ones(()).double())
        reached.append((of_k != 0)[0, 0, :, 0].nonzero().flatten().tolist())
        assert (of_far_k != 0)[1].all()
    assert reached == [[0], [0, 1], [2], [2, 3]]


def test_same_document_compares_every_query_with_every_key_of_its_row() -> None:
    same_R1LL = same_document(torch.tensor([[7, 7, -3], [4, 5, 4]]))
    assert same_R1LL.dtype == torch.bool
    assert same_R1LL[:, 0].int().tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 1], [0, 1, 0], [1, 0, 1]]]


@pytest.mark.parametrize("local", [True, False])
def test_more_contexts_than_are_attended_at_once_are_one_softmax(cross_batch_tensors, local: bool) -> None:
    R = 19
    assert 2 * CONTEXTS_AT_ONCE < R - 1
    plan = [[other for other in range(R) if other != row] if row % 5 == 0 else [-1] * (R - 1) for row in range(R)]
    tensors = cross_batch_tensors(0, R, 2, 1, 2, 2)
    out_RHLD = cross_batch_attention(*tensors, torch.tensor(plan), SCALE, local=local)
    expected_RHLD = naive_attention(*tensors, plan, local=local)
    torch.testing.assert_close(out_RHLD, expected_RHLD)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_RHLD = expected_RHLD + 0 * sum(x.sum() for x in tensors)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_the_result_does_not_depend_on_how_many_contexts_are_attended_at_once(
    cross_batch_tensors, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = cross_batch_tensors(0, 6, 4, 2, 3, 2)
    plan_Rd = pad_plan([[other for other in range(6) if other != row][row % 3 :] for row in range(6)])
    results = []
    for size in (CONTEXTS_AT_ONCE, at_once):
        monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", size)
        out_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE)
        results.append([out_RHLD, *gradients(out_RHLD, tensors, torch.ones_like(out_RHLD))])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_a_plan_may_be_of_any_whole_numbers(cross_batch_tensors, dtype: torch.dtype) -> None:
    tensors, plan_Rd = detached(cross_batch_tensors(0, 3, 2, 2, 3, 4)), torch.tensor([[1, 2], [-1, 0], [-1, -1]])
    expected_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE)
    assert cross_batch_attention(*tensors, plan_Rd.to(dtype), SCALE).equal(expected_RHLD)


def test_the_layout_of_tensors_does_not_matter_and_they_are_left_as_they_were(cross_batch_tensors) -> None:
    tensors = cross_batch_tensors(0, 3, 4, 2, 5, 4)
    before = detached(tensors)
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in before]
    plan_Rd, documents_RL = torch.tensor([[1, 2], [2, -1], [-1, -1]]), torch.tensor([[0, 0, 1, 1, 1]] * 3)
    results = []
    for inputs in (tensors, scattered):
        out_RHLD = cross_batch_attention(*inputs, plan_Rd, SCALE, documents_RL)
        summed = torch.autograd.grad(out_RHLD.transpose(1, 2).sum(), inputs)  # a gradient without strides
        results.append([out_RHLD, *summed])
    torch.testing.assert_close(results[0], results[1])
    assert all(x.equal(y) for x, y in zip(tensors + scattered, before + before, strict=True))
    assert plan_Rd.tolist() == [[1, 2], [2, -1], [-1, -1]]


def test_inference_mode_gives_the_same(cross_batch_tensors) -> None:
    tensors, plan_Rd = cross_batch_tensors(0, 3, 2, 2, 3, 4), torch.tensor([[1, 2], [-1, 0], [-1, -1]])
    with torch.inference_mode():
        out_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE)
    torch.testing.assert_close(out_RHLD, cross_batch_attention(*tensors, plan_Rd, SCALE).detach(), rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused(cross_batch_tensors) -> None:
    tensors = cross_batch_tensors(0, 2, 1, 1, 2, 2)
    out_RHLD = cross_batch_attention(*tensors, torch.tensor([[1], [-1]]), SCALE)
    first = torch.autograd.grad(out_RHLD.pow(2).sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
