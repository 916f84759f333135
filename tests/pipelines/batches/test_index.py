"""Documents are drawn with few ids, texts and signatures, so that copies and near-duplicates abound."""

import json
import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.batches.index import (
    BATCHES,
    COPY,
    EXACT,
    HELD_OUT,
    INDEX,
    NEAR,
    REPORT,
    TRAINING,
    USES,
    index_documents,
    is_held_out,
)
from pipelines.config import Data, Source
from pipelines.tokens.minhash import BINS
from pipelines.tokens.shards import Manifest
from pipelines.workflow.errors import UserError

MODES = ("keep", "drop_exact", "drop_near")


def data(held_out=0.0, **settings):
    """The recipe's part with sources named a, b, ... `held_out`: their shares, or that of the only one."""
    shares = held_out if isinstance(held_out, list) else [held_out]
    sources = tuple(Source(name=name, path="x", held_out=share) for name, share in zip("abcd", shares, strict=False))
    return Data(sources=sources, **settings)


def signature(family, first=0, last=0):
    """That of a family of texts, with the bins [first, last) changed. Texts are near that differ in up to 25 of 128."""
    bins = np.random.default_rng(family).integers(2**32, size=BINS, dtype=np.uint32)
    bins[first:last] += 1
    return bins


def columns_of(index):
    batch = pa.ipc.open_file(pa.memory_map(str(index / INDEX))).read_all()
    return {name: batch.column(name).to_numpy() for name in batch.column_names}


@pytest.fixture(scope="module")
def indexed(fresh, encoded, write_shards):
    """The columns of the index of documents (id, text, signature), all in one source or as [(source, documents)]."""

    def make(documents, data):
        shards = documents if documents and isinstance(documents[0][1], list) else [("a", documents)]
        rows = [
            (source, [[encoded(name, [1, 2], source=source, content=text, signature=bins) for name, text, bins in own]])
            for source, own in shards
        ]
        index = fresh()
        index_documents(write_shards(rows), data, index)
        return columns_of(index)

    return make


# Where the documents lie


@pytest.mark.parametrize("vocab_size", [1 << 16, 1 << 17])
@settings(max_examples=30)
@given(
    shards=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=3)),
        max_size=4,
    )
)
def test_every_document_is_found_in_its_file(fresh, encoded, write_shards, vocab_size, shards):
    shards = [("b", []), ("b", [[3, 1]]), *shards]  # a shard may be empty
    written, made = [], []
    for number, (source, batches) in enumerate(shards):
        documents = []
        for batch in batches:
            documents.append([])
            for length in batch:
                name = f"{source}/{len(written)}"
                tokens = 100 * len(written) + 10 + np.arange(length + 1)
                documents[-1].append(encoded(name, tokens, source=source, signature=len(written)))
                written.append((number, source, name, tokens.tolist()))
        made.append((source, documents))
    directory, index = write_shards(made, vocab_size), fresh()
    index_documents(directory, data([0.0, 0.0]), index)
    found, manifest = columns_of(index), Manifest.read(directory)
    assert len(found["row"]) == len(written)
    for document, (number, source, name, tokens) in enumerate(written):
        path = directory / manifest.shards[number].file
        assert found["shard"][document] == number
        row = pa.ipc.open_file(pa.memory_map(str(path))).read_all().slice(int(found["row"][document]), 1)
        assert row.column("document_id").to_pylist() == [name]
        assert found["length"][document] == len(tokens)
        bytes_ = np.dtype(manifest.token_type).itemsize
        start = int(found["offset"][document])
        span = path.read_bytes()[start : start + len(tokens) * bytes_]
        assert np.frombuffer(span, manifest.token_type).tolist() == tokens
        assert found["source"][document] == "ab".index(source)


# Copies and near-duplicates


