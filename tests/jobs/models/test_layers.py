"""Which layers see other contexts and which have gates."""

import pytest
from fixtures.estimate import fot, training

from fot_model import default_mem_layers
from jobs.models.layers import gated_layers, seeing_layers


@pytest.mark.parametrize("layers", range(1, 81))
def test_memory_layers_by_default_are_the_models(layers: int) -> None:
    objective = training(fot(mem_layers=None)).objective
    assert seeing_layers(objective, layers) == default_mem_layers(layers)
    assert seeing_layers(training(fot(mem_layers="auto")).objective, layers) == default_mem_layers(layers)


def test_layers_that_a_probe_will_choose_are_counted_as_many() -> None:
    assert seeing_layers(training(fot(mem_layers={"auto": 5})).objective, 30) == [5, 10, 15, 20, 25]


def test_gates_are_counted_where_they_are() -> None:
    gated = {"kind": "memorizing", "context": 8, "mem_layers": [0, 2]}
    assert gated_layers(training(gated).objective, 3) == [0, 2]
    assert gated_layers(training({**gated, "gate": False}).objective, 3) == []
    assert gated_layers(training(fot()).objective, 3) == []
