"""The sampler's batches as a torch DataLoader: read ahead by worker processes, pinned where there is a GPU.

The only module here that imports torch. Shapes: R rows, L tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.dataset import DamagedShardError
from pipelines.sampler import CrossBatchSampler


class TensorBatch(NamedTuple):
    """A micro-batch with its arrays as tensors: `input_ids`, `labels` [R, L] int64; the rest as in MicroBatch."""

    input_ids: Tensor
    labels: Tensor
    group: list[int]
    segment: list[int]
    related: list[list[bool]]


class _MicroBatches(Dataset):
    """Micro-batches by (step, number). A damaged shard is handed on as a value: DataLoader would wrap an exception."""

    def __init__(self, sampler: CrossBatchSampler) -> None:
        self._sampler = sampler

    def __getitem__(self, place: tuple[int, int]) -> TensorBatch | DamagedShardError:
        try:
            batch = self._sampler.micro_batch(*place)
        except DamagedShardError as error:
            return error
        tensors = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        return TensorBatch(*tensors, batch.group, batch.segment, batch.related)


def rank_batches(
    sampler: CrossBatchSampler, steps: range, rank: int, world: int, workers: int = 0
) -> Iterator[TensorBatch]:
    """What a rank reads, in order: of every step the micro-batches rank, rank + world, ...

    With `workers` processes a few micro-batches are read ahead; without, they are read when asked for. Raises
    DamagedShardError.
    """
    places = [(step, number) for step in steps for number in range(rank, sampler.shape.micro_batches, world)]
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
