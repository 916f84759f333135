"""What a recipe's sources hold: entries, in order.

Listing looks at names, sizes and content hashes, and at the headers of theories where they give the order. The order of
the entries, and with it everything downstream, depends on names and contents alone.
"""

import fnmatch
import glob
import json
import os
import posixpath
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from pipelines.config import SITE_PACKAGES, STDLIB, Data, Recall, Source
from pipelines.sources.corpus import Entry, File
from pipelines.sources.directories import look_into
from pipelines.sources.distributions import find_distributions, site_packages
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.formats import IN_TREES, holds_records, is_url, plugin_of, suffix_and_codec, unread
from pipelines.sources.storage import Item, open_binary, printable, readable, storage_of
from pipelines.sources.synthetic import SYNTHETIC, TAG, recall_names
from pipelines.sources.trees import beginning, import_order, random_order
from pipelines.workflow.credentials import has_credentials, is_chained, shown_url
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import say

NEVER = ("__pycache__", "site-packages", ".*")  # caches, other people's packages, hidden files
HEADER = 1 << 18  # bytes of a theory in which its header is looked for


class Listed(NamedTuple):
    """What becomes an entry: a document's or a file's name, its files (name, item), whether they hold records."""

    name: str
    files: list[tuple[str, Item]]
    records: bool = False
    licence: str | None = None
    tree: bool = False


def list_entries(data: Data, seed: int, hashes: FileHashes) -> list[Entry]:
    """Every whole document and every file of records, by source in the recipe's order, then by name.

    Says what of a source is left out. Raises UserError for a path that is not there or cannot be read, a source without
    a single file or with too much that would be left out, and a symbolic link that leads where it may not.
    """
    listed = [
        (source.name, each)
        for number, source in enumerate(data.sources)
        for each in _Search(source, f"data.sources.{number}", seed).entries()
    ]
    contents = iter(hashes.contents([item for _, each in listed for _, item in each.files]))
    return [
        Entry(
            source,
            printable(each.name),
            tuple(
                File(printable(inner), item.path, item.size, _read_as(inner, each.tree) + next(contents))
                for inner, item in each.files
            ),
            each.records,
            each.licence,
            each.tree,
        )
        for source, each in listed
    ]


