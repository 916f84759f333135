import gzip
import http.server
import json
import logging
import re
import socket
import sys
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard
from moto.server import ThreadedMotoServer

from pipelines.config import Data, Source
from pipelines.sources.corpus import Document, Dropped
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.readers import describe, read_unit
from pipelines.sources.storage import Item, _Remote, open_binary, open_decompressed, printable, storage_of
from pipelines.workflow.errors import UserError

SECRET = "a-secret-that-nobody-may-see"


def texts(items):
    return [item.text for item in items if isinstance(item, Document)]


def lines(count):
    return "".join(json.dumps({"id": number, "text": f"text {number}"}) + "\n" for number in range(count)).encode()


def table_bytes(values, kind="parquet"):
    buffer, table = pa.BufferOutputStream(), pa.table({"id": range(len(values)), "text": values})
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=2)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return buffer.getvalue().to_pybytes()


# Names


def test_a_name_that_is_not_utf8_is_escaped():
    assert printable("é\udcff") == "é\\xff"


def test_a_local_directory_is_listed(tmp_path, write_tree):
    write_tree(tmp_path, {"b.txt": "bb", "a/c.txt": "c", "a/.x/d": "", ".x": ""})
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dangling").symlink_to("nothing")
    storage = storage_of(str(tmp_path))
    children = storage.children(str(tmp_path))
    assert [(item.name, item.directory, item.link) for item in children] == [
        (".x", False, None),
        ("a", True, None),
        ("b.txt", False, None),
        ("link", True, str(tmp_path / "a")),
    ]
    assert sorted(item.name for item in storage.files(str(tmp_path), lambda name: name == ".x")) == [
        "a/c.txt",
        "b.txt",
        "link",
    ]
    assert storage.info(str(tmp_path / "b.txt")).size == 2
    assert storage.info(str(tmp_path / "none")) is None


# S3, as moto serves it


@pytest.fixture
def credentials(monkeypatch):
    """An S3 environment: `credentials(endpoint)`. No retries, as what does not answer here never will."""

    def prepare(endpoint):
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": SECRET,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)

    return prepare


@pytest.fixture
def elsewhere(credentials, monkeypatch):
    """The same for another server than moto's: what s3fs keeps is forgotten before and after."""

    def prepare(endpoint):
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.3)
        credentials(endpoint)

    yield prepare
    s3fs.S3FileSystem.clear_instance_cache()


def client(endpoint):
    """Another program that uses the storage."""
    return s3fs.S3FileSystem(
        endpoint_url=endpoint, key="other", secret="other", skip_instance_cache=True, use_listings_cache=False
    )


@pytest.fixture(scope="session")
def other(s3_endpoint):
    return client(s3_endpoint)


@pytest.fixture
def bucket(s3_endpoint, other, credentials, tmp_path):
    """Put files into a bucket of the test's own: `bucket(files)` gives its URL."""
    credentials(s3_endpoint)
    name = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower())[-60:].strip("-")
    other.mkdir(name)

    def put(files):
        for key, content in files.items():
            other.pipe(f"{name}/{key}", content.encode() if isinstance(content, str) else content)
        return f"s3://{name}"

    return put


@pytest.fixture
def requests(caplog):
    """The requests that the server has seen: (method, path)."""
    caplog.set_level(logging.INFO, "werkzeug")

    def seen():
        found = [re.search(r'"(?:\x1b\[[\d;]*m)*([A-Z]+) (\S+) HTTP', record.getMessage()) for record in caplog.records]
        return [match.groups() for match in found if match]

    return seen


FILES = {
    "c/a.txt": "one",
    "c/b/1.md": "two",
    "c/b/deep/2.md": "three",
    "c/b/3.jsonl.gz": gzip.compress(lines(2)),
    "c/d.jsonl": lines(5),
    "c/e.parquet": table_bytes(["p", "q", "r"]),
    "c/f.arrow": table_bytes(["s", "t", "u"], "stream"),
    "c/g.arrow": table_bytes(["v", "w", "x"], "file"),
    "c/h.json.zst": zstandard.compress(lines(1)),
    "c/i.parquet.gz": gzip.compress(table_bytes(["y"])),
    "c/j é #1%20+.txt": "odd name",
    "c/.hidden/x.txt": "no",
    "c/b/__pycache__/x.txt": "no",
}


