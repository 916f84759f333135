"""From units of work to documents: lines, rows, what plugins read, whole files and trees.

Memory holds one document and a buffer, however long the file. What is no document comes back as `Dropped`, in its
place.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

from pipelines.config import Source
from pipelines.sources.corpus import Document, Dropped, Entry, File, Unit
from pipelines.sources.formats import IN_TREES, LINES, PROSE, ROWS, SEPARATED, TABLES, plugin_of, suffix_and_codec
from pipelines.sources.separated import read_separated
from pipelines.sources.storage import (
    BLOCK,
    POINTER,
    open_binary,
    open_decompressed,
    printable,
    readable,
    refuse_pointer,
)
from pipelines.sources.synthetic import is_synthetic
from pipelines.sources.tables import choose_columns, name_some, read_rows
from pipelines.workflow.errors import UserError
from pipelines.workflow.plugins import said

BEGINNING = 1 << 16  # bytes of a file of lines in which its first one begins


def read_unit(unit: Unit, source: Source) -> Iterator[Document | Dropped]:
    """The unit's documents, and what was dropped, in order.

    Raises UserError for a file that cannot be read, is damaged or of another format than its name says, and for a table
    without a column of text, or with two.
    """
    for entry in unit.entries:
        if unit.span is None:
            yield from _read_whole(entry, source.text_field)
        elif (suffix := suffix_and_codec(entry.files[0].path)[0]) in TABLES:
            yield from _read_rows(entry, unit.span, source)
        elif suffix in SEPARATED:
            yield from _read_separated(entry, source)
        elif suffix in LINES:
            yield from _read_lines(entry, unit.span, source)
        else:
            yield from _read_by_plugin(entry, source)


def plugins_used(units: Sequence[Unit]) -> dict[str, str]:
    """{distribution: version} of the plugins that read some of the units."""
    read = [plugin_of(unit.entries[0].files[0].path) for unit in units if unit.span is not None]
    return {plugin.distribution: plugin.version for plugin in read if plugin is not None}


def describe(dropped: Dropped) -> str:
    """What was dropped, where and why, for people. Lines count from 1, rows and records from 0."""
    path, what = printable(dropped.path), f"{dropped.reason} ({dropped.detail})" if dropped.detail else dropped.reason
    if dropped.at is None:
        return f"{path}: {what}"
    if suffix_and_codec(path)[0] in ROWS:
        return f"{path}, row {dropped.at}: {what}"
    if suffix_and_codec(path)[0] not in LINES:
        return f"{path}, record {dropped.at}: {what}"
    newlines, left = 0, dropped.at
    with readable(dropped.path), open_decompressed(dropped.path) as stream:
        while left > 0 and (block := stream.read(min(left, BLOCK))):
            newlines, left = newlines + block.count(b"\n"), left - len(block)
    return f"{path}, line {newlines + 1}: {what}"


def _read_whole(entry: Entry, text_field: str) -> Iterator[Document | Dropped]:
    """The entry's files as one document."""
    if not entry.files:
        yield Dropped("every file larger than max_tree_bytes", entry.name)
        return
    texts = []
    for file in entry.files:
        as_it_is = entry.tree and not file.path.endswith(IN_TREES)
        with readable(file.path), (open_binary if as_it_is else open_decompressed)(file.path) as stream:
            content = stream.read()
        bad = _is_prose(file.path, entry.tree)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield Dropped("not UTF-8", file.path, bad=bad)
            continue
        if "\0" in text:
            yield Dropped("binary (NUL bytes)", file.path, bad=bad)
            continue
        if not entry.tree and content.startswith(POINTER):
            yield Dropped("git-lfs pointer, not the file", file.path, bad=True)
            continue
        if not entry.tree and not bad and _is_json_lines(text, text_field):
            yield Dropped("records, JSON lines, without an ending that says so (name it .jsonl)", file.path, bad=True)
            continue
        texts.append(text)
    text = "\n".join(texts)
    encoded = text.encode()
    if text.strip():
        content_hash = hashlib.sha256(encoded).hexdigest()
        made_up = is_synthetic(entry.files[0].path)
        name = f"synthetic/{entry.name}" if made_up else f"{entry.source}/{entry.name}"
        yield Document(name, entry.source, text, entry.name, 0, len(encoded), content_hash)
    elif texts:
        yield Dropped("empty", entry.files[0].path if len(entry.files) == 1 else entry.name)


def _is_json_lines(text: str, text_field: str) -> bool:
    """Whether a text's first two lines that are not blank, or the only one, are JSON objects with a text: part-00000 of
    what Spark and its like write."""
    lines = [line for line in text.split("\n", 4)[:4] if line.strip()][:2]
    try:
        objects = [json.loads(line) for line in lines]
    except ValueError:
        return False
    return bool(objects) and all(isinstance(each, dict) and text_field in each for each in objects)


def _is_prose(path: str, in_tree: bool) -> bool:
    """Whether a file can only be meant as text; in a tree, where much is kept that is not, not by names in capitals."""
    if not in_tree:
        return suffix_and_codec(path)[0] in PROSE
    name = next((path.removesuffix(ending) for ending in IN_TREES if path.endswith(ending)), path)
    return name.endswith(PROSE)


def _read_lines(entry: Entry, span: tuple[int, int], source: Source) -> Iterator[Document | Dropped]:
    (file,) = entry.files
    with readable(file.path), open_decompressed(file.path) as stream:
        whole = suffix_and_codec(file.path)[1] is not None
        if whole or span[0] == 0:
            _check_beginning(file.path, stream)
        for start, line in _lines(stream, 0, None) if whole else _lines(stream, *span):
            if line.strip():
                yield _parse_line(file, start, line, source)


