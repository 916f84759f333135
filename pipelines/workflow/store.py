"""Stages and their content-addressed store.

A stage's key is the hash of everything that makes its output: name, version, parameters, and the hashes of the outputs
it reads. Its output is a directory `<root>/<stage>/<key>`; it is built as `<key>.partial`, where an interrupted stage
finds what it had done, and renamed when complete. A finished stage is not run again: its files are verified by size and
checksum. Nothing finished is ever deleted: what is damaged is made anew beside it and then set aside as
`<key>.damaged-<number>`, and what took long is made anew only where that is asked for. Nothing else is needed (no
server, no database), so the same stages run in-process, in a Ray job, or under an orchestrator.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

from pipelines.workflow.errors import UserError
from pipelines.workflow.files import complete_or_invisible, write_atomically
from pipelines.workflow.hashing import hash_file, hash_json

RECORD = "stage.json"
FORMAT = 2  # of the record; 1 had no `known_as`
LONG = 300.0  # seconds: what took longer is not made anew unasked
State = Literal["done", "running", "interrupted", "to do", "waiting"]


@dataclass(frozen=True)
class Stage:
    """A step of a workflow: `run(output, inputs)` writes files into `output`, reading the directories of `inputs`.

    `version` changes when the code makes something else of the same inputs. `params` is JSON. `content` names the part
    of the output that later stages depend on, where the rest (logs of a training, say) differs from run to run. A stage
    that `mends` is given what is whole of its damaged output and makes the rest again; others begin anew. One
    that was renamed goes by the name it had, `formerly`, in keys, and finds what lies under it.
    """

    name: str
    run: Callable[[Path, Mapping[str, Path]], None]
    params: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    version: int = 1
    content: str = ""
    mends: bool = False
    formerly: str = ""

    @property
    def known_as(self) -> str:
        """The name in keys."""
        return self.formerly or self.name


@dataclass(frozen=True)
class Output:
    """A finished stage.

    `seconds`: time spent in all its runs, killed ones excepted; `files`: sha256 and size of each file, by name; `hash`
    names the content; `params` and `inputs` (the key of each input) are what it was made of; `known_as` is the stage's
    name in keys.
    """

    stage: str
    key: str
    path: Path
    files: dict[str, list[Any]] = field(repr=False)
    seconds: float
    hash: str
    params: Mapping[str, Any] = field(repr=False)
    inputs: Mapping[str, str] = field(repr=False)
    known_as: str = field(repr=False)
    reused: bool = False


class Store:
    """The store under `root`; with `rebuild` what took long is made anew, too, where it is damaged."""

    def __init__(self, root: Path, rebuild: bool = False) -> None:
        self.root, self._rebuild = root, rebuild

    def key(self, stage: Stage, outputs: Mapping[str, Output]) -> str:
        return hash_json(
            {
                "stage": stage.known_as,
                "version": stage.version,
                "params": stage.params,
                "inputs": {outputs[name].known_as: outputs[name].hash for name in stage.inputs},
            }
        )[:16]

    def _place(self, stage: Stage, key: str) -> Path:
        """Where the output is, or is to be."""
        here, before = (self.root / name / key for name in (stage.name, stage.known_as))
        begun = (path.with_name(f"{key}{end}") for path in (here, before) for end in ("", ".partial"))
        return next((path.with_name(key) for path in begun if path.exists()), here)

    def build(self, stage: Stage, outputs: Mapping[str, Output], warn: Callable[[str], None]) -> Output:
        """The stage's output, found and verified or made now.

        Raises UserError while another process builds it, where what is damaged took long to make, and whatever the
        stage raises; then what was done so far stays in the partial directory.
        """
        key = self.key(stage, outputs)
        path = self._place(stage, key)
        partial = path.with_name(f"{key}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self.locked(path):
            if path.exists() and (output := self._verified(stage, path, warn)) is not None:
                return replace(output, reused=True)
            _begin(partial, path if stage.mends else None)
            began, before = time.monotonic(), _read_seconds(partial)
            try:
                stage.run(partial, {name: outputs[name].path for name in stage.inputs})
            finally:
                seconds = before + time.monotonic() - began
                write_atomically(partial / ".seconds", str(seconds).encode())
            (partial / ".seconds").unlink()
            _remove_temporaries(partial)
            files = _checksums(partial)
            content = {name: file for name, file in files.items() if name.startswith(stage.content)}
            made_of = {name: outputs[name].key for name in stage.inputs}
            named = hash_json(content)
            output = Output(stage.name, key, path, files, seconds, named, stage.params, made_of, stage.known_as)
            record = {**asdict(output), "path": None, "version": stage.version, "format": FORMAT}
            write_atomically(partial / RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
            if path.exists():
                os.rename(path, _aside(path))
            os.rename(partial, path)
            return output

    def _verified(self, stage: Stage, path: Path, warn: Callable[[str], None]) -> Output | None:
        """The output that is there, unless it is to be made anew."""
        output = self.read(path)
        damage = {path / RECORD: "missing or damaged"} if output is None else damage_of(output)
        if not damage:
            return output
        file, what = next(iter(damage.items()))
        found = f"stage {stage.name}: {file} is {what}" + (f" (and {len(damage) - 1} more)" if len(damage) > 1 else "")
        aside = f"what is there stays as {_aside(path).name}"
        took_long = output is None or (output.seconds > LONG and not stage.mends)
        if took_long and output is not None and not _in_content(damage, path, stage.content):
            warn(f"{found}; no later stage reads it, and all else is whole: it is left so")
            return output
        if took_long and not self._rebuild:
            how_long = "" if output is None else f", and took {output.seconds / 60:.0f} minutes to make"
            raise UserError(
                f"{found}{how_long}: bring the file back, or have it made again, by `fot run` or `fot evaluate` with "
                f"--rebuild ({aside}), or by moving {path} away"
            )
        warn(f"{found}; it is made again, {aside}")
        return None

    def read(self, path: Path) -> Output | None:
        """A finished output from its directory, None if its record is missing or damaged.

        Raises UserError where later code than this wrote it.
        """
        try:
            record = json.loads((path / RECORD).read_text())
            if record.get("format", 1) > FORMAT:
                raise UserError(f"{path} was made by a later version of fot: use that, or another work_dir")
            record.setdefault("known_as", record["stage"])
            fields = [record[name] for name in ("files", "seconds", "hash", "params", "inputs", "known_as")]
            return Output(record["stage"], record["key"], path, *fields)
        except (OSError, ValueError, KeyError, AttributeError):
            return None

    def finished(self, stage: str) -> Iterator[Output]:
        """All finished outputs of a stage whose record can be read here, by key."""
        for path in sorted((self.root / stage).glob("*")):
            output = None
            with suppress(UserError):  # of later code
                output = self.read(path) if path.suffix == "" else None
            if output is not None:
                yield output

    def find(self, stage: Stage, outputs: Mapping[str, Output]) -> tuple[State, float, Path | None]:
        """(state, seconds spent, where) of a stage, without running or verifying anything."""
        if any(name not in outputs for name in stage.inputs):
            return "waiting", 0.0, None
        path = self._place(stage, self.key(stage, outputs))
        partial = path.with_name(f"{path.name}.partial")
        if (output := self.read(path)) is not None:
            return "done", output.seconds, path
        if partial.exists():
            return ("running" if self._is_locked(path) else "interrupted"), _read_seconds(partial), partial
        return "to do", 0.0, None

    @contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Hold the stage's lock, which the system releases however the process ends."""
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            for patience in (0.5, 0.5, 0.0):  # `is_locked` of another process holds it for a moment
                if _try_lock(lock, fcntl.LOCK_EX):
                    break
                time.sleep(patience)
            else:
                raise UserError(
                    f"stage {path.parent.name} is being built by another process in {path.parent}: wait for it, or "
                    f"use another work_dir"
                )
            yield

    @staticmethod
    def _is_locked(path: Path) -> bool:
        file = path.with_name(f"{path.name}.lock")
        if not file.exists():
            return False
        with open(file) as lock:
            return not _try_lock(lock, fcntl.LOCK_SH)