def test_copies_of_a_document_are_never_used(indexed):
    documents = [("x", "one", signature(1)), ("y", "two", signature(2)), ("x", "one", signature(1))]
    for mode in MODES:
        for share, used in ((0.0, TRAINING), (1.0, HELD_OUT)):
            found = indexed([*documents, documents[0]], data(share, duplicates=mode))
            assert found["use"].tolist() == [used, used, COPY, COPY]
            assert found["original"].tolist() == found["cluster"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("apart", [False, True])
def test_two_texts_under_one_id_are_a_mistake_that_names_it(indexed, apart):
    documents = [("y", "two", signature(2)), ("x", "one", signature(1)), ("x", "other", signature(3))]
    shards = [("a", documents[:2]), ("b", documents[2:])] if apart else documents
    with pytest.raises(UserError, match=r"^two documents have the id 'x' but different text: .*id_field$"):
        indexed(shards, data([0.0, 0.0]))


def test_a_text_that_is_ambiguous_only_against_its_second_copy_is_found(indexed):
    documents = [("x", "one", signature(1)), ("y", "two", signature(2)), ("y", "one", signature(1))]
    with pytest.raises(UserError, match="the id 'y'"):
        indexed(documents, data())


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep", [TRAINING] * 6),
        ("drop_exact", [TRAINING, TRAINING, EXACT, TRAINING, TRAINING, TRAINING]),
        ("drop_near", [TRAINING, TRAINING, EXACT, NEAR, NEAR, TRAINING]),
    ],
)
def test_duplicates_are_left_out_as_asked(indexed, mode, expected):
    documents = [
        ("p", "one", signature(1)),
        ("q", "two", signature(2)),
        ("r", "one", signature(1)),  # the same text as p
        ("s", "near one", signature(1, 0, 20)),  # near p
        ("t", "near near one", signature(1, 0, 40)),  # near s only
        ("u", "not near", signature(2, 0, 26)),
    ]
    found = indexed(documents, data(duplicates=mode))
    assert found["use"].tolist() == expected
    assert found["original"].tolist() == [0, 1, 0, 0, 3, 5]
    assert found["cluster"].tolist() == [0, 1, 0, 0, 0, 5]


def test_the_similarity_that_counts_as_near_is_the_recipes(indexed):
    documents = [("p", "one", signature(1)), ("q", "two", signature(1, 0, 32))]  # three quarters
    for similarity, original in ((0.75, [0, 0]), (0.76, [0, 1])):
        assert indexed(documents, data(similarity=similarity))["original"].tolist() == original


def test_equal_texts_are_one_cluster_even_where_their_signatures_are_not(indexed):
    documents = [("p", "zero", signature(0)), ("q", "one", signature(1)), ("r", "one", signature(2))]
    documents.append(("s", "near r", signature(2, 0, 5)))
    found = indexed(documents, data())
    assert found["original"].tolist() == [0, 1, 1, 2]
    assert found["cluster"].tolist() == [0, 1, 1, 1]


# Held-out documents


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_held_out(name, one, other):
    smaller, larger = sorted([one, other])
    assert is_held_out(name, larger) >= is_held_out(name, smaller)
    assert not is_held_out(name, 0.0)
    assert is_held_out(name, 1.0)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_the_share_is_held_out(share):
    held_out = sum(is_held_out(f"s/{number}", share) for number in range(5000))
    assert abs(held_out - 5000 * share) < 4 * math.sqrt(5000 * share * (1 - share))


def test_what_is_held_out_is_the_same_on_every_machine():
    held_out = [number for number in range(30) if is_held_out(f"s/{number}", 0.2)]
    assert held_out == [1, 10, 12, 14, 21, 22, 25, 28]


def test_a_document_is_held_out_by_its_id_and_its_sources_share(indexed):
    names = [f"s/{number}" for number in range(150)]
    random = np.random.default_rng(0)
    for _ in range(3):
        random.shuffle(names)
        rows = [(name, name, signature(number)) for number, name in enumerate(names)]
        found = indexed([("a", rows[:50]), ("b", rows[50:])], data([0.1, 0.6]))
        expected = [is_held_out(name, 0.1) for name in names[:50]] + [is_held_out(name, 0.6) for name in names[50:]]
        assert (found["use"] == HELD_OUT).tolist() == expected