def _check_beginning(path: str, stream: IO[bytes]) -> None:
    """Raise UserError for what has the name of a file of lines but is none. Leaves the stream where it was."""
    beginning: bytes = stream.peek(BEGINNING)  # type: ignore[attr-defined]  # all that are opened here are buffered
    refuse_pointer(path, beginning)
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", beginning):
        raise UserError(
            f"{printable(path)} is one JSON array, not an object a line: make lines of it, for example with "
            f"`jq -c '.[]' ARRAY > LINES.jsonl`"
        )


def _lines(stream: IO[bytes], start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """(first byte, content) of the lines that start in the range; `end` None for all."""
    at = start
    if start > 0:
        assert end is not None, "what has no end is read from its beginning"
        stream.seek(start - 1)
        at = start - 1 + len(stream.readline(end - start + 1))  # the line before belongs to the range before
    while end is None or at < end:
        line = stream.readline()
        if not line:
            return
        yield at, line.rstrip(b"\r\n")
        at += len(line)


def _parse_line(file: File, start: int, line: bytes, source: Source) -> Document | Dropped:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Dropped("line is not UTF-8", file.path, start, bad=True)
    except (ValueError, RecursionError):
        return Dropped("line is not JSON", file.path, start, bad=True)
    if isinstance(record, dict):
        for name in (source.text_field, source.id_field):
            if line.count(b'"' + name.encode(errors="replace") + b'"') > 1 and _stands_twice(line, name):
                return Dropped(f"line has the field {name!r} twice", file.path, start, bad=True)
    text = record.get(source.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        reason, detail = f"line has no text in field {source.text_field!r}", _what_is_there(record, source.text_field)
        return Dropped(reason, file.path, start, bad=True, detail=detail)
    return _document(source, file, start, start + len(line), text, record.get(source.id_field))


def _stands_twice(line: bytes, field: str) -> bool:
    """Whether the line's object, not one inside it, has the field twice: the last would be taken in silence."""
    pairs = json.loads(line.decode("utf-8-sig"), object_pairs_hook=list)
    return [name for name, _ in pairs].count(field) > 1


def _what_is_there(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return "it is no object"
    return f"it holds {type(record[field]).__name__}" if field in record else f"its fields: {name_some(list(record))}"


def _read_rows(entry: Entry, span: tuple[int, int], source: Source) -> Iterator[Document | Dropped]:
    (file,) = entry.files
    with readable(file.path):  # a damaged row may be found when it is looked at
        for row, text_scalar, id_scalar in read_rows(file.path, span, source.text_field, source.id_field):
            try:
                text, identity = text_scalar.as_py(), None if id_scalar is None else id_scalar.as_py()
            except UnicodeDecodeError:
                yield Dropped("row is not UTF-8", file.path, row, bad=True)
                continue
            if text is None:
                yield Dropped(f"row has null in column {source.text_field!r}", file.path, row, bad=True)
            else:
                yield _document(source, file, row, row + 1, text, identity)


def _read_separated(entry: Entry, source: Source) -> Iterator[Document | Dropped]:
    (file,) = entry.files
    rows = read_separated(file.path)
    header = next(rows, [])
    columns = [header.index(name) for name in choose_columns(file.path, header, source.text_field, source.id_field)]
    for row, fields in enumerate(rows):
        if len(fields) != len(header):
            detail = f"{len(fields)}, there are {len(header)} columns"
            yield Dropped("row has another number of fields", file.path, row, bad=True, detail=detail)
            continue
        text, *identity = (fields[column] for column in columns)
        try:
            "".join([text, *identity]).encode()
        except UnicodeEncodeError:
            yield Dropped("row is not UTF-8", file.path, row, bad=True)
            continue
        yield _document(source, file, row, row + 1, text, next(filter(None, identity), None))


def _read_by_plugin(entry: Entry, source: Source) -> Iterator[Document | Dropped]:
    (file,) = entry.files
    for number, (identity, text) in enumerate(_records(file.path)):
        if isinstance(text, str):
            yield _document(source, file, number, number + 1, text, identity)
        else:
            detail = f"its reader gave {type(text).__name__}"
            yield Dropped("record has no text", file.path, number, bad=True, detail=detail)


def _records(path: str) -> Iterator[tuple[Any, Any]]:
    """(id, text) of what a plugin finds in a file, of whatever types it gives them."""
    plugin = plugin_of(path)
    if plugin is None:
        raise UserError(
            f"{printable(path)}: no plugin here reads files that end so, where it was listed one did: install it on "
            f"every node"
        )
    read = plugin.load()
    with readable(path), open_decompressed(path) as stream:
        refuse_pointer(path, stream.peek(len(POINTER)))  # type: ignore[attr-defined]  # all that are opened are buffered
        try:
            yield from ((identity, text) for identity, text in read(stream))
        except (OSError, EOFError, UserError):
            raise
        except Exception as error:  # of code that is not ours, anything
            raise UserError(
                f"{printable(path)} cannot be read by {plugin.point.group} {plugin.point.name} of {plugin.made_by} "
                f"({said(error)}): mend the file or the reader"
            ) from error


def _document(source: Source, file: File, start: int, end: int, text: str, identity: Any) -> Document | Dropped:
    """The document of a record; without an id it is named by its content."""
    if not text.strip():
        return Dropped("empty", file.path, start)
    if "\0" in text:
        return Dropped("text holds NUL bytes", file.path, start, bad=True)
    try:
        content_hash = hashlib.sha256(text.encode()).hexdigest()
        name = content_hash[:16] if identity is None else str(identity)
        name.encode()
    except UnicodeEncodeError:
        return Dropped("text is not Unicode (lone surrogates)", file.path, start, bad=True)
    return Document(f"{source.name}/{name}", source.name, text, file.name, start, end, content_hash)
