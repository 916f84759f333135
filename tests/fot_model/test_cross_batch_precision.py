"""CrossBatch attention in 16 bits, under autocast, compiled and with recomputed activations.

Every test runs both ways of doing a part on CPU (`way`).

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size, C hidden
size.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fot_model import cross_batch
from fot_model.cross_batch import cross_batch_attention

SCALE = 0.7

pytestmark = pytest.mark.usefixtures("way")


def relative_errors(tensors: list[Tensor], plan_Rd: Tensor, grad_RHLD: Tensor, dtype: torch.dtype) -> list[float]:
    """Of output and gradients in the dtype, against float32 on the same numbers."""
    rounded, results = [x.detach().to(dtype) for x in (*tensors, grad_RHLD)], []
    for kind in (dtype, torch.float32):
        *inputs, grad = (x.to(kind, copy=True) for x in rounded)
        leaves = [x.requires_grad_() for x in inputs]
        out_RHLD = cross_batch_attention(*leaves, plan_Rd, rounded[0].shape[3] ** -0.5)
        results.append([out_RHLD.detach(), *torch.autograd.grad(out_RHLD, leaves, grad)])
        assert all(x.dtype == kind for x in results[-1])
    return [((x.float() - exact).norm() / exact.norm()).item() for x, exact in zip(*results, strict=True)]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_close_to_float32(cross_batch_tensors, dtype: torch.dtype, rounding: float) -> None:
    tensors = cross_batch_tensors(0, 4, 4, 2, 32, 16, torch.float32)
    plan_Rd = torch.tensor([[1, 2, 3], [0, -1, 2], [-1, -1, -1], [0, 1, -1]])
    errors = relative_errors(tensors, plan_Rd, cross_batch_tensors(1, 4, 4, 2, 32, 16)[0], dtype)
    assert max(errors) < 2 * rounding


@pytest.mark.parametrize("alike", [False, True])
def test_many_contexts_in_bfloat16_lose_no_precision(
    cross_batch_tensors, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_batch, "CONTEXTS_AT_ONCE", 2)
    R = 32
    tensors = cross_batch_tensors(0, R, 1, 1, 4, 8, torch.float32)
    grad_RHLD = cross_batch_tensors(1, R, 1, 1, 4, 8)[0].detach()
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
