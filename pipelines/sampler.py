"""The CrossBatch sampler: the batch of step t as a pure function of (data set, batch shape, seed, t).

The unit is the *micro-batch*: G document groups of k contexts whose rows may see one another. A step is M of them;
ranks take them in strides, so the batch of a step does not depend on how many ranks there are. Groups come in a seeded
order, a new permutation each epoch, computed by index (a Feistel network), so seeking to any step costs nothing.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipelines.config import Data
from pipelines.errors import UserError
from pipelines.packing import Groups, pack
from pipelines.shards import TokenDataset

IGNORE = -100  # label of a token whose successor is not in its document


@dataclass(frozen=True)
class MicroBatch:
    """R = G * k rows of L tokens; rows of a group follow each other.

    `input_ids`, `labels` [R, L] int64; `group`, `segment` of each row; `related` [G, G]: groups that share a document;
    `documents`: the document ids each group holds.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    group: list[int]
    segment: list[int]
    related: list[list[bool]]
    documents: list[tuple[str, ...]]


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is kept for evaluation: decided by its id alone, so growth moves nothing."""
    draw = int.from_bytes(hashlib.sha256(f"held out/{document_id}".encode()).digest()[:8], "big")
    return draw < share * 2**64


def split(dataset: TokenDataset, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents for training and of those held out."""
    share = {source.name: source.held_out for source in data.sources}
    held_out = np.array(
        [is_held_out(dataset.ids[number], share[dataset.sources[number]]) for number in dataset.admitted], dtype=bool
    )
    return dataset.admitted[~held_out], dataset.admitted[held_out]


class CrossBatchSampler:
    """Batches over `documents` of a data set. Raises UserError where they do not fill one micro-batch."""

    def __init__(
        self,
        dataset: TokenDataset,
        documents: np.ndarray,
        *,
        context: int,
        contexts_per_group: int,
        groups_per_micro_batch: int,
        micro_batches: int,
        seed: int,
    ) -> None:
        self._dataset = dataset
        self._context, self._contexts = context, contexts_per_group
        self._groups, self._micro_batches, self._seed = groups_per_micro_batch, micro_batches, seed
        self.groups: Groups = pack(documents, dataset.lengths[documents], context * contexts_per_group)
        if len(self.groups) < groups_per_micro_batch:
            raise UserError(
                f"the training documents hold {int(dataset.lengths[documents].sum())} tokens, fewer than one "
                f"micro-batch of {groups_per_micro_batch * contexts_per_group * context}: give more text, or lower the "
                f"context or the groups per micro-batch"
            )

    @property
    def tokens_per_step(self) -> int:
        return self._micro_batches * self._groups * self._contexts * self._context

    def group_numbers(self, step: int, micro_batch: int) -> list[int]:
        """Which groups the micro-batch of a step holds."""
        assert 0 <= micro_batch < self._micro_batches
        first = (step * self._micro_batches + micro_batch) * self._groups
        return [self._group_at(place) for place in range(first, first + self._groups)]

    def _group_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self.groups))
        return permute(index, len(self.groups), f"{self._seed}/{epoch}/{self._dataset.manifest.hash}")

    def micro_batch(self, step: int, micro_batch: int) -> MicroBatch:
        """Micro-batch number `micro_batch` (0 to M - 1) of a step."""
        pieces = [self.groups.pieces(group) for group in self.group_numbers(step, micro_batch)]
        inputs, labels = zip(*(self._read(group) for group in pieces), strict=True)
        held = [{document for document, _, _ in group} for group in pieces]
        G, k = self._groups, self._contexts
        return MicroBatch(
            input_ids=np.concatenate(inputs).reshape(G * k, self._context),
            labels=np.concatenate(labels).reshape(G * k, self._context),
            group=[group for group in range(G) for _ in range(k)],
            segment=list(range(k)) * G,
            related=[[bool(held[a] & held[b]) for b in range(G)] for a in range(G)],
            documents=[tuple(self._dataset.ids[document] for document in sorted(group)) for group in held],
        )

    def _read(self, pieces: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = [], []
        for document, start, length in pieces:
            tokens = self._dataset.tokens(document, start, start + length + 1).astype(np.int64)
            inputs.append(tokens[:length])
            following = np.full(length, IGNORE)
            following[: len(tokens) - 1] = tokens[1:]
            labels.append(following)
        return np.concatenate(inputs), np.concatenate(labels)


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