@pytest.mark.parametrize(("shares", "use"), [([1.0, 0.0], HELD_OUT), ([0.0, 1.0], TRAINING)])
def test_duplicates_go_with_their_original_across_sources_with_different_shares(indexed, shares, use):
    first = [("p", "one", signature(1))]
    second = [
        ("q", "one", signature(1)),  # the same text
        ("r", "two", signature(1, 0, 20)),  # near
        ("s", "three", signature(1, 0, 40)),  # near r only
        ("t", "four", signature(4)),  # on its own
    ]
    found = indexed([("a", first), ("b", second)], data(shares))
    assert found["use"].tolist() == [use] * 4 + [TRAINING if use == HELD_OUT else HELD_OUT]


def test_a_later_document_near_two_earlier_ones_moves_neither(indexed):
    first = [("a", [("p", "one", signature(1, 0, 20))]), ("b", [("q", "two", signature(1, 20, 40))])]
    before = indexed(first, data([0.0, 1.0]))
    assert before["use"].tolist() == [TRAINING, HELD_OUT]
    assert before["cluster"].tolist() == [0, 1]
    after = indexed([*first, ("b", [("r", "three", signature(1))])], data([0.0, 1.0]))
    assert after["use"].tolist() == [TRAINING, HELD_OUT, TRAINING]
    assert after["cluster"].tolist() == [0, 0, 0]


def test_equal_texts_stay_together_where_the_search_finds_different_neighbours_of_them(indexed):
    """q and r have one text, p and f are near it but not near one another; x and y have half of its bins each. Of the
    bands that p shares with r none has p as its first document or as the one before r, so for r only f is found.
    """
    p, f = signature(1, 0, 24), signature(1, 24, 48)
    x, y = (np.where(p == signature(1), half, p + 9) for half in (signature(1, 64, 128), signature(1, 0, 64)))
    shards = [
        ("a", [("x", "x", x), ("y", "y", y), ("p", "p", p)]),
        ("b", [("f", "f", f), ("q", "text", signature(1)), ("r", "text", signature(1))]),
    ]
    found = indexed(shards, data([0.0, 1.0]))
    assert found["original"].tolist() == [0, 1, 2, 3, 2, 2]
    assert found["use"].tolist() == [TRAINING, TRAINING, TRAINING, HELD_OUT, TRAINING, TRAINING]


# Laws

CHANGES = [(0, 0), (0, 20), (20, 40), (40, 60), (0, 64)]  # the first is near all but the last, they to nothing else


@st.composite
def corpora(draw):
    """Shards of documents: few ids, each with one text of few, each with one signature of few.

    Drawn by a seed: evenly, so that chains of near-duplicates are not rare.
    """
    random = Random(draw(st.integers(0, 2**64)))
    text_of = [f"text {random.randrange(8)}" for _ in range(12)]
    signature_of = {text: signature(1, *random.choice(CHANGES)) for text in sorted(set(text_of))}
    names = [[random.randrange(12) for _ in range(random.randint(1, 6))] for _ in range(random.randint(1, 5))]
    return [
        (random.choice("ab"), [(f"id {name}", text_of[name], signature_of[text_of[name]]) for name in own])
        for own in names
    ]


shares = st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=2, max_size=2)


@settings(max_examples=150)
@given(corpora(), shares, st.sampled_from(MODES), st.data())
def test_what_earlier_documents_are_used_for_never_changes_as_the_data_set_grows(indexed, shards, shares, mode, drawn):
    made_with = data(shares, duplicates=mode)
    grown = indexed(shards, made_with)
    kept = drawn.draw(st.integers(1, len(shards)))
    source, last = shards[kept - 1]
    shorter = [*shards[: kept - 1], (source, last[: drawn.draw(st.integers(1, len(last)))])]
    before = indexed(shorter, made_with)
    for name in ("original", "use"):
        assert grown[name][: len(before[name])].tolist() == before[name].tolist()
    for one in np.unique(before["cluster"]):  # documents stay in one cluster
        assert len(set(grown["cluster"][: len(before["cluster"])][before["cluster"] == one])) == 1


