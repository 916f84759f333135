"""A memory is attended to in one softmax over what it holds, whatever was appended, hidden, selected or forgotten.

Shapes: B batch, H query heads, Hk key/value heads, L local tokens, M tokens in memory, D head size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fot_model import memory as memory_module
from fot_model.attention import MASKED, Partial, attend, merge
from fot_model.memory import DenseMemory, Memory, TopKMemory

SCALE = 0.6
KEPT = 3  # the k of top-k memories
KINDS: dict[str, Callable[..., DenseMemory]] = {"dense": DenseMemory, "top-k": partial(TopKMemory, KEPT)}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
few_examples = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32)
part_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random keys and values."""
    return randn(seed + 1, *shape), randn(seed + 2, *shape)


def naive(
    q_BHLD: Tensor, k_BHkMD: Tensor, v_BHkMD: Tensor, seen_BM: Tensor | None = None, most: int | None = None
) -> Partial:
    """A softmax for each query of each head, over the `most` keys of largest inner product among those seen."""
    B, H, L, D = q_BHLD.shape
    group = H // k_BHkMD.shape[1]
    out_BHLD, lse_BHL = torch.zeros(B, H, L, D), torch.zeros(B, H, L)
    for row in range(B):
        places = torch.arange(k_BHkMD.shape[2]) if seen_BM is None else seen_BM[row].nonzero()[:, 0]
        for head in range(H):
            keys, values = (x[row, head // group, places].double() for x in (k_BHkMD, v_BHkMD))
            for at in range(L):
                products = keys @ q_BHLD[row, head, at].double().detach()
                best = products.argsort(descending=True)[:most]
                scores = products[best] * SCALE
                out_BHLD[row, head, at] = scores.softmax(0) @ values[best]
                lse_BHL[row, head, at] = scores.logsumexp(0)
    return out_BHLD, lse_BHL


def expected(
    memory: Memory, q_BHLD: Tensor, k_BHkMD: Tensor, v_BHkMD: Tensor, seen_BM: Tensor | None = None
) -> Partial:
    return naive(q_BHLD, k_BHkMD, v_BHkMD, seen_BM, memory.k if isinstance(memory, TopKMemory) else None)


def attended(memory: Memory, q_BHLD: Tensor, layer: int = 0) -> Partial:
    result = memory.attend(layer, q_BHLD, SCALE)
    assert result is not None
    return result


def fill(
    memory: DenseMemory, k_BHkMD: Tensor, v_BHkMD: Tensor, sizes: list[int], masks: list[Tensor | None] | None = None
) -> DenseMemory:
    """Keys and values appended in parts of these sizes, with a padding mask for each."""
    masks = [None] * len(sizes) if masks is None else masks
    for k_part, v_part, mask in zip(k_BHkMD.split(sizes, dim=2), v_BHkMD.split(sizes, dim=2), masks, strict=True):
        memory.append(0, k_part, v_part, mask)
    return memory


@contextmanager
def steps(chunk: int, scores: int = 2**24) -> Iterator[None]:
    """Go through memory `chunk` keys at a time, `scores` scores at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "CHUNK", chunk)
        patch.setattr(memory_module, "SCORES", scores)
        yield


@st.composite
def padding(draw: st.DrawFn, rows: int) -> tuple[list[int], list[Tensor | None], Tensor]:
    """Sizes of parts, a mask [rows, size] or None for each, and the whole mask; every row sees a token."""
    sizes = draw(part_sizes)
    masks: list[Tensor | None] = []
    for size in sizes:
        bits = draw(st.none() | st.lists(st.booleans(), min_size=rows * size, max_size=rows * size))
        masks.append(None if bits is None else torch.tensor(bits).view(rows, size))
    if masks[-1] is not None:
        masks[-1][:, draw(st.integers(0, sizes[-1] - 1))] = True
    whole = [
        torch.ones(rows, size, dtype=torch.bool) if mask is None else mask
        for size, mask in zip(sizes, masks, strict=True)
    ]
    return sizes, masks, torch.cat(whole, dim=1)


@kinds
def test_an_empty_memory_has_no_length_and_nothing_to_attend_to(make: Callable[..., Memory]) -> None:
    memory = make()
    assert len(memory) == 0
    assert memory.attend(0, randn(0, 1, 1, 1, 2), SCALE) is None
    assert memory.state_dict() == {}


@kinds
@given(sizes=part_sizes, seed=seeds)
@few_examples
def test_appending_in_any_split_of_calls_equals_appending_at_once(
    assert_same, make: Callable[..., DenseMemory], sizes: list[int], seed: int
) -> None:
    M = sum(sizes)
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(seed, 2, 4, 3, 5), pair(seed, 2, 2, M, 5)
    in_parts, at_once = fill(make(), k_BHkMD, v_BHkMD, sizes), fill(make(), k_BHkMD, v_BHkMD, [M])
    assert len(in_parts) == len(at_once) == M
    assert_same(in_parts.state_dict(), {"0.keys": k_BHkMD, "0.values": v_BHkMD}, 0)
    assert_same(attended(in_parts, q_BHLD), attended(at_once, q_BHLD), 0)


@pytest.mark.parametrize("differentiated", [False, True], ids=["fused", "written out"])
@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize(("chunk", "scores"), [(1, 2**24), (3, 2**24), (7, 2**24), (21, 60), (22, 1), (4096, 2**24)])
def test_a_dense_memory_is_attended_to_in_one_softmax_whatever_the_chunk(
    assert_same, chunk: int, scores: int, Hk: int, differentiated: bool
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 2, 4, 3, 5).requires_grad_(differentiated), pair(0, 2, Hk, 22, 5)
    memory = fill(DenseMemory(), k_BHkMD, v_BHkMD, [9, 1, 12])
    with steps(chunk, scores):
        assert_same(attended(memory, q_BHLD), naive(q_BHLD, k_BHkMD, v_BHkMD))


@pytest.mark.parametrize("Hk", [1, 2, 4])
@given(
    M=st.integers(1, 24), k=st.integers(1, 25), chunk=st.integers(1, 30), scores=st.integers(1, 2000), seed=seeds
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_top_k_memory_is_attended_to_where_the_inner_product_is_largest_for_each_query_and_head(
    assert_same, Hk: int, M: int, k: int, chunk: int, scores: int, seed: int
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(seed, 2, 4, 3, 5), pair(seed, 2, Hk, M, 5)
    memory = fill(TopKMemory(k), k_BHkMD, v_BHkMD, [M])
    with steps(chunk, scores):
        assert_same(attended(memory, q_BHLD), naive(q_BHLD, k_BHkMD, v_BHkMD, most=k))


@pytest.mark.parametrize("k", [8, 9, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_a_top_k_memory_that_keeps_all_keys_is_a_dense_one(assert_same, k: int, padded: bool) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 2, 4, 3, 5), pair(0, 2, 2, 8, 5)
    mask = [randn(3, 2, 8) > 0] if padded else None
    dense, top = (fill(memory, k_BHkMD, v_BHkMD, [8], mask) for memory in (DenseMemory(), TopKMemory(k)))
    assert_same(attended(top, q_BHLD), attended(dense, q_BHLD), 1e-6)


@pytest.mark.parametrize("k", [0, -1])
def test_a_top_k_memory_that_keeps_no_key_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"^k is {k}: .* at least 1"):
        TopKMemory(k)


def test_a_top_k_memory_keeps_the_papers_128_keys_unless_told() -> None:
    assert TopKMemory().k == 128


@kinds
@pytest.mark.parametrize("past", [0, 4])
def test_merged_with_the_local_context_it_is_one_softmax_over_both(
    assert_same, make: Callable[..., DenseMemory], past: int
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD), (near_k, near_v) = randn(0, 2, 4, 2, 5), pair(0, 2, 2, 9, 5), pair(3, 2, 2, 4, 5)
    memory = fill(make(), k_BHkMD, v_BHkMD, [9])
    far = expected(memory, q_BHLD, k_BHkMD, v_BHkMD)
    out, lse = merge(attend(q_BHLD, near_k, near_v, SCALE), attended(memory, q_BHLD))
    near = naive(q_BHLD, near_k, near_v)
    share = (far[1] - torch.logaddexp(far[1], near[1])).exp()[..., None]
    assert_same((out, lse), (share * far[0] + (1 - share) * near[0], torch.logaddexp(far[1], near[1])))


@kinds
def test_scores_beyond_the_range_of_the_exponential_do_not_overflow(make: Callable[..., DenseMemory]) -> None:
    k_BHMD, v_BHMD = torch.tensor([-128.0, 127, 128, -500]), torch.tensor([1.0, 2, 4, 8])  # exp(89) is infinite
    memory = fill(make(), k_BHMD.view(1, 1, 4, 1), v_BHMD.view(1, 1, 4, 1), [4])
    with steps(1):
        out, lse = memory.attend(0, torch.ones(1, 1, 1, 1), 1.0) or pytest.fail("nothing remembered")
    share = 1 / (1 + math.exp(-1))
    assert out.item() == pytest.approx(4 * share + 2 * (1 - share), abs=1e-4)
    assert lse.item() == pytest.approx(128 - math.log(share), abs=1e-4)


@kinds
@given(parts=padding(rows=2), chunk=st.integers(1, 9), seed=seeds)
@few_examples
def test_padding_is_never_attended_to_whenever_it_appears(
    assert_same,
    make: Callable[..., DenseMemory],
    parts: tuple[list[int], list[Tensor | None], Tensor],
    chunk: int,
    seed: int,
) -> None:
    sizes, masks, seen_BM = parts
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(seed, 2, 4, 3, 5), pair(seed, 2, 2, sum(sizes), 5)
    hidden = ~seen_BM[:, None, :, None]
    other_k, other_v = k_BHkMD.where(~hidden, 30 * k_BHkMD.flip(2)), v_BHkMD.where(~hidden, 1e4)
    memory, other = fill(make(), k_BHkMD, v_BHkMD, sizes, masks), fill(make(), other_k, other_v, sizes, masks)
    assert len(memory) == sum(sizes)
    with steps(chunk):
        found = attended(memory, q_BHLD)
        assert_same(found, expected(memory, q_BHLD, k_BHkMD, v_BHkMD, seen_BM))
        assert_same(attended(other, q_BHLD), found, 1e-6)


@kinds
@pytest.mark.parametrize("chunk", [2, 4096])
def test_padding_alone_adds_nothing_to_the_local_context_and_what_follows_it_does(
    assert_same, make: Callable[..., DenseMemory], chunk: int
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD), (near_k, near_v) = randn(0, 2, 4, 3, 5), pair(0, 2, 2, 9, 5), pair(3, 2, 2, 4, 5)
    hidden, local = torch.zeros(2, 5, dtype=torch.bool), attend(q_BHLD, near_k, near_v, SCALE)
    memory = fill(make(), k_BHkMD[:, :, :5], v_BHkMD[:, :, :5], [5], [hidden])
    with steps(chunk):
        nothing = attended(memory, q_BHLD)
        assert nothing[0].isfinite().all()
        assert (nothing[1] < MASKED / 2).all()
        assert_same(merge(local, nothing), local, 1e-6)
        memory.append(0, k_BHkMD[:, :, 5:], v_BHkMD[:, :, 5:])
        assert_same(attended(memory, q_BHLD), expected(memory, q_BHLD, k_BHkMD[:, :, 5:], v_BHkMD[:, :, 5:]))


@kinds
def test_a_row_of_padding_alone_leaves_the_other_rows_as_they_are(
    assert_same, make: Callable[..., DenseMemory]
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 2, 4, 3, 5), pair(0, 2, 2, 6, 5)
    memory = fill(make(), k_BHkMD, v_BHkMD, [6], [torch.tensor([[False], [True]]).expand(2, 6)])
    out, lse = attended(memory, q_BHLD)
    assert_same((out[1:], lse[1:]), expected(memory, q_BHLD[1:], k_BHkMD[1:], v_BHkMD[1:]))
    assert out.isfinite().all()
    assert (lse[0] < MASKED / 2).all()


@kinds
def test_layers_do_not_share_their_memory(assert_same, make: Callable[..., DenseMemory]) -> None:
    q_BHLD, memory = randn(0, 1, 2, 3, 4), make()
    held = {7: pair(0, 1, 2, 5, 4), 2: pair(2, 1, 2, 5, 4), 12: pair(4, 1, 2, 5, 4)}
    masks = {7: None, 2: torch.tensor([[True, False, True, True, False]]), 12: None}
    for layer, (k_BHkMD, v_BHkMD) in held.items():
        memory.append(layer, k_BHkMD, v_BHkMD, masks[layer])
    assert len(memory) == 5
    for layer, (k_BHkMD, v_BHkMD) in held.items():
        assert_same(attended(memory, q_BHLD, layer), expected(memory, q_BHLD, k_BHkMD, v_BHkMD, masks[layer]))
    assert memory.attend(3, q_BHLD, SCALE) is None


@kinds
@given(parts=padding(rows=1), new=padding(rows=1), kept=st.integers(0, 45), seed=seeds)
@few_examples
def test_appending_after_truncation_follows_the_tokens_kept(
    assert_same,
    make: Callable[..., DenseMemory],
    parts: tuple[list[int], list[Tensor | None], Tensor],
    new: tuple[list[int], list[Tensor | None], Tensor],
    kept: int,
    seed: int,
) -> None:
    (sizes, masks, seen_BM), (new_sizes, new_masks, new_seen_BM) = parts, new
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(seed, 1, 2, 2, 3), pair(seed, 1, 2, sum(sizes), 3)
    new_k, new_v = pair(seed + 3, 1, 2, sum(new_sizes), 3)
    memory = fill(make(), k_BHkMD, v_BHkMD, sizes, masks)
    memory.truncate(kept)
    assert len(memory) == min(sum(sizes), kept)
    fill(memory, new_k, new_v, new_sizes, new_masks)
    assert len(memory) == min(sum(sizes), kept) + sum(new_sizes)
    all_k, all_v, all_seen = (
        torch.cat([old.narrow(dim, 0, min(sum(sizes), kept)), added], dim)
        for old, added, dim in ((k_BHkMD, new_k, 2), (v_BHkMD, new_v, 2), (seen_BM, new_seen_BM, 1))
    )
    assert_same(attended(memory, q_BHLD), expected(memory, q_BHLD, all_k, all_v, all_seen))


@kinds
def test_truncation_forgets_in_every_layer_and_to_zero_leaves_nothing(
    assert_same, make: Callable[..., DenseMemory]
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD), memory = randn(0, 1, 2, 3, 4), pair(0, 1, 2, 6, 4), make()
    for layer in (1, 3):
        memory.append(layer, k_BHkMD, v_BHkMD)
    memory.truncate(4)
    assert len(memory) == 4
    for layer in (1, 3):
        assert_same(attended(memory, q_BHLD, layer), expected(memory, q_BHLD, k_BHkMD[:, :, :4], v_BHkMD[:, :, :4]))
    memory.truncate(0)
    assert len(memory) == 0
    assert memory.attend(1, q_BHLD, SCALE) is None


@kinds
def test_a_reset_memory_is_empty_and_takes_another_batch_size(assert_same, make: Callable[..., DenseMemory]) -> None:
    memory = fill(make(), *pair(0, 3, 2, 5, 4), [5], [randn(2, 3, 5) > 0])
    memory.reset()
    assert len(memory) == 0
    assert memory.state_dict() == {}
    assert memory.attend(0, randn(2, 3, 2, 1, 4), SCALE) is None
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(3, 1, 2, 3, 4), pair(4, 1, 2, 4, 4)
    fill(memory, k_BHkMD, v_BHkMD, [4])
    assert_same(attended(memory, q_BHLD), expected(memory, q_BHLD, k_BHkMD, v_BHkMD))


@kinds
@given(
    parts=padding(rows=3), kept=st.integers(1, 42), rows=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=seeds
)
@few_examples
def test_selecting_rows_is_selecting_them_of_every_tensor(
    assert_same,
    make: Callable[..., DenseMemory],
    parts: tuple[list[int], list[Tensor | None], Tensor],
    kept: int,
    rows: list[int],
    seed: int,
) -> None:
    sizes, masks, _ = parts
    k_BHkMD, v_BHkMD = pair(seed, 3, 2, sum(sizes), 3)
    q_BHLD, (new_k, new_v) = randn(seed, len(rows), 2, 2, 3), pair(seed + 3, len(rows), 2, 2, 3)
    memory = fill(make(), k_BHkMD, v_BHkMD, sizes, masks)
    memory.truncate(kept)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    memory.select(torch.tensor(rows))
    assert len(memory) == min(kept, sum(sizes))
    assert_same(memory.state_dict(), {name: tensor[rows] for name, tensor in before.items()}, 0)
    memory.append(0, new_k, new_v)
    after = memory.state_dict()
    seen_BM = after["0.seen"][:, 0, :, 0] if "0.seen" in after else None
    all_k, all_v = torch.cat([before["0.keys"][rows], new_k], 2), torch.cat([before["0.values"][rows], new_v], 2)
    assert_same(attended(memory, q_BHLD), expected(memory, q_BHLD, all_k, all_v, seen_BM))


@kinds
def test_selecting_rows_of_every_layer_and_of_an_empty_memory(assert_same, make: Callable[..., DenseMemory]) -> None:
    memory = make()
    memory.select(torch.tensor([0, 0]))
    held = {layer: pair(layer, 2, 1, 4, 3) for layer in (0, 5)}
    for layer, (k_BHkMD, v_BHkMD) in held.items():
        memory.append(layer, k_BHkMD, v_BHkMD)
    memory.select(torch.tensor([1]))
    for layer, (k_BHkMD, v_BHkMD) in held.items():
        assert_same(memory.state_dict()[f"{layer}.keys"], k_BHkMD[[1]], 0)
        assert_same(memory.state_dict()[f"{layer}.values"], v_BHkMD[[1]], 0)


@kinds
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@given(parts=padding(rows=2), seed=seeds)
@settings(deadline=None, max_examples=15)
def test_what_was_saved_comes_back_bit_for_bit_and_goes_its_own_way(
    assert_same,
    make: Callable[..., DenseMemory],
    dtype: torch.dtype | None,
    parts: tuple[list[int], list[Tensor | None], Tensor],
    seed: int,
) -> None:
    sizes, masks, _ = parts
    q_BHLD, (k_BHkMD, v_BHkMD), new = randn(seed, 2, 4, 3, 5), pair(seed, 2, 2, sum(sizes), 5), pair(9, 2, 2, 3, 5)
    memory = fill(make(dtype=dtype), k_BHkMD, v_BHkMD, sizes, masks)
    memory.append(11, k_BHkMD, v_BHkMD)
    loaded = make(dtype=dtype)
    loaded.append(4, *pair(7, 1, 2, 2, 5))
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    loaded.load_state_dict(memory.state_dict())
    assert len(loaded) == sum(sizes)
    assert loaded.attend(4, q_BHLD, SCALE) is None
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items() if "seen" not in name} == dict.fromkeys(
        ("0.keys", "0.values", "11.keys", "11.values"), dtype or torch.float32
    )
    assert_same(loaded.state_dict(), state, 0)
    for grown in (memory, loaded):
        for layer in (0, 11):
            grown.append(layer, *new, torch.tensor([[True, False, True], [True, True, False]]))
    for layer in (0, 11):
        assert_same(attended(loaded, q_BHLD, layer), attended(memory, q_BHLD, layer), 0)
    loaded.truncate(1)
    fill(loaded, *pair(8, 2, 2, 5, 5), [5])
    assert_same({name: memory.state_dict()[name][:, :, : sum(sizes)] for name in state}, state, 0)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_memory_of_a_number_type_takes_what_another_saved_in_its_own(
    assert_same, make: Callable[..., DenseMemory], dtype: torch.dtype
) -> None:
    k_BHkMD, v_BHkMD = pair(0, 2, 2, 5, 4)
    memory, mask = make(dtype=dtype), torch.tensor([[False] * 2 + [True] * 3, [True] * 5])
    memory.load_state_dict(fill(DenseMemory(), k_BHkMD, v_BHkMD, [5], [mask]).state_dict())
    wanted = {"0.keys": k_BHkMD.to(dtype), "0.values": v_BHkMD.to(dtype), "0.seen": mask[:, None, :, None]}
    assert_same(memory.state_dict(), wanted, 0)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [4, 4096])
def test_what_is_remembered_is_rounded_to_the_number_type_and_nothing_else_changes(
    assert_same, make: Callable[..., DenseMemory], dtype: torch.dtype, chunk: int
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 2, 4, 3, 5), pair(0, 2, 2, 9, 5)
    mask: list[Tensor | None] = [randn(5, 2, 9) > -1]
    rounded = fill(make(dtype=dtype), k_BHkMD, v_BHkMD, [9], mask)
    kept = {name: tensor.dtype for name, tensor in rounded.state_dict().items()}
    assert kept == {"0.keys": dtype, "0.values": dtype, "0.seen": torch.bool}
    exact = fill(make(), k_BHkMD.to(dtype).float(), v_BHkMD.to(dtype).float(), [9], mask)
    with steps(chunk):
        assert_same(attended(rounded, q_BHLD), attended(exact, q_BHLD), 0)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_by_default_it_keeps_the_models_number_type(make: Callable[..., DenseMemory], dtype: torch.dtype) -> None:
    memory = fill(make(), *(x.to(dtype) for x in pair(0, 1, 1, 5, 4)), [2, 3])
    assert {tensor.dtype for tensor in memory.state_dict().values()} == {dtype}


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [None, torch.float32])
def test_queries_of_16_bits_are_scored_in_float32(
    assert_same, make: Callable[..., DenseMemory], dtype: torch.dtype, held: torch.dtype | None
) -> None:
    q_BHLD, k_BHkMD, v_BHkMD = (x.to(dtype) for x in (4 * randn(0, 1, 4, 6, 32), *pair(0, 1, 2, 200, 32)))
    memory = fill(make(dtype=held), k_BHkMD, v_BHkMD, [200])
    out, lse = attended(memory, q_BHLD)
    assert lse.dtype == torch.float32
    exact_out, exact_lse = expected(memory, q_BHLD.float(), k_BHkMD.float(), v_BHkMD.float())
    assert_same(lse, exact_lse, 1e-3)
    assert (out.float() - exact_out).norm() < 0.01 * exact_out.norm()


@kinds
def test_float64_stays_float64(assert_same, make: Callable[..., DenseMemory]) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 2, 4, 3, 5).double(), (x.double() for x in pair(0, 2, 2, 9, 5))
    memory = fill(make(), k_BHkMD, v_BHkMD, [9])
    with steps(2):
        out, lse = attended(memory, q_BHLD)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    assert_same((out.float(), lse.float()), expected(memory, q_BHLD, k_BHkMD, v_BHkMD), 1e-6)


@kinds
def test_what_was_remembered_does_not_change_with_the_tensor_it_came_from(
    assert_same, make: Callable[..., DenseMemory]
) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD), mask = randn(0, 1, 2, 3, 4), pair(0, 1, 2, 5, 4), torch.tensor([[True] * 4 + [False]])
    memory = fill(make(), k_BHkMD, v_BHkMD, [5], [mask])
    before = attended(memory, q_BHLD)
    k_BHkMD += 1
    v_BHkMD += 1
    mask[:] = True
    assert_same(attended(memory, q_BHLD), before, 0)


@kinds
def test_memory_is_not_differentiated_but_queries_of_several_windows_are(make: Callable[..., DenseMemory]) -> None:
    q_BHLD, k_BHkMD, v_BHkMD = (randn(seed, 1, 2, 3, 4).requires_grad_() for seed in range(3))
    memory = make()
    outputs = []
    with steps(2):
        for window in range(3):
            memory.append(0, k_BHkMD, v_BHkMD)
            outputs.append(attended(memory, q_BHLD * (1 + window))[0])
    torch.stack(outputs).pow(2).sum().backward()
    assert (k_BHkMD.grad, v_BHkMD.grad) == (None, None)
    assert q_BHLD.grad is not None
    assert (q_BHLD.grad != 0).all()
    assert not any(tensor.requires_grad for tensor in memory.state_dict().values())


@kinds
def test_the_gradient_of_queries_is_that_of_the_softmax(make: Callable[..., DenseMemory]) -> None:
    q_BHLD, (k_BHkMD, v_BHkMD) = randn(0, 1, 2, 3, 4).double(), (x.double() for x in pair(0, 1, 1, 8, 4))
    memory = fill(make(), k_BHkMD, v_BHkMD, [8])
    with steps(3):
        assert torch.autograd.gradcheck(lambda q: attended(memory, q), q_BHLD.requires_grad_())
