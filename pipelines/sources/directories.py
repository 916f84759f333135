"""What a directory inside a source holds: files of records, or one document.

Names tell where nothing but files of records and what usually lies beside them is there. Where there is text, too, they
are looked into: a directory holds records where nearly all of its bytes are documents as the source describes them.
Others stay what a repository is: one document.
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

from pipelines.config import Source
from pipelines.sources.formats import (
    RECORDS,
    SEPARATED,
    TABLES,
    companion,
    is_certain,
    plugin_of,
    suffix_and_codec,
    unread,
)
from pipelines.sources.separated import read_separated
from pipelines.sources.storage import Item, open_decompressed, readable
from pipelines.sources.tables import column_names
from pipelines.workflow.errors import UserError

NEARLY_ALL, HARDLY_ANY = 0.9, 0.1
PACKED = 4  # bytes of text that a compressed one stands for
LINE = 1 << 20  # bytes of a first line that are looked at
OTHERS = "other files beside records"
AS_TEXT = "files of records in a directory that is read as one document"
Named = tuple[str, Item]


@dataclass
class Found:
    """`records`: the files to read line by line or row by row; none where the directory is one document. `beside`: what
    is left out because it only tells of them, by kind. `lost`: what is not read as what it is, by kind."""

    records: list[Named] = field(default_factory=list)
    beside: dict[str, list[Named]] = field(default_factory=dict)
    lost: dict[str, list[Named]] = field(default_factory=dict)


def look_into(files: Sequence[Named], source: Source) -> Found:
    """What a directory with these files (names within it) holds."""
    found = Found()
    records: list[Named] = []
    possible: list[Named] = []
    texts: list[Named] = []
    for name, item in files:
        suffix = suffix_and_codec(name)[0]
        if (kind := companion(name, item.size)) is not None:
            found.beside.setdefault(kind, []).append((name, item))
        elif (kind := unread(name)) is not None:
            found.lost.setdefault(kind, []).append((name, item))
        elif is_certain(name):
            records.append((name, item))
        else:
            (possible if suffix in RECORDS else texts).append((name, item))
    total = _bytes(records) + _bytes(possible) + _bytes(texts)
    if texts and _bytes(records) + _bytes(possible) < HARDLY_ANY * total:
        return Found()

    def looked_at(file: Named) -> bool | None:
        return _holds(file, source)

    with ThreadPoolExecutor() as pool:
        holding = {file[0]: holds for file, holds in zip(possible, pool.map(looked_at, possible), strict=True)}
        if not (records or texts or any(holding.values())) and all(_is_separated(name) for name in holding):
            records, possible = possible, []  # whose columns have other names: that is told when they are read
        texts += [file for file in possible if not holding[file[0]]]
        if texts:  # of those, too, only what the source reads
            wanted = list(zip(records, pool.map(looked_at, records), strict=True))
            texts += [file for file, holds in wanted if holds is False]
            records = [file for file, holds in wanted if holds is not False]
    records = sorted([*records, *(file for file in possible if holding[file[0]])], key=lambda file: file[0].split("/"))
    if not records:
        return Found(lost={} if texts else found.lost)
    if _bytes(records) < NEARLY_ALL * total:
        return Found(lost={AS_TEXT: records})
    if texts:
        found.lost[OTHERS] = texts
    return Found(records, found.beside, found.lost)


def _bytes(files: Sequence[Named]) -> int:
    """About how much there is to read in them."""
    return sum(item.size * (PACKED if suffix_and_codec(name)[1] else 1) for name, item in files)


def _is_separated(name: str) -> bool:
    return suffix_and_codec(name)[0] in SEPARATED


def _holds(file: Named, source: Source) -> bool | None:
    """Whether a file of records begins with a document as the source describes them; None where it cannot be told,
    because it is damaged."""
    name, item = file
    suffix = suffix_and_codec(name)[0]
    if plugin_of(name) is not None:  # made for nothing else
        return True
    try:
        if suffix in TABLES:
            return source.text_field in column_names(item.path)
        if suffix in SEPARATED:
            return source.text_field in next(read_separated(item.path), [])
        with readable(item.path), open_decompressed(item.path) as stream:
            return _begins_with_record(stream, source.text_field)
    except UserError:
        return None


def _begins_with_record(stream: IO[bytes], text_field: str) -> bool | None:
    """Whether the first line is an object with a text, or the beginning of an array of such: that it is one is told
    when it is read. None for what is no JSON."""
    line = b""
    while not line.strip() and (line := stream.readline(LINE)):
        pass
    begins = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if begins.startswith(b"[") or len(line) == LINE:
        begins += stream.read(1 << 12)
        return re.match(rb"(\[\s*)?\{", begins) is not None and json.dumps(text_field).encode() in begins
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return isinstance(record, dict) and isinstance(record.get(text_field), str)
