from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate.trials import interval, read_trials, share, wilson, write_trials


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763), (94, 100, 0.875, 0.972)]
)
def test_wilsons_interval_is_that_of_the_tables(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-3)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share(of: tuple[int, int]) -> None:
    low, high = wilson(*of)
    share = of[0] / of[1]
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    trials = {
        512: [{"depth": 0.5, "exact": True}, {"depth": 0.1, "exact": False}],
        1024: [{"depth": 0.2, "exact": True}],
    }
    write_trials(trials, tmp_path)
    assert read_trials(tmp_path) == trials
    assert share(trials[512], "exact") == 0.5
    assert interval(trials[512], "exact") == "0.095 to 0.905"
