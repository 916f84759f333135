"""Shares of a mixture: slots of a block in proportion to weights."""

from collections.abc import Mapping, Sequence

import numpy as np

BLOCK = 1000  # slots


def too_small(weights: Mapping[str, float]) -> str | None:
    """What is wrong with weights of which one is too small to get a slot in BLOCK; None where all get one."""
    slots = share_out(list(weights.values()), BLOCK)
    if slots.all():
        return None
    name = list(weights)[int(np.argmin(slots))]
    return (
        f"data.sources: the weight of {name!r} ({weights[name]:g}) is less than {1 / BLOCK} of all: raise it or leave "
        f"the source out"
    )


def share_out(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` slots in proportion to the weights, by largest remainder."""
    exact = np.array(weights) / np.sum(weights) * total
    slots = np.floor(exact).astype(np.int64)
    largest = np.argsort(slots - exact, kind="stable")[: total - slots.sum()]
    slots[largest] += 1
    return slots
