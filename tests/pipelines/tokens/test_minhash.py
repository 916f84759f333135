import hashlib
import math
import string
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tokens import minhash
from pipelines.tokens.minhash import signature

IGNORED = "".join(c for c in map(chr, range(128)) if c not in string.ascii_letters + string.digits)


def estimate(a, b):
    return np.mean(signature(a) == signature(b))


def random_letters(rng, length):
    return bytes(rng.integers(97, 123, length, dtype=np.uint8)).decode()


# Signatures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "076a27c79e5ace2a"),
        ("Moby", "42116f2d53d70337"),
        ("Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.", "5eecd679d56c9e6e"),
        ("def near(a, b):\n    return a == b  # ἴσος, 等しい, равный\n" * 40, "931a7ca017605a6f"),
        (" ".join(str(number * number) for number in range(20_000)), "0806ca53b6561f70"),
    ],
)
def test_signatures_are_the_same_on_every_machine_and_in_every_version(text, expected):
    found = signature(text)
    assert (found.shape, found.dtype) == ((128,), np.uint32)
    assert hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()[:16] == expected


@settings(deadline=None)
@given(st.text(max_size=200), st.randoms(use_true_random=False))
def test_case_white_space_punctuation_and_control_characters_do_not_count(text, random):
    noisy = "".join(
        "".join(random.choices(IGNORED, k=random.choice((0, 0, 1, 5)))) + (c.swapcase() if c.isascii() else c)
        for c in text
    )
    assert np.array_equal(signature(noisy), signature(text))


@settings(deadline=None)
@given(st.text("abcé字 ", max_size=300), st.integers(1, 40))
def test_hashing_in_blocks_is_hashing_at_once(text, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BLOCK", block)
        in_blocks = signature(text)
    assert np.array_equal(in_blocks, signature(text))


@settings(deadline=None)
@given(st.text(max_size=4), st.text(max_size=4))  # at most 16 bytes: one shingle
def test_texts_shorter_than_a_window_are_near_only_if_they_are_equal(letters_of, a, b):
    assert estimate(a, b) == (letters_of(a) == letters_of(b))


def test_a_text_without_a_letter_is_empty():
    assert estimate("", " \n...{}") == 1


@pytest.mark.parametrize("shingles", [30, 100, 1000])
@pytest.mark.parametrize("shared", [0.1, 0.5, 0.9])
def test_equal_bins_estimate_the_jaccard_similarity_of_long_and_of_short_texts(jaccard, shingles, shared):
    rng, errors, n = np.random.default_rng(0), [], 300
    for _ in range(n):
        common = random_letters(rng, int(shingles * shared) + 15)
        a, b = (common + random_letters(rng, shingles - int(shingles * shared)) for _ in "ab")
        similarity = jaccard(a, b)  # the same for all pairs: random windows do not meet by chance
        errors.append(estimate(a, b) - similarity)
    deviation = math.sqrt(similarity * (1 - similarity) / 128)
    assert abs(np.mean(errors)) < 5 * deviation / math.sqrt(n)
    assert 0.6 * deviation < np.std(errors) < 1.3 * deviation


def test_memory_of_a_signature_is_bounded_by_two_copies_of_the_text():
    text = "All work and no play makes Jack a dull boy.\n" * 400_000
    tracemalloc.start()
    signature(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(text) + 4_000_000
