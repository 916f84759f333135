import gzip
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.workflow.errors import UserError


def line(text="some text", **fields):
    return json.dumps({"text": text, **fields})


def ids(items):
    return [item.id for item in items if isinstance(item, Document)]


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def write_stream(path, values, rows=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": values})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


# Paths and globs


def test_entries_are_listed_by_source_then_by_name(tmp_path, write_tree, list_of):
    write_tree(tmp_path, {"2/b.txt": "b", "2/a/x": "x", "2/a.jsonl": line(), "1/c.txt": "c"})
    entries = list_of({"second": tmp_path / "2", "first": tmp_path / "1"})
    assert [(entry.source, entry.name, entry.records) for entry in entries] == [
        ("second", "a", False),
        ("second", "a.jsonl", True),
        ("second", "b.txt", False),
        ("first", "c.txt", False),
    ]
    assert [file.name for entry in entries for file in entry.files] == ["a/x", "a.jsonl", "b.txt", "c.txt"]


def test_a_glob_takes_what_it_matches_in_order(tmp_path, write_tree, read):
    write_tree(tmp_path, {"b.txt": "b", "a.txt": "a", "c.md": "c", "deep/er/d.txt": "d", ".hidden.txt": "h"})
    assert texts(read(tmp_path / "*.txt")) == ["a", "b"]
    assert texts(read(tmp_path / "**/*.txt")) == ["a", "b", "d"]
    assert texts(read(tmp_path / "**")) == ["a", "b", "c", "d"]
    assert texts(read(tmp_path / "**/er/*")) == ["d"]
    assert texts(read(tmp_path / "[ac].*")) == ["a", "c"]
    assert ids(read(tmp_path / "*/er/?.txt")) == ["s/deep/er/d.txt"]
    assert texts(read(tmp_path / ".h*")) == ["h"]


def test_a_glob_takes_directories_too(tmp_path, write_tree, read):
    write_tree(tmp_path, {"v1/a.txt": "1", "v1/b/c.txt": "2", "v2/a.txt": "3", "w/a.txt": "4"})
    assert ids(read(tmp_path / "v*")) == ["s/v1/a.txt", "s/v1/b", "s/v2/a.txt"]
    assert ids(read(tmp_path / "v*", directory="one_document")) == ["s/v1", "s/v2"]


def test_a_glob_leaves_out_what_is_excluded(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a/x.txt": "1", "tests/x.txt": "2", "a/tests/x.txt": "3"})
    assert texts(read(tmp_path / "*/x.txt", exclude=("tests",))) == ["1"]
    assert texts(read(tmp_path / "**/x.txt", exclude=("tests",))) == ["1"]


def test_a_relative_path_or_glob_begins_at_the_working_directory(tmp_path, write_tree, read, monkeypatch):
    monkeypatch.chdir(write_tree(tmp_path, {"a.txt": "a", "b/c.txt": "c"}))
    assert (ids(read("*.txt")), ids(read("b/*")), ids(read("b"))) == (["s/a.txt"], ["s/c.txt"], ["s/c.txt"])
    assert ids(read(".", directory="one_document")) == [f"s/{tmp_path.name}"]


def test_files_of_one_name_in_different_directories_are_different_documents(tmp_path, write_tree, read):
    write_tree(tmp_path, {"book-1/text.txt": "one", "book-2/text.txt": "two"})
    assert ids(read(tmp_path / "*/text.txt")) == ["s/book-1/text.txt", "s/book-2/text.txt"]


def test_a_path_that_exists_is_not_taken_for_a_glob(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a[1].txt": "brackets", "a1.txt": "no"})
    assert texts(read(tmp_path / "a[1].txt")) == ["brackets"]


def test_the_home_directory_is_understood(tmp_path, write_tree, read, monkeypatch):
    monkeypatch.setenv("HOME", str(write_tree(tmp_path, {"a.txt": "at home"})))
    assert texts(read("~/a.txt")) == ["at home"]


def test_a_file_url_is_a_path(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt": "here"})
    assert ids(read(f"file://{tmp_path}/a.txt")) == ["s/a.txt"]


def test_names_that_are_not_utf8_are_read_and_escaped(tmp_path, write_tree, read, monkeypatch):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    for name, content in {
        "a\udcff.txt": "a",
        "\udcfe/b.txt": "b",
        "\udcfe/c\udcfd.txt": "c",
        "d\udcff.jsonl.gz": None,
    }.items():
        os.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
        with open(f"{root}/{name}", "wb") as file:
            file.write(gzip.compress(line("d", id=1).encode()) if content is None else content.encode())
    write_stream(tmp_path / "e.arrow", ["e"])
    os.rename(tmp_path / "e.arrow", f"{root}/e\udcff.arrow")
    documents = read(root)
    assert [(item.id, sorted(item.text.split())) for item in documents[:3]] == [
        ("s/a\\xff.txt", ["a"]),
        ("s/1", ["d"]),
        (documents[2].id, ["e"]),
    ]
    assert (documents[3].id, sorted(documents[3].text.split())) == ("s/\\xfe", ["b", "c"])
    assert [item.file for item in documents] == ["a\\xff.txt", "d\\xff.jsonl.gz", "e\\xff.arrow", "\\xfe"]
    assert len(ids(read(f"{root}/*\udcff*"))) == 3
    assert ids(read(root, directory="one_document")) == ["s/\\xff"]
    with pytest.raises(UserError, match=r"\\xff/missing does not exist"):
        read(f"{root}/missing")


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


def test_theories_are_read_after_what_they_import(tmp_path, write_tree, read):
    theories = {"B.thy": "theory B imports sub/C begin B", "A.thy": "theory A imports B begin A", "ROOT": "R"}
    write_tree(tmp_path / "entry", {**theories, "sub/C.thy": f"(* {'long ' * 9999} *) theory C imports Main begin C"})
    (text,) = texts(read(tmp_path, order="imports"))
    assert [part[-1] for part in text.split("\n")] == ["C", "B", "A", "R"]


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


def test_a_subdirectory_of_records_alone_holds_records(tmp_path, write_tree, read):
    write_tree(tmp_path, {"d/1.jsonl": line("one") + "\n" + line("two"), "d/deep/2.jsonl.gz": gzip.compress(b"")})
    write_tree(tmp_path, {"top.json": line("three")})
    write_stream(tmp_path / "d/deep/3.arrow", ["four"])
    pq.write_table(pa.table({"text": ["five"]}), tmp_path / "d/4.parquet")
    assert texts(read(tmp_path)) == ["one", "two", "five", "four", "three"]
    assert texts(read(tmp_path / "*.json")) == texts(read(tmp_path / "top.json")) == ["three"]


def test_a_repository_with_tables_in_it_is_one_document(tmp_path, write_tree, read):
    write_tree(tmp_path, {"d/fixture.jsonl": '{"a": 1}', "d/package.json": '{"name": "text"}', "d/code.py": "pass"})
    pq.write_table(pa.table({"no text": ["five"]}), tmp_path / "d/table.parquet")
    items = read(tmp_path)
    (text,) = texts(items)
    assert sorted(text.split("\n")) == ["pass", '{"a": 1}', '{"name": "text"}']
    (table,) = [item for item in items if isinstance(item, Dropped)]
    assert table.path.endswith("table.parquet")
    assert not table.bad


def test_the_standard_library_is_a_corpus(read):
    documents = read("python:stdlib", suffixes=(".py",), exclude=("test", "tests", "idlelib", "lib2to3"))
    by_id = {document.id: document for document in documents}
    assert {"s/json", "s/email", "s/argparse.py", "s/dataclasses.py"} <= by_id.keys()
    assert "class JSONDecoder" in by_id["s/json"].text
    assert not any("site-packages" in name or "__pycache__" in name for name in by_id)
    assert sum(len(document.text) for document in documents) > 3_000_000


# Symbolic links


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("directory", ["document_per_entry", "one_document"])
@pytest.mark.parametrize("name", ["link", "deep/link"])
@pytest.mark.parametrize("target", ["secret.txt", "secrets"])
def test_a_link_that_leads_out_is_read_only_if_asked_for(tmp_path, write_tree, read, directory, name, target):
    write_tree(tmp_path, {"secret.txt": "secret", "secrets/x.txt": "secret", "A/deep/a.txt": "open"})
    link(tmp_path / "A" / name, tmp_path / target)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "A", directory=directory)
    assert str(caught.value) == (
        f"source 's': {tmp_path}/A/{name} leads to {tmp_path}/{target}, outside {tmp_path}/A: copy it in, or set "
        f"data.sources.0.follow_links to true"
    )
    read_texts = " ".join(texts(read(tmp_path / "A", directory=directory, follow_links=True)))
    assert sorted(read_texts.split()) == ["open", "secret"]


def test_a_link_beside_a_directory_of_a_like_name_leads_out(tmp_path, write_tree, read):
    write_tree(tmp_path, {"AA/secret.txt": "secret", "A/a.txt": "open"})
    link(tmp_path / "A/link.txt", "../AA/secret.txt")
    with pytest.raises(UserError, match=r"A/link\.txt leads to .*AA/secret\.txt, outside"):
        read(tmp_path / "A")


@pytest.mark.parametrize("pattern", ["*.txt", "*", "**/*.txt", "**", "*/x.txt", "l*/*"])
def test_a_link_that_a_glob_meets_may_not_lead_out(tmp_path, write_tree, read, pattern):
    write_tree(tmp_path, {"secrets/x.txt": "secret", "A/a.txt": "open"})
    link(tmp_path / "A/link", "../secrets")
    link(tmp_path / "A/link.txt", "../secrets/x.txt")
    with pytest.raises(UserError, match=r"link\S* leads to .*secrets\S*, outside .*/A"):
        read(tmp_path / "A" / pattern)


def test_links_within_the_root_are_read(tmp_path, write_tree, read):
    write_tree(tmp_path, {"A/a.txt": "a", "A/b/c.txt": "c"})
    link(tmp_path / "A/b/a.txt", "../a.txt")
    link(tmp_path / "A/d", "b")
    assert sorted(" ".join(texts(read(tmp_path / "A"))).split()) == ["a", "a", "a", "c", "c"]
    assert ids(read(tmp_path / "A")) == ["s/a.txt", "s/b", "s/d"]


def test_a_link_inside_a_tree_to_a_directory_that_is_read_anyway_is_passed_over(tmp_path, write_tree, read):
    write_tree(tmp_path, {"A/b/c.txt": "c", "A/e/f.txt": "f"})
    link(tmp_path / "A/b/again", "../e")
    assert texts(read(tmp_path / "A")) == ["c", "f"]


def test_the_path_of_a_source_may_be_a_link(tmp_path, write_tree, read):
    write_tree(tmp_path, {"A/a.txt": "a", "A/b/c.txt": "c"})
    link(tmp_path / "to/A", "../A")
    link(tmp_path / "to/a.txt", "../A/a.txt")
    assert ids(read(tmp_path / "to/A")) == ["s/a.txt", "s/b"]
    assert ids(read(tmp_path / "to/A/*")) == ["s/a.txt", "s/b/c.txt"]
    assert ids(read(tmp_path / "to/a.txt")) == ["s/a.txt"]
    assert ids(read(tmp_path / "to/A", directory="one_document")) == ["s/A"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
@pytest.mark.parametrize("follow_links", [False, True])
def test_loops_of_links_end(tmp_path, write_tree, read, pattern, follow_links):
    write_tree(tmp_path, {"A/b/c.txt": "c", "A/d/e.txt": "e"})
    for name in ("A/b/one", "A/b/two", "A/d/three", "A/d/four"):
        link(tmp_path / name, "..")
    link(tmp_path / "A/self.txt", "self.txt")
    assert sorted(texts(read(tmp_path / "A" / pattern, follow_links=follow_links))) == ["c", "e"]


def test_loops_of_links_outside_end(tmp_path, write_tree, read):
    write_tree(tmp_path, {"A/b/c.txt": "c", "out/d.txt": "d", "out/in/e.txt": "e"})
    link(tmp_path / "A/b/link", "../../out")
    link(tmp_path / "out/in/back", "../../A")
    link(tmp_path / "out/in/loop", "..")
    (text,) = texts(read(tmp_path / "A", follow_links=True))
    assert sorted(text.split()) == ["c", "d", "e"]


def test_what_is_left_out_may_lead_anywhere(tmp_path, write_tree, read):
    write_tree(tmp_path, {"secrets/x": "secret", "A/a.txt": "open"})
    for name in ("link", "x.py", ".hidden"):
        link(tmp_path / "A" / name, "../secrets" if name == "link" else "../secrets/x")
    assert texts(read(tmp_path / "A", exclude=("link",), suffixes=(".txt",))) == ["open"]


# Data sets that save_to_disk wrote


def save(root, files, state=None):
    for name, values in files.items():
        write_stream(root / name, values)
    listed = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "f", "_split": "train"}
    (root / "state.json").write_text(json.dumps(listed if state is None else state))
    (root / "dataset_info.json").write_text('{"features": {}}')


def test_a_saved_data_set_is_its_listed_files_in_order(tmp_path, read):
    save(tmp_path, {"data-00001.arrow": ["c"], "data-00000.arrow": ["a", "b"]})
    write_stream(tmp_path / "cache-1234.arrow", ["no"])
    assert texts(read(tmp_path)) == ["c", "a", "b"]


@pytest.mark.parametrize("within", ["", "sets"])
def test_a_saved_data_set_of_splits_is_all_of_them(tmp_path, read, within):
    root = tmp_path / within
    save(root / "train", {"data-00000.arrow": ["a", "b", "c"]})
    save(root / "test", {"data-00000.arrow": ["d"]})
    save(root / "old", {"data-00000.arrow": ["no"]})
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    items = read(tmp_path)
    assert texts(items) == ["a", "b", "c", "d"]
    assert [item.file for item in items][2:] == [
        f"{within}/{split}/data-00000.arrow".lstrip("/") for split in ("train", "test")
    ]


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/x.arrow", "a/../../x.arrow"])
def test_a_saved_data_set_cannot_list_a_file_outside(tmp_path, read, name):
    write_stream(tmp_path / "x.arrow", ["secret"])
    save(tmp_path / "A", {"data.arrow": ["a"]}, {"_data_files": [{"filename": name}]})
    with pytest.raises(UserError, match=r"state\.json lists .*x\.arrow, which lies outside"):
        read(tmp_path / "A")


def test_a_saved_data_set_cannot_reach_outside_through_a_link(tmp_path, read):
    write_stream(tmp_path / "x.arrow", ["secret"])
    save(tmp_path / "A", {"data.arrow": ["a"]}, {"_data_files": [{"filename": "link.arrow"}]})
    link(tmp_path / "A/link.arrow", "../x.arrow")
    with pytest.raises(UserError, match=r"link\.arrow leads to .*x\.arrow, outside"):
        read(tmp_path / "A")


def test_a_saved_data_set_that_lacks_a_file_is_a_mistake(tmp_path, read):
    save(tmp_path, {"data.arrow": ["a"]}, {"_data_files": [{"filename": "other.arrow"}]})
    with pytest.raises(UserError, match=r"lists other\.arrow, which is missing"):
        read(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"split 'train' of the saved data set is missing"):
        read(tmp_path)


@pytest.mark.parametrize("content", ['{"mode": "on"}', "[]", "nothing"])
def test_another_state_json_makes_no_data_set(tmp_path, write_tree, read, content):
    write_tree(tmp_path, {"app/state.json": content, "app/dataset_dict.json": content, "app/a.txt": "a"})
    (text,) = texts(read(tmp_path))
    assert sorted(text.split("\n")) == sorted([content, content, "a"])


def test_the_content_of_a_file_that_was_not_decompressed_once_has_another_name(tmp_path, write_tree, list_of):
    files = {"a.txt": "a", "b.txt.gz": "b", "c.txt.bz2": "c", "D.TXT.GZ": "d", "tree/e.txt.xz": "e"}
    write_tree(tmp_path, files)
    found = {each.name: each.files[0].content for each in list_of({"s": tmp_path})}
    named = {name: content.rpartition("/")[0] for name, content in found.items()}
    assert named == {"a.txt": "", "b.txt.gz": "", "c.txt.bz2": "bzip2", "D.TXT.GZ": "gzip", "tree": ""}


# The user's mistakes


@pytest.mark.parametrize(
    "path", ["missing.txt", "missing/*.txt", "missing", "there.txt/*", "*.md", "**/*.md", "there.txt/x"]
)
def test_a_path_that_is_not_there_is_named(tmp_path, write_tree, read, path):
    write_tree(tmp_path, {"there.txt": "x"})
    with pytest.raises(UserError) as caught:
        read(tmp_path / path)
    assert str(caught.value) == f"source 's': {tmp_path / path} does not exist: check data.sources"


def test_a_dangling_link_is_named(tmp_path, read):
    os.symlink(tmp_path / "missing", tmp_path / "link.txt")
    with pytest.raises(UserError, match=r"link\.txt cannot be read \(the link leads to nothing\)"):
        read(tmp_path / "link.txt")


@pytest.mark.parametrize("directory", ["document_per_entry", "one_document"])
def test_a_directory_without_a_file_is_a_mistake(tmp_path, write_tree, read, directory):
    with pytest.raises(UserError, match="holds no files"):
        read(tmp_path, directory=directory)
    write_tree(tmp_path, {"a.md": "x", ".hidden": "x", "deep/b.md": "x"})
    with pytest.raises(UserError, match=r"holds no files with suffixes \.py, \.txt"):
        read(tmp_path, directory=directory, suffixes=(".py", ".txt"))


def test_a_source_without_files_beside_one_with_files_is_a_mistake(tmp_path, write_tree, list_of):
    write_tree(tmp_path, {"a/a.txt": "x", "b/.hidden": "x"})
    with pytest.raises(UserError, match=r"source 'b': .* holds no files"):
        list_of({"a": tmp_path / "a", "b": tmp_path / "b"})


@pytest.fixture
def nobody():
    """A directory of its own for someone without privileges, whom nothing lets read what is closed."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory), lambda: os.seteuid(65534) if os.geteuid() == 0 else None
        os.seteuid(os.getuid())


@pytest.mark.parametrize(
    ("name", "closed"), [("a.txt", "a.txt"), (".", "a.txt"), (".", "deep"), (".", "."), ("**", "deep")]
)
def test_what_may_not_be_read_is_named(nobody, write_tree, data_of, tmp_path, name, closed):
    directory, become_nobody = nobody
    root = write_tree(directory / "A", {"a.txt": "x", "deep/b.txt": "x"})
    hashes = FileHashes(tmp_path / "hashes.json")
    (root / closed).chmod(0)
    become_nobody()
    with pytest.raises(UserError) as caught:
        list_entries(data_of(root / name), 0, hashes)
    assert str(caught.value) == f"{root / closed} cannot be read: check its permissions"


def test_a_password_in_a_path_is_refused_and_not_shown(read):
    with pytest.raises(UserError, match="source 's': its path holds a password") as caught:
        read("s3://key:hidden@bucket/a.txt")
    assert "hidden" not in str(caught.value)


def test_dropped_files_do_not_disturb_the_order(tmp_path, write_tree, read):
    write_tree(tmp_path, {"a.txt": "a", "b.bin": b"\xff", "c.txt": "c"})
    assert [type(item) for item in read(tmp_path)] == [Document, Dropped, Document]


def test_files_are_found_again_from_any_directory(tmp_path, write_tree, data_of, units_of, monkeypatch):
    write_tree(tmp_path, {"corpus/a.txt": "a", "corpus/b.jsonl": "{}"})
    monkeypatch.chdir(tmp_path)
    for path in ("corpus", "corpus/*", "./corpus/../corpus"):
        files = [file for unit in units_of(data_of(path)) for entry in unit.entries for file in entry.files]
        assert {file.path for file in files} == {f"{tmp_path}/corpus/a.txt", f"{tmp_path}/corpus/b.jsonl"}
        assert {file.name for file in files} == {"a.txt", "b.jsonl"}


def test_a_query_in_a_url_is_refused_and_not_repeated(data_of, units_of):
    with pytest.raises(UserError, match="its URL holds a query") as error:
        units_of(data_of("https://127.0.0.1:1/a.jsonl?signature=verysecret"))
    assert "verysecret" not in str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        "https://hidden@127.0.0.1:1/a.jsonl",
        "https://127.0.0.1:1/a.jsonl#sig=hidden",
        "sftp://me:hid/den@127.0.0.1/a.jsonl",
        "simplecache::s3://key:hidden@bucket/a.txt",
        "filecache::https://hidden@127.0.0.1:1/a.jsonl",
    ],
)
def test_a_secret_in_a_url_reaches_no_document_id_and_no_message(data_of, units_of, path):
    with pytest.raises(UserError, match="source 's': ") as error:
        units_of(data_of(path))
    assert "hid" not in str(error.value)
