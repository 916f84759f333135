"""In which of a model's layers an objective sees additional contexts."""

from collections.abc import Sequence

from jobs.config.training import (
    MemorizingObjective,
    MemoryRows,
    Objective,
    TransformerXlObjective,
    auto_layers,
    named_layers,
)


def memory_layer_numbers(objective: Objective, layers: int) -> list[int]:
    """The memory layers, of a base that has none itself. Which ones a probe will choose nobody knows before it: then as
    many, spread evenly."""
    if not isinstance(objective, MemoryRows):
        return []
    if named := named_layers(objective):
        return sorted(set(named))
    if (auto := auto_layers(objective)) is not None and auto.auto is not None:
        return [(place + 1) * layers // (auto.auto + 1) for place in range(auto.auto)]
    quarter = layers // 4  # as fot_model.default_mem_layers, which would import torch
    return [quarter, 2 * quarter, 3 * quarter] if layers >= 24 else [2 * layers // 3]


def seeing_layers(objective: Objective, layers: int) -> Sequence[int]:
    """The layers in which additional contexts are seen: memory layers, or all of a Transformer-XL."""
    return range(layers) if isinstance(objective, TransformerXlObjective) else memory_layer_numbers(objective, layers)


def gated_layers(objective: Objective, layers: int) -> list[int]:
    """The layers with the Memorizing Transformer's gate."""
    gated = isinstance(objective, MemorizingObjective) and objective.gate
    return memory_layer_numbers(objective, layers) if gated else []
