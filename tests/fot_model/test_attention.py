"""Every test runs both ways of doing a part on CPU (`way`).

Shapes: B batch, H query heads, Hk key/value heads, G = H / Hk, L queries, M keys, D head size.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fot_model.attention import MASKED, Partial, attend, attend_backward, merge, wide_dtype

SCALE = 0.6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # and their rounding errors
seeds = st.integers(0, 2**32)
exact_dtypes = st.sampled_from(list(TOLERANCE))


pytestmark = pytest.mark.usefixtures("way")


@dataclass
class Part:
    """Keys and values [B, Hk, M, D], and which of them queries see."""

    keys: Tensor
    values: Tensor
    causal: bool
    seen: Tensor | None

    def how(self) -> tuple[float, bool, Tensor | None]:
        return SCALE, self.causal, self.seen

    def attend(self, q_BHLD: Tensor) -> Partial:
        return attend(q_BHLD, self.keys, self.values, *self.how())

    def visible(self, q_BHLD: Tensor) -> Tensor:
        """Bool [B, H, L, M]."""
        B, H, L, _ = q_BHLD.shape
        M = self.keys.shape[2]
        visible = torch.ones(B, H, L, M, dtype=torch.bool)
        for query, key in product(range(L), range(M)):
            visible[:, :, query, key] = not (self.causal and key > query)
        return visible if self.seen is None else visible & self.seen


def naive_attention(q_BHLD: Tensor, *parts: Part) -> Partial:
    """One softmax over the visible keys of all parts, a query head at a time; NaN for a query that sees none."""
    out, lse = [], []
    for head in range(q_BHLD.shape[1]):
        of_keys = head // (q_BHLD.shape[1] // parts[0].keys.shape[1])
        k_BMD = torch.cat([part.keys[:, of_keys] for part in parts], dim=1)
        v_BMD = torch.cat([part.values[:, of_keys] for part in parts], dim=1)
        visible_BLM = torch.cat([part.visible(q_BHLD)[:, head] for part in parts], dim=2)
        scores_BLM = torch.einsum("bld,bmd->blm", q_BHLD[:, head], k_BMD) * SCALE
        scores_BLM = scores_BLM.masked_fill(~visible_BLM, -torch.inf)
        out.append(scores_BLM.softmax(-1) @ v_BMD)
        lse.append(scores_BLM.exp().sum(-1).log())
    return torch.stack(out, 1), torch.stack(lse, 1)


class Inputs:
    """Queries, and parts of keys and values, in float64 or float32. The last part hides no key."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.seed, self.dtype = draw(seeds), draw(exact_dtypes)
        self.generator = torch.Generator().manual_seed(self.seed)
        L, G, B, Hk, D = (
            draw(st.sampled_from(sizes)) for sizes in ([1, 2, 3, 6], [1, 2, 3], [1, 2], [1, 2, 3], [1, 3, 4])
        )
        self.q_BHLD = self.randn(B, Hk * G, L, D)
        masks = draw(st.lists(st.sampled_from(["none", "causal", "seen", "causal and seen"]), max_size=3))
        self.parts = [self.part(draw, Hk, mask) for mask in [*masks, "none"]]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def part(self, draw: st.DrawFn, Hk: int, mask: str) -> Part:
        B, H, L, D = self.q_BHLD.shape
        M = L if "causal" in mask else draw(st.integers(1, 7))
        seen = None
        if "seen" in mask:
            shape = [size if draw(st.booleans()) else 1 for size in (B, H, L, M)]
            seen = torch.rand(shape, generator=self.generator) < draw(st.sampled_from([0.7, 0.3, 0.0]))
        return Part(self.randn(B, Hk, M, D), self.randn(B, Hk, M, D), "causal" in mask, seen)

    def __repr__(self) -> str:
        parts = [
            (list(part.keys.shape), part.causal, None if part.seen is None else part.seen.tolist())
            for part in self.parts
        ]
        return f"Inputs({self.seed}, {self.dtype}, q {list(self.q_BHLD.shape)}, (keys, causal, seen) {parts})"


inputs = st.composite(Inputs)()


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_leaves(inputs: Inputs) -> list[Tensor]:
    return [inputs.q_BHLD, *(x for part in inputs.parts for x in (part.keys, part.values))]


