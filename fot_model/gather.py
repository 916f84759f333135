"""The rows of a batch that is spread over several processes, as each of them needs them: all rows, in rank order.

A context's keys and values may be attended to by rows on any rank, so their gradient is the sum of what all ranks
found: forward is an all-gather, backward a reduce-scatter. Every rank of the group must come to the same calls in the
same order, with tensors of the same shape, whether or not its own rows see anything.

Cost: with n ranks of R rows each, every rank receives (n - 1) * R rows forward and sends as many backward, those in
float32 or wider.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, all_gather_single, reduce_scatter_single

from fot_model.attention import wide_dtype


@torch.compiler.disable
def gather_rows(x: Tensor, ranks: ProcessGroup) -> Tensor:
    """[R, ...] of every rank to [n * R, ...] on each: rank i's rows are i * R to (i + 1) * R - 1. Nothing is sent
    backward where `x` needs no gradient."""
    return _GatherRows.apply(x, ranks)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        everything = x.new_empty(ranks.size() * x.shape[0], *x.shape[1:])
        all_gather_single(everything, x.contiguous(), group=ranks)
        return everything

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.to(wide_dtype(grad)).contiguous()  # many ranks' shares are summed in float32
        own = wide.new_empty(wide.shape[0] // ctx.ranks.size(), *wide.shape[1:])
        reduce_scatter_single(own, wide, group=ctx.ranks)
        return own.to(grad.dtype), None
