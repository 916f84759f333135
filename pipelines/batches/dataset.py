"""A data set as its readers see it: documents by number, any span of their tokens.

The index is mapped into memory; tokens are read from the shards' files as they are asked for, so resident memory does
not grow with the data set. The tokens of a record batch are compared with their checksum when they are first read from,
which costs the same for shards of any size.
"""

import os
import zlib
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.batches.index import BATCHES, HELD_OUT, INDEX, TRAINING
from pipelines.tokens.shards import REPAIR, Manifest
from pipelines.workflow.errors import UserError

OPEN_FILES = 128
BLOCK = 1 << 20  # bytes checked at once


class DamagedShardError(UserError):
    """A shard that is missing, or not what the manifest says."""


class TokenDataset:
    """The documents of the shards in one directory, with their index in another.

    `length` [N] tokens, `source` [N] (place among the recipe's sources), `cluster` [N] (equal for near-duplicates).
    """

    def __init__(self, shards: Path, index: Path) -> None:
        self.directory, self._index = shards, index
        self.manifest = Manifest.read(shards)
        self._columns = _only_batch(index / INDEX)
        self.length, self.source, self.cluster = (self._column(name) for name in ("length", "source", "cluster"))
        self._shard, self._batch, self._row = (self._column(name) for name in ("shard", "batch", "row"))
        self._offset = self._column("offset")
        self._batches = _only_batch(index / BATCHES).to_pydict()
        self._checked: set[int] = set()
        self._dtype = np.dtype(self.manifest.token_type)
        self._file = lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple[type, tuple[Path, Path]]:
        """Pickled by path: a process that it is sent to opens files of its own."""
        return type(self), (self.directory.absolute(), self._index.absolute())

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
        """Token ids [start, end) of a document; shorter where the document ends.

        Raises DamagedShardError where its shard is missing or its tokens are not what was written.
        """
        length = int(self.length[document])
        end = length if end is None else min(end, length)
        size = self._dtype.itemsize
        at = int(self._offset[document]) + start * size
        shard, batch = int(self._shard[document]), int(self._batch[document])
        file = self._file(shard)
        if batch not in self._checked:
            self._check(shard, batch, file)
        return np.frombuffer(os.pread(file.fileno(), max(0, end - start) * size, at), self._dtype)

    def _check(self, shard: int, batch: int, file: FileIO) -> None:
        offset, size, crc = (self._batches[name][batch] for name in ("offset", "size", "crc"))
        found = 0
        for at in range(offset, offset + size, BLOCK):
            found = zlib.crc32(os.pread(file.fileno(), min(BLOCK, offset + size - at), at), found)
        if found != crc:
            raise DamagedShardError(f"{self.directory / self.manifest.shards[shard].file} is corrupt: {REPAIR}")
        self._checked.add(batch)

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
        path = self.directory / self.manifest.shards[number].file
        try:
            return FileIO(path)
        except FileNotFoundError:
            raise DamagedShardError(f"{path} is missing: {REPAIR}") from None


def _only_batch(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
