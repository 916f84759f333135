"""What names the contents of a source's files, remembered by (size, modification time, inode)."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pipelines.sources.formats import is_url
from pipelines.sources.storage import Item, open_binary, printable, readable, storage_of
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically


class FileHashes:
    """What names the contents of files, with a cache on disk, so that an unchanged corpus is not read on every run.

    An entry holds only while the file's stamp (size, modification time, inode) is unchanged.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):  # a damaged cache only costs time
            known = json.loads(cache.read_text())
            self._known = known if isinstance(known, dict) else {}

    def hash(self, path: Path) -> str:
        """sha256 (hex) of a local file. Raises UserError where it cannot be read."""
        item = storage_of(str(path)).info(str(path))
        if item is None:
            raise UserError(f"{printable(str(path))} does not exist: check the recipe")
        return self.contents([item])[0]

    def contents(self, files: Sequence[Item]) -> list[str]:
        """What names each file's content: the tag that its storage gives, else its sha256 (hex).

        Several files are read at once. Raises UserError for one that cannot be read.
        """
        unknown = [item for item in files if self._find(item) is None]
        with ThreadPoolExecutor() as pool:
            hashed = dict(zip(map(_key, unknown), pool.map(_hash, unknown), strict=True))
        self._known |= {_key(item): [*item.stamp, hashed[_key(item)]] for item in unknown if item.stamp is not None}
        return [self._find(item) or hashed[_key(item)] for item in files]

    def _find(self, item: Item) -> str | None:
        """What is known to name the content."""
        if item.tag is not None:
            return item.tag
        *stamp, content = self._known.get(_key(item), [None])
        return content if item.stamp is not None and stamp == list(item.stamp) else None

    def save(self) -> None:
        """Keep what was learned for the next run, if its directory is there."""
        if self._cache.parent.is_dir():
            write_atomically(self._cache, json.dumps(self._known).encode())


def _key(item: Item) -> str:
    return item.path if is_url(item.path) else os.path.abspath(item.path)


def _hash(item: Item) -> str:
    with readable(item.path), open_binary(item.path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
