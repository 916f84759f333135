"""Every test runs both ways of doing a part on CPU: with torch's fused kernel, and with the formula written out.

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size, C hidden
size.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model import attention, cross_batch
from fot_model.cross_batch import (
    CONTEXTS_AT_ONCE,
    cross_batch_attention,
    flex_cross_batch,
    merged_cross_batch,
    same_document,
)
from fot_model.plan import pad_plan

CONFORMANCE = Path(__file__).parent / "conformance"
SETS = ["cross_batch_range2_pack1", "cross_batch_range3_pack4_stepping", "cross_batch_range6_pack4_stepping"]
SCALE = 0.7
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True, scope="module", params=["fused kernel", "written out"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "written out":
            patch.setattr(attention, "_fused", lambda _q_BHLD: False)
        yield request.param


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


def random_tensors(
    seed: int, R: int, H: int, Hk: int, L: int, D: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Queries, local keys, local values, far keys, far values."""
    generator = torch.Generator().manual_seed(seed)
    heads = (H, Hk, Hk, Hk, Hk)
    return [torch.randn(R, n, L, D, generator=generator, dtype=dtype).requires_grad_() for n in heads]


def detached(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(x.dtype if dtype is None else dtype, copy=True) for x in tensors]


def gradients(out: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, tensors, grad, materialize_grads=True))


class Case:
    """A batch of 1 to 4 rows; which others each sees, in any order, with holes (-1) anywhere; perhaps documents."""

    def __init__(self, draw: st.DrawFn) -> None:
        R, width = draw(st.integers(1, 4)), draw(st.integers(0, 4))
        self.plan = []
        for row in range(R):
            others = [other for other in range(R) if other != row]
            seen = draw(st.permutations(others))[: draw(st.integers(0, min(width, len(others))))]
            self.plan.append(draw(st.permutations(seen + [-1] * (width - len(seen)))))
        self.Hk, self.G, self.L = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
        ids = st.lists(st.integers(0, 2), min_size=self.L, max_size=self.L)
        self.documents = draw(st.none() | st.lists(ids, min_size=R, max_size=R))
        self.local, self.seed = draw(st.booleans()), draw(seeds)

    def __repr__(self) -> str:
        return f"Case({vars(self)})"

    def tensors(self, D: int) -> list[Tensor]:
        return random_tensors(self.seed, len(self.plan), self.Hk * self.G, self.Hk, self.L, D)

    def how(self) -> tuple[Tensor, float, Tensor | None, bool]:
        documents_RL = None if self.documents is None else torch.tensor(self.documents)
        return torch.tensor(self.plan, dtype=torch.long), SCALE, documents_RL, self.local

    def naive(self, tensors: list[Tensor]) -> Tensor:
        return naive_attention(*tensors, self.plan, self.documents, self.local)


cases = st.composite(Case)()


@given(case=cases)
@settings(deadline=None, max_examples=60)
def test_attention_and_its_gradients_are_a_softmax_over_the_keys_each_query_may_see(case: Case) -> None:
    tensors = case.tensors(D=2)
    out_RHLD, expected_RHLD = cross_batch_attention(*tensors, *case.how()), case.naive(tensors)
    torch.testing.assert_close(out_RHLD, expected_RHLD)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    expected_RHLD = expected_RHLD + 0 * sum(x.sum() for x in tensors)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@given(case=cases, frozen=st.sets(st.integers(0, 4), min_size=1))
@settings(deadline=None, max_examples=30)
def test_frozen_inputs_get_no_gradient_and_the_others_get_theirs(case: Case, frozen: set[int]) -> None:
    tensors = case.tensors(D=2)
    for at in frozen:
        tensors[at].requires_grad_(False)
    trained = [x for x in tensors if x.requires_grad]
    out_RHLD = cross_batch_attention(*tensors, *case.how())
    assert out_RHLD.requires_grad == bool(trained)
    if trained:
        expected_RHLD = case.naive(tensors) + 0 * sum(x.sum() for x in trained)
        ones_RHLD = torch.ones_like(out_RHLD)
        torch.testing.assert_close(
            gradients(out_RHLD, trained, ones_RHLD), gradients(expected_RHLD, trained, ones_RHLD)
        )


