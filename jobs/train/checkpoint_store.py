"""Where a training's checkpoints lie: a directory of this machine, or of any storage that pyarrow.fs opens by URI.

A checkpoint is a directory `step-00000100`. Every rank writes its files there and then, as the last, its record
`rank-00003.json`: it says how many ranks there are and the checksum of each file. The checkpoint is complete when the
records of all of them are there; nothing else marks it and no rank waits for another. Readers pass over the rest. To
remove one, its records go first.

No torch here: the driver looks at checkpoints, too.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs

from pipelines.sources.formats import is_url
from pipelines.sources.storage import BLOCK
from pipelines.workflow.credentials import shown_url
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import write_atomically

MODEL_FILES = "model"  # directory of a checkpoint: configuration and tokenizer, without weights
MANIFEST = "manifest"  # the key of an identity that names the data set
OWNER = "owner"  # file that names the start of a training that writes
HOUR = 3600.0
Files = Mapping[str, Sequence[Any]]  # [sha256, size] by name


@dataclass(frozen=True)
class Record:
    """What one rank wrote of a checkpoint.

    `identity` says what training it is of, `state` is the training loop's own, `dtype` that of the weights; these are
    the same for all ranks. `time`: seconds since 1970. `base`: where the checkpoint holds only what is trained, the
    path and the fingerprint of the model that the rest is in.
    """

    step: int
    rank: int
    world: int
    files: Files
    identity: Mapping[str, Any]
    state: Mapping[str, Any]
    dtype: str
    time: float
    base: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The records found of a step, by rank."""

    step: int
    records: tuple[Record, ...]
    unreadable: int = 0  # records that are there, but damaged: a kill leaves none

    @property
    def missing(self) -> list[int]:
        """The ranks without a record. Some are always missing where ranks of trainings of different size wrote."""
        worlds = {record.world for record in self.records} or {1}
        return sorted(set(range(max(worlds))) - {record.rank for record in self.records if {record.world} == worlds})

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def files(self) -> Files:
        """The files of all ranks."""
        return {name: file for record in self.records for name, file in record.files.items()}

    @property
    def time(self) -> float:
        """When the last rank finished."""
        return max(record.time for record in self.records)


def superseded(checkpoints: Sequence[Checkpoint], keep: int, keep_hours: float | None, now: float) -> list[Checkpoint]:
    """The complete checkpoints to remove: all but the newest `keep` (at least one) and those younger than
    `keep_hours`."""
    complete = sorted((found for found in checkpoints if found.complete), key=lambda found: found.step)
    return [
        found
        for found in complete[: -max(1, keep)]
        if keep_hours is None or now - found.time >= keep_hours * HOUR  # the clock of the ranks
    ]


