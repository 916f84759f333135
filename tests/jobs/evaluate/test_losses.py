import random
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate.losses import (
    Scored,
    Sums,
    at_steps,
    brief,
    curve_of,
    difference,
    perplexity,
    read_losses,
    renamed,
    write_losses,
)


def windows(nats: list[list[float]], name: str = "model", source: str = "s", first: int = 0) -> list[Scored]:
    """A document for each list, with a window of 10 tokens for each loss."""
    return [
        Scored(name, source, first + document, 10 * place, 16, Sums(each, 10, 30))
        for document, own in enumerate(nats)
        for place, each in enumerate(own)
    ]


def drawn(documents: int, spread: float, seed: int, each: int = 3) -> list[list[float]]:
    draw = random.Random(seed)
    means = [20 + draw.gauss(0, spread) for _ in range(documents)]
    return [[mean + draw.gauss(0, 0.1) for _ in range(each)] for mean in means]


def test_losses_are_read_as_they_were_written(tmp_path: Path) -> None:
    scored = windows([[1.5, 2.25], [3.0]], "base")
    write_losses(scored, tmp_path)
    assert read_losses(tmp_path) == scored
    assert renamed(scored, {"base": "other"}) == windows([[1.5, 2.25], [3.0]], "other")
    assert renamed(scored, {"model": "other"}) == []


def test_windows_are_summed_by_reader_source_and_step() -> None:
    scored = windows([[1.0], [2.0]]) + windows([[4.0]], source="t", first=2) + windows([[8.0]], "base")
    assert curve_of(scored, "model") == {16: Sums(7.0, 30, 90)}
    assert curve_of(scored, "model", "t") == {16: Sums(4.0, 10, 30)}
    assert [one.sums.nats for one in at_steps(scored, "base")[16]] == [8.0]


def test_an_interval_is_over_documents_not_over_windows() -> None:
    """The 95 % interval of a mean of 40 documents is about as wide as the normal one, however many windows each has."""
    few, many = (perplexity(windows(drawn(40, 2.0, 0, each))) for each in (2, 30))
    means = [np.mean(own) / 10 for own in drawn(40, 2.0, 0, 30)]
    half = 1.96 * np.std(means, ddof=1) / len(means) ** 0.5
    assert np.log(many.high / many.low) / 2 == pytest.approx(half, rel=0.1)
    assert np.log(few.high / few.low) == pytest.approx(np.log(many.high / many.low), rel=0.1)
    assert few.low < few.value < few.high


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    found = [perplexity(windows(drawn(30, 2.0, seed))) for seed in range(200)]
    assert 0.89 <= np.mean([each.low <= np.exp(2.0) <= each.high for each in found]) <= 0.99


def test_what_is_the_same_for_both_falls_out_of_a_difference() -> None:
    theirs = drawn(20, 5.0, 1)
    own = [[nats - 1 for nats in each] for each in theirs]
    gap = difference(windows(own), windows(theirs, "base"))
    assert gap == pytest.approx((-0.1, -0.1, -0.1))
    assert perplexity(windows(own)).high > perplexity(windows(theirs)).low, "though the intervals of each overlap"


def test_only_windows_that_both_have_are_compared() -> None:
    own, theirs = windows([[1.0, 2.0], [3.0]]), windows([[0.0], [2.0]], "base")
    assert difference(own, theirs).value == pytest.approx((1 + 1) / 20)
    assert difference(own, []) is None
    assert difference(own, windows([[1.0]], first=9)) is None


def test_every_source_has_its_share_in_every_draw() -> None:
    """What differs from source to source only makes no interval."""
    scored = windows([[10.0], [10.0]]) + windows([[30.0], [30.0]], source="t", first=2)
    assert perplexity(scored) == pytest.approx(tuple([np.exp(2.0)] * 3))


def test_one_document_tells_no_interval() -> None:
    one = perplexity(windows([[10.0, 20.0]]))
    assert (one.low, one.high, one.ends) == (None, None, None)
    assert str(one) == brief(np.exp(1.5))
    assert str(perplexity(windows([[10.0], [10.0]]))) == "2.72 (2.72 to 2.72)"


@pytest.mark.parametrize(
    ("value", "text"), [(1204.4, "1204"), (183.26, "183.3"), (8.314, "8.31"), (0.08449, "0.084"), (-0.5, "-0.500")]
)
def test_a_number_is_shown_with_the_places_that_matter(value: float, text: str) -> None:
    assert brief(value) == text
