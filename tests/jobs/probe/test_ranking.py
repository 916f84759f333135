import math

import pytest

from jobs.probe.ranking import choose, far_worth, rank


def prompt(copy: list, line: list | None = None) -> dict:
    return {"copy": copy, "line": line or copy}


def test_layers_stand_by_their_best_head_and_kinds_count_alike() -> None:
    measured = {
        "facts": [prompt([[0.0, 0.4], [0.3, 0.3], [0.9, 0.0]]), prompt([[0.0, 0.6], [0.3, 0.3], [0.7, 0.0]])],
        "text": [prompt([[0.0, 0.7], [0.3, 0.3], [0.0, 0.0]])],
    }
    ranked = rank(measured)
    assert [(layer.number, layer.head) for layer in ranked] == [(0, 1), (2, 0), (1, 0)]
    best = ranked[0]
    assert best.score == pytest.approx((0.5 + 0.7) / 2)
    assert best.by_kind == {"facts": pytest.approx(0.5), "text": pytest.approx(0.7)}
    assert best.spread == pytest.approx(1.96 * math.sqrt(0.02 / 2) / 2)


def test_the_token_decides_not_its_line() -> None:
    measured = {"facts": [prompt([[0.1], [0.5]], [[0.9], [0.5]])]}
    assert [layer.number for layer in rank(measured)] == [1, 0]
    assert [layer.line for layer in rank(measured)] == [0.5, 0.9]


def test_the_best_are_chosen_in_order_of_depth_and_ties_go_to_the_lower() -> None:
    measured = {"facts": [prompt([[0.2], [0.5], [0.1], [0.5], [0.5]])]}
    assert choose(rank(measured), 2) == [1, 3]
    assert choose(rank(measured), 4) == [0, 1, 3, 4]


def test_what_far_attention_is_worth_is_a_difference_to_all_and_to_none() -> None:
    changed = {
        "facts": [{"without": [1.5, 1.0, 1.0], "alone": [2.0, 3.0, 3.0]}],
        "text": [{"without": [0.5, 2.0, 0.0], "alone": [1.0, 1.0, 1.0]}],
    }
    worth = far_worth(changed)
    assert worth == {"without": [0.5, 1.0], "alone": [0.5, 0.0], "all": [0.5], "none": [2.0]}
