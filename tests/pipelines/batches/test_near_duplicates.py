import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches import near_duplicates as module
from pipelines.batches.near_duplicates import join, near_duplicates
from pipelines.tokens.minhash import signature


@st.composite
def related_signatures(draw):
    """Signatures [N, 128] that come from few: copies of one or mixtures of two, with some bins changed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    related = [rng.integers(0, 2**32, 128, dtype=np.uint32) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 25))):
        one, other = related[rng.integers(len(related))], related[rng.integers(len(related))]
        copy = np.where(rng.random(128) < draw(st.sampled_from((0.5, 0.8, 1.0))), one, other)
        changed = rng.choice(128, draw(st.sampled_from((0, 1, 10, 25, 26, 40, 100))), replace=False)
        copy[changed] = rng.integers(0, 2**32, len(changed))
        related.append(copy)
    return np.stack(related)


similarities = st.sampled_from((0.2, 0.5, 0.75, 0.8, 0.9, 0.95, 1.0))


def near_duplicates_by_definition(signatures, similarity):
    n, first, pairs = len(signatures), list(range(len(signatures))), set()
    bands = next(bands for bands in (1, 2, 4, 8, 16, 32, 64, 128) if (128 - bands) / 128 < similarity)
    for band in np.split(signatures, bands, axis=1):
        buckets = {}
        for later, row in enumerate(band):
            bucket = buckets.setdefault(row.tobytes(), [])
            for earlier in {*bucket[:1], *bucket[-1:]}:
                if np.mean(signatures[later] == signatures[earlier]) >= similarity:
                    first[later] = min(first[later], earlier)
                    pairs.add((earlier, later))
            bucket.append(later)
    cluster = list(range(n))
    for _ in range(n):
        for a, b in pairs:
            cluster[a] = cluster[b] = min(cluster[a], cluster[b])
    return first, cluster


@settings(deadline=None)
@given(related_signatures(), similarities, st.lists(st.integers(0, 28), max_size=4), st.sampled_from((1, 2, 7, 8192)))
def test_near_duplicates_are_those_by_definition_whatever_the_chunks(signatures, similarity, cuts, pairs_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIRS", pairs_at_once)
        found = near_duplicates(np.split(signatures, sorted(cuts)), similarity)
    first, cluster = near_duplicates_by_definition(signatures, similarity)
    assert found.first.tolist() == first
    assert found.cluster.tolist() == cluster
    assert found.first.dtype == found.cluster.dtype == np.int64


@settings(deadline=None)
@given(related_signatures(), similarities, st.data())
def test_appended_documents_leave_first_as_it_is_and_only_join_clusters(signatures, similarity, data):
    old = data.draw(st.integers(1, len(signatures)))
    before, after = (near_duplicates([part], similarity) for part in (signatures[:old], signatures))
    assert np.array_equal(after.first[:old], before.first)
    assert np.array_equal(after.cluster[before.cluster], after.cluster[:old])


@settings(deadline=None)
@given(related_signatures(), similarities)
def test_a_cluster_is_named_by_its_smallest_document_and_holds_what_its_documents_repeat(signatures, similarity):
    found, numbers = near_duplicates([signatures], similarity), np.arange(len(signatures))
    assert np.array_equal(found.cluster[found.cluster], found.cluster)
    assert (found.cluster <= found.first).all()
    assert (found.first <= numbers).all()
    assert np.array_equal(found.cluster[found.first], found.cluster)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_document_that_is_half_of_each_of_two_joins_them_and_repeats_the_first(order):
    signatures = np.random.default_rng(0).integers(0, 2**32, (3, 128), dtype=np.uint32)
    signatures[2] = np.concatenate([signatures[order[0], :64], signatures[order[1], 64:]])
    found = near_duplicates([signatures], 0.5)
    assert found.first.tolist() == [0, 1, 0]
    assert found.cluster.tolist() == [0, 0, 0]


@settings(deadline=None)
@given(st.sets(st.integers(0, 127)), st.integers(0, 99), st.floats(0.01, 1))
def test_a_pair_is_found_exactly_if_enough_of_its_bins_are_equal_wherever_they_are(changed, place, similarity):
    signatures = np.random.default_rng(0).integers(0, 2**32, (101, 128), dtype=np.uint32)
    signatures[100] = signatures[place]
    signatures[100, list(changed)] += 1
    near = (128 - len(changed)) / 128 >= similarity
    assert near_duplicates([signatures], similarity).first.tolist() == [*range(100), place if near else 100]


WORDS = [
    bytes(np.random.default_rng(number).integers(97, 123, 2 + number % 9, dtype=np.uint8)).decode()
    for number in range(5000)
]


def random_words(rng, length):
    """Words as in a language: a few of them are most of a text."""
    return [WORDS[word] for word in np.minimum(rng.zipf(1.3, length), len(WORDS)) - 1]


def test_edited_copies_are_found_as_often_as_the_estimate_reaches_the_similarity(jaccard):
    rng, expected, variance, texts, copies = np.random.default_rng(0), 0.0, 0.0, [], []
    for number in range(400):
        words = random_words(rng, 200)
        edits = rng.random(200) < (0.005, 0.015, 0.02, 0.05)[number % 4]
        copy = [new if edit else word for word, new, edit in zip(words, random_words(rng, 200), edits, strict=True)]
        texts.append(" ".join(words))
        copies.append("\n".join(copy))
        similarity = jaccard(texts[-1], copies[-1])
        found = sum(
            math.comb(128, equal) * similarity**equal * (1 - similarity) ** (128 - equal) for equal in range(103, 129)
        )
        expected, variance = expected + found, variance + found * (1 - found)
    assert 100 < expected < 300
    first = near_duplicates([np.stack([signature(text) for text in texts + copies])], 0.8).first
    assert np.array_equal(first[:400], np.arange(400))
    assert set((first[400:] - np.arange(400)).tolist()) == {0, 400}  # the original, or itself
    assert abs(np.count_nonzero(first[400:] < 400) - expected) < 4 * math.sqrt(variance)


def test_unrelated_texts_are_not_near_and_equal_ones_are():
    rng = np.random.default_rng(1)
    texts = [" ".join(random_words(rng, rng.integers(20, 300))) for _ in range(1000)]
    texts += [text.upper().replace(" ", ",\n") for text in texts[::3]]
    found = near_duplicates([np.stack([signature(text) for text in texts])], 0.8)
    assert found.first.tolist() == found.cluster.tolist() == [*range(1000), *range(0, 1000, 3)]


@pytest.mark.parametrize("chunks", [1, 3])
def test_no_documents_have_no_near_duplicates(chunks):
    found = near_duplicates([np.empty((0, 128), dtype=np.uint32)] * chunks, 0.8)
    assert found.first.tolist() == found.cluster.tolist() == []


def test_a_long_chain_of_near_pairs_is_one_cluster():
    n = 3000
    signatures = np.zeros((n, 128), dtype=np.uint32)
    for number in range(n):  # each changes the next bin, in one of the eight bands that 0.95 asks for
        signatures[number:, number % 128] = number
    found = near_duplicates([signatures], 0.95)
    assert found.cluster.tolist() == [0] * n
    assert found.first[-1] > n - 20


@pytest.mark.parametrize("kind", ["copies", "unrelated"])
def test_memory_is_bounded_while_the_signatures_are_mapped_files(tmp_path, kind):
    n, rng, chunks = 100_000, np.random.default_rng(0), []
    for number in range(4):
        chunk = rng.integers(0, 2**32, (n // 4, 128), dtype=np.uint32)
        np.save(tmp_path / f"{number}.npy", chunk if kind == "unrelated" else np.ones_like(chunk))
        chunks.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    tracemalloc.start()
    found = near_duplicates(chunks, 0.8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * n + 12_000_000
    assert found.cluster[-1] == (n - 1 if kind == "unrelated" else 0)


pairs_of_30 = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


@settings(deadline=None)
@given(st.lists(pairs_of_30, max_size=3))
def test_join_names_each_document_by_the_smallest_one_it_is_linked_to(rounds):
    cluster, expected = np.arange(30), list(range(30))
    for pairs in rounds:
        join(cluster, *np.array(pairs, dtype=np.int64).reshape(-1, 2).T)
        for a, b in pairs:
            low, high = sorted((expected[a], expected[b]))
            expected = [low if name == high else name for name in expected]
        assert cluster.tolist() == expected


def test_join_follows_long_paths_in_any_order():
    order = np.random.default_rng(0).permutation(10_000)
    cluster = np.arange(10_000)
    join(cluster, order[1:], order[:-1])
    assert not cluster.any()
