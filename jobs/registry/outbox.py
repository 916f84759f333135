"""What MLflow could not be told yet: a small JSON file an entry, in `outbox/` of the work directory.

An entry holds no results, it says where in the work directory they are; whoever could write them to MLflow removes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically

Entry = dict[str, Any]


class Outbox:
    """The entries of a work directory."""

    def __init__(self, work_dir: Path) -> None:
        self.directory = work_dir.resolve() / "outbox"

    def keep(self, key: str, entry: Mapping[str, Any]) -> None:
        """Add an entry, or replace the one with this key."""
        write_atomically(self.file(key), json.dumps({"key": key, **entry}, indent=1, sort_keys=True).encode())

    def remove(self, key: str) -> None:
        self.file(key).unlink(missing_ok=True)

    def has(self, key: str) -> bool:
        return self.file(key).exists()

    def entries(self) -> list[Entry]:
        """All entries: the trainings before the outcomes they led to, and these in the order of their time. Raises
        UserError where one is damaged."""
        entries = [_read(file) for file in sorted(self.directory.glob("*.json"))]
        return sorted(entries, key=lambda entry: (entry["kind"] != "training", entry.get("time", "")))

    def entry(self, key: str) -> Entry | None:
        """The entry with this key as it is now."""
        return _read(self.file(key)) if self.has(key) else None

    def check(self, path: Path, key: str) -> None:
        """Raises UserError where a file that the entry needs is gone."""
        if not path.exists():
            raise UserError(f"{path} is gone: run its recipe again, or delete {self.file(key)}")

    def lock_of(self, key: str) -> Path:
        """The lock that whoever writes what the key names to MLflow holds."""
        return self.directory / f"{key}.lock"

    def file(self, key: str) -> Path:
        return self.directory / f"{key}.json"


def _read(file: Path) -> Entry:
    try:
        entry: Entry = json.loads(file.read_text())
    except ValueError:
        raise UserError(
            f"{file} is damaged: delete it and run its recipe again, which records what is missing"
        ) from None
    return entry


def within(path: Path, work_dir: Path) -> str:
    """A path as an entry has it: relative where it is in the work directory, so that this can be moved."""
    path, work_dir = path.absolute(), work_dir.resolve()
    return str(path.relative_to(work_dir)) if path.is_relative_to(work_dir) else str(path)


def settled(path: str, work_dir: Path) -> Path:
    """Where an entry's path is now: a stage's output may have become complete, and lost its suffix, meanwhile."""
    found = work_dir.resolve() / path
    if found.exists():
        return found
    return Path(*(part.removesuffix(".partial") for part in found.parts))
