"""Tokenization: one Ray task a unit, one shard a task.

Exactly once: a task writes its shard under a temporary name, renames it, then leaves a record beside it. Whatever died
in between, running again repeats only the units without a record, and the result is the same to the byte. The manifest,
written last, takes the records' place; rebuilding a damaged shard is the same task again.
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

from pipelines.cluster import run_tasks
from pipelines.config import Data, Source
from pipelines.corpus import Document, Dropped, Unit
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.hashing import hash_file, hash_json
from pipelines.minhash import signature
from pipelines.progress import Progress
from pipelines.readers import describe, read_unit
from pipelines.shards import MANIFEST, REPAIR, Encoded, Manifest, Shard, damage_of, token_dtype, write_shard
from pipelines.tokenizer import TextTokenizer, load_tokenizer

BATCH_CHARACTERS = 1_000_000  # text encoded and written at once: bounds a task's memory
NOT_CONTENT = {
    "path",
    "held_out",
    "weight",
    "max_epochs",
    "follow_links",
}  # a source's settings that shards do not show


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
class Made:
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
    finished = {made.shard.file: made for made in _finished(encoding.output)}
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
                raise UserError(
                    f"{describe(made.first_bad)}: mend it, or tolerate up to N such documents with "
                    f"--set data.max_bad_documents=N"
                )
            progress.advance(units[number].bytes)
    tokenizer = encoding.load()
    manifest = Manifest(
        token_type=token_dtype(tokenizer.vocab_size).name,
        tokenizer={
            "fingerprint": tokenizer.fingerprint,
            "behaviour": tokenizer.behaviour,
            "backend": encoding.backend,
        },
        recipe=recipe_part(data),
        shards=(*inherited, *(shards[number] for number in range(len(units)))),
        parent=before.hash if before else None,
        generations=[*(before.generations if before else ()), len(units)],
        libraries={name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
    )
    if manifest.documents == 0:
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items()) or "nothing in the files"
        raise UserError(f"the corpus is empty, no source holds a document ({dropped}): check data.sources")
    manifest.write(encoding.output)
    for made_on_the_way in (*encoding.output.glob("*.record.json"), *encoding.output.glob(".*.tmp")):
        made_on_the_way.unlink()
    return manifest


def shard_name(number: int, unit: Unit) -> str:
    return f"shard-{number:05d}-{hash_json(unit.identity())[:12]}.arrow"


def inherit(parent: Path, manifest: Manifest, output: Path) -> tuple[Shard, ...]:
    """The parent's shards, brought into the output: as second names of the same files where the file system has them.

    Raises UserError where one is damaged.
    """
    for shard in manifest.shards:
        if damage := damage_of(parent, shard):
            raise UserError(f"{damage}: {REPAIR}")
        target = output / shard.file
        if not target.exists():
            try:
                os.link(parent / shard.file, target)
            except OSError:
                shutil.copyfile(parent / shard.file, target)
    return manifest.shards


def _finished(output: Path) -> Iterator[Made]:
    """What an earlier run of the output had made: by its manifest, or by its records."""
    if (output / MANIFEST).exists():
        for shard in Manifest.read(output).shards:
            yield Made(shard, None)
    for record in output.glob("*.record.json"):
        known = json.loads(record.read_text())
        yield Made(Shard(**known["shard"]), Dropped(**known["first_bad"]) if known["first_bad"] else None)


def tokenize_unit(unit: Unit, name: str, source: Source, encoding: Encoding, known: Made | None) -> Made:
    """One task: the unit's shard, found whole or made."""
    path = encoding.output / name
    if known is not None and path.exists() and hash_file(path) == known.shard.sha256:
        return known

    tokenizer = _load_once(encoding)
    dropped: Counter[str] = Counter()
    bad: list[Dropped] = []

    def documents() -> Iterator[Document]:
        for item in read_unit(unit, source):
            if isinstance(item, Document):
                yield item
                continue
            dropped[item.reason] += 1
            if item.bad:
                bad.append(item)

    batches = (_admit(batch, source, dropped) for batch in _encoded(documents(), tokenizer))
    counts = write_shard(path, filter(None, batches), tokenizer.vocab_size)
    shard = Shard(path.name, hash_file(path), unit.identity(), *counts, dict(sorted(dropped.items())), len(bad))
    made = Made(shard, bad[0] if bad else None)
    write_atomically(path.with_suffix(".record.json"), json.dumps(asdict(made)).encode())
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
        if characters >= BATCH_CHARACTERS:
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
