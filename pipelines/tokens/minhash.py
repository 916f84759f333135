"""MinHash signatures of texts: how near two texts are, from 512 bytes of each.

A text is taken as a set of shingles: all windows of 16 bytes of its UTF-8, in lower case and of what is ASCII only the
letters and digits, so layout and punctuation do not count and every language and code will do. Of that set
`signature` keeps 128 numbers, by one-permutation hashing (Li, Owen, Zhang 2012): every shingle's hash falls into one of
128 bins, a bin keeps its minimum, and a bin that got none takes another's (optimal densification, Shrivastava 2017).
The share of bins in which two signatures are equal estimates the Jaccard similarity J of the two sets (shared shingles
over all shingles), without bias and with a standard deviation of about sqrt(J (1 - J) / 128), however short the texts.
"""

import numpy as np

BINS = 128
WINDOW = 16  # bytes, a power of two: some three words
BLOCK = 2**15  # windows hashed at once: they stay in the processor's cache

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