def test_a_bucket_is_read_as_the_same_files_here_are(tmp_path, write_tree, read, bucket):
    here, there = write_tree(tmp_path, FILES), bucket(FILES)
    paths = ("c", "c/a.txt", "c/*.txt", "c/**/*.md", "*/d.jsonl", "c/[e-g].*", "c/*", "**")
    for path, options in [
        *((path, {"task_bytes": 50}) for path in paths),
        ("c/*", {"directory": "one_document"}),
        ("c", {}),
    ]:
        local, remote = (read(f"{root}/{path}", **options) for root in (here, there))
        assert texts(local)
        assert texts(remote) == texts(local)
        assert [item for item in remote if isinstance(item, Document)] == [
            item for item in local if isinstance(item, Document)
        ]


def test_a_theory_tree_in_a_bucket_is_read_in_order_of_imports(bucket, read):
    root = bucket({"t/x/A.thy": "theory A imports B begin A", "t/x/B.thy": "theory B begin B"})
    assert texts(read(f"{root}/t", order="imports")) == ["theory B begin B\ntheory A imports B begin A"]


def test_a_whole_bucket_is_a_directory(bucket, read):
    root = bucket({"b.txt": "b", "a/c.txt": "c"})
    assert [document.id for document in read(root)] == ["s/a", "s/b.txt"]
    assert [document.id for document in read(f"{root}/", directory="one_document")] == [f"s/{root[5:]}"]


def test_an_object_that_stands_for_a_directory_is_none(bucket, read):
    root = bucket({"t/": "", "t/a/": "", "t/a/b.txt": "b", "t/c.txt": "c"})
    assert texts(read(f"{root}/t")) == texts(read(f"{root}/t/*")) == ["b", "c"]


def test_a_saved_data_set_in_a_bucket_is_read(bucket, read):
    state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
    files = {"d/dataset_dict.json": '{"splits": ["x"]}', "d/x/state.json": state, "d/x/cache.arrow": b"no"}
    assert texts(read(bucket({**files, "d/x/data-0.arrow": table_bytes(["a"], "stream")}) + "/d")) == ["a"]


def test_objects_are_named_by_their_etag_without_being_downloaded(bucket, other, tmp_path, requests):
    root = bucket(FILES)
    data = Data(sources=(Source(name="s", path=f"{root}/c"),))
    before = len(requests())
    entries = list_entries(data, 0, FileHashes(tmp_path / "hashes.json"))
    asked = requests()[before:]
    assert asked
    read = {path.partition("?")[0] for method, path in asked if method == "GET" and "list-type=2" not in path}
    assert read <= {f"{root[4:]}/c/b/3.jsonl.gz"}  # records beside texts: its beginning tells which they are
    assert len(asked) < 12
    for file in (file for entry in entries for file in entry.files):
        assert file.path.startswith(f"{root}/c/")
        assert file.content == other.info(file.path)["ETag"].strip('"')
        assert re.fullmatch("[0-9a-f]{32}", file.content)


@pytest.mark.parametrize(("letters", "count"), [(1_000_000, 10), (30_000_000, 1)])
def test_a_byte_range_is_downloaded_alone(bucket, data_of, units_of, requests, letters, count):
    root = bucket({"a.jsonl": (json.dumps({"text": "x" * letters}).encode() + b"\n") * count})
    data = data_of(f"{root}/a.jsonl", task_bytes=1_000_000)
    units = units_of(data)
    before = len(requests())
    assert len(list(read_unit(units[5], data.sources[0]))) == (1 if count > 1 else 0)
    assert len([path for method, path in requests()[before:] if method == "GET"]) <= 4  # a megabyte each


def test_little_more_is_downloaded_than_is_read(bucket):
    with open_binary(f"{bucket({'a.txt': b'x' * 20_000_000})}/a.txt") as stream:
        stream.seek(5_000_000)
        assert len(stream.read(1_000_000)) == 1_000_000
        assert stream.raw._file.cache.total_requested_bytes <= 4_000_000


def test_new_and_changed_objects_are_seen_by_the_next_listing(bucket, read):
    root = bucket({"a/1.txt": "one"})
    assert texts(read(f"{root}/a")) == ["one"]
    bucket({"a/2.txt": "two", "a/1.txt": "changed"})
    for path in ("a", "a/*", "**/*.txt"):
        assert texts(read(f"{root}/{path}")) == ["changed", "two"]


