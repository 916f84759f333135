"""Helpers of the pipelines' tests, as fixtures: small corpora, tokenizers and data sets, all real."""

import itertools
import subprocess
import sys

import pytest

from pipelines.config import Data, Source
from pipelines.corpus import Document, list_units, read_unit
from pipelines.hashing import FileHashes, hash_file
from pipelines.shards import Manifest, Shard, TokenDataset, write_shard
from pipelines.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """A new empty directory at every call, also inside a hypothesis test."""
    return lambda: tmp_path_factory.mktemp("fresh")


@pytest.fixture(scope="session")
def write_tree():
    """Write {name: str or bytes} under a directory, which is returned."""

    def write(root, files):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root

    return write


@pytest.fixture(scope="session")
def contents():
    """{name: bytes} of every file under a directory, hidden ones too."""
    return lambda root: {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def data_of():
    """The recipe part with one source named "s"."""

    def make(path, *, task_bytes=1_000_000, max_bad_lines=0, **source):
        source = Source(name="s", path=str(path), **source)
        return Data(sources=(source,), task_bytes=task_bytes, max_bad_lines=max_bad_lines)

    return make


@pytest.fixture(scope="session")
def units_of(fresh):
    return lambda data, seed=0: list_units(data, seed, FileHashes(fresh() / "hashes.json"))


@pytest.fixture(scope="session")
def read(data_of, units_of):
    """Everything read from a path: documents and what was dropped, in order."""

    def everything(path, *, seed=0, **options):
        data = data_of(path, **options)
        fields = data.sources[0].text_field, data.sources[0].id_field
        return [item for unit in units_of(data, seed) for item in read_unit(unit, *fields)]

    return everything


@pytest.fixture(scope="session")
def tokenizer_directory(fresh):
    """A byte-level BPE whose training text was full of special tokens."""
    directory = fresh()
    train_tokenizer(["<s>the cat</s> sat on the mat <s> </s> é 漢字\n"] * 50, 320, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture(scope="session")
def dataset_of(fresh):
    """A data set of documents of the given lengths. Its tokens are numbered through: 0, 1, 2, ... in document order."""

    def make(lengths, ids=None, hashes=None, *, shards=1, vocab_size=1 << 20):
        directory, count = fresh(), itertools.count()
        ids = ids or [f"s/{number}" for number in range(len(lengths))]
        hashes = hashes or [f"hash of {name}" for name in ids]
        rows = [
            (Document(name, "s", "text", "file", 0, 4, content), [next(count) for _ in range(length)])
            for name, content, length in zip(ids, hashes, lengths, strict=True)
        ]
        made = []
        for number in range(shards):
            part = rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]
            path = directory / f"shard-{number}.arrow"
            batches = [([document for document, _ in part], [tokens for _, tokens in part])] if part else []
            counts = write_shard(path, batches, vocab_size)
            made.append(Shard(path.name, hash_file(path), *counts, {}))
        Manifest("tokenizer", {}, tuple(made)).write(directory)
        return TokenDataset(directory)

    return make


@pytest.fixture
def python(tmp_path):
    """Start a Python script in a process of its own, in tmp_path; killed at the end if still there."""
    started = []

    def start(script, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
