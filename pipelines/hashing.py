"""Content hashes: of JSON values and of files, the latter remembered by (size, modification time)."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_atomically


def hash_json(value: Any) -> str:
    """sha256 (hex) of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """File hashes with a cache on disk, so that an unchanged corpus is not read again on every run.

    An entry holds only while the file's size, modification time and inode are unchanged.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, list[Any]] = {}
        if cache.exists():
            try:
                self._known = json.loads(cache.read_text())
            except ValueError:  # a damaged cache only costs time
                self._known = {}

    def hash(self, path: Path) -> str:
        """sha256 (hex) of the file. Raises UserError where it cannot be read."""
        try:
            return self._hash(path)
        except PermissionError:
            raise UserError(f"{path} cannot be read: check its permissions") from None

    def _hash(self, path: Path) -> str:
        stat = os.stat(path)
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = str(path.resolve())
        known = self._known.get(name)
        if known is None or known[:3] != identity:
            known = self._known[name] = [*identity, hash_file(path)]
        return str(known[3])

    def save(self) -> None:
        """Keep what was learned for the next run, if its directory is there."""
        if self._cache.parent.is_dir():
            write_atomically(self._cache, json.dumps(self._known).encode())
