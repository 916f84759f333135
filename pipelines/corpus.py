"""From a recipe's sources to documents: what there is (units of work), and reading it.

A *unit* is what one tokenization task reads: a byte range of a .jsonl file, or a run of whole-file and whole-tree
documents of about `task_bytes`. Listing units touches only file names and sizes; their order, and with it everything
downstream, depends on names and contents alone.
"""

import fnmatch
import glob
import gzip
import hashlib
import json
import os
import random
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pipelines.config import Data, Source
from pipelines.errors import UserError
from pipelines.hashing import FileHashes

STDLIB = "python:stdlib"
NEVER = ("__pycache__", "site-packages", ".*")  # caches, other people's packages, hidden files
LINES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class File:
    """A file of a source: its name relative to the source's root, where it is, its size and content hash."""

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """One task's worth of a source. `span`: the byte range of lines to read, None for whole-file documents.

    `documents`: tuples of files; each tuple is one document, or the .jsonl file when there is a span.
    """

    source: str
    documents: tuple[tuple[str, tuple[File, ...]], ...]
    span: tuple[int, int] | None

    @property
    def bytes(self) -> int:
        if self.span is not None:
            return self.span[1] - self.span[0]
        return sum(file.size for _, files in self.documents for file in files)

    def identity(self) -> dict[str, Any]:
        """What the unit is made of, wherever it lies: hashed into stage keys."""
        return {
            "source": self.source,
            "documents": [[name, [[file.name, file.sha256] for file in files]] for name, files in self.documents],
            "span": self.span,
        }


@dataclass(frozen=True)
class Document:
    """A document's text with its lineage.

    `start`, `end`: its bytes in `file` (decompressed, lines without newline); of a tree, `file` is the document's name
    and the bytes are those of the joined text.
    """

    id: str
    source: str
    text: str
    file: str
    start: int
    end: int
    content_hash: str


@dataclass(frozen=True)
class Dropped:
    """Something that is no document, and why. `where` names it for people; `bad_line` counts against the limit."""

    reason: str
    where: str
    bad_line: bool = False


def list_units(data: Data, seed: int, hashes: FileHashes) -> list[Unit]:
    """All units of the recipe's sources, in canonical order.

    Raises UserError for a path that is not there and for a source without a single file.
    """
    names = [source.name for source in data.sources]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"data.sources: the name {repeated.pop()!r} is used twice: give each source its own name")
    units: list[Unit] = []
    for source in data.sources:
        found = _list_source(source, seed, hashes, data.task_bytes)
        if not found:
            limits = f" with suffixes {', '.join(source.suffixes)}" if source.suffixes else ""
            raise UserError(f"source {source.name!r}: {source.path} holds no files{limits}: check data.sources")
        units += found
    return units


def _list_source(source: Source, seed: int, hashes: FileHashes, task_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    pending: list[tuple[str, tuple[File, ...]]] = []
    pending_bytes = 0
    for name, paths, lines in _documents(source, seed):
        files = tuple(
            File(_printable(inner), str(path), path.stat().st_size, hashes.hash(path)) for inner, path in paths
        )
        if lines:
            spans = _line_spans(files[0], task_bytes)
            units += [Unit(source.name, ((_printable(name), files),), span) for span in spans]
            continue
        pending.append((_printable(name), files))
        pending_bytes += sum(file.size for file in files)
        if pending_bytes >= task_bytes:
            units.append(Unit(source.name, tuple(pending), None))
            pending, pending_bytes = [], 0
    if pending:
        units.append(Unit(source.name, tuple(pending), None))
    return units


def _printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _line_spans(file: File, task_bytes: int) -> list[tuple[int, int]]:
    """Byte ranges to read lines from. A line belongs to the range it starts in; gzip cannot be split."""
    if file.path.endswith(".gz"):
        return [(0, file.size)]
    return [(start, min(start + task_bytes, file.size)) for start in range(0, file.size, task_bytes)]


Found = tuple[str, list[tuple[str, Path]], bool]  # a document's name, its files (name, path), whether it is of lines


def _documents(source: Source, seed: int) -> Iterator[Found]:
    """Every whole document of the source, and every .jsonl file, in order of names."""
    for name, root in _roots(source):
        if not os.access(root, os.R_OK):
            raise UserError(f"source {source.name!r}: {root} cannot be read: check its permissions")
        if root.is_file():
            yield name or root.name, [(name or root.name, root)], root.name.endswith(LINES)
        elif source.directory == "one_document":
            if files := _tree(root, source, seed):
                yield name or root.resolve().name, files, False
        else:
            for entry in sorted(root.iterdir()):
                if not _excluded(entry.name, source):
                    yield from _entry(os.path.join(name, entry.name), entry, source, seed)


def _roots(source: Source) -> list[tuple[str, Path]]:
    """The paths a source names. Those of a glob have names relative to its fixed part, a path by itself has none."""
    if source.path == STDLIB:
        return [("", Path(sysconfig.get_paths()["stdlib"]))]
    path = os.path.expanduser(source.path)
    if os.path.lexists(path):
        return [("", Path(path))]
    fixed = Path(path)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    found = sorted(map(Path, glob.glob(path, recursive=True)))
    if "**" in path:  # it matches directories and what lies in them: take each file once
        found = [each for each in found if each.is_file()]
    if not found:
        raise UserError(f"source {source.name!r}: {source.path} does not exist: check data.sources")
    return [(str(root.relative_to(fixed)), root) for root in found]


def _entry(name: str, entry: Path, source: Source, seed: int) -> Iterator[Found]:
    """A directory's entry: a file, or a subdirectory as one document beside its .jsonl files."""
    if entry.is_dir():
        files = _tree(entry, source, seed)
        lines = sorted((inner, path) for inner, path in files if path.name.endswith(LINES))
        if text := [(inner, path) for inner, path in files if not path.name.endswith(LINES)]:
            yield name, text, False
        for inner, path in lines:
            yield inner, [(inner, path)], True
    elif _wanted(entry, source):
        yield name, [(name, entry)], entry.name.endswith(LINES)


def _tree(root: Path, source: Source, seed: int) -> list[tuple[str, Path]]:
    """A tree's files, directory by directory, both in seeded random order."""
    root = root.resolve()
    directories = []
    for directory, inner, names in os.walk(root, onerror=_refuse):
        inner[:] = sorted(name for name in inner if not _excluded(name, source))
        files = sorted(Path(directory, name) for name in names)
        wanted = [file for file in files if not _excluded(file.name, source) and _wanted(file, source)]
        if wanted:
            directories.append(wanted)
    shuffled = random.Random(f"{seed}/{source.name}/{root.name}")
    shuffled.shuffle(directories)
    for wanted in directories:
        shuffled.shuffle(wanted)
    return [(str(file.relative_to(root.parent)), file) for wanted in directories for file in wanted]


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions")


def _excluded(name: str, source: Source) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in (*NEVER, *source.exclude))


