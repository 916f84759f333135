"""What a model in training can do already: held-out perplexity by context length, attention mass on positives.

All ranks measure together, each its share; under ZeRO-3 every rank must make the same number of forward passes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fot_model import FotLlamaForCausalLM, attention_mass
from jobs.config.training import MemoryRows, Objective
from jobs.measures.scoring import score
from jobs.measures.windows import Window, read_contexts
from jobs.train.objective import seen_by
from pipelines.batches.dataset import TokenDataset
from pipelines.batches.loader import TensorBatch

TOKENS_AT_ONCE = 4096


@contextmanager
def evaluating(model: FotLlamaForCausalLM) -> Iterator[None]:
    """No gradients and no training mode for the block."""
    model.eval()
    try:
        with torch.no_grad():  # inference_mode would leave ZeRO-3 with parameters that cannot be trained
            yield
    finally:
        model.train()


def held_out_perplexity(
    model: FotLlamaForCausalLM,
    dataset: TokenDataset,
    windows: Sequence[Window],
    contexts: Sequence[int],
    local: int,
    rank: int,
    world: int,
    device: torch.device,
) -> dict[str, float]:
    """{"perplexity/4x": ...} of the windows at multiples of the local context; memory layers are needed beyond 1x."""
    share = -(-len(windows) // world)
    mine = list(windows[rank * share : (rank + 1) * share])
    padded = [*mine, *[windows[0]] * (share - len(mine))]
    at_once = max(1, TOKENS_AT_ONCE // local)
    found = {}
    for context in contexts if model.config.mem_layers else [1]:
        batches = [padded[first : first + at_once] for first in range(0, share, at_once)]
        texts = (torch.from_numpy(read_contexts(dataset, batch, context, local)) for batch in batches)
        parts = [score(model, text_BT, local, device) for text_BT in texts]
        total = torch.cat(parts)[: len(mine)].sum()
        torch.distributed.all_reduce(total)
        found[f"perplexity/{context}x"] = math.exp(total.item() / (len(windows) * local))
    return found


def mass_on_positives(
    model: FotLlamaForCausalLM,
    batch: TensorBatch,
    objective: Objective,
    step: int,
    seed: int,
    team: torch.distributed.ProcessGroup | None,
) -> dict[str, float]:
    """{"attention_mass/layer8": r_d over all heads, "attention_mass/layer8_best_head": ...} of a micro-batch a team."""
    if not isinstance(objective, MemoryRows):
        return {}
    arguments: dict[str, Any] = seen_by(batch, objective, step, seed, team)
    with attention_mass(model, batch.document_ids) as mass:
        model(batch.input_ids, **arguments)
    found = {}
    for layer, own in mass.layers.items():
        heads = torch.zeros(2, model.config.num_attention_heads, dtype=torch.float64)
        heads += torch.stack([torch.as_tensor(own.positive), torch.as_tensor(own.additional)])
        heads = heads.float().to(batch.input_ids.device)
        torch.distributed.all_reduce(heads)
        positive_H, additional_H = heads
        if additional_H.sum() > 0:
            found[f"attention_mass/layer{layer}"] = (positive_H.sum() / additional_H.sum()).item()
            found[f"attention_mass/layer{layer}_best_head"] = (positive_H / additional_H).max().item()
    return found
