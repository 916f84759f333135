"""Near-duplicates: the documents of a data set whose MinHash signatures (pipelines/tokens/minhash.py) agree.

Pairs are found by banding. A signature is cut into bands, more of them than bins in which near-duplicates
may differ, so every such pair agrees in a whole band; documents that do are a bucket. A document is compared with two
of its bucket, the first and the one before it, so the cost is a sort a band and at most two comparisons a document and
band. Two near-duplicates are missed only where in each bucket they share others stand first and between them, and these
do not link them either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.tokens.minhash import BINS, MULTIPLIER

PAIRS = 2**13  # pairs compared at once: bounds the signatures in memory


@dataclass(frozen=True)
class NearDuplicates:
    """Documents 0 to N - 1 and what they nearly repeat, both [N] int64.

    `first`: the smallest earlier document found to be near, the document itself where there is none. Documents that are
    appended change nothing of it.
    `cluster`: the smallest document to which a chain of near pairs leads. Appended documents may join clusters.
    """

    first: np.ndarray
    cluster: np.ndarray


def near_duplicates(signatures: Sequence[np.ndarray], similarity: float) -> NearDuplicates:
    """Documents whose signatures are equal in a share of at least `similarity` (above 0, up to 1) of their bins.

    `signatures`: those of all documents in order, in chunks [n, 128] that may be mapped files: of them only a bounded
    number is in memory at a time, besides about 100 bytes a document.
    """
    starts = np.cumsum([0, *map(len, signatures)])
    first = np.arange(starts[-1])
    cluster = first.copy()
    rows = BINS // _bands(similarity)
    for band in range(0, BINS, rows):
        keys = np.concatenate([_keys(chunk[:, band : band + rows]) for chunk in signatures])
        later, *candidates = _candidates(keys)
        for earlier in candidates:
            news = (earlier < first[later]) | (cluster[earlier] != cluster[later])
            a, b = later[news], earlier[news]
            near = _share_equal(signatures, starts, a, b) >= similarity
            a, b = a[near], b[near]
            first[a] = np.minimum(first[a], b)
            join(cluster, a, b)
    return NearDuplicates(first, cluster)


def join(cluster: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the clusters of documents a and b [n] pair by pair, in place; a cluster is named by its smallest document.

    Union-find on whole arrays: a root goes under the smallest root it meets, then all paths are made flat.
    """
    while len(a):
        a, b = cluster[a], cluster[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(cluster, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(cluster, roots := cluster[cluster]):
            cluster[:] = roots


def _bands(similarity: float) -> int:
    """The least power of two that is more than the bins in which near-duplicates may differ (0.8: 32 for 25 bins)."""
    return 1 << int(BINS - BINS * similarity).bit_length()


def _keys(columns: np.ndarray) -> np.ndarray:
    """A hash [n] uint64 of each row of a band [n, rows]."""
    keys = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        keys *= MULTIPLIER
        keys += column
    return keys


def _candidates(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each document that is not its bucket's first: its number, that of the bucket's first, of the one before it."""
    order = np.argsort(keys, kind="stable")
    repeats = np.zeros(len(keys), dtype=bool)
    repeats[1:] = keys[order[1:]] == keys[order[:-1]]
    head = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(keys))))
    return order[repeats], order[head[repeats]], order[np.flatnonzero(repeats) - 1]


def _share_equal(signatures: Sequence[np.ndarray], starts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share [n] of bins in which the signatures of documents a and b [n] are equal."""
    share = np.empty(len(a))
    for start in range(0, len(a), PAIRS):
        block = slice(start, start + PAIRS)
        equal = _gather(signatures, starts, a[block]) == _gather(signatures, starts, b[block])
        share[block] = np.count_nonzero(equal, axis=1) / BINS
    return share


def _gather(signatures: Sequence[np.ndarray], starts: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The signatures [n, 128] of n documents out of the chunks that begin at `starts`."""
    gathered = np.empty((len(documents), BINS), dtype=np.uint32)
    chunk = np.searchsorted(starts, documents, side="right") - 1
    order = np.argsort(chunk, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(chunk[order])) + 1):
        number = chunk[places[0]]
        gathered[places] = signatures[number][documents[places] - starts[number]]
    return gathered
