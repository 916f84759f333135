from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.corpus import Document
from pipelines.tokens.minhash import BINS
from pipelines.tokens.shards import Encoded, Manifest, Shard, damage_of, token_dtype, write_shard
from pipelines.workflow.hashing import hash_file

UNIT = {"source": "s", "entries": [["file.jsonl", [["file.jsonl", "0" * 64]]]], "span": [0, 500]}
SHARD = Shard("shard-0.arrow", "0" * 64, UNIT, documents=2, tokens=10, characters=30, dropped={"empty": 1}, bad=0)
MANIFEST = Manifest(
    token_type="uint16",
    tokenizer={"fingerprint": "f", "behaviour": "b", "backend": "huggingface"},
    recipe={"task_bytes": 5, "sources": [{"name": "s"}]},
    shards=(SHARD,),
    parent=None,
    generations=[1],
    libraries={"numpy": "2"},
)


def table_of(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


rows = st.tuples(st.text(max_size=5), st.lists(st.integers(0, (1 << 16) - 1), max_size=20), st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
@given(batches=st.lists(st.lists(rows, min_size=1, max_size=5), max_size=4))
def test_a_shard_gives_back_what_was_written(fresh, vocab_size, batches):
    directory, number, written = fresh(), 0, []
    for batch in batches:
        written.append([])
        for text, tokens, first_bin in batch:
            document = Document(f"s/{number}", "s", text, f"{number}.txt", number, number + 9, f"hash of {number}")
            signature = np.arange(BINS, dtype=np.uint32)
            signature[0] = first_bin
            written[-1].append(Encoded(document, np.array(tokens, np.uint32), signature))
            number += 1
    counts = write_shard(directory / "shard.arrow", iter(written), vocab_size)
    flat = [each for batch in written for each in batch]
    expected = [
        {
            "document_id": each.document.id,
            "source": "s",
            "file": each.document.file,
            "start": each.document.start,
            "end": each.document.end,
            "content_hash": each.document.content_hash,
            "signature": each.signature.tolist(),
            "tokens": each.tokens.tolist(),
        }
        for each in flat
    ]
    assert table_of(directory / "shard.arrow").to_pylist() == expected
    assert counts == (
        len(flat),
        sum(len(each.tokens) for each in flat),
        sum(len(each.document.text) for each in flat),
    )


@pytest.mark.parametrize(("vocab_size", "name"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path, encoded, vocab_size, name):
    assert token_dtype(vocab_size).name == name
    write_shard(tmp_path / "shard.arrow", [[encoded("a", [0, vocab_size - 1])]], vocab_size)
    (tokens,) = table_of(tmp_path / "shard.arrow").column("tokens").chunks
    assert str(tokens.type.value_type) == name
    assert tokens.to_pylist() == [[0, vocab_size - 1]]


def test_the_tokens_lie_in_the_file_as_they_are(tmp_path, encoded):
    tokens = np.arange(1000, 2000)
    write_shard(tmp_path / "shard.arrow", [[encoded("a", tokens)]], 1 << 16)
    assert tokens.astype("<u2").tobytes() in (tmp_path / "shard.arrow").read_bytes()


def test_the_same_documents_make_the_same_bytes(tmp_path, encoded):
    batches = [[encoded("a", [1, 2]), encoded("b", [3])], [encoded("c", [4])]]
    write_shard(tmp_path / "one.arrow", batches, 100)
    write_shard(tmp_path / "other.arrow", batches, 100)
    write_shard(tmp_path / "changed.arrow", [batches[0], [encoded("c", [5])]], 100)
    assert hash_file(tmp_path / "one.arrow") == hash_file(tmp_path / "other.arrow")
    assert hash_file(tmp_path / "one.arrow") != hash_file(tmp_path / "changed.arrow")


def test_an_error_while_writing_leaves_no_shard(tmp_path, contents, encoded):
    def batches():
        yield [encoded("a", [1, 2])]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "shard.arrow", batches(), 100)
    assert contents(tmp_path) == {}


def test_a_shard_is_not_seen_before_it_is_complete(tmp_path, encoded):
    seen = []

    def batches():
        for name in "abc":
            yield [encoded(name, [1, 2])]
            seen.append((tmp_path / "shard.arrow").exists())

    write_shard(tmp_path / "shard.arrow", batches(), 100)
    assert seen == [False] * 3
    assert (tmp_path / "shard.arrow").exists()


def test_damage_is_named_with_the_file(tmp_path, encoded):
    path = tmp_path / "shard-0.arrow"
    counts = write_shard(path, [[encoded("a", range(100))]], 100)
    shard = Shard(path.name, hash_file(path), UNIT, *counts, {}, 0)
    whole = path.read_bytes()
    assert damage_of(tmp_path, shard) is None
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert damage_of(tmp_path, shard) == f"{path} is corrupt"
    for damaged in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(damaged)
        assert damage_of(tmp_path, shard) == f"{path} is corrupt"
    path.write_bytes(whole)
    assert damage_of(tmp_path, shard) is None
    path.unlink()
    assert damage_of(tmp_path, shard) == f"{path} is missing"


# The manifest


def test_a_manifest_read_back_is_the_same(tmp_path):
    grown = replace(MANIFEST, shards=(SHARD, replace(SHARD, file="shard-1.arrow")), parent="f" * 64, generations=[1, 1])
    for manifest in (MANIFEST, grown):
        manifest.write(tmp_path)
        assert Manifest.read(tmp_path) == manifest
        assert Manifest.read(tmp_path).hash == manifest.hash


OF_THE_MANIFEST = {
    "token_type": "uint32",
    "tokenizer": {**MANIFEST.tokenizer, "backend": "gigatoken"},
    "recipe": {"task_bytes": 6, "sources": [{"name": "s"}]},
    "shards": (SHARD, SHARD),
    "parent": "f" * 64,
    "generations": [0, 1],
    "format": 1,
}
OF_A_SHARD = {
    "file": "shard-1.arrow",
    "sha256": "1" * 64,
    "unit": {**UNIT, "span": [0, 501]},
    "documents": 3,
    "tokens": 11,
    "characters": 31,
    "dropped": {"empty": 2},
    "bad": 1,
}


def test_the_manifest_hash_knows_everything_the_manifest_says_but_for_the_libraries():
    assert OF_THE_MANIFEST.keys() | {"libraries"} == {field.name for field in fields(Manifest)}
    assert OF_A_SHARD.keys() == {field.name for field in fields(Shard)}
    changed = [replace(MANIFEST, **{name: value}) for name, value in OF_THE_MANIFEST.items()]
    changed += [replace(MANIFEST, shards=(replace(SHARD, **{name: value}),)) for name, value in OF_A_SHARD.items()]
    assert len({manifest.hash for manifest in [MANIFEST, *changed]}) == 1 + len(changed)
    assert replace(MANIFEST, libraries={"numpy": "3", "pyarrow": "1"}).hash == MANIFEST.hash


def test_the_manifest_hash_knows_the_order_of_the_shards():
    other = replace(SHARD, file="shard-1.arrow")
    assert replace(MANIFEST, shards=(SHARD, other)).hash != replace(MANIFEST, shards=(other, SHARD)).hash


def test_the_manifest_hash_is_the_same_on_every_machine():
    shuffled = replace(MANIFEST, tokenizer=dict(reversed(MANIFEST.tokenizer.items())))
    assert MANIFEST.hash == shuffled.hash
    assert MANIFEST.hash[:16] == "7883f6e292da129e"


def test_a_manifest_sums_its_shards():
    other = Shard("shard-1.arrow", "1" * 64, UNIT, 1, 5, 7, {"empty": 2, "not UTF-8": 1}, 1)
    both = replace(MANIFEST, shards=(SHARD, other))
    assert (both.documents, both.tokens, both.characters) == (3, 15, 37)
    assert both.dropped == {"empty": 3, "not UTF-8": 1}
    none = replace(MANIFEST, shards=())
    assert (none.documents, none.tokens, none.characters, none.dropped) == (0, 0, 0, {})
