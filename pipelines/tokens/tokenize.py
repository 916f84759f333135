"""Tokenization: one Ray task a unit, one shard a task.

Exactly once: a task writes its shard under a temporary name, renames it, then leaves a record beside it. Whatever died
in between, running again repeats only the units without a record, and the result is the same to the byte. The manifest,
written last, takes the records' place. Rebuilding a damaged shard is the same task again.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import Data, Source
from pipelines.sources.corpus import Document, Dropped, Unit
from pipelines.sources.readers import plugins_used, read_unit
from pipelines.tokens.minhash import signature
from pipelines.tokens.precheck import too_many_bad
from pipelines.tokens.shards import Encoded, Manifest, Shard, token_dtype, write_shard
from pipelines.tokens.tokenizer import TextTokenizer, load_tokenizer
from pipelines.workflow.cluster import run_tasks
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import complete_or_invisible, write_atomically
from pipelines.workflow.hashing import hash_file, hash_json
from pipelines.workflow.progress import Progress

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1_000_000, 10_000  # encoded and written at once: bounds a task's memory
RECORD = ".record.json"  # of a finished task, beside its shard
# Settings of a source that its shards do not show, or show by what they were made of.
NOT_CONTENT = {"path", "max_tree_bytes", "recall", "held_out", "weight", "max_epochs", "follow_links", "max_left_out"}


def recipe_part(data: Data) -> dict[str, Any]:
    """What of the recipe decides the shards' content: not the paths (their files' content hashes do), nor the split."""
    sources = [source.model_dump(mode="json", exclude=NOT_CONTENT) for source in data.sources]
    return {"sources": sources, "task_bytes": data.task_bytes}


@dataclass(frozen=True)
class Encoding:
    """How texts become shards: the tokenizer's directory and backend, and where shards go."""

    tokenizer: Path
    backend: str
    output: Path

    def load(self) -> TextTokenizer:
        return load_tokenizer(self.tokenizer, self.backend)


@dataclass(frozen=True)
class MadeShard:
    """A task's result: the shard, and the first broken document of its unit, if there was one."""

    shard: Shard
    first_bad: Dropped | None


def tokenize(
    units: Sequence[Unit], data: Data, encoding: Encoding, progress: Progress, parent: Path | None = None
) -> Manifest:
    """Tokenize all units into shards under `encoding.output` and write the manifest.

    With a `parent` (a data set's directory) its shards come first, as they are. Raises UserError for broken documents
    beyond `data.max_bad_documents` and for a corpus without a single document.
    """
    sources = {source.name: source for source in data.sources}
    before = Manifest.read(parent) if parent else None
    inherited = inherit(parent, before, encoding.output) if parent and before else ()
    tokenizer = encoding.load()
    made_with = describe_tokenizer(tokenizer, encoding.backend)
    finished = {made.shard.file: made for made in _recorded(encoding.output, made_with)}
    names = [shard_name(len(inherited) + number, unit) for number, unit in enumerate(units)]
    arguments = [
        (unit, name, sources[unit.source], encoding, finished.get(name))
        for unit, name in zip(units, names, strict=True)
    ]
    shards: dict[int, Shard] = {}
    bad = sum(shard.bad for shard in inherited)
    with closing(run_tasks(tokenize_unit, arguments)) as results:
        for number, made in results:
            shards[number] = made.shard
            bad += made.shard.bad
            if bad > data.max_bad_documents and made.first_bad is not None:
                raise too_many_bad(made.first_bad)
            progress.advance(units[number].bytes)
    manifest = Manifest(
        token_type=token_dtype(tokenizer.vocab_size).name,
        tokenizer=made_with,
        recipe=recipe_part(data),
        shards=(*inherited, *(shards[number] for number in range(len(units)))),
        parent=before.hash if before else None,
        generations=[*(before.generations if before else ()), len(units)],
        libraries={
            **(before.libraries if before else {}),
            **{name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
            **plugins_used(units),
        },
    )
    if manifest.documents == 0:
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items()) or "nothing in the files"
        raise UserError(f"the corpus is empty, no source holds a document ({dropped}): check data.sources")
    manifest.write(encoding.output)
    remove_records(encoding.output)
    return manifest


