"""Which held-out text an evaluation reads: windows of one local context, and contexts of other documents.

Everything is decided by the documents' ids and a seed, and spread over the documents.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.batches.dataset import TokenDataset
from pipelines.tokens.shards import Manifest
from pipelines.workflow.errors import UserError


@dataclass(frozen=True)
class Window:
    """Tokens [start, start + L] of a document: L inputs from `start` on, and L labels one further."""

    document: int
    start: int


def choose_windows(
    dataset: TokenDataset,
    local: int,
    longest: int,
    windows: int,
    setting: str = "evaluation.perplexity.contexts",
) -> list[Window]:
    """Up to `windows` windows of held-out documents with `longest - 1` before each, spread evenly over the documents
    and within each; those of a document follow each other.

    Raises UserError where no document is long enough.
    """
    long_enough = choose_documents(dataset, local, longest, setting)
    # Round after round every document gives a window.
    offered = {number: (int(dataset.length[number]) - 1) // local - longest + 1 for number in long_enough}
    quota = dict.fromkeys(long_enough, 0)
    left = windows
    while left and (open_ones := [number for number in long_enough if quota[number] < offered[number]]):
        for number in open_ones[:left]:
            quota[number] += 1
        left -= len(open_ones[:left])
    return [
        Window(number, (longest - 1 + turn * offered[number] // quota[number]) * local)
        for number in long_enough
        for turn in range(quota[number])
    ]


def choose_documents(dataset: TokenDataset, local: int, longest: int, setting: str) -> list[int]:
    """Held-out documents of `longest` windows and more, in an order without meaning, sources mixed.

    Raises UserError where there is none.
    """
    needed = longest * local + 1  # one more token: the last label
    long_enough = _mixed(dataset, needed)
    if not long_enough:
        documents = dataset.held_out
        longest_document = int(dataset.length[documents].max()) if len(documents) else 0
        raise UserError(
            f"no held-out document has the {needed} tokens that {longest} x {local} tokens of context need (the "
            f"longest of {len(documents)} has {longest_document}): hold out longer documents "
            f"(data.sources.N.held_out) or lower {setting}"
        )
    return list(long_enough)


@lru_cache(maxsize=4)
def _mixed(dataset: TokenDataset, tokens: int) -> tuple[int, ...]:
    """Held-out documents of so many tokens, by the hash of their ids. To look up all ids takes long, and an evaluation
    asks again and again."""
    documents = dataset.held_out
    long_enough: list[int] = documents[dataset.length[documents] >= tokens].tolist()
    return tuple(sorted(long_enough, key=lambda number: hashlib.sha256(dataset.id(number).encode()).digest()))


def read_windows(dataset: TokenDataset, windows: list[Window], length: int) -> np.ndarray:
    """`length` tokens from the start of each window on: int64 [B, length]."""
    rows = [dataset.tokens(window.document, window.start, window.start + length) for window in windows]
    return np.stack(rows).astype(np.int64)


def read_contexts(dataset: TokenDataset, windows: list[Window], context: int, local: int) -> np.ndarray:
    """The windows with the `context - 1` before each and the last label: int64 [B, context x L + 1]."""
    starts = [Window(window.document, window.start - (context - 1) * local) for window in windows]
    return read_windows(dataset, starts, context * local + 1)


def other_documents(dataset: TokenDataset, document: int, local: int) -> list[int]:
    """Held-out documents of one local context and more that neither are this one nor (nearly) copy it."""
    held_out = dataset.held_out
    other = dataset.cluster[held_out] != dataset.cluster[document]
    found: list[int] = held_out[other & (dataset.length[held_out] >= local)].tolist()
    return found


def fewest_others(dataset: TokenDataset, windows: Iterable[Window], local: int) -> int:
    """How many whole local contexts other documents have, for the window that has the fewest."""
    documents = dict.fromkeys(window.document for window in windows)
    return min(int((dataset.length[other_documents(dataset, own, local)] // local).sum()) for own in documents)


def one_after_another(dataset: TokenDataset, documents: list[int], local: int, seed: str) -> Iterator[Window]:
    """All whole local contexts of one document, then those of the next; in an order drawn."""
    for document in random.Random(seed).sample(documents, len(documents)):
        for place in range(int(dataset.length[document]) // local):
            yield Window(document, place * local)


def one_of_each(dataset: TokenDataset, documents: list[int], local: int, seed: str) -> Iterator[Window]:
    """A whole local context of each document, then another of each, as long as there are any; order and place drawn."""
    draw = random.Random(seed)
    order = draw.sample(documents, len(documents))
    offered = {document: int(dataset.length[document]) // local for document in order}
    first = {document: draw.randrange(offered[document]) for document in order}
    for turn in range(max(offered.values(), default=0)):
        for document in order:
            if turn < offered[document]:
                yield Window(document, (first[document] + turn) % offered[document] * local)


def source_names(manifest: Manifest) -> list[str]:
    """The names of the recipe's sources, in its order, in which `TokenDataset.source` counts."""
    return [source["name"] for source in manifest.recipe["sources"]]
