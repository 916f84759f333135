"""Files that are complete or invisible: written under a temporary name, flushed to disk, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.workflow.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def complete_or_invisible(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of an empty file to write to; it becomes `path` if the block ends without an
    exception. No two writers have the same one, on whatever machines that share the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # the name, too
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
