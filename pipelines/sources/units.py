"""Cutting what the sources hold into units of work: one Ray task's worth each."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.sources.corpus import Entry, File, Unit
from pipelines.sources.formats import LINES, TABLES, suffix_and_codec
from pipelines.sources.tables import part_sizes


def group_units(entries: Sequence[Entry], task_bytes: int) -> list[Unit]:
    """The entries cut into units of about `task_bytes`, in their order. Raises UserError for a damaged table."""
    units: list[Unit] = []
    pending: list[Entry] = []
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            units.append(Unit(pending[0].source, tuple(pending), None, pending_bytes))
            pending.clear()
            pending_bytes = 0

    with ThreadPoolExecutor() as pool:
        spans = pool.map(lambda entry: _spans(entry.files[0], task_bytes), [each for each in entries if each.records])
        for entry in entries:
            if entry.records or (pending and pending[0].source != entry.source):
                flush()
            if entry.records:
                units += [Unit(entry.source, (entry,), span, size) for span, size in next(spans)]
                continue
            pending.append(entry)
            pending_bytes += sum(file.size for file in entry.files)
            if pending_bytes >= task_bytes:
                flush()
    flush()
    return units


def _spans(file: File, task_bytes: int) -> list[tuple[tuple[int, int], int]]:
    """(span, bytes) of the units of a file of records. A line belongs to the byte range it starts in."""
    suffix, codec = suffix_and_codec(file.path)
    if suffix in TABLES:
        return _group_parts(part_sizes(file.path, file.size), task_bytes)
    if codec is not None or suffix not in LINES:
        return [((0, 1), file.size)]
    starts = range(0, file.size, task_bytes)
    return [((start, end), end - start) for start in starts for end in [min(start + task_bytes, file.size)]]


def _group_parts(sizes: Sequence[int], task_bytes: int) -> list[tuple[tuple[int, int], int]]:
    """Runs of parts that reach `task_bytes` together, the last one excepted."""
    spans, start, collected = [], 0, 0
    for end, size in enumerate(sizes, 1):
        collected += size
        if collected >= task_bytes or end == len(sizes):
            spans.append(((start, end), collected))
            start, collected = end, 0
    return spans
