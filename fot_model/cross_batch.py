"""CrossBatch (paper, section 3.2): in a memory layer each context also attends to additional contexts of the batch.

A *plan* says who sees whom: a long tensor [R, d] that holds, for every row (context) of the batch, the rows it sees
besides itself, padded with -1. Keys and values of these rows are differentiated and nothing inside them is masked.
Local keys carry RoPE by their position, keys of additional contexts stand at position 0 of the local window.

Cost: the portable path below gathers the additional keys and values, O(R * d * L * H * D) memory, and runs one
scaled-dot-product attention over (1 + d) * L keys.

Shapes: R rows, L tokens a context, d additional contexts, H heads, D head size, G document groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def cross_batch_plan(
    group_R: Sequence[int],
    segment_R: Sequence[int],
    related_GG: Sequence[Sequence[bool]],
    segments: Sequence[tuple[int, int]],
) -> Tensor:
    """Plan [R, d] by a table of (positives, negatives) per segment (LongLLaMA: 3B uses (0,0) (1,1) (2,1) (3,0)).

    Rows belong to document groups: `group_R` names the group of a row and `segment_R` its place among the group's
    consecutive contexts. A row at segment j sees the `segments[j][0]` contexts right before it in its group
    (positives) and `segments[j][1]` contexts of other groups (negatives), the ones at segment j - 1 first, then
    earlier, then later ones. Groups that share a document (`related_GG`) never serve each other as negatives, so a
    row may get fewer than asked for.

    Raises ValueError where a segment asks for more positives than there are contexts before it.
    """
    for segment, (positives, _) in enumerate(segments):
        if positives > segment:
            raise ValueError(
                f"segment {segment} asks for {positives} positives, but only {segment} contexts of its document "
                f"come before it"
            )
    row_of = {(group, segment): row for row, (group, segment) in enumerate(zip(group_R, segment_R, strict=True))}
    groups = sorted(set(group_R))
    plan: list[list[int]] = []
    for group, segment in zip(group_R, segment_R, strict=True):
        positives, negatives = segments[segment]
        own = [row_of[group, segment - back] for back in range(1, positives + 1)]
        place = groups.index(group)
        others = [other for other in groups[place + 1 :] + groups[:place] if not related_GG[group][other]]
        order = sorted(range(len(segments)), key=lambda at: (at >= segment, abs(at - (segment - 1))))
        candidates = [row_of[other, at] for at in order for other in others if (other, at) in row_of]
        plan.append(own + candidates[:negatives])
    return pad_plan(plan)


def pad_plan(plan: Sequence[Sequence[int]]) -> Tensor:
    """Rows of unequal length to one long tensor [R, d], padded with -1. Asserts that no row sees itself."""
    width = max((len(seen) for seen in plan), default=0)
    for row, seen in enumerate(plan):
        assert row not in seen, f"row {row} sees itself"
    padded = [[*seen, *[-1] * (width - len(seen))] for seen in plan]
    return torch.tensor(padded, dtype=torch.long).view(len(plan), width)


def cross_batch_attention(
    q_RHLD: Tensor, k_RHLD: Tensor, v_RHLD: Tensor, far_k_RHLD: Tensor, plan_Rd: Tensor, scale: float
) -> Tensor:
    """One softmax over the causal local context and all additional contexts of the plan. Returns [R, H, L, D].

    `k_RHLD` are the local keys with positions, `far_k_RHLD` the same keys as additional contexts show them (position
    0: without rotation). Keys and values have as many heads as the queries.
    """
    R, _, L, _ = q_RHLD.shape
    d = plan_Rd.shape[1]
    seen_Rd = plan_Rd >= 0
    rows_Rd = plan_Rd.clamp(min=0)

    def with_additional(local_RHLD: Tensor, far_RHLD: Tensor) -> Tensor:
        additional_RHdLD = far_RHLD[rows_Rd].transpose(1, 2)  # [R, d, H, L, D] -> [R, H, d, L, D]
        return torch.cat([local_RHLD, additional_RHdLD.flatten(2, 3)], dim=2)

    causal_RLL = torch.ones(L, L, dtype=torch.bool, device=q_RHLD.device).tril().expand(R, L, L)
    additional_RLdL = seen_Rd[:, None, :, None].expand(R, L, d, L)
    mask_R1LK = torch.cat([causal_RLL, additional_RLdL.flatten(2)], dim=2)[:, None]
    return functional.scaled_dot_product_attention(
        q_RHLD,
        with_additional(k_RHLD, far_k_RHLD),
        with_additional(v_RHLD, v_RHLD),
        attn_mask=mask_R1LK,
        scale=scale,
    )
