"""What a training's objective asks of a batch: who sees whom at a step, and the loss.

Shapes: R rows of a micro-batch, d additional contexts, L tokens a context.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fot_model import c_prev_plan, check_plan, cross_batch_plan
from jobs.config.training import (
    Draw,
    FotObjective,
    MemorizingObjective,
    Objective,
    OwnObjective,
    StandardObjective,
    Switch,
    TransformerXlObjective,
)
from pipelines.batches.loader import TensorBatch
from pipelines.batches.sampler import MicroBatch
from pipelines.workflow.errors import UserError


def plan_of(objective: Objective, rows: MicroBatch | TensorBatch, step: int, seed: int) -> Tensor | None:
    """Plan [R, d] of a step's micro-batch; None where no row sees another."""
    match objective:
        case StandardObjective():
            return None
        case FotObjective(segments=None):
            return c_prev_plan(rows.group, rows.segment, rows.related, d_at(objective, step, seed))
        case FotObjective(segments=segments) if segments is not None:
            table: Sequence[tuple[int, int]] = segments
        case OwnObjective():
            return _checked(objective.plan(rows, step, seed), rows, objective.kind)
        case MemorizingObjective(contexts=contexts):
            table = [(earlier, 0) for earlier in range(contexts)]
        case TransformerXlObjective(contexts=contexts):
            table = [(min(earlier, 1), 0) for earlier in range(contexts)]
    return cross_batch_plan(rows.group, rows.segment, rows.related, table)


def _checked(plan_Rd: Any, rows: MicroBatch | TensorBatch, kind: str) -> Tensor | None:
    """A plugin's plan. Raises UserError for what is none, and where a row would see the future of its document, or as
    negative what is related to it."""
    if plan_Rd is None:
        return None
    try:
        check_plan(plan_Rd, len(rows.group))
    except ValueError as error:
        raise UserError(f"objective {kind}: {error}") from None
    for row, seen in enumerate(plan_Rd.tolist()):
        own = rows.group[row]
        for other in (each for each in seen if each >= 0):
            if rows.group[other] == own and other > row:
                raise UserError(f"objective {kind}: plan: row {row} sees row {other}, the future of its own document")
            if rows.group[other] != own and rows.related[own][rows.group[other]]:
                raise UserError(
                    f"objective {kind}: plan: row {row} sees row {other}, whose group is related to its own: pass over "
                    f"what rows.related names"
                )
    return torch.as_tensor(plan_Rd, dtype=torch.int64)


def d_at(objective: FotObjective, step: int, seed: int) -> int:
    """d at a step (from 0): a function of the step alone, so that a resumed training draws the same."""
    match objective.d:
        case Switch(first=first, until=until, then=then):
            return first if step < until else then
        case Draw(of=of):
            digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
            return of[int.from_bytes(digest, "big") % len(of)]
        case int(constant):
            return constant
        case None:
            raise AssertionError("a table has no d")


def batch_loss(
    model: torch.nn.Module,
    batch: TensorBatch,
    objective: Objective,
    step: int,
    seed: int,
    labels: int,
    team: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The share of this rank's rows of a micro-batch, which lie on the model's device, in the step's next-token loss
    (nats): their sum over the step's `labels`, so that the sum of all shares is the mean over the step's labels."""
    seen = seen_by(batch, objective, step, seed, team)
    loss: Tensor = model(
        batch.input_ids, shift_labels=batch.labels, num_items_in_batch=max(1, labels), skip_logits=True, **seen
    ).loss
    return loss


def seen_by(
    batch: TensorBatch, objective: Objective, step: int, seed: int, team: torch.distributed.ProcessGroup | None
) -> dict[str, Any]:
    """The model's arguments that say what this rank's rows see."""
    arguments: dict[str, Any] = {"use_cache": False}
    if objective.separate_documents:
        arguments["document_ids"] = batch.document_ids
    plan_Rd = plan_of(objective, batch, step, seed)
    if plan_Rd is not None:
        own = slice(batch.first, batch.first + len(batch.input_ids))
        arguments |= {
            "plan": plan_Rd[own],
            "objective": "fot" if isinstance(objective, OwnObjective) else objective.kind,
            "ranks": team,
        }
    return arguments