@pytest.mark.parametrize("local", [True, False])
def test_the_gradient_is_that_of_finite_differences(local: bool) -> None:
    plan_Rd, documents_RL = torch.tensor([[1, 2], [-1, 0], [-1, -1]]), torch.tensor([[0, 0], [0, 1], [2, 2]])
    tensors = random_tensors(0, 3, 2, 1, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: cross_batch_attention(*x, plan_Rd, SCALE, documents_RL, local), tensors)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(case=cases)
@settings(deadline=None, max_examples=25)
def test_flex_attention_gives_what_the_parts_give(case: Case) -> None:
    tensors = detached(case.tensors(D=4), torch.float32)
    torch.testing.assert_close(
        flex_cross_batch(*tensors, *case.how()), merged_cross_batch(*tensors, *case.how()), rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_several_blocks_gives_what_the_parts_give() -> None:
    tensors = detached(random_tensors(0, 5, 4, 2, 60, 8, torch.float32))  # 300 tokens, blocks of 128
    plan_Rd = torch.tensor([[4, 1], [-1, -1], [0, -1], [-1, 2], [3, 0]])
    documents_RL = torch.arange(60).expand(5, -1) // 23
    for documents, local, mine in product((None, documents_RL), (True, False), (slice(None), slice(1, 4))):
        tensors_of_rows = [x[mine] for x in tensors[:3]] + tensors[3:]
        how = (plan_Rd[mine], SCALE, None if documents is None else documents[mine], local)
        torch.testing.assert_close(
            flex_cross_batch(*tensors_of_rows, *how), merged_cross_batch(*tensors_of_rows, *how), rtol=0, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("local", "joined"), [(True, True), (False, False)])
def test_flex_attention_gives_the_gradients_that_the_parts_give(
    local: bool, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA devices, by torch's dense reference, which differentiates on CPU, too, but for a check."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    tensors = random_tensors(0, 5, 4, 2, 60, 8, torch.float32)  # 300 tokens, blocks of 128
    own = [x[1:4].detach().requires_grad_() for x in tensors[:3]] + tensors[3:]
    plan_Rd = torch.tensor([[0, 4], [-1, -1], [1, 0]])
    how = (plan_Rd, SCALE, torch.arange(60).expand(3, -1) // 23 if joined else None, local)
    found = []
    for attend in (flex_cross_batch, merged_cross_batch):
        out_RHLD = attend(*own, *how)
        grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1))
        found.append(gradients(out_RHLD, own, grad_RHLD))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(case=cases, more=st.integers(0, 3), data=st.data())
@settings(deadline=None, max_examples=30)
def test_there_may_be_more_additional_contexts_than_rows(case: Case, more: int, data: Any) -> None:
    """As on a rank that holds a part of the rows: all rows' far keys and values, the queries of some."""
    rows = len(case.plan)
    first = data.draw(st.integers(0, rows - 1))
    mine = slice(first, data.draw(st.integers(first + 1, rows)))
    plan_Rd, scale, documents_RL, local = case.how()
    tensors = detached(case.tensors(D=4), torch.float32)
    expected_RHLD = merged_cross_batch(*tensors, plan_Rd, scale, documents_RL, local)[mine]
    own = [x[mine] for x in tensors[:3]]
    far = [torch.cat([x, torch.full((more, *x.shape[1:]), 9.0)]) for x in tensors[3:]]
    how = (plan_Rd[mine], scale, None if documents_RL is None else documents_RL[mine], local)
    for attend in (merged_cross_batch, flex_cross_batch):
        torch.testing.assert_close(attend(*own, *far, *how), expected_RHLD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [[[], [], []], [[-1, -1]] * 3])
def test_without_additional_contexts_it_is_causal_attention(plan: list[list[int]]) -> None:
    tensors = random_tensors(0, 3, 2, 2, 5, 4)
    out_RHLD = cross_batch_attention(*tensors, pad_plan(plan), SCALE)
    causal_RHLD = functional.scaled_dot_product_attention(*tensors[:3], is_causal=True, scale=SCALE)
    torch.testing.assert_close(out_RHLD, causal_RHLD)


def test_padding_is_not_attended() -> None:
    q_RHLD, *others = detached(random_tensors(0, 3, 2, 2, 4, 4))
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


def test_gradient_flows_to_the_additional_contexts_and_to_no_others() -> None:
    tensors = random_tensors(0, 4, 2, 2, 3, 4)
    plan_Rd = torch.tensor([[2, 1], [-1, -1], [-1, -1], [0, -1]])
    cross_batch_attention(*tensors, plan_Rd, SCALE)[0].pow(2).sum().backward()
    for x_RHLD, reached in zip(tensors, ([0], [0], [0], [1, 2], [1, 2]), strict=True):
        flows_RL = (x_RHLD.grad != 0).any(3).any(1)
        assert flows_RL.any(1).nonzero().flatten().tolist() == reached
        assert flows_RL[reached].all(), "a token got no gradient"


def test_the_first_query_sees_an_additional_context_to_its_end_but_of_its_own_only_itself() -> None:
    tensors = random_tensors(0, 2, 1, 1, 4, 2)
    cross_batch_attention(*tensors, torch.tensor([[1], [-1]]), SCALE)[0, 0, 0].sum().backward()
    assert (tensors[2].grad[:, 0, :, 0] != 0).tolist() == [[True, False, False, False], [False] * 4]
    assert (tensors[4].grad[:, 0, :, 0] != 0).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("undifferentiated", ["keys", "values", "both"])
def test_detached_additional_contexts_get_no_gradient_though_queries_attend_to_them(undifferentiated: str) -> None:
    q_RHLD, k_RHLD, v_RHLD, *_ = tensors = random_tensors(0, 3, 2, 1, 3, 2)[:3]
    plan = [[1, 2], [0, -1], [-1, -1]]
    far_k_RHLD = k_RHLD.detach() if undifferentiated in ("keys", "both") else k_RHLD
    far_v_RHLD = v_RHLD.detach() if undifferentiated in ("values", "both") else v_RHLD
    inputs = (q_RHLD, k_RHLD, v_RHLD, far_k_RHLD, far_v_RHLD)
    out_RHLD, expected_RHLD = cross_batch_attention(*inputs, torch.tensor(plan), SCALE), naive_attention(*inputs, plan)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@pytest.mark.parametrize("documents", [None, [[0, 0, 1]] * 3])
def test_without_local_context_rows_that_see_nothing_give_zeros_and_no_gradient(documents: Any) -> None:
    tensors = random_tensors(0, 3, 2, 1, 3, 4)
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


def test_local_attention_stays_inside_each_document_and_additional_contexts_are_seen_whole() -> None:
    tensors = random_tensors(0, 2, 1, 1, 4, 2)
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
def test_more_contexts_than_are_attended_at_once_are_one_softmax(local: bool) -> None:
    R = 19
    assert 2 * CONTEXTS_AT_ONCE < R - 1
    plan = [[other for other in range(R) if other != row] if row % 5 == 0 else [-1] * (R - 1) for row in range(R)]
    tensors = random_tensors(0, R, 2, 1, 2, 2)
    out_RHLD = cross_batch_attention(*tensors, torch.tensor(plan), SCALE, local=local)
    expected_RHLD = naive_attention(*tensors, plan, local=local)
    torch.testing.assert_close(out_RHLD, expected_RHLD)
    grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_RHLD = expected_RHLD + 0 * sum(x.sum() for x in tensors)
    torch.testing.assert_close(gradients(out_RHLD, tensors, grad_RHLD), gradients(expected_RHLD, tensors, grad_RHLD))


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_the_result_does_not_depend_on_how_many_contexts_are_attended_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(0, 6, 4, 2, 3, 2)
    plan_Rd = pad_plan([[other for other in range(6) if other != row][row % 3 :] for row in range(6)])
    results = []
    for size in (CONTEXTS_AT_ONCE, at_once):
        monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", size)
        out_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE)
        results.append([out_RHLD, *gradients(out_RHLD, tensors, torch.ones_like(out_RHLD))])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attend", [merged_cross_batch, flex_cross_batch])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_a_plan_may_be_of_any_whole_numbers(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    tensors, plan_Rd = detached(random_tensors(0, 3, 2, 2, 3, 4)), torch.tensor([[1, 2], [-1, 0], [-1, -1]])
    expected_RHLD = attend(*tensors, plan_Rd, SCALE, None, True)
    assert attend(*tensors, plan_Rd.to(dtype), SCALE, None, True).equal(expected_RHLD)


