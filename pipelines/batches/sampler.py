"""The CrossBatch sampler: the batch of step t as a pure function of (data set, recipe, seed, t).

The unit is the *micro-batch*: G document groups of k contexts whose rows may see one another. A step is M of them;
ranks take them in strides, alone or each a part of them, so the batch of a step does not depend on how many ranks there
are. Groups come in a seeded order, a new permutation each epoch, computed by index (a Feistel network), so seeking to
any step costs nothing. With weights every source has an order and epochs of its own, and the mixture says whose turn it
is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.batches.dataset import TokenDataset
from pipelines.batches.mixture import Mixture
from pipelines.batches.packing import Groups, groups_file, read_groups
from pipelines.config import Source
from pipelines.workflow.errors import UserError

IGNORE = -100  # label of a token whose successor is not in its document


@dataclass(frozen=True)
class MicroBatch:
    """R = G * k rows of L tokens, or a part of them; rows of a group follow each other.

    Of all rows, what a plan is made of: `group`, `segment` of each row; `related` [G, G]: groups that share a document
    or hold near-duplicates; `sources` of each group. Of the part's rows, from number `first` on: `input_ids`, `labels`,
    `document_ids` [R, L] int64, the last by number; `documents` of each row, in order.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    group: list[int]
    segment: list[int]
    related: list[list[bool]]
    sources: list[str]
    documents: list[tuple[int, ...]]
    first: int


@dataclass(frozen=True)
class BatchShape:
    """L tokens a context, k contexts a group, G groups a micro-batch, M micro-batches a step."""

    context: int
    contexts_per_group: int
    groups_per_micro_batch: int
    micro_batches: int

    @property
    def group_tokens(self) -> int:
        return self.context * self.contexts_per_group

    @property
    def groups_per_step(self) -> int:
        return self.groups_per_micro_batch * self.micro_batches

    @property
    def tokens_per_step(self) -> int:
        return self.groups_per_step * self.group_tokens