@given(inputs=inputs)
@settings(deadline=None, max_examples=100)
def test_a_part_is_a_softmax_over_the_keys_it_lets_each_query_see(inputs: Inputs) -> None:
    for part in inputs.parts:
        (out_BHLD, lse_BHL), (naive_BHLD, naive_BHL) = part.attend(inputs.q_BHLD), naive_attention(inputs.q_BHLD, part)
        assert out_BHLD.dtype == lse_BHL.dtype == inputs.dtype
        sees_BHL = part.visible(inputs.q_BHLD).any(-1)
        exact = {"rtol": 0, "atol": TOLERANCE[inputs.dtype]}
        torch.testing.assert_close(out_BHLD[sees_BHL], naive_BHLD[sees_BHL], **exact)
        torch.testing.assert_close(lse_BHL[sees_BHL], naive_BHL[sees_BHL], **exact)
        assert out_BHLD.isfinite().all()
        assert (lse_BHL[~sees_BHL] - MASKED).abs().lt(100).all(), "a query that sees nothing has an lse near MASKED"


@pytest.mark.parametrize(("L", "M", "causal"), [(1, 1, False), (1, 600, False), (40, 1, False), (530, 530, True)])
def test_a_part_of_any_length_is_a_softmax(L: int, M: int, causal: bool) -> None:
    q_BHLD, k_BHkMD, v_BHkMD = randn(0, 1, 4, L, 8), randn(1, 1, 2, M, 8), randn(2, 1, 2, M, 8)
    found = attend(q_BHLD, k_BHkMD, v_BHkMD, SCALE, causal)
    k_BHMD, v_BHMD = k_BHkMD.repeat_interleave(2, dim=1), v_BHkMD.repeat_interleave(2, dim=1)
    scores_BHLM = q_BHLD @ k_BHMD.transpose(-1, -2) * SCALE
    if causal:
        scores_BHLM = scores_BHLM.masked_fill(torch.ones(L, M).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found, (scores_BHLM.softmax(-1) @ v_BHMD, scores_BHLM.logsumexp(-1)), rtol=0, atol=1e-5)


@given(inputs=inputs, data=st.data())
@settings(deadline=None, max_examples=100)
def test_parts_merged_in_any_order_are_one_softmax_over_the_union(inputs: Inputs, data: Any) -> None:
    partials = [part.attend(inputs.q_BHLD) for part in inputs.parts]
    while len(partials) > 1:
        a = partials.pop(data.draw(st.integers(0, len(partials) - 1)))
        b = partials.pop(data.draw(st.integers(0, len(partials) - 1)))
        partials.append(merge(a, b))
    expected = naive_attention(inputs.q_BHLD, *inputs.parts)
    torch.testing.assert_close(partials[0], expected, rtol=0, atol=TOLERANCE[inputs.dtype])


