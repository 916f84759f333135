"""The CrossBatch plan: who sees whom (paper, section 3.2 and appendix).

A plan is a long tensor [R, d]: for every row (context) of the batch the rows it sees besides itself, padded with -1.
Rows of one document stand in the batch in the document's order. Three rules make plans; any other tensor of this form
that `check_plan` accepts is a plan too.

- `cross_batch_plan`: a table of (positives, negatives) for each segment of a document group (LongLLaMA's counts);
- `c_prev_plan`: the paper's small models: C_prev of the own document and of the d - 1 next ones;
- `longllama_plan`: LongLLaMA's code: the `reach` rows before, with packing and stepping.

Shapes: R rows, d additional contexts, L tokens a context, G document groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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

    Raises ValueError where a segment asks for more positives than there are contexts before it, and where rows name
    a segment or a group that the tables do not have.
    """
    for segment, (positives, negatives) in enumerate(segments):
        if min(positives, negatives) < 0:
            raise ValueError(
                f"segment {segment} asks for {positives} positives and {negatives} negatives: give 0 or more"
            )
        if positives > segment:
            raise ValueError(
                f"segment {segment} asks for {positives} positives, but only {segment} contexts of its document "
                f"come before it"
            )
    row_of = _rows(group_R, segment_R, related_GG, len(segments))
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


def c_prev_plan(
    group_R: Sequence[int], segment_R: Sequence[int], related_GG: Sequence[Sequence[bool]], d: int
) -> Tensor:
    """Plan [R, d] of the paper's small models: a row sees the context before it in its own document (C_prev) and the
    ones at the same place in the d - 1 documents that come next, round the batch. First contexts see none.

    Rows are described as in `cross_batch_plan`; related groups are passed over. d = 1 has no negatives. Raises
    ValueError where d is more than there are groups.
    """
    groups = sorted(set(group_R))
    if not 1 <= d <= len(groups):
        raise ValueError(f"d is {d}, but the batch holds {len(groups)} document groups: give a d of 1 to {len(groups)}")
    row_of = _rows(group_R, segment_R, related_GG, max(segment_R) + 1)
    plan = []
    for group, segment in zip(group_R, segment_R, strict=True):
        place = groups.index(group)
        others = [other for other in groups[place + 1 :] + groups[:place] if not related_GG[group][other]]
        seen = [group, *others[: d - 1]]
        plan.append([row_of[other, segment - 1] for other in seen if (other, segment - 1) in row_of])
    return pad_plan(plan)