def test_the_layout_of_tensors_does_not_matter_and_they_are_left_as_they_were() -> None:
    tensors = random_tensors(0, 3, 4, 2, 5, 4)
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


def test_inference_mode_gives_the_same() -> None:
    tensors, plan_Rd = random_tensors(0, 3, 2, 2, 3, 4), torch.tensor([[1, 2], [-1, 0], [-1, -1]])
    with torch.inference_mode():
        out_RHLD = cross_batch_attention(*tensors, plan_Rd, SCALE)
    torch.testing.assert_close(out_RHLD, cross_batch_attention(*tensors, plan_Rd, SCALE).detach(), rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    tensors = random_tensors(0, 2, 1, 1, 2, 2)
    out_RHLD = cross_batch_attention(*tensors, torch.tensor([[1], [-1]]), SCALE)
    first = torch.autograd.grad(out_RHLD.pow(2).sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def relative_errors(tensors: list[Tensor], plan_Rd: Tensor, grad_RHLD: Tensor, dtype: torch.dtype) -> list[float]:
    """Of output and gradients in the dtype, against float32 on the same numbers."""
    rounded, results = [*detached(tensors, dtype), grad_RHLD.to(dtype)], []
    for kind in (dtype, torch.float32):
        *inputs, grad = (x.to(kind, copy=True) for x in rounded)
        leaves = [x.requires_grad_() for x in inputs]
        out_RHLD = cross_batch_attention(*leaves, plan_Rd, rounded[0].shape[3] ** -0.5)
        results.append([out_RHLD.detach(), *gradients(out_RHLD, leaves, grad)])
        assert all(x.dtype == kind for x in results[-1])
    return [((x.float() - exact).norm() / exact.norm()).item() for x, exact in zip(*results, strict=True)]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_close_to_float32(dtype: torch.dtype, rounding: float) -> None:
    tensors = random_tensors(0, 4, 4, 2, 32, 16, torch.float32)
    plan_Rd = torch.tensor([[1, 2, 3], [0, -1, 2], [-1, -1, -1], [0, 1, -1]])
    errors = relative_errors(tensors, plan_Rd, detached(random_tensors(1, 4, 4, 2, 32, 16))[0], dtype)
    assert max(errors) < 2 * rounding


@pytest.mark.parametrize("alike", [False, True])
def test_many_contexts_in_bfloat16_lose_no_precision(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", 2)
    R = 64
    tensors, grad_RHLD = random_tensors(0, R, 1, 1, 4, 8, torch.float32), random_tensors(1, R, 1, 1, 4, 8)[0].detach()
    tensors[0] = tensors[0] / 4  # scores small enough that their own rounding does not matter
    if alike:  # every row's share of a gradient is the same, so sums only grow
        tensors, grad_RHLD = [x[:1].expand_as(x) for x in tensors], grad_RHLD[:1].expand_as(grad_RHLD)
    everyone_Rd = torch.tensor([[other for other in range(R) if other != row] for row in range(R)])
    errors = relative_errors(tensors, everyone_Rd, grad_RHLD, torch.bfloat16)
    what = ("output", "queries", "keys", "values", "far keys", "far values")
    assert not {name: error for name, error in zip(what, errors, strict=True) if error > 1.5 * 2**-8}


class TinyAttention(torch.nn.Module):
    """Hidden states [R, L, C] to a number, by projections and CrossBatch."""

    H, Hk, D = 4, 2, 8

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        C, sizes = 16, {"q": self.H * self.D, "k": self.Hk * self.D, "v": self.Hk * self.D}
        for name, size in sizes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(size, C, generator=generator) / 4))
        self.hidden_RLC = torch.randn(4, 6, C, generator=generator)
        self.plan_Rd = torch.tensor([[1, 2, 3], [0, -1, 2], [-1, -1, -1], [0, 1, -1]])

    def forward(self, hidden_RLC: Tensor, plan_Rd: Tensor) -> Tensor:
        R, L, _ = hidden_RLC.shape
        q, k, v = (functional.linear(hidden_RLC, weight).view(R, L, -1, self.D) for weight in (self.q, self.k, self.v))
        q_RHLD, k_RHkLD, v_RHkLD = (x.transpose(1, 2) for x in (q, k, v))
        turned_k_RHkLD = k_RHkLD * torch.linspace(0.5, 1.5, L, dtype=k_RHkLD.dtype)[:, None]
        out_RHLD = cross_batch_attention(q_RHLD, turned_k_RHkLD, v_RHkLD, k_RHkLD, v_RHkLD, plan_Rd, SCALE)
        assert out_RHLD.dtype == v_RHkLD.dtype
        return out_RHLD.transpose(1, 2).float().sin().sum()

    def loss_and_gradients(self, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
        hidden_RLC = self.hidden_RLC.clone().requires_grad_()
        loss = (self if run is None else run)(hidden_RLC, self.plan_Rd)
        found = torch.autograd.grad(loss, [hidden_RLC, *self.parameters()])
        return [loss.detach(), *found]


def test_under_autocast_it_computes_in_bfloat16_and_gradients_reach_float32_weights() -> None:
    tiny = TinyAttention()
    exact = tiny.loss_and_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny.loss_and_gradients()
    for mine, reference in zip(found[1:], exact[1:], strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - reference).norm() < 0.02 * reference.norm()


def test_compiled_once_it_gives_the_same_output_and_gradients_for_any_plan() -> None:
    torch._dynamo.reset()
    tiny, backend, graphs = TinyAttention(), CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(tiny, backend=backend)
    for plan in (tiny.plan_Rd.tolist(), [[3, 2, 1], [2, 3, -1], [-1, 0, -1], [-1, -1, -1]], [[-1, -1, -1]] * 4):
        tiny.plan_Rd = torch.tensor(plan)
        torch.testing.assert_close(tiny.loss_and_gradients(compiled), tiny.loss_and_gradients(), rtol=0, atol=1e-5)
        graphs.append(backend.frame_count)
    assert graphs == graphs[:1] * 3 != [0, 0, 0]
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_gives_the_same_output_and_gradients(reentrant: bool) -> None:
    tiny = TinyAttention()
    hidden_RLC = tiny.hidden_RLC.clone().requires_grad_()
    checkpoint(tiny, hidden_RLC, tiny.plan_Rd, use_reentrant=reentrant).backward()
    found = [hidden_RLC.grad, *(weight.grad for weight in tiny.parameters())]
    torch.testing.assert_close(found, tiny.loss_and_gradients()[1:], rtol=0, atol=1e-5)


class Memory(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the most elements alive at once, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not func.is_view:
            self.largest = max([self.largest, *(x.numel() for x in made)])
        self._made = [ref for ref in self._made if ref() is not None] + [weakref.ref(x) for x in made]
        alive = [x for ref in self._made if (x := ref()) is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def measured(d: int, local: bool, R: int, L: int, D: int) -> Memory:
    """Forward and backward with d additional contexts for each row."""
    tensors = random_tensors(0, R, 1, 1, L, D, torch.float32)
    plan_Rd = (torch.arange(R)[:, None] + torch.arange(1, d + 1)) % R
    grad_RHLD = torch.ones_like(tensors[0])
    with Memory() as memory:
        torch.autograd.grad(cross_batch_attention(*tensors, plan_Rd, SCALE, local=local), tensors, grad_RHLD)
    return memory


@pytest.fixture
def four_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", 4)


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("local", [True, False])
def test_memory_of_a_step_does_not_grow_with_the_number_of_additional_contexts(local: bool) -> None:
    few, many = (measured(d, local, R=24, L=16, D=2) for d in (4, 20))
    assert few.largest == many.largest > 0
    assert few.peak == many.peak > 0


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("local", [True, False])
def test_no_tensor_is_larger_than_an_input_where_the_kernel_is_fused_nor_than_scores_of_a_part(
    local: bool, way: str
) -> None:
    R, L, D = 24, 64, 2
    part_scores, local_scores = 4 * L * L, R * L * L * local
    largest = {"fused kernel": R * L * D, "written out": max(part_scores, local_scores)}[way]
    assert measured(20, local, R, L, D).largest == largest


def test_what_is_saved_for_the_backward_pass_does_not_grow_with_the_number_of_additional_contexts() -> None:
    R, H, Hk, L, D = 24, 2, 1, 4, 2
    saved, tensors = [], random_tensors(0, R, H, Hk, L, D)
    for d in (1, 8, 23):
        plan_Rd, elements = (torch.arange(R)[:, None] + torch.arange(1, d + 1)) % R, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, e=elements: (e.append(x.numel()), x)[1], lambda x: x):
            cross_batch_attention(*tensors, plan_Rd, SCALE)
        saved.append(sum(elements))
    queries_and_output, keys_and_values, lse = 2 * R * H * L * D, 4 * R * Hk * L * D, R * H * L
    assert saved == [queries_and_output + keys_and_values + lse] * 3
