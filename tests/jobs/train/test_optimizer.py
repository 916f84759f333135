"""Parameter groups and schedules; what DeepSpeed makes of them is seen in test_zero.py."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.config.training import Optimizer, RateSchedule
from jobs.train.optimizer import parameter_groups, schedule_factor
from pipelines.workflow.errors import UserError

KINDS = ("constant", "cosine", "inverse_sqrt")


def curve(steps: int, **settings: object) -> list[float]:
    schedule = RateSchedule.model_validate(settings)
    return [schedule_factor(schedule, step, steps) for step in range(steps)]


@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_every_schedule_warms_up_linearly_to_the_peak_and_never_rises_again(kind, warmup, steps, floor) -> None:
    factors = curve(steps, kind=kind, warmup_steps=warmup, floor=floor)
    assert factors[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps))]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(one >= other for one, other in pairwise(after))
    if kind == "constant":
        assert set(after) <= {1.0}


def test_cosine_goes_down_to_its_floor() -> None:
    factors = curve(1000, kind="cosine", warmup_steps=0, floor=0.25)
    assert factors[0] == 1
    assert factors[500] == pytest.approx((1 + 0.25) / 2)
    assert factors[-1] == pytest.approx(0.25, abs=1e-4)


@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 200))
def test_a_training_that_goes_on_goes_on_with_its_schedule(kind, warmup, steps) -> None:
    schedule = RateSchedule(kind=kind, warmup_steps=warmup, floor=0.25)
    later = [schedule_factor(schedule, step, steps) for step in range(max(warmup + 1, steps), 3 * steps + 60)]
    assert all(one >= other for one, other in pairwise(later))
    if kind == "cosine":
        assert set(later) == {0.25}


def test_inverse_square_root_falls_as_it_says() -> None:
    factors = curve(400, kind="inverse_sqrt", warmup_steps=25)
    assert factors[24] == 1
    assert factors[99] == math.sqrt(25 / 100)
    assert factors[399] == 0.25


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.last = torch.nn.Linear(3, 1, bias=False)


def names_of(model: Model, groups: list[dict]) -> list[tuple[set[str], float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in groups]


def test_a_parameter_is_in_the_first_group_whose_pattern_it_matches() -> None:
    model = Model()
    settings = Optimizer.model_validate(
        {
            "learning_rate": 1.0,
            "weight_decay": 0.5,
            "groups": [{"pattern": r"norm|bias$", "weight_decay": 0}, {"pattern": "first", "learning_rate": 0.1}],
        }
    )
    assert names_of(model, parameter_groups(model, settings)) == [
        ({"norm.weight", "norm.bias", "first.bias"}, 1.0, 0.0),
        ({"first.weight"}, 0.1, 0.5),
        ({"last.weight"}, 1.0, 0.5),
    ]
    assert [len(group["params"]) for group in parameter_groups(model, Optimizer())] == [5]


def test_a_pattern_that_nothing_matches_is_named() -> None:
    settings = Optimizer.model_validate({"groups": [{"pattern": "bias"}, {"pattern": "lm_haed"}]})
    with pytest.raises(UserError, match=r"optimizer.groups.1.pattern 'lm_haed' matches no parameter"):
        parameter_groups(Model(), settings)
