import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Data, Source
from pipelines.corpus import Document, Dropped, list_units
from pipelines.errors import UserError
from pipelines.hashing import FileHashes


def line(text="some text", **fields):
    return json.dumps({"text": text, **fields}, ensure_ascii=False)


def ids(items):
    return [item.id for item in items if isinstance(item, Document)]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Dropped)]


# Kinds of sources


def test_a_text_file_is_one_document(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt": "first\n\nsecond é\n"})
    (document,) = read(tmp_path / "a.txt")
    assert (document.id, document.source, document.text) == ("s/a.txt", "s", "first\n\nsecond é\n")
    assert (document.file, document.start, document.end) == ("a.txt", 0, len("first\n\nsecond é\n".encode()))


def test_a_compressed_text_file_is_one_document(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt.gz": gzip.compress(b"hello")})
    assert texts(read(tmp_path / "a.txt.gz")) == ["hello"]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt": b"\xef\xbb\xbfhello"})
    assert texts(read(tmp_path / "a.txt")) == ["hello"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_jsonl_file_holds_a_document_a_line(tmp_path, write_tree, read, suffix):
    content = f"{line('one', id='x')}\n{line('two', id=7)}\n".encode()
    write_tree(tmp_path, {"a" + suffix: gzip.compress(content) if suffix.endswith("gz") else content})
    documents = read(tmp_path / f"a{suffix}", task_bytes=10)
    assert [(document.id, document.text) for document in documents] == [("s/x", "one"), ("s/7", "two")]
    assert [json.loads(content[d.start : d.end])["text"] for d in documents] == ["one", "two"]


def test_the_fields_of_text_and_id_can_be_named(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"body": "hello", "key": "k", "text": "no", "id": "no"}'})
    (document,) = read(tmp_path / "a.jsonl", text_field="body", id_field="key")
    assert (document.id, document.text) == ("s/k", "hello")


def test_a_document_without_id_is_named_by_its_content(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": "\n".join([line("one"), line("two"), line("one", id=None), line("one", more=1)])})
    first, second, third, fourth = ids(read(tmp_path / "a.jsonl"))
    assert first == third == fourth != second


def test_a_glob_takes_the_files_it_matches_in_order(tmp_path, write_tree, read):
    write_tree(tmp_path, {"b.txt": "b", "a.txt": "a", "c.md": "c", "deep/er/d.txt": "d"})
    assert texts(read(tmp_path / "*.txt")) == ["a", "b"]
    assert sorted(texts(read(tmp_path / "**/*.txt"))) == ["a", "b", "d"]


def test_files_of_one_name_in_different_directories_are_different_documents(tmp_path, write_tree, read):
    write_tree(tmp_path, {"book-1/text.txt": "one", "book-2/text.txt": "two"})
    assert len(set(ids(read(tmp_path / "*/text.txt")))) == 2


def test_a_path_that_exists_is_not_taken_for_a_glob(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a[1].txt": "brackets", "a1.txt": "no"})
    assert texts(read(tmp_path / "a[1].txt")) == ["brackets"]


def test_the_home_directory_is_understood(tmp_path, write_tree, read, monkeypatch):
    monkeypatch.setenv("HOME", str(write_tree(tmp_path, {"a.txt": "at home"})))
    assert texts(read("~/a.txt")) == ["at home"]


# Directories


def test_each_entry_of_a_directory_is_a_document(tmp_path, write_tree, read):
    write_tree(tmp_path, {"b.txt": "b", "a/1.txt": "one", "a/deep/2.txt": "two", "c.jsonl": line("c", id="c")})
    documents = {document.id: sorted(document.text.split("\n")) for document in read(tmp_path)}
    assert documents == {"s/a": ["one", "two"], "s/b.txt": ["b"], "s/c": ["c"]}


def test_one_document_takes_the_whole_directory(tmp_path, write_tree, read):
    root = write_tree(tmp_path / "repository", {"b.txt": "b", "a/1.txt": "one", "a/deep/2.txt": "two"})
    (document,) = read(root, directory="one_document")
    assert document.id == "s/repository"
    assert sorted(document.text.split("\n")) == ["b", "one", "two"]


def test_a_tree_is_read_directory_by_directory_in_seeded_order(tmp_path, write_tree, read):
    names = [f"{directory}/{number}" for directory in "abcd" for number in range(5)]
    write_tree(tmp_path, {f"tree/{name}.txt": name for name in names})
    orders = []
    for seed in (0, 0, 1, 2):
        (text,) = texts(read(tmp_path, seed=seed))
        order = text.split("\n")
        assert sorted(order) == sorted(names)
        directories = [name[0] for name in order]
        assert directories == [first for first in directories[::5] for _ in range(5)]
        orders.append(order)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert any(order[::5] != sorted(order[::5]) for order in orders)  # directories
    assert any(order[:5] != sorted(order[:5]) for order in orders)  # files of a directory


def test_suffixes_choose_files_in_directories(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.py": "a", "b.md": "b", "c/d.py": "d", "c/e.md": "e", "f/g.md": "g"})
    assert ids(read(tmp_path, suffixes=(".py",))) == ["s/a.py", "s/c"]
    assert texts(read(tmp_path, suffixes=(".py",))) == ["a", "d"]
    assert len(read(tmp_path, suffixes=(".py", ".md"))) == 4


def test_exclude_leaves_out_names_at_every_depth(tmp_path, write_tree, read):
    write_tree(tmp_path, {"tests/a.txt": "1", "b/tests/c.txt": "2", "b/draft-1.txt": "3", "b/d.txt": "4", "e.txt": "5"})
    assert texts(read(tmp_path, exclude=("tests", "draft-?.*"))) == ["4", "5"]


def test_hidden_files_caches_and_packages_are_never_read(tmp_path, write_tree, read):
    inside = {".git/config": "no", "__pycache__/x.txt": "no", "site-packages/y.txt": "no", ".hidden": "no", "z": "yes"}
    write_tree(tmp_path, inside | {f"deep/{name}": content for name, content in inside.items()})
    assert ids(read(tmp_path)) == ["s/deep", "s/z"]
    assert texts(read(tmp_path)) == ["yes", "yes"]


def test_all_jsonl_files_of_a_subdirectory_hold_a_document_a_line(tmp_path, write_tree, read):
    write_tree(tmp_path, {"train/1.jsonl": line("one", id=1) + "\n" + line("two", id=2)})
    assert texts(read(tmp_path)) == ["one", "two"]
    write_tree(tmp_path, {"train/2.jsonl": line("three", id=3)})
    assert sorted(texts(read(tmp_path))) == ["one", "three", "two"]


def test_the_standard_library_is_a_corpus(read):
    documents = read("python:stdlib", suffixes=(".py",), exclude=("test", "tests", "idlelib", "lib2to3"))
    by_id = {document.id: document for document in documents}
    assert {"s/json", "s/email", "s/argparse.py", "s/dataclasses.py"} <= by_id.keys()
    assert "class JSONDecoder" in by_id["s/json"].text
    assert not any("site-packages" in name or "__pycache__" in name for name in by_id)
    assert sum(len(document.text) for document in documents) > 3_000_000


# Units of work


junk = st.sampled_from([b"{", b"\xff\xfe", b"[]", b'{"text": 3}', b"\xe2\x80\xa8", b"not json \r at all"])
blank = st.sampled_from([b"", b"  ", b"\t"])
good = st.builds(lambda text: line(f"x{text}").encode(), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))


@given(
    lines=st.lists(st.tuples(st.one_of(good, good, junk, blank), st.sampled_from([b"\n", b"\r\n"])), max_size=30),
    last=st.one_of(good, st.just(b"")),
    task_bytes=st.integers(1, 200),
)
def test_every_line_is_read_once_whatever_the_byte_ranges(fresh, write_tree, read, lines, last, task_bytes):
    content = b"".join(piece for pair in lines for piece in pair) + last
    if not content:
        return
    root = write_tree(fresh(), {"a.jsonl": content})
    items = read(root / "a.jsonl", task_bytes=task_bytes)
    documents = [item for item in items if isinstance(item, Document)]
    written = [text for text, _ in [*lines, (last, b"")] if text.startswith(b'{"text": "x')]
    assert [content[document.start : document.end] for document in documents] == written
    assert [document.text for document in documents] == [json.loads(text)["text"] for text in written]
    assert reasons(items) == reasons(read(root / "a.jsonl", task_bytes=10**9))
    assert len(reasons(items)) == len([text for text, _ in lines if text.strip() and text not in written])


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), task_bytes=st.integers(1, 200))
def test_every_whole_file_is_in_one_unit_of_about_task_bytes(fresh, write_tree, data_of, units_of, sizes, task_bytes):
    names = [f"{number:02d}.txt" for number in range(len(sizes))]
    root = write_tree(fresh(), dict(zip(names, map("x".__mul__, sizes), strict=True)))
    units = units_of(data_of(root, task_bytes=task_bytes))
    assert [name for unit in units for name, _ in unit.documents] == names
    assert all(task_bytes <= unit.bytes < task_bytes + 50 for unit in units[:-1])


def test_units_depend_on_names_and_contents_alone(fresh, write_tree, data_of, units_of):
    files = {"a.txt": "a", "b/c.txt": "c", "b/d.txt": "d", "e.jsonl": line()}
    first = write_tree(fresh(), files)
    second = write_tree(fresh() / "elsewhere", dict(reversed(files.items())))
    one, other = ([unit.identity() for unit in units_of(data_of(root, task_bytes=4))] for root in (first, second))
    assert one == other
    write_tree(second, {"b/d.txt": "D"})
    assert [unit.identity() for unit in units_of(data_of(second, task_bytes=4))] != one


# What is no document


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"other": "x"}', "no text in field 'text'"),
        (b'{"text": 3}', "no text in field 'text'"),
        (b'{"text": null}', "no text in field 'text'"),
        (b'["text"]', "no text in field 'text'"),
        (b'{"text": "\\ud800"}', "lone surrogates"),
        (b'{"text": "x", "id": "\\udfff"}', "surrogates"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_the_rest_is_read(tmp_path, write_tree, read, bad, reason):
    write_tree(tmp_path, {"a.jsonl": b"\n".join([line("before").encode(), b"", bad, line("after").encode()])})
    items = read(tmp_path / "a.jsonl")
    assert texts(items) == ["before", "after"]
    (dropped,) = [item for item in items if isinstance(item, Dropped)]
    assert reason in dropped.reason
    assert dropped.bad_line
    assert dropped.where == f"{tmp_path / 'a.jsonl'}, line 3"


def test_a_paired_surrogate_is_a_character(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"text": "\\ud83d\\ude00"}'})
    assert texts(read(tmp_path / "a.jsonl")) == ["😀"]


def test_a_line_without_text_is_dropped_but_not_bad(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.jsonl": '{"text": " \\n"}'})
    (dropped,) = read(tmp_path / "a.jsonl")
    assert (dropped.reason, dropped.bad_line) == ("empty", False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"caf\xe9", "not UTF-8"), (b"a\0b", "binary (NUL bytes)"), (b"", "empty"), (b" \n", "empty")],
)
def test_a_file_that_is_no_text_is_dropped(tmp_path, write_tree, read, content, reason):
    write_tree(tmp_path, {"bad.txt": content, "good.txt": "good"})
    items = read(tmp_path)
    assert (texts(items), reasons(items)) == (["good"], [reason])
    assert "bad.txt" in next(item.where for item in items if isinstance(item, Dropped))


def test_a_file_that_is_no_text_leaves_the_rest_of_its_tree(tmp_path, write_tree, read):
    write_tree(tmp_path, {"tree/a.txt": "a", "tree/b.bin": b"\xff\0", "tree/c.bin": b"\0"})
    items = read(tmp_path)
    assert texts(items) == ["a"]
    assert sorted(reasons(items)) == ["binary (NUL bytes)", "not UTF-8"]


# The user's mistakes


def cut(compressed):
    return compressed[: len(compressed) // 2]


def flip(compressed):
    return compressed[:40] + bytes(255 - byte for byte in compressed[40:80]) + compressed[80:]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", [cut, flip, lambda compressed: b"no gzip at all"], ids=["cut", "flipped", "no gzip"])
def test_a_damaged_gz_is_named(tmp_path, write_tree, read, name, damage):
    compressed = gzip.compress("\n".join(line(f"text {n} {n**9}", id=n) for n in range(200)).encode())
    write_tree(tmp_path, {name: damage(compressed)})
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["missing.txt", "missing/*.txt", "missing"])
def test_a_path_that_is_not_there_is_named(tmp_path, read, path):
    with pytest.raises(UserError, match=r"source 's': .*missing.* does not exist"):
        read(tmp_path / path)


def test_a_dangling_link_is_named(tmp_path, read):
    os.symlink(tmp_path / "missing", tmp_path / "link.txt")
    with pytest.raises(UserError, match=r"link\.txt cannot be read"):
        read(tmp_path / "link.txt")


@pytest.mark.parametrize("directory", ["document_per_entry", "one_document"])
def test_a_directory_without_a_file_is_a_mistake(tmp_path, write_tree, read, directory):
    with pytest.raises(UserError, match="holds no files"):
        read(tmp_path, directory=directory)
    write_tree(tmp_path, {"a.md": "x", ".hidden": "x", "deep/b.md": "x"})
    with pytest.raises(UserError, match=r"holds no files with suffixes \.py, \.txt"):
        read(tmp_path, directory=directory, suffixes=(".py", ".txt"))


def test_two_sources_need_two_names(tmp_path, write_tree):
    source = Source(name="s", path=str(write_tree(tmp_path, {"a.txt": "x"})))
    with pytest.raises(UserError, match="'s' is used twice"):
        list_units(Data(sources=(source, source)), 0, FileHashes(tmp_path / "hashes.json"))
