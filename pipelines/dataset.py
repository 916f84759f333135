"""A data set as its readers see it: documents by number, any span of their tokens.

The index is mapped into memory; tokens are read from the shards' files as they are asked for, so resident memory does
not grow with the data set. A shard is checked against the manifest's checksum when it is first read from.
"""

import os
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.documents import HELD_OUT, INDEX, TRAINING
from pipelines.errors import UserError
from pipelines.shards import REPAIR, Manifest, damage_of

OPEN_FILES = 128


class DamagedShardError(UserError):
    """A shard that is missing, or not what the manifest says."""


class TokenDataset:
    """The documents of the shards in one directory, with their index in another.

    `length` [N] tokens, `source` [N] (place among the recipe's sources), `cluster` [N] (equal for near-duplicates).
    Raises DamagedShardError, at the first read from a shard, where it is not what the manifest says.
    """

    def __init__(self, shards: Path, index: Path) -> None:
        self.directory = shards
        self.manifest = Manifest.read(shards)
        reader = pa.ipc.open_file(pa.memory_map(str(index / INDEX)))
        self._columns = reader.get_batch(0)
        self.length, self.source, self.cluster = (self._column(name) for name in ("length", "source", "cluster"))
        self._shard, self._row, self._offset = (self._column(name) for name in ("shard", "row", "offset"))
        self._dtype = np.dtype(self.manifest.token_type)
        self._file = lru_cache(OPEN_FILES)(self._open)
        self._checked: set[int] = set()

    def _column(self, name: str) -> np.ndarray:
        return self._columns.column(name).to_numpy()

    def __len__(self) -> int:
        return len(self.length)

    @cached_property
    def training(self) -> np.ndarray:
        """Numbers of the documents to train on."""
        return np.flatnonzero(self._column("use") == TRAINING)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Numbers of the documents kept for evaluation."""
        return np.flatnonzero(self._column("use") == HELD_OUT)

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids [start, end) of a document; shorter where the document ends."""
        length = int(self.length[document])
        end = length if end is None else min(end, length)
        size = self._dtype.itemsize
        at = int(self._offset[document]) + start * size
        file = self._file(int(self._shard[document]))
        return np.frombuffer(os.pread(file.fileno(), max(0, end - start) * size, at), self._dtype)

    def id(self, document: int) -> str:
        """A document's id, read from its shard."""
        file = self._file(int(self._shard[document]))
        row = int(self._row[document])
        reader = pa.ipc.open_file(pa.memory_map(str(file.name)))
        for place in range(reader.num_record_batches):
            batch = reader.get_batch(place)
            if row < batch.num_rows:
                return str(batch.column("document_id")[row].as_py())
            row -= batch.num_rows
        raise AssertionError("the index names a row that the shard does not have")

    def _open(self, number: int) -> FileIO:
        shard = self.manifest.shards[number]
        if number not in self._checked and (damage := damage_of(self.directory, shard)):
            raise DamagedShardError(f"{damage}: {REPAIR}")
        self._checked.add(number)
        return FileIO(self.directory / shard.file)
