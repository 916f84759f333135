"""The mixture: which source the group at a place of the training order comes from, by index alone.

Places are dealt in blocks of BLOCK. In every block each source has a number of slots in proportion to its weight, and
the slots stand in a seeded order of the block's own. So shares are kept, to 1 / BLOCK, in every block, and how many
groups of a source come before a place takes one block to count: seeking costs the same everywhere.
"""

import hashlib
from functools import lru_cache

import numpy as np

from pipelines.shares import BLOCK, share_out, too_small
from pipelines.workflow.errors import UserError


class Mixture:
    """Places dealt to sources. `weights`: any positive numbers, by source name.

    Raises UserError for a weight too small to get a slot in BLOCK.
    """

    def __init__(self, weights: dict[str, float], seed: int) -> None:
        if (wrong := too_small(weights)) is not None:
            raise UserError(wrong)
        self.slots = share_out(list(weights.values()), BLOCK)
        self._weights, self._seed = weights, seed
        self._block = lru_cache(4)(self._deal)

    def __reduce__(self) -> tuple[type, tuple[dict[str, float], int]]:
        return type(self), (self._weights, self._seed)  # the cache is each process's own

    def at(self, place: int) -> tuple[int, int]:
        """(source, how many groups of it come before) of a place."""
        block, within = divmod(place, BLOCK)
        sources, before = self._block(block)
        source = int(sources[within])
        return source, block * int(self.slots[source]) + int(before[within])

    def count(self, places: int) -> np.ndarray:
        """How many of the first `places` places each source has."""
        blocks, rest = divmod(places, BLOCK)
        return blocks * self.slots + np.bincount(self._block(blocks)[0][:rest], minlength=len(self.slots))

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, earlier slots of the same source in the block) of each place of a block."""
        drawn = np.frombuffer(hashlib.shake_128(f"mixture/{self._seed}/{block}".encode()).digest(8 * BLOCK), "<u8")
        order = np.argsort(drawn, kind="stable")
        sources = np.repeat(np.arange(len(self.slots)), self.slots)[order]
        before = np.empty(BLOCK, np.int64)
        for source in range(len(self.slots)):
            own = np.flatnonzero(sources == source)
            before[own] = np.arange(len(own))
        return sources, before
