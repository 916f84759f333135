"""Packing: document groups of k consecutive contexts of L tokens, as a pure function of the documents' lengths.

A long document fills groups on its own. What is left of it, and short documents, are joined longest first and cut into
groups, so that each holds few documents: those after the first lie between the eos of one document and the bos of the
next. Every token of every document is used once, but for the remainder of the last, incomplete group of each source,
which is counted. On disk a group is a row of an Arrow file, a source a file.

For a training that goes on with another one's, what is new to it and what that one had are packed apart.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.batches.dataset import TokenDataset
from pipelines.batches.fresh import fresh_documents
from pipelines.workflow.cluster import run_tasks
from pipelines.workflow.files import complete_or_invisible, write_atomically

REPORT = "report.json"
FRESH = "fresh.npy"
NEW, REPLAYED = "new", "replayed"
COLUMNS = ("document", "start", "length")
SCHEMA = pa.schema([(name, pa.large_list(pa.int64())) for name in COLUMNS])


@dataclass(frozen=True)
class Groups:
    """Document groups as runs of pieces: group g holds pieces offsets[g] to offsets[g + 1].

    A piece is tokens [start, start + length) of a document. `dropped`: tokens of the incomplete last group.
    """

    offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, group: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of a group, in order."""
        run = slice(self.offsets[group], self.offsets[group + 1])
        return list(zip(*(column[run].tolist() for column in (self.document, self.start, self.length)), strict=True))


def pack(documents: np.ndarray, lengths: np.ndarray, group_tokens: int) -> Groups:
    """Groups of `group_tokens` (k * L) tokens from documents (their numbers) of the given lengths."""
    full = lengths // group_tokens
    own_document = np.repeat(documents, full)
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    own_start = within * group_tokens

    tail = lengths - full * group_tokens
    order = np.argsort(-tail, kind="stable")
    order = order[tail[order] > 0]
    end = np.cumsum(tail[order])
    begin = end - tail[order]
    shared = int(end[-1]) // group_tokens if len(end) else 0

    # Cut the joined tails at the group boundaries: pieces begin where a tail begins and where a group does.
    cuts = np.union1d(begin, np.arange(shared + 1) * group_tokens)
    cuts = cuts[cuts <= shared * group_tokens]
    piece_begin, piece_length = cuts[:-1], np.diff(cuts)
    owner = np.searchsorted(end, piece_begin, side="right")
    tail_document = documents[order][owner]
    tail_start = (full[order] * group_tokens)[owner] + piece_begin - begin[owner]
    first_piece = np.searchsorted(piece_begin, np.arange(shared + 1) * group_tokens)

    return Groups(
        offsets=np.concatenate([np.arange(len(own_document)), len(own_document) + first_piece]),
        document=np.concatenate([own_document, tail_document]),
        start=np.concatenate([own_start, tail_start]),
        length=np.concatenate([np.full(len(own_document), group_tokens), piece_length]),
        dropped=int(lengths.sum()) - (len(own_document) + shared) * group_tokens,
    )


def join_groups(parts: Sequence[Groups]) -> Groups:
    """The groups of all parts, one part after the other."""
    before = np.cumsum([0, *(len(part.document) for part in parts)])
    offsets = [part.offsets[:-1] + first for part, first in zip(parts, before, strict=False)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Groups(np.concatenate([*offsets, before[-1:]]), **columns, dropped=sum(part.dropped for part in parts))


def groups_file(source: int, age: str | None = None) -> str:
    return f"groups-{source:03d}{'' if age is None else f'-{age}'}.arrow"


def pack_dataset(
    shards: Path, index: Path, sources: Sequence[str], group_tokens: int, output: Path, earlier: Path | None = None
) -> dict[str, Any]:
    """Pack the training documents of every source, a Ray task each. Returns the report, written beside the groups.

    `earlier`: a data set whose documents are packed as REPLAYED, apart from those that are NEW to it.
    """
    ages: Sequence[str | None] = (None,) if earlier is None else (NEW, REPLAYED)
    if earlier is not None:
        with complete_or_invisible(output / FRESH) as temporary, open(temporary, "wb") as file:
            np.save(file, fresh_documents(shards, earlier))
    parts = [(number, age) for number in range(len(sources)) for age in ages]
    arguments = [(shards, index, number, group_tokens, output, age) for number, age in parts]
    names = [sources[number] if age is None else f"{sources[number]}, {age}" for number, age in parts]
    report = {}
    with closing(run_tasks(pack_source, arguments)) as results:
        for place, counts in results:
            report[names[place]] = counts
    report = {name: report[name] for name in names}
    write_atomically(output / REPORT, json.dumps(report, indent=1).encode())
    return report


def pack_source(
    shards: Path, index: Path, source: int, group_tokens: int, output: Path, age: str | None = None
) -> dict[str, int]:
    """One task: the groups of a source. Returns its numbers of tokens, groups, pieces and dropped tokens."""
    dataset = TokenDataset(shards, index)
    documents = dataset.training[dataset.source[dataset.training] == source]
    if age is not None:
        documents = documents[np.load(output / FRESH)[documents] == (age == NEW)]
    groups = pack(documents, dataset.length[documents], group_tokens)
    write_groups(groups, output / groups_file(source, age))
    return {
        "tokens": int(dataset.length[documents].sum()),
        "groups": len(groups),
        "pieces": len(groups.document),
        "dropped": groups.dropped,
    }


def write_groups(groups: Groups, path: Path) -> None:
    """Write the groups, a row each, complete or invisible."""
    offsets = pa.array(groups.offsets)
    columns = [pa.LargeListArray.from_arrays(offsets, pa.array(getattr(groups, name))) for name in COLUMNS]
    schema = SCHEMA.with_metadata({"dropped": str(groups.dropped)})
    with complete_or_invisible(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def read_groups(path: Path) -> Groups:
    """Groups from their file, mapped into memory."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    batch = reader.get_batch(0)
    document, start, length = (batch.column(name).values.to_numpy() for name in COLUMNS)
    offsets = batch.column("document").offsets.to_numpy()
    return Groups(offsets, document, start, length, int(reader.schema.metadata[b"dropped"]))
