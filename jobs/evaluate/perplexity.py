"""Perplexity by context length, on the same tokens for every length.

A window is `L` consecutive tokens of a held-out document (the local context). At context c x L the c - 1 windows before
it are read into an empty memory, one after the other, and then the window is scored. Only windows with enough of the
document before them for the longest context are taken, so that the lengths differ in context alone.

Shapes: B windows, L tokens a window.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fot_model import FotCache, FotLlamaForCausalLM
from pipelines.cluster import run_tasks
from pipelines.dataset import TokenDataset
from pipelines.errors import UserError
from pipelines.progress import Progress

WINDOWS_AT_ONCE = 8


@dataclass(frozen=True)
class Scoring:
    """What is scored: a model with its memory layers' settings (`mem_layers`, `mem_positionals`; for a plain LLaMA
    too), on a data set (`shards`, their index `documents`), at multiples (`contexts`) of the local context (`local`,
    tokens)."""

    model: Path
    memory: Mapping[str, Any]
    shards: Path
    documents: Path
    local: int
    contexts: Sequence[int]


@dataclass(frozen=True)
class Window:
    """Tokens [start, start + L] of a document are scored: L predictions from `start` on."""

    document: int
    start: int


def choose_windows(dataset: TokenDataset, local: int, longest: int, count: int) -> list[Window]:
    """Up to `count` windows of held-out documents, spread evenly over the documents and within each.

    Raises UserError where no document is long enough.
    """
    needed = longest * local + 1  # one more token: the last label
    documents = dataset.held_out
    long_enough = documents[dataset.length[documents] >= needed].tolist()
    if not long_enough:
        longest_document = int(dataset.length[documents].max()) if len(documents) else 0
        raise UserError(
            f"no held-out document has the {needed} tokens that perplexity at {longest} x {local} tokens needs (the "
            f"longest of {len(documents)} has {longest_document}): hold out longer documents "
            f"(data.sources.N.held_out) or lower evaluation.perplexity.contexts"
        )
    # Round after round every document gives a window; documents in an order without meaning, sources mixed.
    long_enough.sort(key=lambda number: hashlib.sha256(dataset.id(number).encode()).digest())
    offered = {number: (int(dataset.length[number]) - 1) // local - longest + 1 for number in long_enough}
    quota = dict.fromkeys(long_enough, 0)
    left = count
    while left and (open_ones := [number for number in long_enough if quota[number] < offered[number]]):
        for number in open_ones[:left]:
            quota[number] += 1
        left -= len(open_ones[:left])
    return [
        Window(number, (longest - 1 + turn * offered[number] // quota[number]) * local)
        for number in long_enough
        for turn in range(quota[number])
    ]


def perplexity(scoring: Scoring, count: int, name: str) -> dict[int, float]:
    """{multiple of the local context: perplexity per token} on `count` windows of held-out documents, as Ray tasks.

    Raises UserError where no document is long enough.
    """
    dataset = TokenDataset(scoring.shards, scoring.documents)
    windows = choose_windows(dataset, scoring.local, max(scoring.contexts), count)
    batches = [windows[first : first + WINDOWS_AT_ONCE] for first in range(0, len(windows), WINDOWS_AT_ONCE)]
    results: list[dict[int, float]] = [{} for _ in batches]
    tasks = run_tasks(window_losses, [(scoring, batch) for batch in batches])
    with Progress(name, len(windows), "windows") as progress, closing(tasks):
        for number, losses in tasks:
            results[number] = losses
            progress.advance(len(batches[number]))
    return {
        context: math.exp(math.fsum(result[context] for result in results) / (len(windows) * scoring.local))
        for context in scoring.contexts
    }


@torch.inference_mode()
def window_losses(scoring: Scoring, windows: list[Window]) -> dict[int, float]:
    """One task: summed loss (nats) of the windows at each context."""
    tokens, local = TokenDataset(scoring.shards, scoring.documents), scoring.local
    model = FotLlamaForCausalLM.from_pretrained(scoring.model, **scoring.memory).eval()
    cpu = torch.device("cpu")
    return {context: score(model, tokens, windows, context, local, cpu).sum().item() for context in scoring.contexts}


def score(
    model: FotLlamaForCausalLM,
    tokens: TokenDataset,
    windows: list[Window],
    context: int,
    local: int,
    device: torch.device,
) -> torch.Tensor:
    """Loss (nats) of each window [B] at `context` times the local context; to be called without gradients. `device`:
    where the model computes, though its parameters may lie elsewhere."""
    cache = FotCache(model.config)
    for back in range(context - 1, -1, -1):
        inputs_BL, labels_BL = _read(tokens, windows, back * local, local)
        logits_BLV = model(inputs_BL.to(device), past_key_values=cache, last_context_length=local).logits
        cache.flush()
    losses_BL = functional.cross_entropy(logits_BLV.double().transpose(1, 2), labels_BL.to(device), reduction="none")
    return losses_BL.sum(1)


def _read(tokens: TokenDataset, windows: list[Window], back: int, local: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        tokens.tokens(window.document, window.start - back, window.start - back + local + 1).astype(np.int64)
        for window in windows
    ]
    batch = torch.from_numpy(np.stack(rows))
    return batch[:, :-1], batch[:, 1:]
