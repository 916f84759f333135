"""Integrity: is a data set what its manifest says, and rebuilding the shards that are not, alone and to the byte."""

from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa

from pipelines.config import Data
from pipelines.sources.corpus import Entry
from pipelines.tokens.growth import units_again
from pipelines.tokens.shards import Manifest, Shard, damage_of
from pipelines.tokens.tokenize import Encoding, recipe_part, remove_records, tokenize_unit
from pipelines.workflow.cluster import run_tasks
from pipelines.workflow.errors import UserError
from pipelines.workflow.progress import Progress


def find_damage(directory: Path, manifest: Manifest, progress: Progress) -> dict[int, str]:
    """What is wrong with which shard: checksums, and numbers of documents and tokens. A Ray task a shard."""
    damage = {}
    with closing(run_tasks(check_shard, [(directory, shard) for shard in manifest.shards])) as results:
        for number, found in results:
            if found is not None:
                damage[number] = found
            progress.advance(1)
    return dict(sorted(damage.items()))


def check_shard(directory: Path, shard: Shard) -> str | None:
    """One task: what is wrong with a shard, None if nothing is."""
    if damage := damage_of(directory, shard):
        return damage
    table = pa.ipc.open_file(pa.memory_map(str(directory / shard.file))).read_all()
    tokens = sum(len(chunk.values) for chunk in table.column("tokens").chunks)
    if (table.num_rows, tokens) != (shard.documents, shard.tokens):
        return (
            f"{directory / shard.file} holds {table.num_rows} documents and {tokens} tokens, the manifest says "
            f"{shard.documents} and {shard.tokens}"
        )
    return None


def check_manifest(manifest: Manifest, data: Data, encoding: Encoding) -> None:
    """Raises UserError that says what differs where recipe, tokenizer or library behave other than the manifest's."""
    if differs := recipe_difference(manifest, data):
        raise UserError(f"the data set was made with another {differs}")
    tokenizer = encoding.load()
    if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
        raise UserError(
            f"the data set was made with another tokenizer (fingerprint {manifest.tokenizer['fingerprint'][:12]}, this "
            f"one {tokenizer.fingerprint[:12]}): give the one it was made with, or make the data set again"
        )
    if tokenizer.behaviour != manifest.tokenizer["behaviour"]:
        raise UserError(
            f"the tokenizer is the same, but its library makes other tokens of the same text: the data set was made "
            f"with {_libraries(manifest.libraries)}, here are {_libraries(_here(manifest))}: install the former"
        )


def recipe_difference(manifest: Manifest, data: Data) -> str | None:
    """What the recipe sets otherwise than the manifest's did, None if nothing."""
    part, made_with = recipe_part(data), manifest.recipe
    for key in sorted(part.keys() | made_with.keys()):
        if part.get(key) != made_with.get(key):
            return f"data.{key}: {_difference(made_with.get(key), part.get(key))}"
    return None


def _difference(there: object, here: object) -> str:
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            if one != other and isinstance(one, dict) and isinstance(other, dict):
                keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
                return ", ".join(f"{number}.{key} was {one.get(key)!r}, is {other.get(key)!r}" for key in keys)
    return f"it was {there!r}, is {here!r}"


def _here(manifest: Manifest) -> dict[str, str]:
    return {name: _version(name) for name in manifest.libraries}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a plugin's distribution
        return "not installed"


def _libraries(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def repair(
    damage: dict[int, str],
    manifest: Manifest,
    entries: Sequence[Entry],
    data: Data,
    encoding: Encoding,
    progress: Progress,
) -> None:
    """Rebuild the damaged shards from what they were made of.

    Raises UserError where that has changed or is gone, and where what comes out differs from what the manifest says.
    """
    sources = {source.name: source for source in data.sources}
    arguments = []
    units = units_again([manifest.shards[number].unit for number in damage], entries)
    for number, unit in zip(damage, units, strict=True):
        shard = manifest.shards[number]
        if unit is None:
            names = ", ".join(entry[0] for entry in shard.unit["entries"][:3])
            raise UserError(
                f"{damage[number]}, and what it was made of has changed or is gone (source {shard.unit['source']!r}: "
                f"{names}): bring it back, or remove {encoding.output} to make the data set again"
            )
        arguments.append((unit, shard.file, sources[unit.source], encoding, None))
    numbers = list(damage)
    with closing(run_tasks(tokenize_unit, arguments)) as results:
        for place, made in results:
            shard = manifest.shards[numbers[place]]
            if made.shard != shard:
                raise UserError(
                    f"{shard.file} comes out other than it was: made with {_libraries(manifest.libraries)}, here are "
                    f"{_libraries(_here(manifest))}: install the former, or make the data set again"
                )
            progress.advance(1)
    remove_records(encoding.output)
