"""Where files lie: on this machine, or at a URL that fsspec opens (s3://, gs://, hf://, memory://, ...).

Both are listed and opened in the same way. Local names may be any bytes, held as `os.fsdecode` gives them. Credentials
for remote storage come from the environment alone; what a driver says in an error is not repeated: it may quote them.
"""

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import pyarrow as pa

from pipelines.sources.compression import Decompressed
from pipelines.sources.formats import is_url, suffix_and_codec
from pipelines.sources.synthetic import is_synthetic, synthetic_text
from pipelines.workflow.credentials import shown_url
from pipelines.workflow.errors import UserError

BLOCK = 1 << 20  # bytes read at once
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # ours that bring a protocol's driver
POINTER = b"version https://git-lfs.github.com/spec/"
TAGS = ("blob_id", "xet_hash", "md5Hash", "crc32c", "ETag", "etag")  # what drivers call a name of the content
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modify", "created")


@dataclass(frozen=True)
class Item:
    """A file or directory of a storage.

    `name`: relative to what was listed, '' for that itself. `tag`: what the storage calls the content, None where it
    has to be read to name it. `stamp`: changes when the content does, None if nothing tells. `link`: of a symbolic
    link, where it really leads.
    """

    name: str
    path: str
    directory: bool
    size: int
    tag: str | None = None
    stamp: tuple[int | str, ...] | None = None
    link: str | None = None


class Storage(Protocol):
    """What can be listed. Everything raises UserError for what cannot be read."""

    def info(self, path: str) -> Item | None:
        """The file or directory at `path`, None if there is none."""

    def children(self, path: str) -> list[Item]:
        """What lies directly in a directory."""

    def files(self, path: str, leave_out: Callable[[str], bool]) -> Iterator[Item]:
        """All files below a directory, and links to directories, which are not entered. Names for which `leave_out`
        holds are passed over, files and directories."""


def storage_of(path: str) -> Storage:
    """The storage that holds `path`, listed afresh."""
    return _Remote(path) if is_url(path) else _Local()


def printable(name: str) -> str:
    """A file name or path as valid Unicode: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def open_binary(path: str) -> IO[bytes]:
    """A buffered, seekable stream of a file's bytes, or of a synthetic document's."""
    if is_synthetic(path):
        return io.BytesIO(synthetic_text(path).encode())
    if not is_url(path):
        return open(path, "rb", buffering=BLOCK)
    with _answering(path):
        file = _filesystem(path).open(path, "rb", block_size=BLOCK)
    return io.BufferedReader(_RemoteFile(path, file), BLOCK)


def open_decompressed(path: str) -> IO[bytes]:
    """A stream of a file's bytes, decompressed as its name says. Reading a damaged or truncated one is an OSError."""
    stream, codec = open_binary(path), suffix_and_codec(path)[1]
    if codec is None:
        return stream
    return io.BufferedReader(Decompressed(stream, codec), BLOCK)


