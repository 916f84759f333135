import hashlib
import os

import pytest

from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.storage import Item, storage_of
from pipelines.workflow.errors import UserError


def sha256(content):
    return hashlib.sha256(content).hexdigest()


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


def test_many_files_are_hashed_at_once_each_by_its_own_content(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}").write_bytes(b"x" * number)
    items = storage_of(str(tmp_path)).children(str(tmp_path))
    hashes = FileHashes(tmp_path / "cache.json")
    assert hashes.contents(items) == [sha256(b"x" * number) for number in range(50)]
    (tmp_path / "07").write_bytes(b"changed")
    items = storage_of(str(tmp_path)).children(str(tmp_path))
    assert hashes.contents(items)[6:9] == [sha256(b"x" * 6), sha256(b"changed"), sha256(b"x" * 8)]


def test_a_tag_is_taken_as_it_is(tmp_path):
    hashes = FileHashes(tmp_path / "cache.json")
    assert hashes.contents([Item("a", "s3://nowhere/a", False, 3, tag="etag")]) == ["etag"]


def test_a_file_that_nothing_tells_changes_of_is_hashed_every_time(tmp_path):
    (tmp_path / "file").write_bytes(b"one")
    item, hashes = Item("", str(tmp_path / "file"), False, 3), FileHashes(tmp_path / "cache.json")
    assert hashes.contents([item]) == [sha256(b"one")]
    (tmp_path / "file").write_bytes(b"two")
    assert hashes.contents([item]) == [sha256(b"two")]


def test_what_is_known_of_a_name_that_is_not_utf8_is_kept(tmp_path):
    path = tmp_path / "a\udcff"
    path.write_bytes(b"content")
    hashes = FileHashes(tmp_path / "cache.json")
    assert hashes.hash(path) == sha256(b"content")
    hashes.save()
    stat = path.stat()
    path.write_bytes(b"another")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileHashes(tmp_path / "cache.json").hash(path) == sha256(b"content")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="missing does not exist"):
        FileHashes(tmp_path / "cache.json").hash(tmp_path / "missing")
