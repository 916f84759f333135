"""What CrossBatch attention holds in memory does not grow with the additional contexts.

Every test runs both ways of doing a part on CPU (`way`).

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fot_model import cross_batch
from fot_model.cross_batch import cross_batch_attention

SCALE = 0.7

pytestmark = pytest.mark.usefixtures("way")


class Alive(TorchDispatchMode):
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


def measured(tensors: list[Tensor], d: int, local: bool) -> Alive:
    """Forward and backward with d additional contexts for each row."""
    R = len(tensors[0])
    plan_Rd = (torch.arange(R)[:, None] + torch.arange(1, d + 1)) % R
    grad_RHLD = torch.ones_like(tensors[0])
    with Alive() as noted:
        torch.autograd.grad(cross_batch_attention(*tensors, plan_Rd, SCALE, local=local), tensors, grad_RHLD)
    return noted


@pytest.fixture
def four_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", 4)


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("local", [True, False])
def test_memory_of_a_step_does_not_grow_with_the_number_of_additional_contexts(
    cross_batch_tensors, local: bool
) -> None:
    tensors = cross_batch_tensors(0, R=13, H=1, Hk=1, L=16, D=2, dtype=torch.float32)
    few, many = (measured(tensors, d, local) for d in (4, 12))
    assert few.largest == many.largest > 0
    assert few.peak == many.peak > 0


@pytest.mark.usefixtures("four_at_once")
@pytest.mark.parametrize("local", [True, False])
def test_no_tensor_is_larger_than_an_input_where_the_kernel_is_fused_nor_than_scores_of_a_part(
    cross_batch_tensors, local: bool, way: str
) -> None:
    R, L, D = 13, 64, 2
    part_scores, local_scores = 4 * L * L, R * L * L * local
    largest = {"fused kernel": R * L * D, "written out": max(part_scores, local_scores)}[way]
    tensors = cross_batch_tensors(0, R, 1, 1, L, D, torch.float32)
    assert measured(tensors, 12, local).largest == largest


def test_what_is_saved_for_the_backward_pass_does_not_grow_with_the_number_of_additional_contexts(
    cross_batch_tensors,
) -> None:
    R, H, Hk, L, D = 24, 2, 1, 4, 2
    saved, tensors = [], cross_batch_tensors(0, R, H, Hk, L, D)
    for d in (1, 8, 23):
        plan_Rd, elements = (torch.arange(R)[:, None] + torch.arange(1, d + 1)) % R, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, e=elements: (e.append(x.numel()), x)[1], lambda x: x):
            cross_batch_attention(*tensors, plan_Rd, SCALE)
        saved.append(sum(elements))
    queries_and_output, keys_and_values, lse = 2 * R * H * L * D, 4 * R * Hk * L * D, R * H * L
    assert saved == [queries_and_output + keys_and_values + lse] * 3
