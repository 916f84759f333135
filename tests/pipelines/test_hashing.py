import hashlib
import os

import pytest

from pipelines.hashing import FileHashes, hash_file, hash_json


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_json_hash_knows_values_and_not_the_order_of_keys():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    different = [{"a": 1, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": "1", "b": [1, 2]}, {"a": 1.5}, {"a": None}, {}, []]
    assert len({hash_json(value) for value in different}) == len(different)


def test_a_file_hash_is_the_sha256_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"content\0" * 100_000)
    assert hash_file(tmp_path / "file") == sha256(b"content\0" * 100_000)


def change_size(path):
    path.write_bytes(b"longer content")


def change_time(path):
    before = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def change_inode(path):
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"other")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [change_size, change_time, change_inode])
@pytest.mark.parametrize("saved", [False, True])
def test_a_changed_file_is_hashed_again(tmp_path, change, saved):
    path, hashes = tmp_path / "file", FileHashes(tmp_path / "cache.json")
    path.write_bytes(b"first")
    assert hashes.hash(path) == sha256(b"first")
    change(path)
    if saved:
        hashes.save()
        hashes = FileHashes(tmp_path / "cache.json")
    assert hashes.hash(path) == sha256(path.read_bytes()) != sha256(b"first")


def test_an_unchanged_file_is_not_read_again(tmp_path):
    path, hashes = tmp_path / "file", FileHashes(tmp_path / "cache.json")
    path.write_bytes(b"first")
    hashes.hash(path)
    hashes.save()
    stat = path.stat()
    path.write_bytes(b"other")  # same size, inode and, set back, time: only a reader would notice
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileHashes(tmp_path / "cache.json").hash(path) == sha256(b"first")


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_cache_only_costs_time(tmp_path, damage):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "cache.json").write_bytes(damage)
    hashes = FileHashes(tmp_path / "cache.json")
    assert hashes.hash(tmp_path / "file") == sha256(b"content")
    hashes.save()
    assert FileHashes(tmp_path / "cache.json").hash(tmp_path / "file") == sha256(b"content")