@given(corpora(), shares, st.sampled_from(MODES))
def test_uses_follow_from_ids_texts_and_originals(indexed, shards, shares, mode):
    found = indexed(shards, data(shares, duplicates=mode))
    documents = [(source, name, text) for source, own in shards for name, text, _ in own]
    ids, texts = [name for _, name, _ in documents], [text for _, _, text in documents]
    original = found["original"].tolist()
    for number, (_, name, text) in enumerate(documents):
        root = number
        while original[root] != root:
            root = original[root]
        assert original[number] == original[texts.index(text)]
        if ids.index(name) < number:
            use = COPY
        elif texts.index(text) < number and mode != "keep":
            use = EXACT
        elif original[number] < number and mode == "drop_near":
            use = NEAR
        else:
            share = shares["ab".index(documents[root][0])]
            use = HELD_OUT if is_held_out(ids[root], share) else TRAINING
        assert found["use"][number] == use
        assert found["cluster"][number] == found["cluster"][original[number]] <= original[number]


# The report


@settings(max_examples=30)
@given(corpora(), shares, st.sampled_from(MODES), st.data())
def test_the_report_counts_what_there_is(fresh, encoded, write_shards, shards, shares, mode, drawn):
    lengths, made = [], []
    for source, own in shards:
        lengths += drawn.draw(st.lists(st.integers(1, 70), min_size=len(own), max_size=len(own)))
        tokens = lengths[-len(own) :]
        rows = zip(own, tokens, strict=True)
        batch = [encoded(name, range(n), source=source, content=text, signature=bins) for (name, text, bins), n in rows]
        made.append((source, [batch]))
    directory, index = write_shards(made), fresh()
    reasons = st.dictionaries(st.sampled_from(["empty", "not UTF-8", "no tokens"]), st.integers(1, 9))
    manifest = Manifest.read(directory)
    manifest = replace(manifest, shards=tuple(replace(shard, dropped=drawn.draw(reasons)) for shard in manifest.shards))
    manifest.write(directory)

    report = index_documents(directory, data(shares, duplicates=mode), index)
    assert json.loads((index / REPORT).read_text()) == report
    assert list(report) == ["a", "b"]
    found = columns_of(index)
    for number, source in enumerate("ab"):
        own = [document for document in range(len(lengths)) if found["source"][document] == number]
        uses = Counter(USES[found["use"][document]] for document in own)
        tokens = Counter()
        for document in own:
            tokens[USES[found["use"][document]]] += lengths[document]
        dropped = Counter()
        for shard in manifest.shards:
            if shard.unit["source"] == source:
                dropped.update(shard.dropped)
        histogram = Counter(str(2 ** int(math.log2(lengths[document]))) for document in own)
        assert report[source] == {
            "documents": len(own),
            "tokens": sum(lengths[document] for document in own),
            "characters": 4 * len(own),
            "uses": {name: [uses[name], tokens[name]] for name in USES},
            "duplicates": sum(int(found["original"][document]) != document for document in own),
            "lengths": histogram,
            "dropped": dropped,
        }
        assert list(report[source]["lengths"]) == sorted(histogram, key=int)


def test_the_same_shards_make_the_same_index(fresh, encoded, write_shards, contents):
    rows = [encoded(f"a/{number % 20}", [1] * (1 + number % 20), signature=number % 15) for number in range(30)]
    rows = [replace(row, document=replace(row.document, source="a")) for row in rows]
    made = []
    for _ in range(2):
        index = fresh()
        index_documents(write_shards([("a", [rows[:7], rows[7:]])]), data(0.3), index)
        made.append(contents(index))
    assert made[0] == made[1]
    assert made[0].keys() == {INDEX, BATCHES, REPORT}