def link(directory: Path, output_file: Path) -> None:
    """Make a link to a directory in a stage's output; one that goes on being right if the store is moved, where the
    directory lies in it, too."""
    root = output_file.parents[2]
    target = os.path.relpath(directory, output_file.parent) if directory.is_relative_to(root) else directory
    output_file.unlink(missing_ok=True)
    output_file.symlink_to(target, target_is_directory=True)


def _try_lock(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_temporaries(directory: Path) -> None:
    """What processes left behind that were killed while writing."""
    for temporary in directory.rglob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def _read_seconds(partial: Path) -> float:
    file = partial / ".seconds"
    return float(file.read_text()) if file.exists() else 0.0


def _checksums(directory: Path) -> dict[str, list[Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): [hash_file(path), path.stat().st_size] for path in files}


def damage_of(output: Output) -> dict[Path, str]:
    """What is wrong with which of an output's files."""
    damage = {}
    for name, (checksum, size) in output.files.items():
        file = output.path / name
        if not file.exists():
            damage[file] = "missing"
        elif file.stat().st_size != size or hash_file(file) != checksum:
            damage[file] = "corrupt"
    for entry in output.path.iterdir():
        if not entry.exists():
            damage[entry] = f"a link to {os.readlink(entry)}, which is not there"
    return damage


def _in_content(damage: Mapping[Path, str], path: Path, content: str) -> bool:
    """Whether any of what is damaged is part of the content."""
    return any(str(file.relative_to(path)).startswith(content) for file in damage)


def _aside(path: Path) -> Path:
    """A name beside it that is not taken."""
    return next(each for number in count(1) if not (each := path.with_name(f"{path.name}.damaged-{number}")).exists())


def _begin(partial: Path, whole: Path | None) -> None:
    """A directory to build in: what an interrupted run left, or nothing, and with `whole`, a finished output that is
    mended, links to those of its files that are what its record says."""
    partial.mkdir(exist_ok=True)
    (partial / RECORD).unlink(missing_ok=True)
    _remove_temporaries(partial)
    if whole is None or not whole.exists():
        return
    for name, (checksum, size) in _recorded_files(whole).items():
        file, here = whole / name, partial / name
        if not here.exists() and file.is_file() and file.stat().st_size == size and hash_file(file) == checksum:
            here.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, here)
            except OSError:  # a disk without links
                with complete_or_invisible(here) as temporary:
                    shutil.copyfile(file, temporary)


def _recorded_files(path: Path) -> dict[str, list[Any]]:
    try:
        return dict(json.loads((path / RECORD).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
