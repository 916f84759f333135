"""Attention mass on positives r_d, d = 1 ... 256 (paper, section 4.2), in reading.

A held-out window asks. In memory are d contexts, each a window of its own: the positive, which is the window before it,
and d - 1 windows of other documents. r_d is the attention mass on the positive divided by the mass on all d, by memory
layer: over all heads, and of the head for which it is largest. 1/d: documents are not told apart.

As in training every context is computed without those after it, here each by itself, with an empty memory. In training
a context sees additional contexts of its own; so behind the first memory layer its keys are not quite these.

The d_max contexts are read once, in batches; then memory is truncated to d contexts for each d, and the window asks.

Shapes: N contexts, L tokens a context, Hk key/value heads, H heads, D head size.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from fot_model import FotCache, FotLlamaForCausalLM, memory_mass
from fot_model.memory import Memory
from jobs.common.plot import plot_mass
from jobs.config.evaluation import AttentionMassSettings
from jobs.evaluate.cells import Cell, Json
from jobs.evaluate.subject import (
    Subject,
    check_tokenizer,
    load_model,
    memory_bytes,
    new_cache,
    open_documents,
    read_config,
    read_into,
    weights_bytes,
)
from jobs.measures.result import Point, Result, Table
from jobs.measures.windows import (
    Window,
    choose_windows,
    fewest_others,
    one_of_each,
    other_documents,
    read_windows,
)
from pipelines.batches.dataset import TokenDataset
from pipelines.workflow.errors import UserError

TOKENS_AT_ONCE = 4096  # of contexts that are read side by side


def cells(subject: Subject, settings: AttentionMassSettings) -> list[Cell]:
    """One for each window that asks. Raises UserError where there are fewer contexts than d, and for a model without
    memory layers."""
    dataset, local, largest = open_documents(subject), subject.local, max(settings.d)
    if not read_config(subject.model).get("mem_layers"):
        raise UserError(f"attention_mass: {subject.model} has no memory layers: leave it out or give a FoT model")
    check_tokenizer(subject, dataset)
    check_documents(dataset, local, settings)
    weights = weights_bytes(subject.model, subject.dtype)
    held = memory_bytes(subject.model, subject.memory, largest * local, _at_once(local) * local, dtype=subject.dtype)
    return [
        Cell(
            key=_key(window),
            function=measure,
            arguments=(subject, window, sorted(set(settings.d))),
            tokens=(largest + len(set(settings.d))) * local,
            bytes=weights + held,
            weights=weights,
            what=f"attention mass with {largest} contexts of {local} tokens in memory",
        )
        for window in _windows(dataset, local, settings)
    ]


def check_documents(dataset: TokenDataset, local: int, settings: AttentionMassSettings) -> None:
    """Raises UserError where held-out documents are too short or too few."""
    there = fewest_others(dataset, _windows(dataset, local, settings), local)
    if there < max(settings.d) - 1:
        raise UserError(
            f"evaluation.attention_mass.d: {max(settings.d)} needs {max(settings.d) - 1} contexts of {local} tokens of "
            f"other held-out documents, there are {there}: lower it to at most {there + 1}, or hold out more documents"
        )


def measure(subject: Subject, window: Window, amounts: list[int]) -> Json:
    """A cell: {d: {layer: [mass on the positive by head, mass on all d contexts by head]}} of one window."""
    model, dataset, local = (
        load_model(subject.model, subject.model, subject.dtype),
        open_documents(subject),
        subject.local,
    )
    others = other_documents(dataset, window.document, local)
    seed = f"{subject.seed}/attention mass/{dataset.id(window.document)}/{window.start}"
    negatives = islice(one_of_each(dataset, others, local, seed), max(amounts) - 1)
    contexts = [Window(window.document, window.start - local), *negatives]
    memory = new_cache(model, subject.memory).memory
    read_beside(model, memory, torch.from_numpy(read_windows(dataset, contexts, local)))
    cache = FotCache(model.config, memory)
    asks_1L = torch.from_numpy(read_windows(dataset, [window], local)).to(model.device)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for amount in sorted(amounts, reverse=True):
        cache.truncate(amount * local)
        with memory_mass(model, range(local)) as mass:
            model(asks_1L, past_key_values=cache, last_context_length=local, logits_to_keep=1)
        found[str(amount)] = {
            str(layer): [torch.as_tensor(own.positive).tolist(), torch.as_tensor(own.additional).tolist()]
            for layer, own in mass.layers.items()
        }
    return found


def read_beside(model: FotLlamaForCausalLM, memory: Memory, contexts_NL: torch.Tensor) -> None:
    """Read each of these contexts with an empty memory of its own, and append its keys and values to `memory`, a single
    row."""
    L = contexts_NL.shape[1]
    for some_NL in contexts_NL.split(_at_once(L)):
        own = FotCache(model.config)
        read_into(model, own, some_NL, L)
        state = own.memory.state_dict()
        for layer in model.config.mem_layers:
            memory.append(layer, *(_one_row(state[f"{layer}.{name}"]) for name in ("keys", "values")))


def _one_row(x_NHkLD: torch.Tensor) -> torch.Tensor:
    """[1, Hk, N * L, D]."""
    return x_NHkLD.transpose(0, 1).flatten(1, 2)[None]


def summarize(subject: Subject, settings: AttentionMassSettings, results: Mapping[str, Json], output: Path) -> Result:
    """r_d by layer and d, beside 1/d."""
    windows = _windows(open_documents(subject), subject.local, settings)
    measured = [results[_key(window)] for window in windows]
    amounts = sorted(set(settings.d))
    curves: dict[str, dict[int, float]] = {}  # by name of a layer and of its best head
    for layer in measured[0][str(amounts[0])]:
        for d in amounts:
            masses_2H = torch.tensor([result[str(d)][layer] for result in measured], dtype=torch.float64).sum(0)
            positive_H, all_H = masses_2H
            curves.setdefault(f"layer{layer}", {})[d] = (positive_H.sum() / all_H.sum()).item()
            curves.setdefault(f"layer{layer}_best_head", {})[d] = (positive_H / all_H).max().item()
    rows = [[d, *(curve[d] for curve in curves.values()), 1 / d] for d in amounts]
    note = (
        f"{len(windows)} held-out windows of {subject.local:,} tokens ask; in memory are the window before and d - 1 "
        f"of other documents. All keys count, with top-k memory too."
    )
    shown = {name.replace("layer", "layer ").replace("_best_head", ", best head"): own for name, own in curves.items()}
    plot_mass(shown, output / "attention_mass.png")
    points = [Point(f"attention_mass/{name}", d, value) for name, curve in curves.items() for d, value in curve.items()]
    table = Table("Attention mass on the own document, r_d", ["d", *curves, "1/d"], rows, note)
    return Result("attention_mass", settings.model_dump(mode="json"), points, [table], ["attention_mass.png"])


def _windows(dataset: TokenDataset, local: int, settings: AttentionMassSettings) -> list[Window]:
    """Windows that ask: each has one before it."""
    return choose_windows(dataset, local, 2, settings.samples, "the local context")


def _at_once(local: int) -> int:
    """Contexts read side by side."""
    return max(1, TOKENS_AT_ONCE // local)


def _key(window: Window) -> str:
    return f"{window.document}-{window.start}"
