"""The index of a data set: for every document where its tokens lie, which documents it copies, what it is used for.

Documents are numbered in manifest order. What an earlier document is used for never depends on a later one, so a grown
data set keeps its decisions: a document is held out by its id alone, or with the first document that it copies.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.batches.near_duplicates import join, near_duplicates
from pipelines.config import Data
from pipelines.tokens.precheck import two_texts
from pipelines.tokens.shards import Manifest
from pipelines.workflow.files import complete_or_invisible, write_atomically

INDEX, BATCHES, REPORT = "documents.arrow", "batches.arrow", "report.json"
TRAINING, HELD_OUT, COPY, EXACT, NEAR = range(5)
USES = ("training", "held out", "same id and text as an earlier one", "same text as an earlier one", "near-duplicate")
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("batch", pa.int32()),  # record batch, numbered over all shards
        ("row", pa.int32()),  # within the shard
        ("offset", pa.int64()),  # of the first token, bytes from the start of the shard's file
        ("length", pa.int64()),  # tokens
        ("source", pa.int32()),
        ("original", pa.int64()),  # the first document that this one copies or nearly copies; itself if none
        ("cluster", pa.int64()),  # smallest document of those linked by being (near-)duplicates
        ("use", pa.int8()),
    ]
)
BATCH_SCHEMA = pa.schema([("offset", pa.int64()), ("size", pa.int64()), ("crc", pa.uint32())])  # of a batch's tokens


def index_documents(shards: Path, data: Data, output: Path) -> dict[str, Any]:
    """Write the index of the data set in `shards`, and return its report, written beside it.

    Raises UserError for two documents of one id with different text.
    """
    manifest = Manifest.read(shards)
    columns = _read_columns(shards, manifest, [source.name for source in data.sources])
    ids, contents, signatures, batches = (columns.pop(name) for name in ("ids", "contents", "signatures", "batches"))
    first_of_id, first_of_content = _first_of_equal(ids), _first_of_equal(contents)
    if len(ambiguous := np.flatnonzero(first_of_content != first_of_content[first_of_id])):
        name = ids[int(ambiguous[0])].as_py()
        raise two_texts(name)
    near = near_duplicates(signatures, data.similarity)
    original = near.first[first_of_content]
    number = np.arange(len(ids))
    join(near.cluster, number, first_of_content)

    shares = np.array([source.held_out for source in data.sources])
    root = _root(original)
    held_out = _held_out(ids, root, shares[columns["source"]])
    use = np.where(held_out, HELD_OUT, TRAINING)
    if data.duplicates == "drop_near":
        use[original < number] = NEAR
    if data.duplicates != "keep":
        use[first_of_content < number] = EXACT
    use[first_of_id < number] = COPY

    columns |= {"original": original, "cluster": near.cluster, "use": use}
    _write(output / INDEX, SCHEMA, columns)
    _write(output / BATCHES, BATCH_SCHEMA, batches)
    report = _report(manifest, data, columns)
    write_atomically(output / REPORT, json.dumps(report, indent=1).encode())
    return report


def _read_columns(shards: Path, manifest: Manifest, sources: list[str]) -> dict[str, Any]:
    """All the index needs of the shards; signatures stay mapped, one array [n, BINS] a record batch."""
    columns: dict[str, list[Any]] = {name: [] for name in ("shard", "batch", "row", "offset", "length", "source")}
    batches: dict[str, list[int]] = {"offset": [], "size": [], "crc": []}
    ids, contents, signatures = [], [], []
    for number, shard in enumerate(manifest.shards):
        whole = pa.memory_map(str(shards / shard.file)).read_buffer()
        reader = pa.ipc.open_file(whole)
        rows = 0
        for place in range(reader.num_record_batches):
            batch = reader.get_batch(place)
            tokens, n = batch.column("tokens"), batch.num_rows
            offsets, values = tokens.offsets.to_numpy(), tokens.values
            begin, size = values.buffers()[1].address - whole.address, len(values) * values.type.bit_width // 8
            crc = zlib.crc32(memoryview(whole)[begin : begin + size])
            columns["batch"].append(np.full(n, len(batches["crc"])))
            for name, value in (("offset", begin), ("size", size), ("crc", crc)):
                batches[name].append(value)
            columns["shard"].append(np.full(n, number))
            columns["row"].append(np.arange(rows, rows + n))
            columns["offset"].append(begin + offsets[:-1] * values.type.bit_width // 8)
            columns["length"].append(np.diff(offsets))
            source = sources.index(batch.column("source")[0].as_py())
            columns["source"].append(np.full(n, source))  # a shard is of one source
            ids.append(batch.column("document_id"))
            contents.append(batch.column("content_hash"))
            signatures.append(batch.column("signature").flatten().to_numpy().reshape(n, -1))
            rows += n
    made: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    made |= {"ids": pa.chunked_array(ids), "contents": pa.chunked_array(contents), "signatures": signatures}
    return made | {"batches": batches}


def _write(path: Path, schema: pa.Schema, columns: dict[str, Any]) -> None:
    with complete_or_invisible(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _first_of_equal(values: pa.ChunkedArray) -> np.ndarray:
    """For each place the first place with an equal value."""
    encoded = values.cast(pa.large_string()).dictionary_encode()  # a dictionary of plain strings ends at 2 GB
    codes = np.concatenate([chunk.indices for chunk in encoded.unify_dictionaries().chunks])
    _, first = np.unique(codes, return_index=True)
    return first[codes]


def _root(original: np.ndarray) -> np.ndarray:
    """Follow each document to the one that copies no other."""
    root = original
    while not np.array_equal(root, further := root[root]):
        root = further
    return root


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is kept for evaluation: decided by its id alone, so growth moves nothing."""
    draw = int.from_bytes(hashlib.sha256(f"held out/{document_id}".encode()).digest()[:8], "big")
    return draw < share * 2**64


def _held_out(ids: pa.ChunkedArray, root: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Whether each document is held out: as its original is, however its own id would be drawn."""
    number = 0
    drawn = np.zeros(len(root), bool)
    for chunk in ids.chunks:
        for name in chunk.to_pylist():
            drawn[number] = is_held_out(name, share[number])
            number += 1
    return drawn[root]


def _report(manifest: Manifest, data: Data, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Per source: documents and tokens by use, near-duplicates found, a histogram of lengths, what was dropped."""
    report = {}
    for number, source in enumerate(data.sources):
        own = columns["source"] == number
        lengths, use = columns["length"][own], columns["use"][own]
        exponents = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
        shards = [shard for shard in manifest.shards if shard.unit["source"] == source.name]
        dropped: dict[str, int] = {}
        for shard in shards:
            for reason, count in shard.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        report[source.name] = {
            "documents": int(own.sum()),
            "tokens": int(lengths.sum()),
            "characters": sum(shard.characters for shard in shards),
            "uses": {
                name: [int((use == each).sum()), int(lengths[use == each].sum())] for each, name in enumerate(USES)
            },
            "duplicates": int((columns["original"] < np.arange(len(own)))[own].sum()),
            "lengths": {str(2**each): int((exponents == each).sum()) for each in np.unique(exponents).tolist()},
            "dropped": dict(sorted(dropped.items())),
        }
    return report
