"""CrossBatch (paper, section 3.2): in a memory layer each context also attends to additional contexts of the batch.

One softmax covers the causal local context and every token of the additional contexts that the plan (`plan.py`) names.
Local keys carry RoPE by their position; the caller gives the *far* keys, what additional contexts show of themselves
(FoT: position 0 of the local window). Where the rows of a batch are spread over several ranks, far keys and values are
gathered from all of them (`gather.py`), and the plan names rows of any rank.

Cost: the attention is done a part at a time and merged by log-sum-exp (`attention.py`), forward and backward, so the
memory is that of a plain causal step (and, on several ranks, the keys and values of all F rows): no [R, d, L, H, D]
tensor of additional keys, no [L, d * L] scores. The time grows with the number of additional contexts. On a CUDA device
the same is one call of FlexAttention with a block mask made from the plan.

Under torch.compile the parts run outside the graph (a graph break in each memory layer); there are no second
derivatives.

Shapes: R rows, F rows of all ranks (R on one), L tokens a context, d additional contexts, H query heads, Hk key/value
heads, D head size, N contexts attended at once, M = N * L keys.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fot_model.attention import attend, attend_backward, merge, wide_dtype
from fot_model.gather import gather_rows

CONTEXTS_AT_ONCE = 8  # bounds the keys that are copied together: [1, Hk, 8 * L, D]


def cross_batch_attention(
    q_RHLD: Tensor,
    k_RHkLD: Tensor,
    v_RHkLD: Tensor,
    far_k_RHkLD: Tensor,
    far_v_RHkLD: Tensor,
    plan_Rd: Tensor,
    scale: float,
    document_ids_RL: Tensor | None = None,
    local: bool = True,
    differentiable: bool = True,
    ranks: ProcessGroup | None = None,
) -> Tensor:
    """One softmax over the causal local context and all additional contexts of the plan. Returns [R, H, L, D].

    `document_ids_RL` keeps local attention inside each of the documents joined in a row. Without `local`, additional
    contexts alone; rows that see none get zeros. Unless `differentiable`, far keys and values get no gradient.

    With `ranks` the rows are this rank's own: rank i of the group holds rows i * R to (i + 1) * R - 1 of those that
    the plan names.
    """
    if not differentiable:
        far_k_RHkLD, far_v_RHkLD = _detached(far_k_RHkLD), _detached(far_v_RHkLD)
    far_k_FHkLD, far_v_FHkLD = far_k_RHkLD, far_v_RHkLD
    if ranks is not None:  # both in one collective
        far_k_FHkLD, far_v_FHkLD = gather_rows(torch.stack([far_k_RHkLD, far_v_RHkLD], dim=1), ranks).unbind(1)
    attention = flex_cross_batch if q_RHLD.is_cuda else merged_cross_batch
    return attention(q_RHLD, k_RHkLD, v_RHkLD, far_k_FHkLD, far_v_FHkLD, plan_Rd, scale, document_ids_RL, local)


@torch.compiler.disable  # a detached view as a graph's output is refused
def _detached(x: Tensor) -> Tensor:
    return x.detach()


@torch.compiler.disable
def merged_cross_batch(
    q_RHLD: Tensor,
    k_RHkLD: Tensor,
    v_RHkLD: Tensor,
    far_k_FHkLD: Tensor,
    far_v_FHkLD: Tensor,
    plan_Rd: Tensor,
    scale: float,
    document_ids_RL: Tensor | None,
    local: bool,
) -> Tensor:
    """Part by part; see `cross_batch_attention`."""
    plan = [[row for row in seen if row >= 0] for seen in plan_Rd.tolist()]
    seen_R1LL = None if document_ids_RL is None else same_document(document_ids_RL.to(q_RHLD.device))
    return _MergedCrossBatch.apply(q_RHLD, k_RHkLD, v_RHkLD, far_k_FHkLD, far_v_FHkLD, plan, scale, seen_R1LL, local)


def same_document(document_ids_RL: Tensor) -> Tensor:
    """Bool [R, 1, L, L]: query and key are of one document."""
    return document_ids_RL[:, None, :, None] == document_ids_RL[:, None, None, :]


class _MergedCrossBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, *how: Any) -> Tensor:
        plan, scale, seen, local = how
        if local:
            out_RHLD, lse_RHL = attend(q, k, v, scale, causal=True, seen=seen)
        else:
            out_RHLD = torch.zeros_like(q)
            lse_RHL = torch.full(q.shape[:3], -torch.inf, dtype=wide_dtype(q), device=q.device)
        out_RHLD = out_RHLD.to(lse_RHL.dtype)  # the sum of many parts is kept in float32
        for row, others in _parts(plan):
            mine = slice(row, row + 1)
            part = attend(q[mine], _joined(far_k, others), _joined(far_v, others), scale)
            out_RHLD[mine], lse_RHL[mine] = merge((out_RHLD[mine], lse_RHL[mine]), part)
        out = out_RHLD.to(q.dtype)
        ctx.save_for_backward(q, k, v, far_k, far_v, out, lse_RHL, seen)
        ctx.how = (plan, scale, local)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RHLD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, far_k, far_v, out, lse, seen = ctx.saved_tensors
        plan, scale, local = ctx.how
        grad_RHLD = grad_RHLD.contiguous()
        if local:
            grads = attend_backward(grad_RHLD, q, k, v, out, lse, scale, causal=True, seen=seen)
        else:
            grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        grad_q, grad_k, grad_v = grads
        grad_q = grad_q.to(lse.dtype)  # sums of many parts are kept in float32
        grad_far_k, grad_far_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (far_k, far_v))
        for row, others in _parts(plan):
            mine = slice(row, row + 1)
            of_q, of_k, of_v = attend_backward(
                grad_RHLD[mine], q[mine], _joined(far_k, others), _joined(far_v, others), out[mine], lse[mine], scale
            )
            grad_q[mine] += of_q
            for other, of_k_HkLD, of_v_HkLD in zip(others, _apart(of_k, others), _apart(of_v, others), strict=True):
                grad_far_k[other] += of_k_HkLD
                grad_far_v[other] += of_v_HkLD
        gradients = (grad_q, grad_k, grad_v, grad_far_k, grad_far_v)
        return (*(gradient.to(q.dtype) for gradient in gradients), None, None, None, None)


def _parts(plan: list[list[int]]) -> list[tuple[int, list[int]]]:
    """(row, some of the rows that it sees), each pair once."""
    return [
        (row, seen[start : start + CONTEXTS_AT_ONCE])
        for row, seen in enumerate(plan)
        for start in range(0, len(seen), CONTEXTS_AT_ONCE)
    ]


def _joined(x_RHkLD: Tensor, rows: list[int]) -> Tensor:
    """The contexts of N rows one after the other: [1, Hk, N * L, D]."""
    return torch.cat([x_RHkLD[row] for row in rows], dim=1)[None]


def _apart(x_1HkMD: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """What `_joined` joined: N tensors [Hk, L, D]."""
    return x_1HkMD[0].chunk(len(rows), dim=1)


def flex_cross_batch(
    q_RHLD: Tensor,
    k_RHkLD: Tensor,
    v_RHkLD: Tensor,
    far_k_FHkLD: Tensor,
    far_v_FHkLD: Tensor,
    plan_Rd: Tensor,
    scale: float,
    document_ids_RL: Tensor | None,
    local: bool,
) -> Tensor:
    """The batch as one long sequence: Q = R * L queries against R * L local and F * L far keys, of which a block mask
    leaves those that the plan allows. See `cross_batch_attention`."""
    R, _, L, _ = q_RHLD.shape
    F = far_k_FHkLD.shape[0]
    plan_Rd = plan_Rd.to(q_RHLD.device, torch.long)
    # The K = R + F + 1 columns are contexts of keys, local and far ones; the last takes the padding.
    sees_RK = torch.zeros(R, R + F + 1, dtype=torch.bool, device=q_RHLD.device)
    sees_RK.scatter_(1, (R + plan_Rd).where(plan_Rd >= 0, R + F), True)
    documents_Q = (
        torch.zeros(R * L, dtype=torch.long, device=q_RHLD.device)
        if document_ids_RL is None
        else document_ids_RL.flatten().to(q_RHLD.device)
    )

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        far = sees_RK[query // L, key // L]
        if not local:
            return far
        near = (query // L == key // L) & (key <= query)
        return far | near & (documents_Q[query] == documents_Q[key % (R * L)])

    compiled = q_RHLD.is_cuda
    block_mask, flex = _flex(compiled)
    mask = block_mask(allowed, None, None, R * L, (R + F) * L, device=str(q_RHLD.device))
    out = flex(
        _one_sequence(q_RHLD),
        torch.cat([_one_sequence(k_RHkLD), _one_sequence(far_k_FHkLD)], dim=2),
        torch.cat([_one_sequence(v_RHkLD), _one_sequence(far_v_FHkLD)], dim=2),
        block_mask=mask,
        scale=scale,
        enable_gqa=q_RHLD.shape[1] != k_RHkLD.shape[1],
    )
    return out[0].unflatten(1, (R, L)).transpose(0, 1)


def _one_sequence(x_RHLD: Tensor) -> Tensor:
    """[1, H, R * L, D]."""
    return x_RHLD.transpose(0, 1).flatten(1, 2)[None]


@cache
def _flex(compiled: bool) -> tuple[Any, Any]:
    if not compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask), torch.compile(flex_attention)
