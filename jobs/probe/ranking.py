"""From what prompts showed to an order of the layers. Pure functions.

A head's score is the mean share of its attention that falls on the very token to be copied, over the queries of a
prompt, the prompts of a kind, and the kinds; a layer's score is that of its best head. (Retrieval heads: Wu et al.
2024, arXiv 2404.15574, who count how often a head's largest weight lies there; this is the weight itself.) The share on
the whole line ranks layers high, too, that only find the place; alone they bring nothing (benchmarks/RESULTS.md).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Z = 1.96  # of a 95 % interval
Heads = list[list[float]]  # [layers][heads]
Measured = Mapping[str, Any]  # what came of a prompt: {"copy": Heads, "line": Heads, "loss": nats}


@dataclass(frozen=True)
class Layer:
    """A layer by its best head, `head`. `score`: the head's mean mass on the token to be copied, `by_kind` of prompts
    too; `spread`: half the width of the score's 95 % interval over prompts. `line`: its mean mass on the whole line."""

    number: int
    head: int
    score: float
    spread: float
    by_kind: Mapping[str, float]
    line: float


def rank(measured: Mapping[str, Sequence[Measured]]) -> list[Layer]:
    """Layers from the best down. `measured`: prompts by their kind."""
    copy, line = heads(measured, "copy"), heads(measured, "line")
    layers = []
    for number, own in enumerate(copy):
        head = own.index(max(own))
        values = {kind: [prompt["copy"][number][head] for prompt in prompts] for kind, prompts in measured.items()}
        by_kind = {kind: fmean(each) for kind, each in values.items()}
        layers.append(Layer(number, head, own[head], spread(values.values()), by_kind, line[number][head]))
    return sorted(layers, key=lambda layer: (-layer.score, layer.number))


def heads(measured: Mapping[str, Sequence[Measured]], what: str) -> Heads:
    """Mean mass of every head on the "line" or "copy", kinds of prompts counting alike."""
    prompts = [[prompt[what] for prompt in own] for own in measured.values()]
    layers, count = len(prompts[0][0]), len(prompts[0][0][0])
    return [
        [fmean(fmean(each[layer][head] for each in own) for own in prompts) for head in range(count)]
        for layer in range(layers)
    ]


def spread(kinds: Collection[Sequence[float]]) -> float:
    """Half the width of the 95 % interval of the mean over kinds of their prompts' means; a kind of a single prompt
    counts as if it were certain."""
    variances = [stdev(own) ** 2 / len(own) if len(own) > 1 else 0.0 for own in kinds]
    return Z * math.sqrt(sum(variances)) / len(kinds)


def far_worth(changed: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> dict[str, list[float]]:
    """By layer, means over kinds of their prompts' means: how much the answers' loss rises "without" this layer's far
    attention, and how much it falls when this "alone" is added where no layer has any, in nats; and the loss where
    "all" have it and "none" has, one number each. `changed`: what `change_layers` gave, by kind."""

    def mean(name: str) -> list[float]:
        kinds = [
            [fmean(values) for values in zip(*(prompt[name] for prompt in own), strict=True)]
            for own in changed.values()
        ]
        return [fmean(values) for values in zip(*kinds, strict=True)]

    *without, all_far = mean("without")
    *alone, none_far = mean("alone")
    return {
        "without": [loss - all_far for loss in without],
        "alone": [none_far - loss for loss in alone],
        "all": [all_far],
        "none": [none_far],
    }


def choose(ranked: Sequence[Layer], count: int) -> list[int]:
    """The numbers of the best layers, in order of depth."""
    return sorted(layer.number for layer in ranked[:count])
