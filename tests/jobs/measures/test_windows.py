import pytest

from jobs.evaluate.subject import open_documents
from jobs.measures.windows import (
    Window,
    choose_documents,
    choose_windows,
    fewest_others,
    one_after_another,
    one_of_each,
    other_documents,
    read_windows,
    source_names,
)
from pipelines.workflow.errors import UserError

LOCAL = 8


@pytest.fixture(scope="module")
def dataset(subject_of):
    return open_documents(subject_of({"s": [30, 70, 101]}))


def test_the_windows_have_the_longest_context_before_them_and_spread_over_documents(dataset) -> None:
    windows = choose_windows(dataset, LOCAL, 4, 100)
    assert len(set(windows)) == len(windows)
    assert all(window.start >= 3 * LOCAL for window in windows)
    assert all(window.start + LOCAL < dataset.length[window.document] for window in windows)
    assert {document: sum(w.document == document for w in windows) for document in (1, 2)} == {1: 5, 2: 9}
    assert {window.document for window in choose_windows(dataset, LOCAL, 4, 2)} == {1, 2}
    assert set(choose_documents(dataset, LOCAL, 4, "x")) == {1, 2}


def test_the_order_of_documents_is_looked_up_once(subject_of, monkeypatch) -> None:
    dataset = open_documents(subject_of({"s": [30, 70, 101]}))
    looked_up, find = [], dataset.id
    monkeypatch.setattr(dataset, "id", lambda number: looked_up.append(number) or find(number))
    chosen = choose_documents(dataset, LOCAL, 4, "x")
    assert chosen == choose_documents(dataset, LOCAL, 4, "x")
    assert sorted(looked_up) == [1, 2]
    assert {*choose_documents(dataset, LOCAL, 2, "x")} == {0, 1, 2}


def test_no_document_long_enough_is_a_users_error(dataset, subject_of) -> None:
    with pytest.raises(UserError, match=r"the longest of 3 has 101.* or lower some.setting"):
        choose_windows(dataset, LOCAL, 16, 10, "some.setting")
    none = open_documents(subject_of({"s": [30, 70, 101]}, held_out=0.0))
    with pytest.raises(UserError, match=r"the longest of 0 has 0.*held_out"):
        choose_windows(none, LOCAL, 1, 10)


def test_windows_are_read_from_their_start_on(dataset) -> None:
    read = read_windows(dataset, [Window(1, 3), Window(2, 50)], 5)
    assert read.tolist() == [dataset.tokens(1, 3, 8).tolist(), dataset.tokens(2, 50, 55).tolist()]


def test_other_documents_are_long_enough_and_never_copies(subject_of) -> None:
    dataset = open_documents(subject_of({"s": [64, 20, 7, 40, 64]}, same_text=[0, 3]))
    assert other_documents(dataset, 0, LOCAL) == [1, 4]
    assert other_documents(dataset, 3, LOCAL) == [1, 4]
    assert other_documents(dataset, 1, LOCAL) == [0, 3, 4]
    assert fewest_others(dataset, [Window(1, 0), Window(3, 8)], LOCAL) == 2 + 8


def test_contexts_of_others_are_whole_all_different_and_drawn_by_the_seed(dataset) -> None:
    documents = [0, 1, 2]
    for contexts in (one_after_another, one_of_each):
        drawn = list(contexts(dataset, documents, LOCAL, "seed"))
        assert len(set(drawn)) == len(drawn) == 3 + 8 + 12
        assert all(w.start % LOCAL == 0 and w.start + LOCAL <= dataset.length[w.document] for w in drawn)
        assert drawn == list(contexts(dataset, documents, LOCAL, "seed"))
        others = {tuple(contexts(dataset, documents, LOCAL, f"{n}")) for n in range(8)}
        assert len(others) > 1


def test_one_of_each_takes_every_document_before_any_twice_and_one_after_another_whole_ones(dataset) -> None:
    turns = [window.document for window in one_of_each(dataset, [0, 1, 2], LOCAL, "s")]
    assert sorted(turns[:3]) == sorted(turns[3:6]) == [0, 1, 2]
    in_a_row = [window.document for window in one_after_another(dataset, [0, 1, 2], LOCAL, "s")]
    assert [a for a, b in zip(in_a_row, [None, *in_a_row], strict=False) if a != b] == list(dict.fromkeys(in_a_row))


def test_sources_have_the_recipes_names_in_its_order(subject_of) -> None:
    dataset = open_documents(subject_of({"b": [20], "a": [30, 40]}))
    names = source_names(dataset.manifest)
    assert [names[place] for place in dataset.source] == ["b", "a", "a"]
