"""Near-duplicates: MinHash signatures of texts, and the documents of a data set whose signatures agree.

A text is taken as a set of shingles: all windows of 16 bytes of its UTF-8, in lower case and of what is ASCII only the
letters and digits, so layout and punctuation do not count and every language and code will do. Of that set
`signature` keeps 128 numbers, by one-permutation hashing (Li, Owen, Zhang 2012): every shingle's hash falls into one of
128 bins, a bin keeps its minimum, and a bin that got none takes another's (optimal densification, Shrivastava 2017).
The share of bins in which two signatures are equal estimates the Jaccard similarity J of the two sets (shared shingles
over all shingles), without bias and with a standard deviation of about sqrt(J (1 - J) / 128), however short the texts.

`near_duplicates` finds pairs by banding. A signature is cut into bands, more of them than bins in which near-duplicates
may differ, so every such pair agrees in a whole band; documents that do are a bucket. A document is compared with two
of its bucket, the first and the one before it, so the cost is a sort a band and at most two comparisons a document and
band. Two near-duplicates are missed only where in each bucket they share others stand first and between them, and these
do not link them either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 128
WINDOW = 16  # bytes, a power of two: some three words
BLOCK = 2**15  # windows hashed at once: they stay in the processor's cache
PAIRS = 2**13  # pairs compared at once: bounds the signatures in memory

LOWER = bytes(range(256)).lower()
IGNORED = bytes(byte for byte in range(128) if not chr(byte).isalnum())
MULTIPLIER = 0x9E3779B97F4A7C15
POWERS = {size: pow(MULTIPLIER, size, 2**64) for size in (1, 2, 4, 8)}
EMPTY = 2**64 - 1


def signature(text: str) -> np.ndarray:
    """The text's signature [128] uint32, the same on every machine.

    A text shorter than a window is one shingle: it is near only to texts that are equal but for what is ignored.
    """
    letters = text.encode().translate(LOWER, IGNORED).ljust(WINDOW, b"\0")
    minima = np.full(BINS, EMPTY, dtype=np.uint64)
    for start in range(0, len(letters) - WINDOW + 1, BLOCK):
        hashes = _hash_windows(letters[start : start + BLOCK + WINDOW - 1])
        np.minimum.at(minima, (hashes & (BINS - 1)).astype(np.intp), hashes)
    _fill_empty(minima)
    return (minima // BINS).astype(np.uint32)


def _hash_windows(letters: bytes) -> np.ndarray:
    """Hashes of all windows of n bytes, [n - WINDOW + 1] uint64: polynomials modulo 2**64, then mixed.

    Windows double: the hash of 2k bytes is that of the first k, times MULTIPLIER**k, plus that of the other k.
    """
    hashes = np.frombuffer(letters, dtype=np.uint8).astype(np.uint64)
    for size, power in POWERS.items():
        hashes = hashes[:-size] * power + hashes[size:]
    return _mix(hashes)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers in which every bit decides every other (splitmix64's), in place."""
    numbers ^= numbers >> 30
    numbers *= 0xBF58476D1CE4E5B9
    numbers ^= numbers >> 27
    numbers *= 0x94D049BB133111EB
    numbers ^= numbers >> 31
    return numbers


# Row b: the order in which bin b, if empty, asks the others. All texts ask alike, so J is still estimated unbiased.
LENDERS = np.argsort(_mix(np.arange(BINS * BINS, dtype=np.uint64) * MULTIPLIER).reshape(BINS, BINS), axis=1)


def _fill_empty(minima: np.ndarray) -> None:
    """Each empty bin takes the minimum of the first bin in its order that has one."""
    filled = minima != EMPTY
    lenders = LENDERS[~filled]
    first = filled[lenders].argmax(axis=1)
    minima[~filled] = minima[lenders[np.arange(len(lenders)), first]]


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