class CrossBatchSampler:
    """Batches of a data set's groups (those of each source, in the recipe's order). `first`: the step at which the
    order begins, in a training that goes on with another one's.

    Raises UserError where the groups do not fill one micro-batch, and where a source with a weight has none.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        groups: Sequence[Groups],
        sources: Sequence[Source],
        shape: BatchShape,
        seed: int,
        first: int = 0,
    ) -> None:
        self.dataset, self.groups, self.sources, self.shape, self.first = dataset, groups, sources, shape, first
        self._order = f"{seed}/{dataset.manifest.hash}"
        self._ends = np.cumsum([len(own) for own in groups])
        weights = {source.name: source.weight for source in sources if source.weight is not None}
        self._mixture = Mixture(weights, seed) if weights else None
        if self._ends[-1] < shape.groups_per_micro_batch:
            raise UserError(
                f"the training documents fill {self._ends[-1]} groups of {shape.contexts_per_group} x {shape.context} "
                f"tokens, a micro-batch takes {shape.groups_per_micro_batch}: give more text, or lower the context or "
                f"the groups per micro-batch"
            )
        if empty := [name for name, own in zip(weights, groups, strict=False) if len(own) == 0]:
            raise UserError(
                f"source {empty[0]!r} has a weight but not the {shape.group_tokens} training tokens of one group: give "
                f"it more text or leave it out"
            )

    @classmethod
    def open(
        cls, dataset: TokenDataset, packed: Path, sources: Sequence[Source], shape: BatchShape, seed: int
    ) -> "CrossBatchSampler":
        """With the groups of a directory written by `pack_dataset`."""
        groups = [read_groups(packed / groups_file(number)) for number in range(len(sources))]
        return cls(dataset, groups, sources, shape, seed)

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source is read in the first so many steps."""
        places = steps * self.shape.groups_per_step
        if self._mixture is None:
            return {source.name: places / int(self._ends[-1]) for source in self.sources}
        counts = self._mixture.count(places).tolist()
        named = zip(self.sources, counts, self.groups, strict=True)
        return {source.name: count / len(own) for source, count, own in named}

    def group_numbers(self, step: int, micro_batch: int) -> list[tuple[int, int]]:
        """Which groups the micro-batch of a step holds: (source, number among the source's groups)."""
        assert 0 <= micro_batch < self.shape.micro_batches
        assert step >= self.first
        first = ((step - self.first) * self.shape.micro_batches + micro_batch) * self.shape.groups_per_micro_batch
        return [self._group_at(place) for place in range(first, first + self.shape.groups_per_micro_batch)]

    def labels(self, step: int) -> int:
        """How many tokens of a step have a label; no token is read. All but the last of each document have one."""
        places = [place for number in range(self.shape.micro_batches) for place in self.group_numbers(step, number)]
        pieces = [piece for source, number in places for piece in self.groups[source].pieces(number)]
        ends = sum(start + length == int(self.dataset.length[document]) for document, start, length in pieces)
        return self.shape.tokens_per_step - ends

    def _group_at(self, place: int) -> tuple[int, int]:
        if self._mixture is None:
            size = int(self._ends[-1])
            epoch, turn = divmod(place, size)
            index = permute(turn, size, f"{self._order}/{epoch}")
            source = int(np.searchsorted(self._ends, index, side="right"))
            return source, index - int(self._ends[source] - len(self.groups[source]))
        source, turn = self._mixture.at(place)
        epoch, index = divmod(turn, len(self.groups[source]))
        return source, permute(index, len(self.groups[source]), f"{self._order}/{epoch}/{self.sources[source].name}")

    def micro_batch(self, step: int, micro_batch: int, part: tuple[int, int] = (0, 1)) -> MicroBatch:
        """Micro-batch number `micro_batch` (0 to M - 1) of a step. Of part (i, n) only the i-th of n equal parts of its
        groups is read. Raises DamagedShardError."""
        G, k, L = self.shape.groups_per_micro_batch, self.shape.contexts_per_group, self.shape.context
        numbers = self.group_numbers(step, micro_batch)
        pieces = [self.groups[source].pieces(number) for source, number in numbers]
        at, parts = part
        assert at in range(parts)
        assert G % parts == 0
        size = G // parts
        mine = pieces[at * size : (at + 1) * size]
        inputs, labels = np.empty((size, k * L), np.int64), np.full((size, k * L), IGNORE, np.int64)
        document_ids = np.empty_like(inputs)
        for group, own in enumerate(mine):
            self._read(own, inputs[group], labels[group], document_ids[group])
        clusters = [{int(self.dataset.cluster[document]) for document, _, _ in own} for own in pieces]
        return MicroBatch(
            input_ids=inputs.reshape(size * k, L),
            labels=labels.reshape(size * k, L),
            document_ids=document_ids.reshape(size * k, L),
            group=[group for group in range(G) for _ in range(k)],
            segment=list(range(k)) * G,
            related=[[not one.isdisjoint(other) for other in clusters] for one in clusters],
            sources=[self.sources[source].name for source, _ in numbers],
            documents=[row for own in mine for row in _documents_by_row(own, L)],
            first=at * size * k,
        )

    def _read(
        self, pieces: list[tuple[int, int, int]], inputs: np.ndarray, labels: np.ndarray, document_ids: np.ndarray
    ) -> None:
        """Fill the tokens of one group, the tokens that follow them, and the documents they are of."""
        at = 0
        for document, start, length in pieces:
            tokens = self.dataset.tokens(document, start, start + length + 1)
            inputs[at : at + length] = tokens[:length]
            labels[at : at + len(tokens) - 1] = tokens[1:]
            document_ids[at : at + length] = document
            at += length


def _documents_by_row(pieces: list[tuple[int, int, int]], context: int) -> list[tuple[int, ...]]:
    """The documents in each of a group's contexts."""
    length = [length for _, _, length in pieces]
    end = np.cumsum(length)
    rows = range(0, int(end[-1]), context)
    return [
        tuple(
            document
            for (document, _, n), last in zip(pieces, end, strict=True)
            if last > at and last - n < at + context
        )
        for at in rows
    ]


def permute(index: int, size: int, key: str) -> int:
    """Where a seeded permutation of range(size) sends an index: a Feistel network, walked until it lands inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = (left << half) | right
        if index < size:
            return index
