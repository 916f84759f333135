"""Tokenization: one Ray task a unit, one shard a task.

Exactly once: a task writes its shard under a temporary name, renames it, then leaves a record beside it. Whatever died
in between, running again repeats only the units without a record, and the result is the same to the byte.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from pipelines.config import Data
from pipelines.corpus import Document, Unit, read_unit
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.hashing import hash_file, hash_json
from pipelines.progress import Progress
from pipelines.shards import Manifest, Shard, write_shard
from pipelines.tokenizer import TextTokenizer, load_tokenizer

BATCH_CHARACTERS = 1_000_000  # text encoded and written at once: bounds a task's memory


def recipe_part(data: Data) -> dict[str, Any]:
    """What of the recipe decides the shards' content: not the paths (their files' content hashes do), nor the split."""
    sources = [source.model_dump(mode="json", exclude={"path", "held_out"}) for source in data.sources]
    return {"sources": sources, "task_bytes": data.task_bytes}


def tokenize(units: list[Unit], data: Data, tokenizer: Path, output: Path, progress: Progress) -> Manifest:
    """Tokenize all units into shards under `output` and write the manifest.

    Raises UserError for broken lines beyond `data.max_bad_lines` and for a corpus without a single document.
    """
    tokenize_task = ray.remote(num_cpus=1, max_retries=5)(tokenize_unit)
    at_once = 2 * int(ray.cluster_resources().get("CPU", 1))
    running: dict[ray.ObjectRef, int] = {}
    shards: dict[int, Shard] = {}
    bad_lines, first_bad_line = 0, ""
    pending = iter(range(len(units)))
    try:
        while len(shards) < len(units):
            for number in itertools.islice(pending, at_once - len(running)):
                running[tokenize_task.remote(units[number], number, data, tokenizer, output)] = number
            (done,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            shards[number], bad, first = ray.get(done)
            bad_lines, first_bad_line = bad_lines + bad, first_bad_line or first
            if bad_lines > data.max_bad_lines:
                raise UserError(
                    f"{first_bad_line}: mend the line, or tolerate up to N such lines with --set data.max_bad_lines=N"
                )
            progress.advance(units[number].bytes)
    finally:
        for task in running:
            ray.cancel(task, force=True)
    manifest = Manifest(
        tokenizer=load_tokenizer(tokenizer).fingerprint,
        recipe=recipe_part(data),
        shards=tuple(shards[number] for number in range(len(units))),
    )
    if manifest.documents == 0:
        dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items()) or "nothing in the files"
        raise UserError(f"the corpus is empty, no source holds a document ({dropped}): check data.sources")
    manifest.write(output)
    for made_on_the_way in (*output.glob("*.record.json"), *output.glob(".*.tmp")):
        made_on_the_way.unlink()
    return manifest


def tokenize_unit(unit: Unit, number: int, data: Data, tokenizer: Path, output: Path) -> tuple[Shard, int, str]:
    """One task: the unit's shard, its number of bad lines and the first ("file, line N: reason"), made or found."""
    path = output / f"shard-{number:05d}-{hash_json(unit.identity())[:12]}.arrow"
    record = path.with_suffix(".record.json")
    if record.exists():
        known = json.loads(record.read_text())
        shard = Shard(**known["shard"])
        if path.exists() and hash_file(path) == shard.sha256:
            return shard, known["bad_lines"], known["first_bad_line"]

    source = next(source for source in data.sources if source.name == unit.source)
    text_tokenizer = load_tokenizer(tokenizer)
    dropped: Counter[str] = Counter()
    bad: list[str] = []  # as many entries as bad lines, only the first says where

    def documents() -> Iterator[Document]:
        for item in read_unit(unit, source.text_field, source.id_field):
            if isinstance(item, Document):
                yield item
            else:
                dropped[item.reason] += 1
                if item.bad_line:
                    bad.append("" if bad else f"{item.where}: {item.reason}")

    batches = _encoded(documents(), text_tokenizer)
    counts = write_shard(path, batches, text_tokenizer.vocab_size)
    shard = Shard(path.name, hash_file(path), *counts, dict(sorted(dropped.items())))
    found = len(bad), bad[0] if bad else ""
    known = {"shard": asdict(shard), "bad_lines": found[0], "first_bad_line": found[1]}
    write_atomically(record, json.dumps(known).encode())
    return shard, *found


def _encoded(
    documents: Iterator[Document], tokenizer: TextTokenizer
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch, tokenizer.encode_documents([document.text for document in batch])
            batch, characters = [], 0
    if batch:
        yield batch, tokenizer.encode_documents([document.text for document in batch])
