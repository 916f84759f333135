"""Growth: a data set made of an earlier one's shards and new ones for what its sources have gained since.

An earlier data set can be the parent when it was made by the same part of the recipe and all it was made of is still
there, unchanged. Its shards and their order stay; only what is new is tokenized. Where something was changed or taken
away, a new data set begins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.sources.corpus import Entry, Unit
from pipelines.sources.units import group_units
from pipelines.tokens.shards import Manifest
from pipelines.workflow.hashing import hash_json


@dataclass(frozen=True)
class Generation:
    """What a data set is to be made of: the shards of `parent`, if there is one, then `units`.

    `parent_hash` names the parent's manifest; `identities` are those of all units, the parent's first; the first
    `original` of them were there before any growth. Without units the data set exists already.
    """

    parent: Path | None
    parent_hash: str | None
    units: list[Unit]
    identities: list[dict[str, Any]]
    original: int


def next_generation(
    entries: Sequence[Entry], part: dict[str, Any], known: Sequence[tuple[Path, Manifest]], task_bytes: int
) -> Generation:
    """What the entries come to, given the finished data sets that are known and the recipe's part.

    Of several that could be the parent the largest is taken.
    """
    present = _present(entries)
    parents = [
        (len(made_of), manifest.hash, directory, manifest, made_of)
        for directory, manifest in known
        if manifest.recipe == part and (made_of := entries_of(manifest)) <= present.keys()
    ]
    if not parents:
        units = group_units(entries, task_bytes)
        return Generation(None, None, units, [unit.identity() for unit in units], len(units))
    _, parent_hash, directory, manifest, made_of = max(parents, key=lambda each: each[:2])
    finished = finished_generation(directory, manifest)
    units = group_units([entry for key, entry in present.items() if key not in made_of], task_bytes)
    if not units:
        return finished
    identities = finished.identities + [unit.identity() for unit in units]
    return replace(finished, parent_hash=parent_hash, units=units, identities=identities)


def finished_generation(directory: Path, manifest: Manifest) -> Generation:
    """A data set that exists, as what it was made of."""
    identities = [shard.unit for shard in manifest.shards]
    return Generation(directory, manifest.parent, [], identities, manifest.generations[0])


def entries_of(manifest: Manifest) -> set[str]:
    """Keys of all files and documents that the data set was made of."""
    return {key for shard in manifest.shards for key in _keys(shard.unit)}


def units_again(identities: Iterable[dict[str, Any]], entries: Sequence[Entry]) -> list[Unit | None]:
    """The units of recorded identities, None where something they were made of has changed or is gone."""
    present = _present(entries)
    units: list[Unit | None] = []
    for identity in identities:
        found = [present.get(key) for key in _keys(identity)]
        if whole := [entry for entry in found if entry is not None]:
            span = tuple(identity["span"]) if identity["span"] else None
            size = span[1] - span[0] if span else sum(file.size for entry in whole for file in entry.files)
            units.append(Unit(identity["source"], tuple(whole), span, size) if len(whole) == len(found) else None)
        else:
            units.append(None)
    return units


def _present(entries: Sequence[Entry]) -> dict[str, Entry]:
    return {_key(entry.identity(), entry.records): entry for entry in entries}


def _keys(unit: dict[str, Any]) -> list[str]:
    """Keys of what a recorded unit was made of."""
    return [_key([unit["source"], *entry], unit["span"] is not None) for entry in unit["entries"]]


def _key(identity: list[Any], records: bool) -> str:
    """Names an entry, and how it is read: a file that was a document before its format was known is another."""
    return hash_json([identity, records])