class _Search:
    """Finds what one source holds. `setting`: where the recipe has it."""

    def __init__(self, source: Source, setting: str, seed: int) -> None:
        self.source, self.setting, self.seed = source, setting, seed
        self.suffixes = source.suffixes
        _check_url(source)
        if source.path == STDLIB:
            self.path = sysconfig.get_paths()["stdlib"]
        elif source.path == SITE_PACKAGES:
            self.path, _ = site_packages()
            self.suffixes = self.suffixes or (".py",)
        elif is_url(source.path):
            self.path = source.path.removeprefix("file://")
        else:
            self.path = os.path.abspath(os.path.expanduser(source.path))  # tasks run in directories of their own
        self.follow_links = source.follow_links or source.path in (STDLIB, SITE_PACKAGES)  # some have links
        self.storage = storage_of(self.path)
        self.top = self.path  # what links may not lead out of
        self.bytes = 0  # of all that is listed
        self.beside: dict[str, list[tuple[str, Item]]] = {}  # left out because it only tells of records, by kind
        self.lost: dict[str, list[tuple[str, Item]]] = {}  # not read, or not as what it is, by kind

    def entries(self) -> Iterator[Listed]:
        found = False
        for each in self._listed():
            found = True
            self.bytes += sum(item.size for _, item in each.files)
            yield each
        self._account()
        if not found:
            limits = f" with suffixes {', '.join(self.suffixes)}" if self.suffixes else ""
            raise self._mistake(f"{self.source.path} holds no files{limits}: check data.sources")

    def _listed(self) -> Iterator[Listed]:
        if self.source.recall is not None:
            return self._made_up(self.source.recall)
        return self._distributions() if self.source.path == SITE_PACKAGES else self._files_of_roots()

    def _files_of_roots(self) -> Iterator[Listed]:
        for name, root in self._roots():
            if root.directory:
                yield from self._directory(name, root)
            else:
                base = name or posixpath.basename(root.path)
                yield self._file(base, root)

    def _distributions(self) -> Iterator[Listed]:
        """Each installed distribution as a tree; what is left out is named."""
        distributions, left_out = find_distributions(site_packages())
        if left_out:
            named = ", ".join(f"{name} ({why})" for name, why in left_out.items())
            say(f"source {self.source.name!r}: left out: {printable(named)}")
        for each in distributions:
            taken = [(name, self.storage.info(path)) for name, path in each.files if self._is_named_in(name)]
            files = self._wanted([(name, item) for name, item in taken if item is not None and not item.directory])
            if files:
                yield self._tree(each.name, each.name, files)._replace(licence=each.licence)

    def _made_up(self, settings: Recall) -> Iterator[Listed]:
        for name in recall_names(settings, self.seed):
            yield Listed(name, [(name, Item(name, SYNTHETIC + name, False, settings.characters, TAG))])

    def _account(self) -> None:
        """Say what is left out, a line a kind. Raises UserError where that is too much."""
        lost = sum(item.size for files in self.lost.values() for _, item in files)
        if lost > self.source.max_left_out * self.bytes:
            kinds = "; ".join(f"{kind}: {_some(files)}" for kind, files in self.lost.items())
            raise self._mistake(
                f"{100 * lost / self.bytes:.0f} % of its bytes are data that would be left out or read as plain text "
                f"({kinds}): read only what is meant with {self.setting}.suffixes or exclude, set its text_field, or "
                f"allow it with {self.setting}.max_left_out"
            )
        for kind, files in self.beside.items():
            say(f"source {self.source.name!r}: left out: {printable(f'{kind}: {_some(files)}')}")
        for kind, files in self.lost.items():
            say(f"source {self.source.name!r}: not read as what they are: {printable(f'{kind}: {_some(files)}')}")

    def _is_named_in(self, name: str) -> bool:
        """Whether a distribution's file is one of those asked for, by its name."""
        asked_for = self.suffixes is None or name.endswith(self.suffixes)
        return asked_for and not any(self._is_left_out(part) for part in name.split("/"))

    def _mistake(self, text: str) -> UserError:
        return UserError(f"source {self.source.name!r}: {printable(text)}")

    # What a path or glob names

    def _roots(self) -> list[tuple[str, Item]]:
        """What the path names. Matches of a glob have names relative to its fixed part, a path by itself has none."""
        if (root := self.storage.info(self.path)) is not None:
            return [("", root)]
        parts = self.path.split("/")
        fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        self.top = "/".join(parts[:fixed]) or ("/" if self.path.startswith("/") else ".")
        if self.top.endswith(":/"):  # a URL's very beginning
            self.top += "/"
        pattern = [part for part in parts[fixed:] if part]
        top = self.storage.info(self.top) if pattern else None
        found = list(self._matches("", top, pattern)) if top is not None and top.directory else []
        if not found:
            raise self._mistake(f"{self.source.path} does not exist: check data.sources")
        return sorted(found, key=_by_parts)

    def _matches(self, prefix: str, directory: Item, pattern: Sequence[str]) -> Iterator[tuple[str, Item]]:
        first, rest = pattern[0], pattern[1:]
        if first == "**":  # takes files only
            for name, item in self._files(directory):
                if _match(name.split("/"), pattern):
                    self._check_link(item)
                    yield prefix + name, item
            return
        if glob.has_magic(first):
            found = [item for item in self.storage.children(directory.path) if _match([item.name], [first])]
        else:
            named = self.storage.info(f"{directory.path}/{first}")
            found = [] if named is None else [replace(named, name=first)]
        for item in found:
            if any(fnmatch.fnmatchcase(item.name, excluded) for excluded in self.source.exclude):
                continue
            self._check_link(item)
            if not rest:
                yield prefix + item.name, item
            elif item.directory:
                yield from self._matches(f"{prefix}{item.name}/", item, rest)

    # What a directory holds

    def _directory(self, name: str, root: Item) -> Iterator[Listed]:
        files = sorted(self._files(root), key=_by_parts)
        base = posixpath.basename(root.path if is_url(root.path) else os.path.realpath(root.path))
        if self.source.directory == "document_per_entry":
            yield from self._entries(f"{name}/" if name else "", dict(files))
        elif wanted := self._wanted(files):
            yield self._tree(name or base, base, wanted)

    def _entries(self, prefix: str, files: Mapping[str, Item]) -> Iterator[Listed]:
        """A directory's entries: files, and subdirectories, each a document or nothing but files of records."""
        if (saved := self._saved_dataset(files)) is not None:
            yield from (Listed(prefix + name, [(prefix + name, files[name])], True) for name in saved)
            return
        for entry, group in groupby(files.items(), key=lambda file: file[0].partition("/")[0]):
            within = list(group)
            for name, item in self._wanted([file for file in within if file[0] == entry]):
                yield self._file(prefix + name, item)
            inner = [(name[len(entry) + 1 :], item) for name, item in within if name != entry]
            if self._saved_dataset(dict(inner)) is not None:
                yield from self._entries(f"{prefix}{entry}/", dict(inner))
                continue
            wanted = self._wanted(inner)
            found = look_into(wanted, self.source)
            for known, new in ((self.beside, found.beside), (self.lost, found.lost)):
                for kind, files_of_it in new.items():
                    known.setdefault(kind, []).extend((f"{prefix}{entry}/{name}", item) for name, item in files_of_it)
            if found.records:
                self.bytes += sum(item.size for _, item in wanted) - sum(item.size for _, item in found.records)
                for name, item in found.records:
                    yield self._file(f"{prefix}{entry}/{name}", item)
            elif wanted:
                yield self._tree(prefix + entry, entry, wanted)

    def _file(self, name: str, item: Item) -> Listed:
        """A file by itself: a document, or records."""
        if (kind := unread(name)) is not None:
            self.lost.setdefault(kind, []).append((name, item))
        return Listed(name, [(name, item)], records=holds_records(name))

    def _tree(self, name: str, base: str, files: Sequence[tuple[str, Item]]) -> Listed:
        """A tree as one document. `base`: the tree's own name, which its files' names begin with."""
        items = dict(files)
        if self.source.order == "imports":
            theories = [inner for inner in items if inner.endswith(".thy")]
            with ThreadPoolExecutor() as pool:
                headers = pool.map(_header, [items[theory].path for theory in theories])
                order = import_order(list(items), dict(zip(theories, headers, strict=True)))
        else:
            order = random_order(list(items), f"{self.seed}/{self.source.name}/{printable(base)}")
        if self.source.max_tree_bytes is not None:
            order = beginning(order, {inner: item.size for inner, item in items.items()}, self.source.max_tree_bytes)
        return Listed(name, [(f"{base}/{inner}", items[inner]) for inner in order], tree=True)

    def _wanted(self, files: Sequence[tuple[str, Item]]) -> list[tuple[str, Item]]:
        """Those with one of the source's suffixes. Raises UserError where one of them may not be read."""
        wanted = [(name, item) for name, item in files if self.suffixes is None or name.endswith(self.suffixes)]
        for _, item in wanted:
            self._check_link(item)
        return wanted

    def _saved_dataset(self, files: Mapping[str, Item]) -> list[str] | None:
        """The .arrow files, in order, of a directory that Hugging Face's `save_to_disk` wrote; None of any other.

        A data set lists its files in state.json, one in splits these in dataset_dict.json.
        """
        splits = _read_list(files.get("dataset_dict.json"), "splits")
        saved = []
        for split in [""] if splits is None else splits:
            state = files.get(posixpath.join(str(split), "state.json"))
            data_files = _read_list(state, "_data_files")
            if data_files is None:
                if splits is None:
                    return None
                raise self._mistake(
                    f"{self.source.path}: split {split!r} of the saved data set is missing: save it again"
                )
            saved += [posixpath.normpath(posixpath.join(str(split), str(each["filename"]))) for each in data_files]
        for name in saved:
            if name.startswith(("/", "../")):
                raise self._mistake(
                    f"{self.source.path}: its state.json lists {name}, which lies outside: save it again"
                )
            if name not in files:
                raise self._mistake(f"{self.source.path}: its state.json lists {name}, which is missing: save it again")
            self._check_link(files[name])
        return saved

    def _files(self, root: Item) -> list[tuple[str, Item]]:
        """(name, item) of all files below a directory.

        A link to a directory is entered if it leads out of what is read already, or is an entry of its own.
        """
        entries = self.source.directory == "document_per_entry"
        found, pending, entered = [], [("", root.path)], [os.path.realpath(root.path)]
        while pending:
            prefix, path = pending.pop()
            for item in self.storage.files(path, self._is_left_out):
                name = prefix + item.name
                if not item.directory:
                    found.append((name, item))
                elif (entries and "/" not in name) or not _is_within(item.link, entered):
                    self._check_link(item)
                    pending.append((f"{name}/", item.path))
                    entered.append(str(item.link))
        return found

    def _is_left_out(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in (*NEVER, *self.source.exclude))

    def _check_link(self, item: Item) -> None:
        if item.link is None or self.follow_links or item.path == self.path:
            return
        if not _is_within(item.link, [os.path.realpath(self.top)]):
            raise self._mistake(
                f"{item.path} leads to {item.link}, outside {self.top}: copy it in, or set {self.setting}.follow_links "
                f"to true"
            )


