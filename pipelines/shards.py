"""Token shards (one Arrow IPC file each, a row a document) and the manifest that lists them.

Shards are uncompressed so that a reader maps them into memory and takes any span of tokens without a copy.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus import Document
from pipelines.errors import UserError
from pipelines.files import complete_or_invisible, write_atomically
from pipelines.hashing import hash_json

MANIFEST = "manifest.json"
FORMAT = 1


def schema(vocab_size: int) -> pa.Schema:
    """Columns of a shard; token ids take two bytes where the vocabulary fits."""
    token = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    return pa.schema(
        [
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("file", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("content_hash", pa.string()),
            ("tokens", pa.large_list(token)),
        ]
    )


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest records it. `dropped`: what became no document, by reason."""

    file: str
    sha256: str
    documents: int
    tokens: int
    characters: int
    dropped: dict[str, int]


def write_shard(
    path: Path, batches: Iterable[tuple[list[Document], list[list[int]]]], vocab_size: int
) -> tuple[int, int, int]:
    """Write a shard from batches of documents with their token ids, complete or invisible.

    Returns its numbers of documents, tokens and characters.
    """
    documents = tokens = characters = 0
    table = schema(vocab_size)
    with complete_or_invisible(path) as temporary, pa.ipc.new_file(str(temporary), table) as writer:
        for batch, ids in batches:
            columns = {
                "document_id": [document.id for document in batch],
                "source": [document.source for document in batch],
                "file": [document.file for document in batch],
                "start": [document.start for document in batch],
                "end": [document.end for document in batch],
                "content_hash": [document.content_hash for document in batch],
                "tokens": ids,
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=table))
            documents += len(batch)
            tokens += sum(map(len, ids))
            characters += sum(len(document.text) for document in batch)
    return documents, tokens, characters


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in order. Its hash names the data set everywhere downstream."""

    tokenizer: str
    recipe: dict[str, Any]
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over everything the manifest says."""
        return hash_json(asdict(self))

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def characters(self) -> int:
        return sum(shard.characters for shard in self.shards)

    @property
    def dropped(self) -> Counter[str]:
        return sum((Counter(shard.dropped) for shard in self.shards), Counter())

    def write(self, directory: Path) -> None:
        write_atomically(directory / MANIFEST, json.dumps(asdict(self), indent=1, sort_keys=True).encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        content = json.loads((directory / MANIFEST).read_text())
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return cls(shards=shards, **content)


class TokenDataset:
    """All documents of a data set, memory-mapped. Documents are numbered in manifest order.

    Raises UserError for two documents of one id with different content. Copies (same id and content) are left out:
    `admitted` lists the documents in use.
    """

    def __init__(self, directory: Path) -> None:
        self.manifest = Manifest.read(directory)
        ids: list[str] = []
        hashes: list[str] = []
        sources: list[str] = []
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []  # (tokens, offsets) of a record batch
        place: list[np.ndarray] = []
        for shard in self.manifest.shards:
            reader = pa.ipc.open_file(pa.memory_map(str(directory / shard.file)))
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                ids += batch.column("document_id").to_pylist()
                hashes += batch.column("content_hash").to_pylist()
                sources += batch.column("source").to_pylist()
                column = batch.column("tokens")
                place.append(np.stack([np.full(len(column), len(self._batches)), np.arange(len(column))], axis=1))
                self._batches.append((column.values.to_numpy(), column.offsets.to_numpy()))
        self.ids, self.sources = ids, sources
        self._place = np.concatenate(place) if place else np.zeros((0, 2), np.int64)
        self.lengths = np.concatenate([np.diff(offsets) for _, offsets in self._batches] or [np.zeros(0, np.int64)])
        self.admitted = self._without_copies(ids, hashes)

    @staticmethod
    def _without_copies(ids: list[str], hashes: list[str]) -> np.ndarray:
        known: dict[str, str] = {}
        admitted = []
        for number, (name, content) in enumerate(zip(ids, hashes, strict=True)):
            if name not in known:
                known[name] = content
                admitted.append(number)
            elif known[name] != content:
                raise UserError(
                    f"two documents have the id {name!r} but different text: make the ids unique, or name the field "
                    f"that holds them with data.sources.N.id_field"
                )
        return np.array(admitted, dtype=np.int64)

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids [start, end) of a document, without a copy; shorter where the document ends."""
        batch, row = self._place[document]
        values, offsets = self._batches[batch]
        first, last = offsets[row], offsets[row + 1]
        return values[first + start : last if end is None else min(first + end, last)]