def test_a_part_that_hides_all_keys_from_a_query_has_weight_zero_beside_others() -> None:
    q_BHLD, (k_BHkMD, other_k), (v_BHkMD, other_v) = (
        randn(0, 2, 4, 3, 5),
        randn(1, 2, 2, 2, 3, 5),
        randn(2, 2, 2, 2, 3, 5),
    )
    seen_B11M = torch.tensor([[False] * 3, [True] * 3])[:, None, None]
    for causal in (False, True):
        hidden = attend(q_BHLD, k_BHkMD, v_BHkMD, SCALE, causal, seen_B11M)
        other = attend(q_BHLD, other_k, other_v, SCALE)
        for merged in (merge(hidden, other), merge(other, hidden)):
            torch.testing.assert_close(merged[0][0], other[0][0], rtol=0, atol=0)
            torch.testing.assert_close(merged[1][0], other[1][0], rtol=0, atol=0)
            assert not torch.allclose(merged[0][1], other[0][1], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_queries_that_see_no_key_at_all_stay_finite_forward_and_backward(dtype: torch.dtype) -> None:
    q_BHLD, k_BHkMD, v_BHkMD, grad_BHLD = (
        randn(seed, 1, heads, 3, 4).to(dtype) for seed, heads in enumerate((4, 2, 2, 4))
    )
    nothing_111M = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    out_BHLD, lse_BHL = merge(
        *[attend(q_BHLD, k_BHkMD, v_BHkMD, SCALE, causal, nothing_111M) for causal in (False, True)]
    )
    gradients = attend_backward(
        grad_BHLD, q_BHLD, k_BHkMD, v_BHkMD, out_BHLD.to(dtype), lse_BHL, SCALE, seen=nothing_111M
    )
    assert all(x.isfinite().all() for x in (out_BHLD, lse_BHL, *gradients))


@pytest.mark.parametrize("largest", [128.0, -128.0])  # exp(89) is infinite in float32, exp(-104) is zero
def test_scores_beyond_the_range_of_the_exponential_are_merged_without_overflow(largest: float) -> None:
    q_BHLD, v_BHMD = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)
    k_BHMD = torch.tensor([largest - 256, largest - 1, largest]).view(1, 1, 3, 1)
    parts = [attend(q_BHLD, k_BHMD[:, :, [at]], v_BHMD[:, :, [at]], 1.0) for at in range(3)]
    weight = 1 / (1 + math.exp(-1))
    for out_BHLD, lse_BHL in (
        merge(merge(parts[0], parts[1]), parts[2]),
        merge(parts[2], merge(parts[1], parts[0])),
        attend(q_BHLD, k_BHMD, v_BHMD, 1.0),
    ):
        assert out_BHLD.item() == pytest.approx(4 * weight + 2 * (1 - weight), abs=5e-5)  # 2^-17, half a unit of 128
        assert lse_BHL.item() == pytest.approx(largest - math.log(weight), abs=2e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
def test_in_half_precision_weights_are_computed_in_float32(dtype: torch.dtype, causal: bool) -> None:
    q_BHLD, k_BHkMD, v_BHkMD = (randn(seed, 1, heads, 512, 64).to(dtype) for seed, heads in enumerate((4, 2, 2)))
    seen_111M = (randn(3, 1, 1, 1, 512) < 1).index_fill(3, torch.tensor(0), True)
    for seen in (None, seen_111M):
        out_BHLD, lse_BHL = attend(q_BHLD, k_BHkMD, v_BHkMD, 1 / 8, causal, seen)
        wide_BHLD, wide_BHL = attend(q_BHLD.float(), k_BHkMD.float(), v_BHkMD.float(), 1 / 8, causal, seen)
        assert (out_BHLD.dtype, lse_BHL.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(lse_BHL, wide_BHL, rtol=0, atol=4 * HALF[dtype])
        assert (out_BHLD.float() - wide_BHLD).norm() < 2 * HALF[dtype] * wide_BHLD.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_many_parts_in_half_precision_lose_no_more_than_one(dtype: torch.dtype) -> None:
    q_BHLD, k_BHkMD, v_BHkMD = (randn(seed, 1, 2, length, 16).to(dtype) for seed, length in enumerate((4, 256, 256)))
    parts = [attend(q_BHLD, k_BHkMD[:, :, [at]], v_BHkMD[:, :, [at]], 1 / 4) for at in range(256)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    wide_BHLD, wide_BHL = attend(q_BHLD.float(), k_BHkMD.float(), v_BHkMD.float(), 1 / 4)
    assert merged[0].dtype == merged[1].dtype == torch.float32
    torch.testing.assert_close(merged[1], wide_BHL, rtol=0, atol=HALF[dtype])
    assert (merged[0] - wide_BHLD).norm() < HALF[dtype] * wide_BHLD.norm()


def summed_gradients(inputs: Inputs, grad_BHLD: Tensor) -> list[Tensor]:
    """Part by part: gradients of queries, then of every part's keys and values."""
    out_BHLD, lse_BHL = naive_attention(inputs.q_BHLD, *inputs.parts)
    grad_q_BHLD, others = torch.zeros_like(inputs.q_BHLD), []
    for part in inputs.parts:
        of_q, of_k, of_v = attend_backward(
            grad_BHLD, inputs.q_BHLD, part.keys, part.values, out_BHLD, lse_BHL, *part.how()
        )
        grad_q_BHLD += of_q
        others += [of_k, of_v]
    return [grad_q_BHLD, *others]


@given(inputs=inputs)
@settings(deadline=None, max_examples=100)
def test_gradients_summed_over_parts_are_those_of_one_softmax_over_the_union(inputs: Inputs) -> None:
    grad_BHLD = inputs.randn(*inputs.q_BHLD.shape)
    found = summed_gradients(inputs, grad_BHLD)
    leaves = [x.requires_grad_() for x in all_leaves(inputs)]
    expected = torch.autograd.grad(naive_attention(inputs.q_BHLD, *inputs.parts)[0], leaves, grad_BHLD)
    torch.testing.assert_close(found, list(expected), rtol=0, atol=TOLERANCE[inputs.dtype])


@given(inputs=inputs, data=st.data())
@settings(deadline=None, max_examples=100)
def test_merged_parts_are_differentiated_like_one_softmax_whichever_of_their_inputs_need_it(
    inputs: Inputs, data: Any
) -> None:
    leaves = all_leaves(inputs)
    needed = data.draw(st.lists(st.sampled_from(range(len(leaves))), min_size=1, unique=True))
    wanted = [leaves[at].requires_grad_() for at in needed]
    merged = inputs.parts[0].attend(inputs.q_BHLD)
    for part in inputs.parts[1:]:
        merged = merge(merged, part.attend(inputs.q_BHLD))
    grad_BHLD = inputs.randn(*inputs.q_BHLD.shape)
    found = torch.autograd.grad(merged[0], wanted, grad_BHLD)
    expected = torch.autograd.grad(naive_attention(inputs.q_BHLD, *inputs.parts)[0], wanted, grad_BHLD)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[inputs.dtype])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_half_precision_are_close_to_those_in_float32(dtype: torch.dtype, causal: bool) -> None:
    q_BHLD, k_BHkMD, v_BHkMD, grad_BHLD = (
        randn(seed, 1, heads, 128, 16).to(dtype) for seed, heads in enumerate((4, 2, 2, 4))
    )
    found, wide = [], []
    for kind, gradients in ((dtype, found), (torch.float32, wide)):
        q, k, v, grad = (x.to(kind) for x in (q_BHLD, k_BHkMD, v_BHkMD, grad_BHLD))
        union = attend(q, k, v, 1 / 4, causal)
        gradients += attend_backward(grad, q, k, v, *union, 1 / 4, causal)
    for mine, reference in zip(found, wide, strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - reference).norm() < 2 * HALF[dtype] * reference.norm()


def test_the_layout_of_tensors_does_not_matter_and_they_are_left_as_they_were() -> None:
    shapes = [(2, heads, 6, 8) for heads in (4, 2, 2, 4)]
    tensors = [randn(seed, *shape) for seed, shape in enumerate(shapes)]
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    seen_B11M = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])[:, None, None]
    for causal, seen in product((False, True), (None, seen_B11M)):
        results = []
        for q_BHLD, k_BHkMD, v_BHkMD, grad_BHLD in (tensors, scattered):
            union = attend(q_BHLD, k_BHkMD, v_BHkMD, SCALE, causal, seen)
            results.append([*union, *attend_backward(grad_BHLD, q_BHLD, k_BHkMD, v_BHkMD, *union, SCALE, causal, seen)])
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert all(x.equal(randn(seed, *shape)) for seed, (x, shape) in enumerate(zip(tensors, shapes, strict=True)))
    assert seen_B11M.flatten().tolist() == [True] * 9 + [False] * 3


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [] if func.is_view else [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_makes_no_scores_and_the_formula_one_matrix_of_them(causal: bool, way: str) -> None:
    H, Hk, L, D = 4, 2, 32, 4
    q_BHLD, k_BHkMD, v_BHkMD = randn(0, 1, H, L, D), randn(1, 1, Hk, L, D), randn(2, 1, Hk, L, D)
    with LargestTensor() as seen:
        union = attend(q_BHLD, k_BHkMD, v_BHkMD, SCALE, causal)
        attend_backward(q_BHLD, q_BHLD, k_BHkMD, v_BHkMD, *union, SCALE, causal)
    assert seen.elements == {"fused kernel": H * L * D, "written out": H * L * L}[way]


def test_scores_and_sums_are_kept_in_float32_or_wider() -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    found = [wide_dtype(torch.empty(0, dtype=dtype)) for dtype in kinds]
    assert found == [torch.float32, torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_score_of_a_hidden_key_is_finite_in_every_number_type(dtype: torch.dtype) -> None:
    assert torch.tensor(MASKED, dtype=dtype).isfinite()
