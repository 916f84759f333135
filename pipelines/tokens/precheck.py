"""What is wrong with a corpus, as far as that can be found before anything is tokenized.

Every file of records is begun, and those whose records bring ids are read through for ids that stand for two texts.

Ray tasks read them; ids and texts come back as hashes of 64 bits, 16 bytes a document. Two that meet are looked up, so
that a collision is no error.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.config import Data, Source
from pipelines.sources.corpus import Document, Dropped, Unit
from pipelines.sources.readers import describe, read_unit
from pipelines.tokens.shards import Manifest
from pipelines.workflow.cluster import run_tasks
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import Progress

AT_ONCE = 16  # files begun


def too_many_bad(bad: Dropped) -> UserError:
    """Of more broken documents than are tolerated, the first."""
    return UserError(
        f"{describe(bad)}: mend it, or tolerate up to N such documents with --set data.max_bad_documents=N"
    )


def two_texts(name: str) -> UserError:
    """Of an id that stands for two texts."""
    return UserError(
        f"two documents have the id {name!r} but different text: make the ids unique, or name the field that holds "
        f"them with data.sources.N.id_field"
    )


def check_records(units: Sequence[Unit], data: Data, earlier: Path | None) -> None:
    """Look at what will be tokenized, beside what the data set `earlier` holds.

    Raises UserError for a file of records that is not what its name says or lacks what the source asks for, and for an
    id that stands for two texts.
    """
    sources = {source.name: source for source in data.sources}
    records = [unit for unit in units if unit.span is not None]
    begun = [unit for unit in records if unit.span is not None and unit.span[0] == 0]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        firsts = list(pool.map(lambda unit: _first(unit, sources[unit.source]), begun))
    with_ids = set()
    for unit, first in zip(begun, firsts, strict=True):
        if isinstance(first, Dropped) and data.max_bad_documents == 0:
            raise too_many_bad(first)
        if isinstance(first, Document) and first.id != f"{first.source}/{first.content_hash[:16]}":
            with_ids.add(unit.entries)
    if with_ids:
        _check_ids([unit for unit in records if unit.entries in with_ids], sources, earlier)


def _first(unit: Unit, source: Source) -> Document | Dropped | None:
    """The first document of a unit, or broken one."""
    return next((each for each in read_unit(unit, source) if isinstance(each, Document) or each.bad), None)


def _check_ids(units: Sequence[Unit], sources: Mapping[str, Source], earlier: Path | None) -> None:
    parts = [_hashes(batch) for batch in _known(earlier)]
    arguments = [(unit, sources[unit.source]) for unit in units]
    with (
        Progress("ids", sum(unit.bytes for unit in units), "B") as progress,
        closing(run_tasks(_hash_ids, arguments)) as results,
    ):
        for number, hashes in results:
            parts.append(hashes)
            progress.advance(units[number].bytes)
    pairs = np.concatenate(parts)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    same_id, same_text = (pairs[1:] == pairs[:-1]).T
    suspects = set(pairs[1:][same_id & ~same_text, 0].tolist())
    if not suspects:
        return
    texts = {name: content for batch in _known(earlier) for name, content in batch if _hash(name) in suspects}
    for unit in units:
        for each in read_unit(unit, sources[unit.source]):
            if not isinstance(each, Document) or _hash(each.id) not in suspects:
                continue
            if texts.setdefault(each.id, each.content_hash) != each.content_hash:
                raise two_texts(each.id)


def _hash_ids(unit: Unit, source: Source) -> np.ndarray:
    """Of each document of a unit, as `_hashes`."""
    return _hashes([(each.id, each.content_hash) for each in read_unit(unit, source) if isinstance(each, Document)])


def _hashes(named: Sequence[tuple[str, str]]) -> np.ndarray:
    """Hashes of id and text of documents, given with the sha256 (hex) of their text: uint64 [N, 2]."""
    return np.array([(_hash(name), int(content[:16], 16)) for name, content in named], np.uint64).reshape(-1, 2)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _known(directory: Path | None) -> Iterator[list[tuple[str, str]]]:
    """(id, hash of its text) of the documents of a data set, by batch."""
    if directory is None:
        return
    for shard in Manifest.read(directory).shards:
        reader = pa.ipc.open_file(pa.memory_map(str(directory / shard.file)))
        for place in range(reader.num_record_batches):
            batch = reader.get_batch(place)
            columns = (batch.column(name).to_pylist() for name in ("document_id", "content_hash"))
            yield list(zip(*columns, strict=True))