def has_begun(output: Path) -> bool:
    """Whether an earlier run has tokenized something into this directory."""
    return any(output.glob(f"*{RECORD}"))


def remove_records(output: Path) -> None:
    """Remove what tasks, the killed ones too, left beside the shards."""
    for made_on_the_way in (*output.glob(f"*{RECORD}"), *output.glob(".*.tmp")):
        made_on_the_way.unlink()


def describe_tokenizer(tokenizer: TextTokenizer, backend: str) -> dict[str, str]:
    """What a manifest says of its tokenizer."""
    return {"fingerprint": tokenizer.fingerprint, "behaviour": tokenizer.behaviour, "backend": backend}


def shard_name(number: int, unit: Unit) -> str:
    return f"shard-{number:05d}-{hash_json(unit.identity())[:12]}.arrow"


def inherit(parent: Path, manifest: Manifest, output: Path) -> tuple[Shard, ...]:
    """The parent's shards, brought into the output: as second names of the same files where there are such."""
    for shard in manifest.shards:
        target = output / shard.file
        if not target.exists():
            try:
                os.link(parent / shard.file, target)
            except OSError:
                with complete_or_invisible(target) as temporary:
                    shutil.copyfile(parent / shard.file, temporary)
    return manifest.shards


def _recorded(output: Path, tokenizer: dict[str, str]) -> Iterator[MadeShard]:
    """What an earlier run of the output had made, with the same tokenizer and library behaviour."""
    for record in output.glob(f"*{RECORD}"):
        known = json.loads(record.read_text())
        if known["tokenizer"] == tokenizer:
            yield MadeShard(Shard(**known["shard"]), Dropped(**known["first_bad"]) if known["first_bad"] else None)


def tokenize_unit(unit: Unit, name: str, source: Source, encoding: Encoding, known: MadeShard | None) -> MadeShard:
    """One task: the unit's shard, found whole or made."""
    path = encoding.output / name
    if known is not None and path.exists() and hash_file(path) == known.shard.sha256:
        return known

    tokenizer = _load_once(encoding)
    dropped: Counter[str] = Counter()
    bad, first_bad = 0, None

    def documents() -> Iterator[Document]:
        nonlocal bad, first_bad
        for item in read_unit(unit, source):
            if isinstance(item, Document):
                yield item
                continue
            dropped[item.reason] += 1
            if item.bad:
                bad, first_bad = bad + 1, first_bad or item

    batches = (_admit(batch, source, dropped) for batch in _encoded(documents(), tokenizer))
    counts = write_shard(path, filter(None, batches), tokenizer.vocab_size)
    shard = Shard(path.name, hash_file(path), unit.identity(), *counts, dict(sorted(dropped.items())), bad)
    made = MadeShard(shard, first_bad)
    record = {**asdict(made), "tokenizer": describe_tokenizer(tokenizer, encoding.backend)}
    write_atomically(path.with_suffix(RECORD), json.dumps(record).encode())
    return made


@lru_cache(1)
def _load_once(encoding: Encoding) -> TextTokenizer:
    """A worker process runs many tasks; loading a vocabulary of 32,000 takes a fifth of a second."""
    return encoding.load()


def _encoded(documents: Iterator[Document], tokenizer: TextTokenizer) -> Iterator[list[tuple[Document, np.ndarray]]]:
    """(document, its tokens with bos and eos), in batches of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield list(zip(batch, tokenizer.encode_documents([each.text for each in batch]), strict=True))
            batch, characters = [], 0
    if batch:
        yield list(zip(batch, tokenizer.encode_documents([each.text for each in batch]), strict=True))


def _admit(batch: list[tuple[Document, np.ndarray]], source: Source, dropped: Counter[str]) -> list[Encoded]:
    """Those of the length that the source asks for, with their signatures."""
    admitted = []
    for document, tokens in batch:
        length = len(tokens)
        if length == 2:  # bos and eos
            dropped["no tokens"] += 1
        elif length < source.min_tokens:
            dropped[f"shorter than {source.min_tokens} tokens"] += 1
        elif source.max_tokens is not None and length > source.max_tokens:
            dropped[f"longer than {source.max_tokens} tokens"] += 1
        else:
            admitted.append(Encoded(document, tokens, signature(document.text)))
    return admitted