def refuse_pointer(path: str, beginning: bytes) -> None:
    """Raise UserError for a git-lfs pointer in a file's place."""
    if beginning.startswith(POINTER):
        raise UserError(
            f"{printable(shown_url(path))} is a git-lfs pointer: fetch the file that it stands for with `git lfs pull`"
        )


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Errors of reading the file, or of what it holds, as UserErrors that name it."""
    try:
        yield
    except PermissionError:
        raise UserError(f"{printable(shown_url(path))} cannot be read: check its permissions") from None
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # of a temporary file: the one that is read is good
            raise
        said = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{printable(shown_url(path))} cannot be read ({said}): mend or remove the file") from error


class _Local:
    """Files of this machine (`Storage`)."""

    def info(self, path: str) -> Item | None:
        with readable(path):
            item = self._item("", path)
            if item is None and os.path.islink(path):
                raise FileNotFoundError("the link leads to nothing")
            return item

    def children(self, path: str) -> list[Item]:
        with readable(path):
            return list(self._scan("", path))

    def files(self, path: str, leave_out: Callable[[str], bool]) -> Iterator[Item]:
        pending = [("", path)]
        while pending:
            prefix, directory = pending.pop()
            with readable(directory):
                for item in self._scan(prefix, directory):
                    if leave_out(os.path.basename(item.path)):
                        continue
                    if item.directory and item.link is None:
                        pending.append((f"{item.name}/", item.path))
                    else:
                        yield item

    def _scan(self, prefix: str, directory: str) -> Iterator[Item]:
        for name in sorted(os.listdir(directory)):
            if (item := self._item(prefix + name, os.path.join(directory, name))) is not None:
                yield item

    @staticmethod
    def _item(name: str, path: str) -> Item | None:
        """A file or directory, also through a link; None for anything else (nothing, a socket, ...)."""
        link = os.path.realpath(path) if os.path.islink(path) else None
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            if link is None:
                raise
            return None  # links that lead to one another
        directory = stat.S_ISDIR(status.st_mode)
        if not (directory or stat.S_ISREG(status.st_mode)):
            return None
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
        return Item(name, path, directory, status.st_size, None, stamp, link)


class _Remote:
    """Files that fsspec opens (`Storage`)."""

    def __init__(self, url: str) -> None:
        self._filesystem = _filesystem(url)
        self._filesystem.invalidate_cache()

    def info(self, path: str) -> Item | None:
        with _answering(path):
            try:
                return self._item("", self._filesystem.info(path))
            except FileNotFoundError:
                return None

    def children(self, path: str) -> list[Item]:
        with _answering(path):
            return list(self._below(path, self._filesystem.ls(path, detail=True)))

    def files(self, path: str, leave_out: Callable[[str], bool]) -> Iterator[Item]:
        with _answering(path):
            found = list(self._below(path, self._filesystem.find(path, detail=True).values()))
        return (item for item in found if not any(leave_out(part) for part in item.name.split("/")))

    def _below(self, path: str, found: Any) -> Iterator[Item]:
        """The items found, with names relative to `path`; objects that stand for directories are none."""
        root = self._filesystem._strip_protocol(path).rstrip("/")
        for info in found:
            name = info["name"][len(root) :].lstrip("/")
            if name and not name.endswith("/"):
                yield self._item(name, info)

    def _item(self, name: str, info: dict[str, Any]) -> Item:
        path, directory = self._filesystem.unstrip_protocol(info["name"]), info["type"] == "directory"
        if directory:
            return Item(name, path, True, 0)
        if info["size"] is None:
            raise UserError(f"{shown_url(path)}: the server does not say how long the file is: download it first")
        large = info.get("lfs") or {}  # hf:// names large files by their sha256
        tag = large.get("sha256") or next((info[key] for key in TAGS if info.get(key)), None)
        time = next((info[key] for key in TIMES if info.get(key)), None)
        stamp = None if time is None else (info["size"], str(time))
        return Item(name, path, False, info["size"], None if tag is None else str(tag).strip('"'), stamp)


class _RemoteFile(io.RawIOBase):
    """A file that fsspec opened; what goes wrong in reading it is a UserError."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        self._file.seek(offset, whence)
        return self.tell()

    def readinto(self, buffer: Any) -> int:
        with _answering(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        with _answering(self._path):
            return bytes(self._file.read())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _filesystem(url: str) -> Any:
    """fsspec's driver for the URL. Raises UserError where it is not installed."""
    import fsspec  # type: ignore[import-untyped]

    protocol = url.split("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"install it with `pip install 'fot[{extra}]'`" if extra else str(error).splitlines()[0]
        raise UserError(f"{shown_url(url)}: the driver of {protocol}:// is missing: {remedy}") from None
    except ValueError:
        raise UserError(f"{shown_url(url)}: nothing is known to open {protocol}://: check data.sources") from None
    with _answering(url):
        return fsspec.url_to_fs(url)[0]


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """Errors of a remote storage as UserErrors in our own words; drivers raise whatever they like."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{shown_url(url)} does not exist: check data.sources") from None
    except PermissionError:
        raise UserError(f"{shown_url(url)}: access is denied: check the credentials in the environment") from None
    except Exception as error:
        raise UserError(
            f"{shown_url(url)}: the storage does not answer ({type(error).__name__}): check the address, the network "
            f"and the credentials in the environment"
        ) from None
