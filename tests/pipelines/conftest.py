"""Helpers of the pipelines' tests, as fixtures: small corpora, tokenizers and data sets, all real."""

import itertools
import string
import subprocess
import sys

import numpy as np
import pytest

from pipelines.batches.dataset import TokenDataset
from pipelines.batches.index import index_documents
from pipelines.config import Data, Source
from pipelines.sources.corpus import Document
from pipelines.sources.file_hashes import FileHashes
from pipelines.sources.listing import list_entries
from pipelines.sources.readers import read_unit
from pipelines.sources.units import group_units
from pipelines.tokens.minhash import BINS
from pipelines.tokens.shards import Encoded, Manifest, Shard, token_dtype, write_shard
from pipelines.tokens.tokenizer import load_tokenizer, train_tokenizer
from pipelines.workflow.hashing import hash_file


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

    def make(path, *, task_bytes=1_000_000, max_bad_documents=0, **source):
        source = Source(name="s", path=str(path), **source)
        return Data(sources=(source,), task_bytes=task_bytes, max_bad_documents=max_bad_documents)

    return make


@pytest.fixture(scope="session")
def units_of(fresh):
    def make(data, seed=0):
        return group_units(list_entries(data, seed, FileHashes(fresh() / "hashes.json")), data.task_bytes)

    return make


@pytest.fixture(scope="session")
def list_of(fresh):
    """The entries of sources given as {name: path}."""

    def make(paths, **options):
        sources = tuple(Source(name=name, path=str(path), **options) for name, path in paths.items())
        return list_entries(Data(sources=sources), 0, FileHashes(fresh() / "hashes.json"))

    return make


@pytest.fixture(scope="session")
def read(data_of, units_of):
    """Everything read from a path: documents and what was dropped, in order."""

    def everything(path, *, seed=0, **options):
        data = data_of(path, **options)
        return [item for unit in units_of(data, seed) for item in read_unit(unit, data.sources[0])]

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
def encoded():
    """A document as a shard takes it. `signature`: itself, or a number that it is drawn from."""

    def make(name, tokens, *, source="s", content=None, signature=0):
        if not isinstance(signature, np.ndarray):
            signature = np.random.default_rng(signature).integers(2**32, size=BINS, dtype=np.uint32)
        document = Document(name, source, "text", "file", 0, 4, content or f"hash of {name}")
        return Encoded(document, np.array(tokens, np.uint32), signature)

    return make


@pytest.fixture(scope="session")
def write_shards(fresh):
    """Write shards, each (source, batches of documents), and their manifest into a new directory."""

    def write(shards, vocab_size=1 << 20):
        directory, made = fresh(), []
        for number, (source, batches) in enumerate(shards):
            path = directory / f"shard-{number}.arrow"
            counts = write_shard(path, batches, vocab_size)
            unit = {"source": source, "entries": [], "span": None}
            made.append(Shard(path.name, hash_file(path), unit, *counts, {}, 0))
        token_type = token_dtype(vocab_size).name
        Manifest(token_type, {"fingerprint": "tokenizer"}, {}, tuple(made), None, [len(made)], {}).write(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def dataset_of(encoded, write_shards):
    """A data set of documents of the given lengths. Its tokens are numbered through: 0, 1, 2, ... in document order.

    `signatures`: a number a document, equal for near-duplicates; `sources`: {name: how many of the documents it has};
    `shards`: how many of each source, of so many `batches`; `data`: settings of the recipe's part. Shards and index are
    in one directory.
    """

    def make(
        lengths,
        ids=None,
        hashes=None,
        signatures=None,
        *,
        sources=None,
        shards=1,
        batches=1,
        vocab_size=1 << 20,
        held_out=0.0,
        **data,
    ):
        count = itertools.count()
        sources = sources or {"s": len(lengths)}
        names = [name for name, n in sources.items() for _ in range(n)]
        ids = ids or [f"{name}/{number}" for number, name in enumerate(names)]
        columns = zip(ids, lengths, names, hashes or [None] * len(ids), signatures or range(len(ids)), strict=True)
        rows = [
            encoded(name, [*itertools.islice(count, length)], source=source, content=content, signature=signature)
            for name, length, source, content, signature in columns
        ]
        made, first = [], 0
        for source, n in sources.items():
            made += [(source, _parts(part, batches)) for part in _parts(rows[first : first + n], shards)]
            first += n
        directory = write_shards(made, vocab_size)
        parts = tuple(Source(name=name, path="x", held_out=held_out) for name in sources)
        index_documents(directory, Data(sources=parts, **data), directory)
        return TokenDataset(directory, directory)

    return make


def _parts(rows, n):
    """The rows in n consecutive parts, without the empty ones."""
    cuts = [number * len(rows) // n for number in range(n + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(cuts) if start < end]


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


IGNORED = "".join(c for c in map(chr, range(128)) if c not in string.ascii_letters + string.digits)


def _letters_of(text):
    return b"".join(c.lower().encode() if c.isascii() else c.encode() for c in text if c not in IGNORED)


@pytest.fixture(scope="session")
def letters_of():
    """What counts of a text for its signature, as bytes."""
    return _letters_of


@pytest.fixture(scope="session")
def jaccard():
    """The true similarity of two texts of at least a window each."""

    def similarity(a, b):
        a, b = ({t[i : i + 16] for i in range(len(t) - 15)} for t in map(_letters_of, (a, b)))
        return len(a & b) / len(a | b)

    return similarity
