"""The sampler's batches as a torch DataLoader: read ahead by worker processes, pinned where there is a GPU.

The only module here that imports torch. Shapes: R rows, L tokens.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.batches.dataset import DamagedShardError
from pipelines.batches.sampler import CrossBatchSampler


class TensorBatch(NamedTuple):
    """A micro-batch or a part of one with its arrays as tensors: `input_ids`, `labels`, `document_ids` [R, L] int64;
    the rest as in MicroBatch."""

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    group: list[int]
    segment: list[int]
    related: list[list[bool]]
    first: int

    def to(self, device: torch.device) -> "TensorBatch":
        """What the model takes, on its device; from pinned memory without waiting."""
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True)
        )


class _MicroBatches(Dataset):
    """Micro-batches by (step, number, part). A damaged shard is handed on as a value: DataLoader would wrap an
    exception."""

    def __init__(self, sampler: CrossBatchSampler) -> None:
        self._sampler = sampler

    def __getitem__(self, place: tuple[int, int, tuple[int, int]]) -> TensorBatch | DamagedShardError:
        try:
            batch = self._sampler.micro_batch(*place)
        except DamagedShardError as error:
            return error
        return TensorBatch(
            torch.from_numpy(batch.input_ids),
            torch.from_numpy(batch.labels),
            torch.from_numpy(batch.document_ids),
            batch.group,
            batch.segment,
            batch.related,
            batch.first,
        )


def rank_batches(
    sampler: CrossBatchSampler, steps: Iterable[int], rank: int, world: int, workers: int = 0, spread: int = 1
) -> Iterator[TensorBatch]:
    """What a rank reads, in order. `spread` consecutive ranks are a team; of the T = world / spread teams, team t takes
    of every step the micro-batches t, t + T, ..., and each of its ranks a part of each.

    With `workers` processes a few micro-batches are read ahead; without, they are read when asked for. Raises
    DamagedShardError.
    """
    assert world % spread == 0
    team, at = divmod(rank, spread)
    numbers = range(team, sampler.shape.micro_batches, world // spread)
    places = [(step, number, (at, spread)) for step in steps for number in numbers]
    loader = DataLoader(
        _MicroBatches(sampler),
        sampler=places,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, DamagedShardError):
            raise batch
        yield batch
