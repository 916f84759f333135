"""Files that are complete or invisible: written under a temporary name, flushed to disk, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.workflow.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def complete_or_invisible(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file, complete or not at all."""
    with complete_or_invisible(path) as temporary:
        temporary.write_bytes(content)


def check_fetched(path: Path) -> None:
    """Raises UserError for a file that cannot be read, and for what git leaves of one that git-lfs did not fetch."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS)) == LFS
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if pointer:
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it lies")