def _wanted(file: Path, source: Source) -> bool:
    return file.is_file() and (source.suffixes is None or file.name.endswith(source.suffixes))


def read_unit(unit: Unit, text_field: str, id_field: str) -> Iterator[Document | Dropped]:
    """The unit's documents, and what was dropped, in order.

    Raises UserError for a file that cannot be read or is a damaged .gz.
    """
    if unit.span is not None:
        (_, (file,)) = unit.documents[0]
        yield from _read_lines(unit.source, file, unit.span, text_field, id_field)
        return
    for name, files in unit.documents:
        texts = []
        for file in files:
            try:
                with _open(file) as stream:
                    content = stream.read()
                text = content.decode("utf-8-sig")
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(file, error) from error
            except UnicodeDecodeError:
                yield Dropped("not UTF-8", file.path)
                continue
            if "\0" in text:
                yield Dropped("binary (NUL bytes)", file.path)
                continue
            texts.append(text)
        text = "\n".join(texts)
        if text.strip():
            size = len(text.encode())
            yield Document(f"{unit.source}/{name}", unit.source, text, name, 0, size, _content_hash(text))
        elif texts:
            yield Dropped("empty", name)


def _read_lines(
    source: str, file: File, span: tuple[int, int], text_field: str, id_field: str
) -> Iterator[Document | Dropped]:
    try:
        with _open(file) as stream:
            for number, start, line in _lines(stream, file, span):
                if line.strip():
                    yield _parse_line(source, file, number, start, line, text_field, id_field)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _lines(stream: IO[bytes], file: File, span: tuple[int, int]) -> Iterator[tuple[int | None, int, bytes]]:
    """(number from 1, where known; first byte; content) of the lines that start inside the span."""
    start, end = span
    compressed = file.path.endswith(".gz")
    at = 0
    if start > 0:
        stream.seek(start - 1)
        at = start - 1 + len(stream.readline())  # the line before the span's first belongs to the range before
    number = 1 if start == 0 else None
    while compressed or at < end:
        line = stream.readline()
        if not line:
            return
        yield number, at, line.rstrip(b"\r\n")
        at += len(line)
        number = None if number is None else number + 1


def _parse_line(
    source: str, file: File, number: int | None, start: int, line: bytes, text_field: str, id_field: str
) -> Document | Dropped:
    where = f"{file.path}, line {number}" if number is not None else f"{file.path}, byte {start}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Dropped("line is not UTF-8", where, bad_line=True)
    except (ValueError, RecursionError):
        return Dropped("line is not JSON", where, bad_line=True)
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Dropped(f"line has no text in field {text_field!r}", where, bad_line=True)
    if not text.strip():
        return Dropped("empty", where)
    identity = record.get(id_field)
    if any("\ud800" <= character <= "\udfff" for character in f"{identity}{text}"):
        return Dropped("text is not Unicode (lone surrogates)", where, bad_line=True)
    content_hash = _content_hash(text)
    name = content_hash[:16] if identity is None else str(identity)
    return Document(f"{source}/{name}", source, text, file.name, start, start + len(line), content_hash)


def _open(file: File) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file.path)) if file.path.endswith(".gz") else open(file.path, "rb")


def _unreadable(file: File, error: Exception) -> UserError:
    return UserError(f"{file.path} cannot be read ({error}): mend or remove the file")


def _content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