def test_a_bad_line_in_a_bucket_is_described(bucket, read):
    root = bucket({"a.jsonl": b'{"text": "x"}\n{\n'})
    (dropped,) = [item for item in read(f"{root}/a.jsonl") if isinstance(item, Dropped)]
    assert describe(dropped) == f"{root}/a.jsonl, line 2: line is not JSON"


@pytest.mark.parametrize(
    "path", ["s3://no-such-bucket", "s3://no-such-bucket/a.txt", "s3://no-such-bucket/*.txt", "s3://no-such-bucket/**"]
)
def test_a_bucket_that_is_not_there_is_named(s3_endpoint, credentials, read, path):
    credentials(s3_endpoint)
    with pytest.raises(UserError) as caught:
        read(path)
    assert re.fullmatch(r"(source 's': )?s3://no-such-bucket\S* does not exist: check data.sources", str(caught.value))


@pytest.mark.parametrize("path", ["missing.txt", "missing", "*.md", "a/**/*.md"])
def test_an_object_that_is_not_there_is_named(bucket, read, path):
    root = bucket({"a/x.txt": "x"})
    with pytest.raises(UserError, match=r"^source 's': s3://.*/.* does not exist: check data\.sources$"):
        read(f"{root}/{path}")


def test_a_damaged_object_is_named(bucket, read):
    root = bucket(
        {"a.jsonl.gz": gzip.compress(lines(999))[:-5], "b.parquet": b"PAR1", "c.arrow": table_bytes(["x"], "file")[:-5]}
    )
    for name in ("a.jsonl.gz", "b.parquet", "c.arrow"):
        with pytest.raises(UserError, match=rf"^{root}/{name} cannot be read \(.*\): mend or remove the file$"):
            read(f"{root}/{name}")


