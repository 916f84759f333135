"""The dictionary task's generator: its laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.config.dictionary import PARTS as RECIPE_PARTS
from jobs.config.dictionary import RECORDS, WINDOW
from jobs.config.dictionary import SYMBOLS as RECIPE_SYMBOLS
from jobs.evaluate.dictionary.task import (
    FIRST_SYMBOL,
    IGNORE,
    KEY,
    PAD,
    PARTS,
    QUESTION,
    RECORD,
    SYMBOLS,
    VALUE,
    VOCABULARY,
    Dictionary,
    answers,
    context_tokens,
    contexts,
    training_batch,
)

SEEDS = st.integers(0, 2**31)


def phrases(rows: np.ndarray, first: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(key, value) of all records or questions of contexts, token by token; nothing but padding may follow them."""
    found = []
    for row in rows.tolist():
        at = 0
        while at < len(row) and row[at] != PAD:
            assert (row[at], row[at + 5]) == (first, VALUE)
            key, value = tuple(row[at + 1 : at + 5]), tuple(row[at + 6 : at + 10])
            assert len(value) == 4, "cut at the window's end"
            assert all(FIRST_SYMBOL <= token < VOCABULARY for token in key + value)
            found.append((key, value))
            at += 10
        assert set(row[at:]) <= {PAD}
    return found


def test_the_task_is_the_papers() -> None:
    assert (VOCABULARY, RECORD, PARTS) == (64, 10, 4)
    assert context_tokens(25) == 256
    assert (context_tokens(25), SYMBOLS, PARTS) == (WINDOW, RECIPE_SYMBOLS, RECIPE_PARTS)
    assert RECORDS == 25


def test_there_are_keys_for_sixteen_million_tokens() -> None:
    numbers = np.arange(2**24 // WINDOW * RECORDS)
    keys = Dictionary(3).keys(numbers)
    assert len(np.unique(keys @ VOCABULARY ** np.arange(PARTS))) == len(numbers) == 1_638_400


@given(SEEDS, st.integers(1, 9))
def test_a_dictionary_holds_every_key_of_its_symbols_once(seed: int, symbols: int) -> None:
    dictionary = Dictionary(seed, symbols)
    keys = dictionary.keys(np.arange(dictionary.size))
    assert len({tuple(key) for key in keys.tolist()}) == dictionary.size == symbols**PARTS
    assert [len(set(keys[:, place])) for place in range(PARTS)] == [symbols] * PARTS


@given(SEEDS, st.lists(st.integers(0, SYMBOLS**PARTS - 1), min_size=1, max_size=30))
def test_a_record_depends_on_seed_and_number_alone(seed: int, numbers: list[int]) -> None:
    together = Dictionary(seed).records(np.array(numbers))
    apart = [Dictionary(seed).records(np.array([number]))[0] for number in numbers]
    assert together.tolist() == [record.tolist() for record in apart]


def test_another_seed_makes_another_dictionary() -> None:
    numbers = np.arange(200)
    one, other = Dictionary(0), Dictionary(1)
    assert (one.keys(numbers) != other.keys(numbers)).any(1).mean() > 0.99
    assert (one.values(numbers) != other.values(numbers)).any(1).mean() > 0.99


def test_symbols_of_keys_and_values_are_evenly_spread() -> None:
    numbers = np.arange(60_000)
    dictionary = Dictionary(11)
    for drawn in (dictionary.keys(numbers), dictionary.values(numbers)):
        for place in range(PARTS):
            counts = np.bincount(drawn[:, place], minlength=VOCABULARY)[FIRST_SYMBOL:]
            assert 800 < counts.min() <= counts.max() < 1200  # 1000 on average
    pairs = dictionary.values(numbers) @ VOCABULARY ** np.arange(PARTS)
    assert len(np.unique(pairs)) > 59_000, "the places of a value are drawn apart"


@given(SEEDS, st.integers(0, 50), st.integers(1, 5), st.integers(1, 25), st.sampled_from([7, 20, SYMBOLS]), st.data())
@settings(max_examples=60)
def test_a_batch_asks_what_its_documents_hold(
    seed: int, step: int, documents: int, records: int, symbols: int, data: st.DataObject
) -> None:
    asking = data.draw(st.integers(1, documents))
    rows, labels = training_batch(seed, step, documents, asking, records, symbols)
    assert rows.shape == labels.shape == (documents + asking, context_tokens(records))
    held = [phrases(row[None], KEY) for row in rows[:documents]]
    assert all(len(document) == records for document in held), "records whole in windows"
    assert len({key for document in held for key, _ in document}) == documents * records, "keys without replacement"
    for document, row in zip(held[:asking], rows[documents:], strict=True):
        assert sorted(phrases(row[None], QUESTION)) == sorted(document)
    again, _ = training_batch(seed, step, documents, asking, records, symbols)
    assert np.array_equal(rows, again)


@given(SEEDS, st.integers(1, 25), st.integers(1, 4))
def test_labels_are_the_values_of_questions_where_they_stand(seed: int, records: int, documents: int) -> None:
    rows, labels = training_batch(seed, 0, documents, documents, records, SYMBOLS)
    assert (labels[:documents] == IGNORE).all()
    for row, wanted in zip(rows[documents:].tolist(), labels[documents:].tolist(), strict=True):
        expected = [IGNORE] * len(row)
        for question in range(records):
            for at in range(10 * question + 6, 10 * question + 10):
                expected[at] = row[at]
        assert wanted == expected


def test_records_are_no_questions() -> None:
    assert (answers(contexts(Dictionary(0).records(np.arange(50)), 25)) == IGNORE).all()


@pytest.mark.parametrize(("one", "other"), [((0, 0), (0, 1)), ((0, 0), (1, 0))], ids=["step", "seed"])
def test_steps_and_seeds_differ(one: tuple[int, int], other: tuple[int, int]) -> None:
    rows = [training_batch(seed, step, 2, 2, 25, SYMBOLS)[0] for seed, step in (one, other)]
    assert set(phrases(rows[0][:2], KEY)).isdisjoint(phrases(rows[1][:2], KEY))


def test_questions_come_in_another_order_than_records() -> None:
    rows, _ = training_batch(0, 0, 1, 1, 25, SYMBOLS)
    assert phrases(rows[:1], KEY) != phrases(rows[1:], QUESTION)
