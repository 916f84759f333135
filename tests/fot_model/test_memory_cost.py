"""What a memory costs: tensors made in attending, writes and buffers in appending.

Shapes: B batch, H query heads, Hk key/value heads, L local tokens, M tokens in memory, D head size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fot_model import memory as memory_module
from fot_model.memory import DenseMemory, TopKMemory

SCALE = 0.6
KINDS: dict[str, Callable[..., DenseMemory]] = {"dense": DenseMemory, "top-k": partial(TopKMemory, 3)}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random keys and values."""
    return randn(seed + 1, *shape), randn(seed + 2, *shape)


def filled(memory: DenseMemory, k_BHkMD: Tensor, v_BHkMD: Tensor, seen_BM: Tensor | None = None) -> DenseMemory:
    memory.append(0, k_BHkMD, v_BHkMD, seen_BM)
    return memory


@contextmanager
def steps(chunk: int, scores: int = 2**24) -> Iterator[None]:
    """Go through memory `chunk` keys at a time, `scores` scores at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "CHUNK", chunk)
        patch.setattr(memory_module, "SCORES", scores)
        yield


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and not func.is_view:
                self.elements = max(self.elements, made.numel())
        return result


@kinds
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("differentiated", [False, True], ids=["fused", "written out"])
def test_attending_makes_no_tensor_that_grows_with_memory(
    make: Callable[..., DenseMemory], dtype: torch.dtype | None, padded: bool, differentiated: bool
) -> None:
    q_BHLD = randn(0, 1, 2, 16, 4).requires_grad_(differentiated)
    largest = []
    for M in (16, 512):
        memory = filled(make(dtype=dtype), *pair(0, 1, 1, M, 4), randn(3, 1, M) > 0 if padded else None)
        with steps(8), LargestTensor() as seen:
            memory.attend(0, q_BHLD, SCALE)
        largest.append(seen.elements)
    assert largest[0] == largest[1] > 0


def test_where_scores_are_written_out_no_more_are_made_at_once_than_asked_for() -> None:
    memory, q_BHLD = filled(DenseMemory(), *pair(0, 1, 2, 400, 4)), randn(0, 1, 4, 8, 4).requires_grad_()
    with steps(4096, 640), LargestTensor() as seen:
        memory.attend(0, q_BHLD, SCALE)
    assert seen.elements == 640


def test_a_top_k_search_of_many_queries_makes_no_tensor_larger_than_its_answer() -> None:
    memory, q_BHLD = filled(TopKMemory(2), *pair(0, 1, 2, 40, 4)), randn(0, 1, 4, 32, 4)
    with steps(8, 4 * (8 + 2)), LargestTensor() as seen:
        memory.attend(0, q_BHLD, SCALE)
    assert seen.elements == q_BHLD.numel()


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
@pytest.mark.parametrize("padded", [False, True])
def test_appending_reallocates_logarithmically_often_and_writes_a_constant_number_of_times(
    step: int, padded: bool
) -> None:
    k_BHkLD, v_BHkLD = pair(0, 1, 1, step, 2)
    mask = torch.zeros(1, step, dtype=torch.bool) if padded else None
    tensors = 3 if padded else 2
    buffers, written = [], []
    for tokens in (128, 256, 512, 1024):
        memory = DenseMemory()
        with Allocations() as seen:
            for _ in range(tokens):
                memory.append(0, k_BHkLD, v_BHkLD, mask)
        assert len(memory) == tokens * step
        buffers.append(seen.buffers)
        written.append(seen.written / (tokens * step * (4 + padded)))
    assert all(0 <= later - earlier <= tensors for earlier, later in pairwise(buffers)), "one more doubling"
    assert 2 <= buffers[0] <= tensors * (math.log2(128) + 2) + padded
    assert all(1 <= times <= 6 for times in written)


def test_appending_goes_on_at_constant_cost_after_truncation() -> None:
    memory = filled(DenseMemory(), *pair(0, 1, 1, 512, 2))
    memory.truncate(500)
    with Allocations() as seen:
        for _ in range(12):
            memory.append(0, *pair(0, 1, 1, 1, 2))
        assert seen.buffers <= 2 * 12, "the memory's own buffers are held"
    assert seen.written < 500
