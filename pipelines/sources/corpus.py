"""The vocabulary of a corpus: its files, the units of work they are cut into, the documents read from them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class File:
    """A file of a source: its name relative to the source's root, where it is (a path or URL), its size in bytes and
    what names its content (sha256, or the version tag that the storage gives)."""

    name: str
    path: str
    size: int
    content: str


@dataclass(frozen=True)
class Entry:
    """What a source lists: the files of one whole document, or one file of records (lines or rows).

    `licence`: of an installed package, as its metadata says. `tree`: the document is a directory, not a file.
    """

    source: str
    name: str
    files: tuple[File, ...]
    records: bool
    licence: str | None = None
    tree: bool = False

    def identity(self) -> list[Any]:
        """What the entry is made of, wherever it lies. JSON."""
        licence = [] if self.licence is None else [self.licence]
        return [self.source, self.name, [[file.name, file.content] for file in self.files], *licence]


@dataclass(frozen=True)
class Unit:
    """One task's worth of a source: whole documents, or the part `span` of one file of records.

    `span`: for lines the byte range they start in, for tables the range of row groups (.parquet) or record batches
    (.arrow); (0, 1) where the file cannot be split. None for whole documents. `bytes`: about how many are to be read.
    """

    source: str
    entries: tuple[Entry, ...]
    span: tuple[int, int] | None
    bytes: int

    def identity(self) -> dict[str, Any]:
        """What the unit is made of, wherever it lies: hashed into stage keys, and recorded with its shard. JSON."""
        entries = [entry.identity()[1:] for entry in self.entries]
        return {"source": self.source, "entries": entries, "span": list(self.span) if self.span else None}


@dataclass(frozen=True)
class Document:
    """A document's text with its lineage.

    `start`, `end`: its bytes in `file` (decompressed, lines without newline); of a table (a plugin's file), its row's
    (record's) number and the next; of a tree, `file` is the document's name and the bytes are those of the joined text.
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
    """Something that is no document, and why. `at`: where in the file, the byte a line starts at or a row's number;
    None for a whole file. `bad` counts against data.max_bad_documents. Reasons are few, so that they can be counted;
    `detail` is what is told of this one besides."""

    reason: str
    path: str
    at: int | None = None
    bad: bool = False
    detail: str = ""
