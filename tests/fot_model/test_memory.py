"""Shapes: B batch, H query heads, Hk key/value heads, L local tokens, M tokens in memory, D head size."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fot_model import memory as memory_module
from fot_model.memory import DenseMemory, merge, partial_attention, repeat_heads

SCALE = 0.6
seeds = st.integers(0, 2**32)
part_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(q_BHLD: Tensor, k_BHkMD: Tensor, v_BHkMD: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over all keys, a query head at a time; its output and log-sum-exp."""
    group = q_BHLD.shape[1] // k_BHkMD.shape[1]
    out, lse = [], []
    for head in range(q_BHLD.shape[1]):
        scores_BLM = torch.einsum("bld,bmd->blm", q_BHLD[:, head], k_BHkMD[:, head // group]) * SCALE
        out.append(scores_BLM.softmax(-1) @ v_BHkMD[:, head // group])
        lse.append(scores_BLM.exp().sum(-1).log())
    return torch.stack(out, 1), torch.stack(lse, 1)


@pytest.fixture(autouse=True, scope="module", params=["fused kernel", "written out"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's fused kernel does the work, with them the formula written out."""
    with torch.set_grad_enabled(request.param == "written out"):
        yield


def filled(k_BHkMD: Tensor, v_BHkMD: Tensor, sizes: list[int]) -> DenseMemory:
    """A memory to which keys and values were appended in parts of these sizes."""
    memory = DenseMemory()
    for k_part, v_part in zip(k_BHkMD.split(sizes, dim=2), v_BHkMD.split(sizes, dim=2), strict=True):
        memory.append(0, k_part, v_part)
    return memory


def attended(memory: DenseMemory, q_BHLD: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    result = memory.attend(layer, q_BHLD, SCALE)
    assert result is not None
    return result


@given(sizes=part_sizes, seed=seeds, data=st.data())
@settings(deadline=None, max_examples=50)
def test_merged_partial_attentions_are_one_softmax_over_the_union(sizes: list[int], seed: int, data: Any) -> None:
    M = sum(sizes)
    q_BHLD, k_BHMD, v_BHMD = randn(seed, 2, 3, 4, 5), randn(seed + 1, 2, 3, M, 5), randn(seed + 2, 2, 3, M, 5)
    parts = [
        partial_attention(q_BHLD, k_part, v_part, SCALE)
        for k_part, v_part in zip(k_BHMD.split(sizes, dim=2), v_BHMD.split(sizes, dim=2), strict=True)
    ]
    while len(parts) > 1:  # any two, in any order
        a = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge(a, b))
    out_BHLD, lse_BHL = naive_attention(q_BHLD, k_BHMD, v_BHMD)
    torch.testing.assert_close(parts[0][0], out_BHLD, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[0][1], lse_BHL, rtol=0, atol=1e-5)


@given(L=st.integers(1, 6), seed=seeds)
@settings(deadline=None, max_examples=25)
def test_masked_partial_attention_is_a_softmax_over_the_keys_left(L: int, seed: int) -> None:
    q_BHLD, k_BHLD, v_BHLD = randn(seed, 2, 2, L, 3), randn(seed + 1, 2, 2, L, 3), randn(seed + 2, 2, 2, L, 3)
    out_BHLD, lse_BHL = partial_attention(q_BHLD, k_BHLD, v_BHLD, SCALE, causal=True)
    for at in range(L):
        seen = slice(0, at + 1)
        expected = naive_attention(q_BHLD[:, :, at : at + 1], k_BHLD[:, :, seen], v_BHLD[:, :, seen])
        torch.testing.assert_close(out_BHLD[:, :, at : at + 1], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(lse_BHL[:, :, at : at + 1], expected[1], rtol=0, atol=1e-5)


def test_scores_beyond_the_range_of_the_exponential_are_merged_without_overflow() -> None:
    q_BHLD, v_BHMD = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)
    k_BHMD = torch.tensor([-128.0, 127.0, 128.0]).view(1, 1, 3, 1)  # exp(89) is infinite in float32
    parts = [partial_attention(q_BHLD, k_BHMD[:, :, [at]], v_BHMD[:, :, [at]], 1.0) for at in range(3)]
    out_BHLD, _ = merge(merge(parts[0], parts[1]), parts[2])
    weight = 1 / (1 + math.exp(-1))
    assert out_BHLD.item() == pytest.approx(4 * weight + 2 * (1 - weight), abs=1e-4)


def test_weights_of_bfloat16_keys_are_computed_in_float32() -> None:
    q_BHLD, k_BHMD, v_BHMD = (randn(seed, 1, 2, length, 64).bfloat16() for seed, length in enumerate((4, 512, 512)))
    out_BHLD, lse_BHL = partial_attention(q_BHLD, k_BHMD, v_BHMD, SCALE)
    expected_BHLD, expected_BHL = naive_attention(q_BHLD.float(), k_BHMD.float(), v_BHMD.float())
    assert (out_BHLD.dtype, lse_BHL.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse_BHL, expected_BHL, rtol=0, atol=0.05)
    assert (out_BHLD.float() - expected_BHLD).norm() < 0.03 * expected_BHLD.norm()


def test_a_head_of_keys_serves_neighbouring_query_heads() -> None:
    x_BHkLD = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_heads(x_BHkLD, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]


@given(sizes=part_sizes, seed=seeds)
@settings(deadline=None, max_examples=50)
def test_appending_in_any_split_of_calls_equals_appending_at_once(sizes: list[int], seed: int) -> None:
    M = sum(sizes)
    q_BHLD, k_BHkMD, v_BHkMD = randn(seed, 2, 4, 3, 5), randn(seed + 1, 2, 2, M, 5), randn(seed + 2, 2, 2, M, 5)
    in_parts, at_once = filled(k_BHkMD, v_BHkMD, sizes), filled(k_BHkMD, v_BHkMD, [M])
    assert len(in_parts) == len(at_once) == M
    torch.testing.assert_close(attended(in_parts, q_BHLD), attended(at_once, q_BHLD), rtol=0, atol=1e-6)


@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 3, 7, 21, 22, 4096])
def test_attending_is_one_softmax_over_all_of_memory_whatever_the_chunk(
    chunk: int, Hk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "CHUNK", chunk)
    q_BHLD, k_BHkMD, v_BHkMD = randn(0, 2, 4, 3, 5), randn(1, 2, Hk, 22, 5), randn(2, 2, Hk, 22, 5)
    found, expected = attended(filled(k_BHkMD, v_BHkMD, [9, 1, 12]), q_BHLD), naive_attention(q_BHLD, k_BHkMD, v_BHkMD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def test_attending_makes_no_tensor_that_grows_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "CHUNK", 8)
    q_BHLD = randn(0, 1, 2, 16, 4)
    largest = []
    for M in (16, 256):
        memory = filled(randn(1, 1, 1, M, 4), randn(2, 1, 1, M, 4), [M])
        with LargestTensor() as seen:
            memory.attend(0, q_BHLD, SCALE)
        largest.append(seen.elements)
    assert largest[0] == largest[1] > 0


def test_layers_do_not_share_their_memory() -> None:
    q_BHLD = randn(0, 1, 2, 3, 4)
    k, v = [randn(seed, 1, 2, 5, 4) for seed in (1, 2)], [randn(seed, 1, 2, 5, 4) for seed in (3, 4)]
    memory = DenseMemory()
    memory.append(7, k[0], v[0])
    memory.append(2, k[1], v[1])
    assert len(memory) == 5
    for layer, which in ((7, 0), (2, 1)):
        expected = naive_attention(q_BHLD, k[which], v[which])
        torch.testing.assert_close(attended(memory, q_BHLD, layer), expected, rtol=0, atol=1e-5)
    assert memory.attend(3, q_BHLD, SCALE) is None


def test_an_empty_memory_has_no_length_and_nothing_to_attend_to() -> None:
    memory = DenseMemory()
    assert len(memory) == 0
    assert memory.attend(0, randn(0, 1, 1, 1, 2), SCALE) is None


@given(held=st.integers(1, 12), kept=st.integers(0, 14), sizes=part_sizes, seed=seeds)
@settings(deadline=None, max_examples=50)
def test_appending_after_truncation_follows_the_tokens_kept(held: int, kept: int, sizes: list[int], seed: int) -> None:
    old_k, old_v, q_BHLD = randn(seed, 1, 2, held, 3), randn(seed + 1, 1, 2, held, 3), randn(seed + 2, 1, 2, 2, 3)
    new_k, new_v = randn(seed + 3, 1, 2, sum(sizes), 3), randn(seed + 4, 1, 2, sum(sizes), 3)
    memory = filled(old_k, old_v, [held])
    memory.truncate(kept)
    assert len(memory) == min(held, kept)
    for k_part, v_part in zip(new_k.split(sizes, dim=2), new_v.split(sizes, dim=2), strict=True):
        memory.append(0, k_part, v_part)
    assert len(memory) == min(held, kept) + sum(sizes)
    all_k, all_v = torch.cat([old_k[:, :, :kept], new_k], dim=2), torch.cat([old_v[:, :, :kept], new_v], dim=2)
    torch.testing.assert_close(attended(memory, q_BHLD), naive_attention(q_BHLD, all_k, all_v), rtol=0, atol=1e-5)


def test_truncation_forgets_in_every_layer_and_to_zero_leaves_nothing() -> None:
    q_BHLD, k_BHkMD, v_BHkMD = randn(0, 1, 2, 3, 4), randn(1, 1, 2, 6, 4), randn(2, 1, 2, 6, 4)
    memory = DenseMemory()
    for layer in (1, 3):
        memory.append(layer, k_BHkMD, v_BHkMD)
    memory.truncate(4)
    for layer in (1, 3):
        expected = naive_attention(q_BHLD, k_BHkMD[:, :, :4], v_BHkMD[:, :, :4])
        torch.testing.assert_close(attended(memory, q_BHLD, layer), expected, rtol=0, atol=1e-5)
    memory.truncate(0)
    assert len(memory) == 0
    assert memory.attend(1, q_BHLD, SCALE) is None


def test_a_reset_memory_is_empty_and_takes_another_batch_size() -> None:
    memory = filled(randn(0, 3, 2, 5, 4), randn(1, 3, 2, 5, 4), [5])
    memory.reset()
    assert len(memory) == 0
    assert memory.attend(0, randn(2, 3, 2, 1, 4), SCALE) is None
    q_BHLD, k_BHkMD, v_BHkMD = randn(3, 1, 2, 3, 4), randn(4, 1, 2, 2, 4), randn(5, 1, 2, 2, 4)
    memory.append(0, k_BHkMD, v_BHkMD)
    torch.testing.assert_close(attended(memory, q_BHLD), naive_attention(q_BHLD, k_BHkMD, v_BHkMD), rtol=0, atol=1e-5)


def test_what_was_remembered_does_not_change_with_the_tensor_it_came_from() -> None:
    q_BHLD, k_BHkMD, v_BHkMD = randn(0, 1, 2, 3, 4), randn(1, 1, 2, 5, 4), randn(2, 1, 2, 5, 4)
    memory = filled(k_BHkMD, v_BHkMD, [5])
    before = attended(memory, q_BHLD)
    k_BHkMD += 1
    v_BHkMD += 1
    torch.testing.assert_close(attended(memory, q_BHLD), before, rtol=0, atol=0)


@torch.enable_grad()
def test_memory_is_not_differentiated_but_queries_of_several_windows_are() -> None:
    q_BHLD, k_BHkMD, v_BHkMD = (randn(seed, 1, 2, 3, 4).requires_grad_() for seed in range(3))
    memory = DenseMemory()
    outputs = []
    for _ in range(3):
        memory.append(0, k_BHkMD, v_BHkMD)
        outputs.append(attended(memory, q_BHLD * (1 + len(outputs)))[0])
    sum(out.pow(2).sum() for out in outputs).backward()
    assert (k_BHkMD.grad, v_BHkMD.grad) == (None, None)
    assert (q_BHLD.grad != 0).all()


class Allocations(TorchDispatchMode):
    """Counts buffers made and elements written into any."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            if func.overloadpacket is torch.ops.aten.copy_:
                self.written += result.numel()
            elif func.overloadpacket is not torch.ops.aten.detach:
                self.buffers += 1
                self.written += result.numel()
        return result


@pytest.mark.parametrize("step", [1, 3])
def test_appending_reallocates_logarithmically_often_and_writes_a_constant_number_of_times(step: int) -> None:
    k_BHkLD, v_BHkLD = randn(0, 1, 1, step, 2), randn(1, 1, 1, step, 2)
    buffers, written = [], []
    for tokens in (256, 512, 1024, 2048):
        memory = DenseMemory()
        with Allocations() as seen:
            for _ in range(tokens):
                memory.append(0, k_BHkLD, v_BHkLD)
        assert len(memory) == tokens * step
        buffers.append(seen.buffers)
        written.append(seen.written / (tokens * step * 2 * k_BHkLD.shape[3]))
    assert all(0 <= later - earlier <= 2 for earlier, later in pairwise(buffers)), "twice the tokens: one more doubling"
    assert 2 <= buffers[0] <= 2 * (math.log2(256) + 2)
    assert all(1 <= times <= 6 for times in written)