def _check_url(source: Source) -> None:
    """Raise UserError where the path tells a credential, which would become part of document ids, or chains URLs."""
    named, path = f"source {source.name!r}", source.path
    if is_chained(path):
        raise UserError(f"{named}: {shown_url(path)} chains URLs: give the last one alone, or copy the files")
    if re.match("https?://", path, re.IGNORECASE) and re.search("[?#]", path):
        raise UserError(
            f"{named}: its URL holds a query or fragment, which may be secret and would become part of document ids: "
            f"download the file, or give a URL without"
        )
    if has_credentials(path):
        raise UserError(f"{named}: its path holds a password or token: give it in the environment instead")


def _read_as(name: str, in_tree: bool) -> str:
    """What names the content of a file besides its bytes: that it is decompressed, where it was not once; the plugin
    that reads it, of which another version may read another text."""
    if in_tree:
        return ""
    codec, plugin = suffix_and_codec(name)[1], plugin_of(name)
    decompressed = "" if codec is None or name.endswith(IN_TREES) else f"{codec}/"
    return decompressed if plugin is None else f"{decompressed}{plugin.made_by}/"


def _some(files: Sequence[tuple[str, Item]]) -> str:
    """How many files, and the first of them."""
    return f"{files[0][0]}" if len(files) == 1 else f"{len(files)}, such as {files[0][0]}"


def _by_parts(named: tuple[str, Item]) -> list[str]:
    return named[0].split("/")


def _match(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's parts match a glob's: ** stands for any number of them, hidden ones have to be asked for."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _match(parts, pattern[1:]):
        return True
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    rest = pattern if pattern[0] == "**" else pattern[1:]
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], rest)


def _is_within(path: str | None, directories: Sequence[str]) -> bool:
    return path is not None and any(os.path.commonpath([path, directory]) == directory for directory in directories)


def _header(path: str) -> str:
    with readable(path), open_binary(path) as stream:
        return stream.read(HEADER).decode(errors="replace")


def _read_list(item: Item | None, key: str) -> list[Any] | None:
    """The list under `key` of a JSON file; None where there is no such thing."""
    if item is None:
        return None
    with readable(item.path), open_binary(item.path) as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value.get(key) if isinstance(value, dict) and isinstance(value.get(key), list) else None
