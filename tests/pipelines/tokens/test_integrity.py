"""Damage is found and named; what is made again is what it was, to the byte, or the user is told what differs."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import pytest

from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.units import group_units
from pipelines.tokens.integrity import check_manifest, find_damage, repair
from pipelines.tokens.shards import MANIFEST, Manifest
from pipelines.tokens.tokenize import Encoding, tokenize
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.hashing import hash_file
from pipelines.workflow.progress import Progress

QUIET = Progress("", 1, "")
LINES = "".join(json.dumps({"id": n, "text": f"line number {n} " * 5}) + "\n" for n in range(30))


@pytest.fixture(scope="module")
def corpus(fresh, write_tree):
    files = {"lines.jsonl": LINES, "tree/a.txt": "a", "tree/b/c.txt": "c", "d.txt": "d " * 300, "e.txt": "e " * 300}
    return write_tree(fresh(), files)


@pytest.fixture(scope="module")
def entries_of(fresh):
    return lambda data: list_entries(data, 0, FileHashes(fresh() / "hashes.json"))


@pytest.fixture(scope="module")
def made(local_ray, corpus, data_of, entries_of, tokenizer_directory, fresh):
    """(directory, data) of a data set."""
    data, directory = data_of(corpus, task_bytes=500), fresh()
    units = group_units(entries_of(data), 500)
    tokenize(units, data, Encoding(tokenizer_directory, "huggingface", directory), QUIET)
    assert len(units) > 4
    return directory, data


@pytest.fixture
def copy(made, tmp_path, tokenizer_directory):
    """(manifest, data, encoding) of a copy to damage."""
    shutil.copytree(made[0], tmp_path / "copy")
    return Manifest.read(made[0]), made[1], Encoding(tokenizer_directory, "huggingface", tmp_path / "copy")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "is missing": lambda path: path.unlink(),
    "is corrupt": flip_a_byte,
    "corrupt": lambda path: os.truncate(path, path.stat().st_size - 8),
    "is corrupt$": lambda path: path.write_bytes(b""),
}


def test_a_whole_data_set_has_no_damage(made):
    assert find_damage(made[0], Manifest.read(made[0]), QUIET) == {}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named_and_repaired_to_the_byte(made, copy, entries_of, contents, what):
    manifest, data, encoding = copy
    for number in (1, 3):
        DAMAGES[what](encoding.output / manifest.shards[number].file)
    damage = find_damage(encoding.output, manifest, QUIET)
    assert list(damage) == [1, 3]
    for number, text in damage.items():
        assert re.search(f"{re.escape(manifest.shards[number].file)} .*{what}", text)
    untouched = encoding.output / manifest.shards[0].file
    before = untouched.stat().st_mtime_ns
    repair(damage, manifest, entries_of(data), data, encoding, QUIET)
    assert contents(encoding.output) == contents(made[0])
    assert untouched.stat().st_mtime_ns == before


def test_a_shard_with_other_counts_than_the_manifests_is_damaged(made, copy):
    manifest, _, encoding = copy
    path = encoding.output / manifest.shards[0].file
    shards = (replace(manifest.shards[0], documents=7), replace(manifest.shards[1], tokens=7), *manifest.shards[2:])
    damage = find_damage(encoding.output, replace(manifest, shards=shards), QUIET)
    assert list(damage) == [0, 1]
    assert f"{path} holds {manifest.shards[0].documents} documents" in damage[0]
    assert "7 tokens" in damage[1] or "and 7" in damage[1]


def test_a_shard_whose_source_changed_is_not_repaired_but_named(made, copy, corpus, entries_of, contents):
    manifest, data, encoding = copy
    number = next(n for n, shard in enumerate(manifest.shards) if shard.unit["entries"][0][0] == "d.txt")
    (encoding.output / manifest.shards[number].file).unlink()
    entries = [each for each in entries_of(data) if each.name != "d.txt"]
    before = contents(encoding.output)
    with pytest.raises(
        UserError, match=r"is missing, and what it was made of has changed or is gone \(source 's': d.txt"
    ):
        repair({number: "x is missing"}, manifest, entries, data, encoding, QUIET)
    assert contents(encoding.output) == before


def test_another_recipe_is_named_key_by_key(copy):
    manifest, data, encoding = copy
    check_manifest(manifest, data, encoding)
    other = data.model_copy(update={"task_bytes": 501})
    with pytest.raises(UserError, match=r"made with another data\.task_bytes: it was 500, is 501"):
        check_manifest(manifest, other, encoding)
    source = data.sources[0].model_copy(update={"text_field": "body", "min_tokens": 3})
    with pytest.raises(
        UserError, match=r"another data.sources: 0.min_tokens was 1, is 3, 0.text_field was 'text', is 'body'"
    ):
        check_manifest(manifest, data.model_copy(update={"sources": (source,)}), encoding)
    elsewhere = data.sources[0].model_copy(update={"path": "elsewhere", "held_out": 0.5, "weight": 3.0})
    check_manifest(manifest, data.model_copy(update={"sources": (elsewhere,)}), encoding)


def test_another_tokenizer_is_an_error(copy, tmp_path):
    manifest, data, encoding = copy
    (tmp_path / "other").mkdir()
    train_tokenizer(["other text"] * 9, 300, tmp_path / "other")
    with pytest.raises(UserError, match="made with another tokenizer"):
        check_manifest(manifest, data, replace(encoding, tokenizer=tmp_path / "other"))


def test_a_library_that_encodes_otherwise_is_an_error(copy):
    manifest, data, encoding = copy
    tokenizer = {**manifest.tokenizer, "behaviour": "other"}
    older = replace(manifest, tokenizer=tokenizer, libraries={**manifest.libraries, "tokenizers": "0.0.1"})
    with pytest.raises(
        UserError, match=r"makes other tokens of the same text.*tokenizers 0.0.1.*here are.*tokenizers 0\.[1-9]"
    ):
        check_manifest(older, data, encoding)


def test_a_shard_that_comes_out_otherwise_is_an_error(copy, entries_of):
    manifest, data, encoding = copy
    shards = (replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:])
    with pytest.raises(UserError, match=f"{manifest.shards[0].file} comes out other than it was"):
        repair({0: "x"}, replace(manifest, shards=shards), entries_of(data), data, encoding, QUIET)


def test_the_manifest_is_not_touched_by_repair(copy, entries_of):
    manifest, data, encoding = copy
    before = hash_file(encoding.output / MANIFEST)
    (encoding.output / manifest.shards[0].file).unlink()
    repair({0: "x"}, manifest, entries_of(data), data, encoding, QUIET)
    assert hash_file(encoding.output / MANIFEST) == before
    assert asdict(Manifest.read(encoding.output)) == asdict(manifest)