def difference(theirs: Any, ours: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in order, dotted, in which two JSON values differ, with both values; None if they are equal."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        return None if theirs == ours else (key, theirs, ours)
    for name in {**ours, **theirs}:
        found = difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
        if found is not None:
            return found
    return None


def check_identity(where: str, identity: Mapping[str, Any]) -> None:
    """Raise UserError if the newest checkpoint under `where` is of another training, or none can be written there."""
    store = CheckpointStore(where)
    store.make()
    complete = [found for found in store.all() if found.complete]
    if complete:
        store.check_identity(complete[-1], identity)


class CheckpointStore:
    """The checkpoints under `where`: a path of this machine, or a URI.

    Raises UserError where that cannot be opened or listed.
    """

    def __init__(self, where: str) -> None:
        self.name = shown_url(where)
        try:
            self._fs: Any = fs.FileSystem.from_uri(where)[0] if is_url(where) else fs.LocalFileSystem()
            self._root: str = fs.FileSystem.from_uri(where)[1] if is_url(where) else os.path.abspath(where)
        except (OSError, pa.ArrowException):
            raise UserError(f"checkpoints.path {self.name} cannot be opened: give a path or a URI like s3://") from None

    @property
    def local(self) -> Path | None:
        """The directory, if it is on this machine."""
        return Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    def make(self) -> None:
        """Make the directory, if it is not there."""
        with self._answering("written to"):
            self._fs.create_dir(self._root, recursive=True)

    def all(self) -> list[Checkpoint]:
        """What is there, complete or not, by step."""
        with self._answering("listed"):
            steps = [
                int(found[1]) for name in self._names(self._root) if (found := re.fullmatch(r"step-(\d{8,})", name))
            ]
            return [self._checkpoint(step) for step in sorted(steps)]

    def check_identity(self, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
        """Raise UserError if the checkpoint is of another training."""
        found = difference(checkpoint.records[0].identity, json.loads(json.dumps(identity)))
        if found is None:
            return
        key, theirs, ours = found
        if key == MANIFEST:
            raise UserError(
                f"{self.name}: the data set has changed since the checkpoint of step {checkpoint.step} (manifest "
                f"{theirs} then, {ours} now): set another checkpoints.path, or go back to the data of the checkpoint"
            )
        raise UserError(
            f"{self.name}: the checkpoint of step {checkpoint.step} was trained with {key} {_shown(theirs)}, now it is "
            f"{_shown(ours)}: set another checkpoints.path, or go back to {_shown(theirs)}"
        )

    def write(self, step: int, name: str, save: Callable[[IO[bytes]], None]) -> list[Any]:
        """A new file of a checkpoint, as `save` writes it to a stream. Returns [sha256, size].

        Raises OSError where it cannot be written, as on a full disk.
        """
        path = f"{self._path(step)}/{name}"
        self._fs.create_dir(os.path.dirname(path), recursive=True)
        with open(path, "wb") if self.local is not None else self._fs.open_output_stream(path) as stream:
            sink = _Sink(stream)
            try:
                save(sink)  # type: ignore[arg-type]
            except Exception:
                if sink.error is not None:  # what torch raises then speaks of its own file positions
                    raise sink.error from None
                raise
            stream.flush()
            if self.local is not None:
                os.fsync(stream.fileno())
        return [sink.hash.hexdigest(), sink.size]

    def write_record(self, record: Record) -> None:
        """Say that all of the rank's files are written."""
        self._put(self._record_path(record), json.dumps(asdict(record)).encode())

    def _put(self, path: str, content: bytes) -> None:
        if self.local is not None:
            write_atomically(Path(path), content)
            return
        with self._fs.open_output_stream(path) as stream:  # an object is there when it is whole
            stream.write(content)

    def drop_record(self, record: Record) -> None:
        """What the rank wrote of this step, if anything, is no longer complete."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(self._record_path(record))

    def damaged(self, step: int, files: Files, target: Path | None = None) -> str | None:
        """The first of a checkpoint's files that is missing or not what its record says; None if all are good.

        `target`: a directory to copy them to.
        """

        def is_good(name: str) -> bool:
            with self._fs.open_input_stream(f"{self._path(step)}/{name}") as stream:
                if target is None:
                    return _copy(stream, None) == list(files[name])
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with open(target / name, "wb") as copy:
                    return _copy(stream, copy) == list(files[name])

        def check(name: str) -> bool:
            try:
                return is_good(name)
            except FileNotFoundError:
                return False

        with ThreadPoolExecutor() as pool:
            return next((name for name, good in zip(files, pool.map(check, files), strict=True) if not good), None)

    def remove(self, checkpoint: Checkpoint) -> None:
        """The records first: what is left of an interrupted removal is not complete."""
        for record in checkpoint.records:
            self.drop_record(record)
        self._fs.delete_dir(self._path(checkpoint.step))

    def own(self, owner: str) -> None:
        """Say which start of a training writes here from now on; an earlier one that still runs writes no more."""
        with self._answering("written to"):
            self._put(f"{self._root}/{OWNER}", owner.encode())

    def owner(self) -> str | None:
        """Which start of a training writes here."""
        try:
            with self._fs.open_input_stream(f"{self._root}/{OWNER}") as stream:
                return bytes(stream.read()).decode()
        except FileNotFoundError:
            return None

    def _path(self, step: int) -> str:
        return f"{self._root}/{step_name(step)}"

    def _record_path(self, record: Record) -> str:
        return f"{self._path(record.step)}/rank-{record.rank:05d}.json"

    def _names(self, path: str) -> list[str]:
        """What lies directly in a directory."""
        selector = fs.FileSelector(path, allow_not_found=True)
        return [info.base_name for info in self._fs.get_file_info(selector)]

    def _checkpoint(self, step: int) -> Checkpoint:
        path = self._path(step)
        names = sorted(name for name in self._names(path) if re.fullmatch(r"rank-\d+\.json", name))
        read = [self._read_record(f"{path}/{name}") for name in names]
        records = sorted((record for record in read if record is not None), key=lambda record: record.rank)
        return Checkpoint(step, tuple(records), len(read) - len(records))

    def _read_record(self, path: str) -> Record | None:
        """None for a file that is not what `write_record` writes, or was removed just now."""
        try:
            with self._fs.open_input_stream(path) as stream:
                return Record(**json.loads(stream.read()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @contextmanager
    def _answering(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = error.strerror or type(error).__name__  # a driver's own words may quote credentials
            raise UserError(
                f"checkpoints.path {self.name} cannot be {done} ({what}): check the path, and for remote storage the "
                f"network and the credentials in the environment"
            ) from None


def step_name(step: int) -> str:
    """A checkpoint's directory."""
    return f"step-{step:08d}"


def place_of(where: str, name: str) -> str:
    """The directory `name` under a path or URI. A path becomes absolute: workers have working directories of their
    own."""
    if not is_url(where):
        return str(Path(where).expanduser().resolve() / name)
    path, mark, options = where.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def split_step(where: str) -> tuple[str, int | None]:
    """The directory of checkpoints and the step, of a path or URI that may end in a step's directory."""
    path, mark, options = where.partition("?") if is_url(where) else (where, "", "")
    found = re.fullmatch(r"(.*?)/*step-(\d{8,})/*", path if is_url(path) else os.path.abspath(path))
    return (where, None) if found is None else (found[1] + mark + options, int(found[2]))


class _Sink:
    """A stream to write to that hashes and counts what goes through, and remembers why writing failed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.hash, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            self._stream.write(content)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self._stream.flush()


def _copy(stream: Any, copy: IO[bytes] | None) -> list[Any]:
    """[sha256, size] of a stream, which is copied on the way."""
    found, size = hashlib.sha256(), 0
    while content := stream.read(BLOCK):
        found.update(content)
        size += len(content)
        if copy is not None:
            copy.write(content)
    return [found.hexdigest(), size]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