def longllama_plan(rows: int, reach: int, packing: int = 1, stepping: bool = False) -> Tensor:
    """Plan [R, d] of LongLLaMA's training code: a row sees the `reach` rows before it, as far as there are.

    `packing` consecutive rows hold consecutive contexts of one document. With `stepping` the reach grows within these:
    row j of a packing sees min(j * ceil((reach + 1) / (packing - 1)), reach) rows. Raises ValueError for a number of
    rows that is no multiple of `packing`.
    """
    if min(rows, reach, packing) < 1 or rows % packing:
        raise ValueError(
            f"{rows} rows, reach {reach}, packing {packing}: all must be positive and rows a multiple of packing"
        )
    step = -(-(reach + 1) // max(packing - 1, 1))
    plan = []
    for row in range(rows):
        own_reach = min(row % packing * step, reach) if stepping and packing > 1 else reach
        plan.append([row - back for back in range(1, min(own_reach, row) + 1)])
    return pad_plan(plan)


def pad_plan(plan: Sequence[Sequence[int]]) -> Tensor:
    """Rows of unequal length to one long tensor [R, d], padded with -1."""
    width = max((len(seen) for seen in plan), default=0)
    padded = [[*seen, *[-1] * (width - len(seen))] for seen in plan]
    return torch.tensor(padded, dtype=torch.long).view(len(plan), width)


def check_plan(plan_Rd: Tensor, rows: int, document_ids_RL: Tensor | None = None, own: range | None = None) -> None:
    """Raises ValueError where a row of the plan sees itself, a row that is not there, or a later row that holds a
    document of its own: its future.

    `rows`: how many the batch has; `own`: which of them plan and document_ids have a line for, by default all. The
    future can be told only among these.
    """
    own = range(rows) if own is None else own
    if not isinstance(plan_Rd, Tensor):
        raise ValueError(f"the plan is a {type(plan_Rd).__name__}: give a tensor, as pad_plan makes of lists")
    whole = not (plan_Rd.is_floating_point() or plan_Rd.is_complex() or plan_Rd.dtype == torch.bool)
    if plan_Rd.dim() != 2 or plan_Rd.shape[0] != len(own) or not whole:
        raise ValueError(
            f"the plan is a {plan_Rd.dtype} tensor {list(plan_Rd.shape)}: give whole numbers [{len(own)}, d], a line "
            f"for each row of the batch"
        )
    if document_ids_RL is not None and (document_ids_RL.dim() != 2 or document_ids_RL.shape[0] != len(own)):
        raise ValueError(f"document_ids {list(document_ids_RL.shape)}: give [{len(own)}, L], one for each token")
    ids = [] if document_ids_RL is None else document_ids_RL.tolist()
    documents = {row: set(held) for row, held in zip(own, ids, strict=False)}
    for row, seen in zip(own, plan_Rd.tolist(), strict=True):
        for other in seen:
            if not -1 <= other < rows:
                raise ValueError(f"plan: row {row} sees row {other}, but the batch has rows 0 to {rows - 1} (-1 pads)")
            if other == row:
                raise ValueError(f"plan: row {row} sees itself; its own context is always seen: leave it out (-1)")
            if other >= 0 and seen.count(other) > 1:
                raise ValueError(f"plan: row {row} sees row {other} twice: name it once")
            if other > row and other in documents and (shared := documents[row] & documents[other]):
                raise ValueError(
                    f"plan: row {row} sees row {other}, the future of its own document {min(shared)}: let it see "
                    f"earlier rows of its document only"
                )


def documents_of(position_ids: Tensor, document_ids_RL: Tensor | None, R: int, L: int) -> Tensor | None:
    """The document of each token [R, L], by where positions [1 or R, L] start again; `document_ids_RL` where it is
    given, and None where it is not and no row joins documents. No two documents of the batch get one number.

    Raises ValueError for positions that do not count on from 0 in each document: additional contexts lie at position 0.
    """
    if position_ids.shape not in ((1, L), (R, L)):
        raise ValueError(f"position_ids {list(position_ids.shape)}: give [{R}, {L}], one for each token")
    positions_RL = position_ids.expand(R, L)
    starts_RL = torch.ones_like(positions_RL, dtype=torch.bool)
    starts_RL[:, 1:] = positions_RL.diff(dim=1) != 1
    if (positions_RL[starts_RL] != 0).any():
        raise ValueError(
            "position_ids with a plan: let them count from 0 in each row, and in each document joined in it"
        )
    if document_ids_RL is None:
        return starts_RL.flatten().cumsum(0).view(R, L) if starts_RL[:, 1:].any() else None
    within_RL = document_ids_RL[:, 1:] == document_ids_RL[:, :-1]
    if (starts_RL[:, 1:] & within_RL.to(starts_RL.device)).any():
        raise ValueError("position_ids start again inside a document: document_ids must change there")
    return document_ids_RL


def _rows(
    group_R: Sequence[int], segment_R: Sequence[int], related_GG: Sequence[Sequence[bool]], segments: int
) -> dict[tuple[int, int], int]:
    """{(group, segment): row}. Raises ValueError for rows outside the tables or twice at one place."""
    groups = len(related_GG)
    if len(group_R) != len(segment_R):
        raise ValueError(f"group_R names {len(group_R)} rows, segment_R {len(segment_R)}: give both for each row")
    if any(len(line) != groups for line in related_GG):
        raise ValueError(f"related_GG has {groups} lines, but not all of {groups} columns: give a square table")
    row_of: dict[tuple[int, int], int] = {}
    for row, (group, segment) in enumerate(zip(group_R, segment_R, strict=True)):
        if not (0 <= group < groups and 0 <= segment < segments):
            raise ValueError(
                f"row {row} is segment {segment} of group {group}: there are {segments} segments and {groups} groups"
            )
        if (group, segment) in row_of:
            raise ValueError(f"rows {row_of[group, segment]} and {row} are both segment {segment} of group {group}")
        row_of[group, segment] = row
    for (group, segment), row in row_of.items():
        if segment and (group, segment - 1) not in row_of:
            raise ValueError(
                f"row {row} is segment {segment} of group {group}, but segment {segment - 1} of it is not there"
            )
    return row_of
