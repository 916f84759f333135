"""The dictionary task (paper, section 4.1): records `<k> k1..k4 <v> v1..v4`, then questions `<q> k1..k4 <v> v1..v4`.

The vocabulary has 64 tokens: padding, `<k>`, `<v>`, `<q>`, and 60 symbols, of which keys and values are made; 60^4 =
12.96 million keys are enough for 1.64 million records (16M tokens). A record is a function of its number: a seeded
bijection (four Feistel rounds, walked until it lands inside) sends the number to a key, so keys are drawn without
replacement; the value is a hash of the number. A dictionary of any size so takes no memory, and any part of it is made
alone. A context holds whole records, padded to a multiple of 16 tokens: 25 records make 256.

Shapes: N records, R contexts, L tokens a context, G documents.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

PAD, KEY, VALUE, QUESTION = range(4)
FIRST_SYMBOL = 4
VOCABULARY = 64
SYMBOLS = VOCABULARY - FIRST_SYMBOL
PARTS = 4  # symbols of a key, and of a value
RECORD = 2 * (1 + PARTS)  # tokens of a record, and of a question
MULTIPLE = 16  # of tokens in a context
IGNORE = -100  # the label of what is not asked for
FEISTEL_ROUNDS = 4


@dataclass(frozen=True)
class Dictionary:
    """Records by number. `symbols`: how many of the 60 occur at each place of a key; fewer make keys more alike."""

    seed: int
    symbols: int = SYMBOLS

    @property
    def size(self) -> int:
        """The number of distinct keys, so of records."""
        return self.symbols**PARTS

    def keys(self, numbers_N: Array) -> Array:
        """The keys [N, 4] of records, as tokens."""
        assert numbers_N.size == 0 or (numbers_N.min() >= 0 and numbers_N.max() < self.size), "no such record"
        places = _walk(numbers_N.astype(np.uint64), self.size, self.seed)
        alphabets = np.stack([_generator(self.seed, 1 + at).permutation(SYMBOLS) for at in range(PARTS)])
        digits = _digits(places, self.symbols)
        return FIRST_SYMBOL + np.take_along_axis(alphabets, digits.T, axis=1).T

    def values(self, numbers_N: Array) -> Array:
        """The values [N, 4] of records, as tokens."""
        words = mix(numbers_N.astype(np.uint64) ^ mix(np.full(1, 2 * self.seed + 1, np.uint64)))
        return FIRST_SYMBOL + _digits(words >> np.uint64(32), SYMBOLS)

    def records(self, numbers_N: Array) -> Array:
        """[N, 10]."""
        return self._phrases(KEY, numbers_N)

    def questions(self, numbers_N: Array) -> Array:
        """[N, 10], answers included."""
        return self._phrases(QUESTION, numbers_N)

    def _phrases(self, first: int, numbers_N: Array) -> Array:
        phrases = np.empty((len(numbers_N), RECORD), np.int64)
        phrases[:, 0], phrases[:, 1 + PARTS] = first, VALUE
        phrases[:, 1 : 1 + PARTS], phrases[:, 2 + PARTS :] = self.keys(numbers_N), self.values(numbers_N)
        return phrases


def context_tokens(records: int) -> int:
    """Tokens of a context of so many records."""
    return -(-records * RECORD // MULTIPLE) * MULTIPLE


def contexts(phrases_NT: Array, records: int) -> Array:
    """Records or questions [N, 10] in contexts [N / records, L] of `records` each."""
    rows = phrases_NT.reshape(-1, records * RECORD)
    return np.pad(rows, ((0, 0), (0, context_tokens(records) - rows.shape[1])), constant_values=PAD)


def answers(questions_RL: Array) -> Array:
    """Labels [R, L] of contexts of questions: the values' tokens where they stand, `IGNORE` elsewhere."""
    labels = np.full_like(questions_RL, IGNORE)
    asked = questions_RL.shape[1] // RECORD * RECORD
    phrases, kept = questions_RL[:, :asked], labels[:, :asked]
    values = (np.arange(asked) % RECORD > 1 + PARTS) & (np.repeat(phrases[:, ::RECORD], RECORD, axis=1) == QUESTION)
    kept[values] = phrases[values]
    return labels


def training_batch(
    seed: int, step: int, documents: int, asking: int, records: int, symbols: int
) -> tuple[Array, Array]:
    """The contexts of a step [documents + asking, L], and their labels: the documents' records first, then the
    questions of the first `asking` documents, each record of theirs once, in random order. All keys of a step differ.
    """
    draw = _generator(seed, 0, step)
    dictionary = Dictionary(int(draw.integers(2**31)), symbols)
    numbers_GN = np.arange(documents * records).reshape(documents, records)
    asked_GN = draw.permuted(numbers_GN[:asking], axis=1)
    remembered = contexts(dictionary.records(numbers_GN.ravel()), records)
    questions = contexts(dictionary.questions(asked_GN.ravel()), records)
    labels = np.concatenate([np.full_like(remembered, IGNORE), answers(questions)])
    return np.concatenate([remembered, questions]), labels


def mix(words: Words) -> Words:
    """A bijection of 64-bit numbers in which every bit decides every other (splitmix64's)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))


def _walk(numbers: Words, size: int, seed: int) -> Words:
    """Where a seeded permutation of range(size) sends numbers."""
    half = ((size - 1).bit_length() + 1) // 2
    places = _feistel(numbers, half, seed)
    while (outside := places >= size).any():
        places[outside] = _feistel(places[outside], half, seed)
    return places


def _feistel(numbers: Words, half: int, seed: int) -> Words:
    """A seeded permutation of the numbers of 2 x `half` bits."""
    mask, bits = np.uint64(2**half - 1), np.uint64(half)
    left, right = numbers >> bits, numbers & mask
    for turn in range(FEISTEL_ROUNDS):
        key = mix(np.full(1, FEISTEL_ROUNDS * seed + turn, np.uint64))
        left, right = right, left ^ (mix(right ^ key) & mask)
    return left << bits | right


def _digits(words: Words, base: int) -> Array:
    """The last four digits [N, 4] of numbers."""
    powers = np.array([base**at for at in range(PARTS)], np.uint64)
    return ((words[:, None] // powers) % np.uint64(base)).astype(np.int64)
