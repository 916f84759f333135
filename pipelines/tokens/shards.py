"""Token shards (one Arrow IPC file each, a row a document) and the manifest that lists them.

Shards are uncompressed, so any span of a document's tokens is a span of bytes in the file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.sources.corpus import Document
from pipelines.tokens.minhash import BINS
from pipelines.workflow.files import complete_or_invisible, write_atomically
from pipelines.workflow.hashing import hash_file, hash_json

MANIFEST = "manifest.json"
FORMAT = 2
REPAIR = "rebuild it with `fot data repair RECIPE`"


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token where the vocabulary fits, else four."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def schema(vocab_size: int) -> pa.Schema:
    """Columns of a shard. `signature` is the document's MinHash."""
    return pa.schema(
        [
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("file", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("content_hash", pa.string()),
            ("signature", pa.list_(pa.uint32(), BINS)),
            ("tokens", pa.large_list(pa.from_numpy_dtype(token_dtype(vocab_size)))),
        ]
    )


@dataclass(frozen=True)
class Encoded:
    """A document as it goes into a shard: `tokens` [n] with bos and eos, `signature` [BINS] uint32."""

    document: Document
    tokens: np.ndarray
    signature: np.ndarray


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest records it. `unit`: what of the corpus it was made of; `dropped`: what of it became no
    document, by reason, of which `bad` were broken."""

    file: str
    sha256: str
    unit: dict[str, Any]
    documents: int
    tokens: int
    characters: int
    dropped: dict[str, int]
    bad: int


def write_shard(path: Path, batches: Iterable[Sequence[Encoded]], vocab_size: int) -> tuple[int, int, int]:
    """Write a shard from batches of documents, complete or invisible.

    Returns its numbers of documents, tokens and characters.
    """
    documents = tokens = characters = 0
    table = schema(vocab_size)
    with complete_or_invisible(path) as temporary, pa.ipc.new_file(str(temporary), table) as writer:
        for batch in batches:
            writer.write_batch(_record_batch(batch, table, token_dtype(vocab_size)))
            documents += len(batch)
            tokens += sum(len(each.tokens) for each in batch)
            characters += sum(len(each.document.text) for each in batch)
    return documents, tokens, characters


def _record_batch(batch: Sequence[Encoded], table: pa.Schema, dtype: np.dtype) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(each.tokens) for each in batch)])
    values = np.concatenate([each.tokens for each in batch]).astype(dtype)
    signatures = np.concatenate([each.signature for each in batch])
    columns = [
        pa.array([getattr(each.document, name) for each in batch], pa.string()) for name in ("id", "source", "file")
    ]
    columns += [pa.array([getattr(each.document, name) for each in batch], pa.int64()) for name in ("start", "end")]
    columns += [
        pa.array([each.document.content_hash for each in batch], pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(signatures), BINS),
        pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=table)


def damage_of(directory: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, None if nothing is."""
    path = directory / shard.file
    if not path.exists():
        return f"{path} is missing"
    return None if hash_file(path) == shard.sha256 else f"{path} is corrupt"


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set, in order. Its hash names the data set everywhere downstream.

    `token_type`: uint16 or uint32. `tokenizer`: its fingerprint, the hash of what the library made of it on probe
    texts, and the backend. `recipe`: the part of the recipe that decides the shards. `parent`: the hash of the manifest
    that this one extends, whose shards, in their order, are the first of these. `generations`: how many shards each
    growth added. `libraries`: versions that made it, for people; not part of the hash.
    """

    token_type: str
    tokenizer: dict[str, str]
    recipe: dict[str, Any]
    shards: tuple[Shard, ...]
    parent: str | None
    generations: list[int]
    libraries: dict[str, str]
    format: int = FORMAT

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over everything the manifest says, but for `libraries`."""
        return hash_json({**asdict(self), "libraries": None})

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

    @property
    def licences(self) -> dict[str, list[str]]:
        """The installed packages that it was made of, by licence."""
        packages: dict[str, list[str]] = {}
        for shard in self.shards:
            for name, _, *licence in shard.unit["entries"]:
                for each in licence:
                    packages.setdefault(each, []).append(name)
        return dict(sorted(packages.items()))

    def write(self, directory: Path) -> None:
        write_atomically(directory / MANIFEST, json.dumps(asdict(self), indent=1, sort_keys=True).encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a data set. Raises ValueError for one of another format."""
        content = json.loads((directory / MANIFEST).read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')}, this version reads {FORMAT}")
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return cls(shards=shards, **content)
