"""Which documents of a data set an earlier one does not have: by content, whatever files they are in by now."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.batches.dataset import DamagedShardError
from pipelines.tokens.shards import REPAIR, Manifest


def fresh_documents(shards: Path, earlier: Path) -> np.ndarray:
    """For each document of the data set in `shards` whether that in `earlier` lacks its text: bool [N].

    Raises DamagedShardError where a shard is missing.
    """
    return ~pc.is_in(_contents(shards), value_set=_contents(earlier)).to_numpy()


def _contents(directory: Path) -> pa.ChunkedArray:
    """The content hash of each document, in manifest order."""
    columns: list[pa.Array] = []
    for shard in Manifest.read(directory).shards:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(directory / shard.file)))
        except FileNotFoundError:
            raise DamagedShardError(f"{directory / shard.file} is missing: {REPAIR}") from None
        batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
        columns += [batch.column("content_hash").cast(pa.large_string()) for batch in batches]
    return pa.chunked_array(columns, pa.large_string())
