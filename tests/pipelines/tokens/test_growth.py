"""What a data set grows from: decided by what its shards were made of and what the sources hold now."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.corpus import Entry, File
from pipelines.sources.units import group_units
from pipelines.tokens.growth import next_generation, units_again
from pipelines.tokens.shards import Manifest, Shard

PART = {"task_bytes": 10}
names = st.text("abcdef", min_size=1, max_size=3)


def entry(name, content="", *, size=5, records=False, source="s"):
    return Entry(source, name, (File(name, f"/corpus/{name}", size, content or f"content of {name}"),), records)


def entries(*names):
    return [entry(name) for name in sorted(names)]


def finished(entries, fresh, parent=None, part=PART):
    """A data set made of the entries, as tokenization would leave it: (directory, manifest)."""
    generation = next_generation(entries, part, [parent] if parent else [], 10)
    shards = [Shard(f"{n}.arrow", "", unit, 1, 1, 1, {}, 0) for n, unit in enumerate(generation.identities)]
    earlier = parent[1].generations if parent else []
    made = [*earlier, len(shards) - sum(earlier)]
    manifest = Manifest("uint16", {}, part, tuple(shards), generation.parent_hash, made, {})
    directory = fresh()
    manifest.write(directory)
    return directory, Manifest.read(directory)


def test_without_a_data_set_everything_is_new():
    present = entries("a", "b", "c")
    generation = next_generation(present, PART, [], 10)
    assert (generation.parent, generation.parent_hash) == (None, None)
    assert generation.units == group_units(present, 10)
    assert generation.identities == [unit.identity() for unit in generation.units]
    assert generation.original == len(generation.units) == 2


def test_a_data_set_of_the_same_corpus_is_found(fresh):
    directory, manifest = finished(entries("a", "b", "c"), fresh)
    generation = next_generation(entries("a", "b", "c"), PART, [(directory, manifest)], 10)
    assert (generation.parent, generation.units, generation.parent_hash) == (directory, [], None)
    assert generation.identities == [shard.unit for shard in manifest.shards]


@given(st.lists(st.sets(names, min_size=1, max_size=6), min_size=1, max_size=5))
def test_growth_tokenizes_each_document_once_and_keeps_what_there_was(fresh, added):
    known = None
    for present in accumulate(added, set.union):
        before = known[1] if known else None
        known = finished(entries(*present), fresh, known)
        manifest = known[1]
        made_of = [name for shard in manifest.shards for name, _ in shard.unit["entries"]]
        assert sorted(made_of) == sorted(present)
        if before is not None and len(before.shards) < len(manifest.shards):
            assert manifest.shards[: len(before.shards)] == before.shards
            assert manifest.parent == before.hash
            assert manifest.generations[:-1] == before.generations
        again = next_generation(entries(*present), PART, [known], 10)
        assert (again.parent, again.units, again.parent_hash) == (known[0], [], manifest.parent)
        assert again.original == manifest.generations[0]


def test_the_largest_of_several_data_sets_is_the_parent(fresh):
    small, large = finished(entries("a"), fresh), finished(entries("a", "b", "c"), fresh)
    present = entries("a", "b", "c", "d")
    for known in ([small, large], [large, small]):
        assert next_generation(present, PART, known, 10).parent == large[0]


@pytest.mark.parametrize(
    ("present", "why"),
    [
        ([entry("a", "changed"), entry("b"), entry("c")], "a changed file"),
        ([entry("a"), entry("c")], "a file that is gone"),
        ([entry("a", source="t"), entry("b", source="t"), entry("c", source="t")], "another source"),
    ],
)
def test_where_something_is_not_as_it_was_a_new_data_set_begins(fresh, present, why):
    generation = next_generation(present, PART, [finished(entries("a", "b"), fresh)], 10)
    assert generation.parent is None, why
    assert generation.units == group_units(present, 10)


def test_another_part_of_the_recipe_begins_a_new_data_set(fresh):
    known = finished(entries("a"), fresh)
    assert next_generation(entries("a", "b"), {"task_bytes": 11}, [known], 10).parent is None
    assert next_generation(entries("a", "b"), PART, [known], 10).parent == known[0]


def test_units_come_again_from_their_recorded_identities():
    lines = entry("lines.jsonl", size=25, records=True)
    present = [*entries("a", "b", "c"), lines]
    units = group_units(present, 10)
    identities = [unit.identity() for unit in units]
    assert units_again(identities, present) == units
    moved = [
        Entry(e.source, e.name, tuple(File(f.name, f"/moved/{f.name}", f.size, f.content) for f in e.files), e.records)
        for e in present
    ]
    assert [unit.entries[0].files[0].path[:7] for unit in units_again(identities, moved)] == ["/moved/"] * len(units)


def test_a_unit_whose_files_changed_does_not_come_again():
    identities = [unit.identity() for unit in group_units(entries("a", "b", "c"), 10)]
    assert [len(identity["entries"]) for identity in identities] == [2, 1]
    assert [unit is None for unit in units_again(identities, [entry("a"), entry("b", "new"), entry("c")])] == [
        True,
        False,
    ]
    assert [unit is None for unit in units_again(identities, entries("a", "b"))] == [False, True]
    assert [unit is None for unit in units_again(identities, [])] == [True, True]


def test_a_file_that_is_read_otherwise_now_begins_a_new_data_set(fresh):
    text, rows = entry("a.csv"), entry("a.csv", records=True)
    known = finished([text], fresh)
    assert next_generation([rows], PART, [known], 10).parent is None
    assert units_again([known[1].shards[0].unit], [rows]) == [None]
    again = finished([rows], fresh)
    assert next_generation([rows], PART, [again], 10).parent == again[0]
