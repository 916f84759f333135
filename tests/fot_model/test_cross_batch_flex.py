"""What runs on CUDA devices, by torch's reference of FlexAttention on CPU, against the parts.

`test_cross_batch.py` holds the parts, in both their ways, against a softmax a query.

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size.
"""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_model.cross_batch import flex_cross_batch, merged_cross_batch

SCALE = 0.7
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@given(more=st.integers(0, 3), data=st.data())
@settings(deadline=None, max_examples=40)
def test_flex_attention_gives_what_the_parts_give(cross_batch_cases, more: int, data: Any) -> None:
    """Of all rows, or as on a rank that holds a part of them: all rows' far keys and values, the queries of some."""
    case = data.draw(cross_batch_cases)
    first = data.draw(st.integers(0, len(case.plan) - 1))
    mine = slice(first, data.draw(st.integers(first + 1, len(case.plan))))
    plan_Rd, scale, documents_RL, local = case.how()
    tensors = [x.detach().float() for x in case.tensors(D=4)]
    expected_RHLD = merged_cross_batch(*tensors, plan_Rd, scale, documents_RL, local)[mine]
    own = [x[mine] for x in tensors[:3]]
    far = [torch.cat([x, torch.full((more, *x.shape[1:]), 9.0)]) for x in tensors[3:]]
    how = (plan_Rd[mine], scale, None if documents_RL is None else documents_RL[mine], local)
    torch.testing.assert_close(flex_cross_batch(*own, *far, *how), expected_RHLD, rtol=0, atol=1e-5)


def test_over_several_blocks_it_gives_what_the_parts_give(cross_batch_tensors) -> None:
    tensors = [x.detach() for x in cross_batch_tensors(0, 5, 4, 2, 60, 8, torch.float32)]  # 300 tokens, blocks of 128
    plan_Rd = torch.tensor([[4, 1], [-1, -1], [0, -1], [-1, 2], [3, 0]])
    documents_RL = torch.arange(60).expand(5, -1) // 23
    for documents, local, mine in product((None, documents_RL), (True, False), (slice(None), slice(1, 4))):
        tensors_of_rows = [x[mine] for x in tensors[:3]] + tensors[3:]
        how = (plan_Rd[mine], SCALE, None if documents is None else documents[mine], local)
        torch.testing.assert_close(
            flex_cross_batch(*tensors_of_rows, *how), merged_cross_batch(*tensors_of_rows, *how), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("local", "joined"), [(True, True), (False, False)])
def test_it_gives_the_gradients_that_the_parts_give(
    cross_batch_tensors, local: bool, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's dense reference differentiates on CPU, too, but for a check."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    tensors = cross_batch_tensors(0, 5, 4, 2, 60, 8, torch.float32)  # 300 tokens, blocks of 128
    own = [x[1:4].detach().requires_grad_() for x in tensors[:3]] + tensors[3:]
    plan_Rd = torch.tensor([[0, 4], [-1, -1], [1, 0]])
    how = (plan_Rd, SCALE, torch.arange(60).expand(3, -1) // 23 if joined else None, local)
    found = []
    for attend in (flex_cross_batch, merged_cross_batch):
        out_RHLD = attend(*own, *how)
        grad_RHLD = torch.randn(out_RHLD.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad(out_RHLD, own, grad_RHLD, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_a_plan_may_be_of_any_whole_numbers(cross_batch_tensors, dtype: torch.dtype) -> None:
    tensors = [x.detach() for x in cross_batch_tensors(0, 3, 2, 2, 3, 4)]
    plan_Rd = torch.tensor([[1, 2], [-1, 0], [-1, -1]])
    expected_RHLD = flex_cross_batch(*tensors, plan_Rd, SCALE, None, True)
    assert flex_cross_batch(*tensors, plan_Rd.to(dtype), SCALE, None, True).equal(expected_RHLD)
