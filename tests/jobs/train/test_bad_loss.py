import pickle

import pytest

from jobs.config.training import BadLoss
from jobs.train.bad_loss import LEAST, REMEDY, WINDOW, BadLossError, LossWatch, SkippedSteps


def bad(step: int) -> BadLossError:
    return BadLossError(step, "its loss is nan", REMEDY)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_what_is_no_number_is_bad(loss: float) -> None:
    with pytest.raises(BadLossError, match=r"step 8: its loss is (nan|inf|-inf): lower optimizer.learning_rate"):
        LossWatch(BadLoss(), []).check(7, loss, 1.0)
    with pytest.raises(BadLossError, match=r"step 8: the norm of its gradient is (nan|inf|-inf): lower"):
        LossWatch(BadLoss(), []).check(7, 1.0, loss)


def test_a_spike_is_measured_against_the_median_of_the_steps_before() -> None:
    watch = LossWatch(BadLoss(spike=2), [])
    for step in range(LEAST):
        watch.check(step, 100.0 if step == 0 else 1.0, None)  # before there are enough nothing is a spike
    watch.check(LEAST, 2.0, 1.0)
    with pytest.raises(BadLossError, match=r"2.010, over 2 times the median 1.000"):
        watch.check(LEAST + 1, 2.01, 1.0)
    assert 2.01 not in watch.recent


def test_without_a_factor_nothing_is_a_spike() -> None:
    watch = LossWatch(BadLoss(), [1.0] * 50)
    watch.check(50, 1e9, 1e9)


def test_a_resumed_watch_judges_as_the_one_before() -> None:
    settings, losses = BadLoss(spike=1.5), [1 + 0.001 * (step % 7) for step in range(3 * WINDOW)]
    whole = LossWatch(settings, [])
    for step, loss in enumerate(losses):
        whole.check(step, loss, None)
    assert LossWatch(settings, whole.recent).recent == whole.recent == losses[-WINDOW:]


def test_skipped_steps_outlive_the_process(tmp_path) -> None:
    skipped = SkippedSteps(tmp_path, BadLoss(action="skip", most=2))
    skipped.add(bad(3), write=True)
    again = SkippedSteps(tmp_path, BadLoss(action="skip", most=2))
    assert (3 in again, 4 in again, len(again)) == (True, False, 1)
    again.add(bad(9), write=True)
    with pytest.raises(BadLossError, match=r"step 13: its loss is nan: 2 steps are left out already, as many as"):
        again.add(bad(12), write=True)
    elsewhere = SkippedSteps(tmp_path / "elsewhere", BadLoss(action="skip"))
    elsewhere.remember({"9": "its loss is nan"}, write=True)  # of a checkpoint
    assert (9 in elsewhere, len(elsewhere)) == (True, 1)
    assert 9 in SkippedSteps(tmp_path / "elsewhere", BadLoss())


def test_a_rank_that_does_not_write_leaves_no_file(tmp_path) -> None:
    SkippedSteps(tmp_path, BadLoss(action="skip")).add(bad(3), write=False)
    assert not list(tmp_path.iterdir())


def test_where_the_recipe_says_stop_the_error_stands(tmp_path) -> None:
    with pytest.raises(BadLossError):
        SkippedSteps(tmp_path, BadLoss()).add(bad(3), write=True)


def test_the_error_comes_whole_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(bad(3)))
    assert (error.step, error.what, str(error)) == (3, "its loss is nan", str(bad(3)))