def failing(status, code):
    """A server that refuses everything as S3 does, quoting the credentials."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said = f"<Code>{code}</Code><Message>{code} {SECRET}</Message><AWSAccessKeyId>{SECRET}</AWSAccessKeyId>"
            body = f"<Error>{said}</Error>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body.encode())

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


DENIED, SILENT = "access is denied: check the credentials", r"the storage does not answer \(\w+\): check the address"


@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        ("s3://bucket/a.txt", 403, "AccessDenied", DENIED),
        ("s3://bucket/*.txt", 403, "InvalidAccessKeyId", DENIED),
        ("s3://bucket", 403, "SignatureDoesNotMatch", DENIED),
        ("s3://bucket/a.txt", 400, "Weird", SILENT),
    ],
)
def test_a_refusal_is_told_without_the_credentials(elsewhere, read, path, status, code, message):
    server = failing(status, code)
    elsewhere(f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(UserError, match=rf"^s3://bucket\S*: {message}") as caught:
        read(path)
    server.shutdown()
    assert SECRET not in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize("listening", [False, True])
def test_a_server_that_does_not_answer_is_told(elsewhere, read, listening):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        elsewhere(f"http://{SECRET}:{SECRET}@127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            UserError, match=r"^s3://bucket/a\.txt: the storage does not answer \(\w+\): check the "
        ) as caught:
            read("s3://bucket/a.txt")
    assert SECRET not in str(caught.value)


def test_a_server_that_stops_answering_is_told_while_reading(elsewhere, data_of, units_of):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    elsewhere(endpoint)
    fs = client(endpoint)
    fs.mkdir("stopping")
    for name, content in {
        "a.jsonl": lines(9),
        "a.jsonl.gz": gzip.compress(lines(9)),
        "a.txt": b"x",
        "a.arrow": table_bytes(["x"], "file"),
        "a.parquet": table_bytes(["x"]),
    }.items():
        fs.pipe(f"stopping/{name}", content)
    data = data_of("s3://stopping")
    units = units_of(data)
    streams = {name: open_binary(f"s3://stopping/{name}") for name in ("a.txt", "a.jsonl")}
    server.stop()
    for stream in streams.values():
        with pytest.raises(UserError, match=r"^s3://stopping/a\.\w+: the storage does not answer"):
            stream.read(1)
        with pytest.raises(UserError, match=r"^s3://stopping/a\.\w+: the storage does not answer"):
            stream.read()
    for unit in units:
        with pytest.raises(UserError, match=r"^s3://stopping/a\.\S+: the storage does not answer"):
            list(read_unit(unit, data.sources[0]))
    assert len(units) == 5


# Other storage


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield lambda files: [fs.pipe(f"/{name}", content) for name, content in files.items()]
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_any_storage_that_fsspec_opens_is_read(tmp_path, write_tree, read, memory):
    files = {name: content.encode() if isinstance(content, str) else content for name, content in FILES.items()}
    write_tree(tmp_path, files)
    memory(files)
    for path in ("c", "c/a.txt", "c/**/*.md", "c/e.parquet", "c/f.arrow", "c/g.arrow", "c/*.z*", "*/d.jsonl"):
        local, remote = read(f"{tmp_path}/{path}", task_bytes=50), read(f"memory://{path}", task_bytes=50)
        assert texts(local)
        assert [(item.id, item.text) for item in remote] == [(item.id, item.text) for item in local]


def test_content_without_a_tag_is_hashed_and_remembered(tmp_path, read, memory):
    memory({"d/a.txt": b"one", "d/b.txt": b"two"})
    data = Data(sources=(Source(name="s", path="memory://d"),))
    local = Data(sources=(Source(name="s", path=str(tmp_path / "d")),))
    (tmp_path / "d").mkdir()
    for name, content in {"a.txt": b"one", "b.txt": b"two"}.items():
        (tmp_path / "d" / name).write_bytes(content)
    hashes = FileHashes(tmp_path / "hashes.json")
    first = list_entries(data, 0, hashes)
    assert [entry.identity() for entry in first] == [entry.identity() for entry in list_entries(local, 0, hashes)]
    hashes.save()
    fsspec.filesystem("memory").store["/d/a.txt"].getbuffer()[:] = b"new"  # in secret: only a reader would notice
    assert list_entries(data, 0, FileHashes(tmp_path / "hashes.json")) == first
    memory({"d/a.txt": b"new"})
    assert list_entries(data, 0, FileHashes(tmp_path / "hashes.json")) != first


@pytest.mark.parametrize(
    ("info", "tag"),
    [
        ({"ETag": '"0a1b"', "LastModified": "x"}, "0a1b"),
        ({"md5Hash": "bWQ1", "crc32c": "Y3Jj", "etag": "CJ="}, "bWQ1"),
        ({"crc32c": "Y3Jj", "etag": "CJ="}, "Y3Jj"),
        ({"blob_id": "b10b", "lfs": {"sha256": "5ad5", "size": 3}}, "5ad5"),
        ({"blob_id": "b10b", "lfs": None}, "b10b"),
        ({"mtime": 3}, None),
    ],
)
def test_the_tag_is_what_the_storage_calls_the_content(info, tag):
    """As s3fs, gcsfs and huggingface_hub describe files; they are not all at hand here."""
    item = _Remote("memory://")._item("a", {"name": "/a", "type": "file", "size": 3, **info})
    assert isinstance(item, Item)
    assert item.tag == tag


def test_a_file_of_unknown_length_is_a_mistake():
    with pytest.raises(UserError, match="memory:///a: the server does not say how long the file is"):
        _Remote("memory://")._item("a", {"name": "/a", "type": "file", "size": None})


def test_a_missing_driver_is_named_with_its_extra(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError,
        match=re.escape("gs://bucket/a.txt: the driver of gs:// is missing: install it with `pip install 'fot[gs]'`"),
    ):
        read("gs://bucket/a.txt")
    with pytest.raises(UserError, match=r"abfs://bucket/a\.txt: the driver of abfs:// is missing: .*adlfs"):
        read("abfs://bucket/a.txt")


def test_an_unknown_protocol_is_named(read):
    with pytest.raises(UserError, match=r"^nope://bucket/a\.txt: nothing is known to open nope://"):
        read("nope://bucket/a.txt")


def test_a_remote_stream_is_seekable_and_decompresses(memory):
    memory({"a.txt.gz": gzip.compress(b"one\ntwo\n"), "b": b"0123456789"})
    assert list(open_decompressed("memory://a.txt.gz")) == [b"one\n", b"two\n"]
    with open_binary("memory://b") as stream:
        assert (stream.seek(4), stream.read(3), stream.tell()) == (4, b"456", 7)
        assert (stream.seek(-2, 2), stream.read()) == (8, b"89")


@pytest.mark.parametrize("path", ["nope://me:hidden@bucket/a.txt", "abfs://key:hidden@bucket/a.txt?sig=hidden"])
def test_no_error_of_a_storage_repeats_what_a_url_tells(path):
    with pytest.raises(UserError, match=r"bucket/a\.txt") as caught:
        open_binary(path)
    assert "hidden" not in str(caught.value)
