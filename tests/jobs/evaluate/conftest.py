"""A tiny model with its tokenizer, and held-out documents in its tokens: all real."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.evaluate.subject import Subject, read_tokenizer
from pipelines.batches.index import index_documents
from pipelines.config import Data, Source
from pipelines.sources.corpus import Document
from pipelines.tokens.minhash import signature
from pipelines.tokens.shards import Encoded, Manifest, Shard, write_shard
from pipelines.tokens.tokenize import describe_tokenizer
from pipelines.tokens.tokenizer import train_tokenizer
from pipelines.workflow.hashing import hash_file

LOCAL = 16
VOCABULARY = 280


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the grass is green, 1 2 3 45678; déjà vu\n" * 5], VOCABULARY, directory)
    return directory


@pytest.fixture(scope="session")
def save_model(tokenizer_dir: Path, tmp_path_factory):
    """Writes a model with its tokenizer. By default one layer without positions: reading windows into memory equals one
    long causal pass."""

    def save(**changes: object) -> Path:
        torch.manual_seed(0)
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": LOCAL,
            "mem_layers": [0],
            "mem_positionals": False,
            "initializer_range": 0.5,
        }
        directory = tmp_path_factory.mktemp("model")
        FotLlamaForCausalLM(FotLlamaConfig(**{**shape, **changes})).save_pretrained(directory)
        for file in tokenizer_dir.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    return save


@pytest.fixture(scope="session")
def model_dir(save_model) -> Path:
    return save_model()


@pytest.fixture(scope="session")
def subject_of(model_dir: Path, tmp_path_factory):
    """Held-out documents of random tokens, {source: lengths}; `same_text`: places of documents that copy the first."""

    def make(lengths: Mapping[str, Sequence[int]], held_out: float = 1.0, same_text: Sequence[int] = ()) -> Subject:
        directory = tmp_path_factory.mktemp("documents")
        shards, place = [], 0
        for source, sizes in lengths.items():
            rows = []
            for size in sizes:
                tokens = np.random.default_rng(place).integers(2, VOCABULARY, size).astype(np.uint16)
                text = f"text {0 if place in same_text else place}"
                document = Document(f"{source}/{place}", source, text, "file", 0, 4, text)
                rows.append(Encoded(document, tokens, signature(text)))
                place += 1
            file = directory / f"{source}.arrow"
            counts = write_shard(file, [rows], VOCABULARY)
            unit = {"source": source, "entries": [], "span": None}
            shards.append(Shard(file.name, hash_file(file), unit, *counts, {}, 0))
        sources = tuple(Source(name=name, path="x", held_out=held_out) for name in lengths)
        described = describe_tokenizer(read_tokenizer(model_dir), "huggingface")
        recipe = {"sources": [{"name": name} for name in lengths]}
        Manifest("uint16", described, recipe, tuple(shards), None, [len(shards)], {}).write(directory)
        index_documents(directory, Data(sources=sources, duplicates="keep"), directory)
        return Subject({"model": model_dir}, LOCAL, seed=0, shards=directory, documents=directory)

    return make


@pytest.fixture
def measure(tmp_path: Path):
    """Runs an evaluation's cells in this process, without Ray."""

    def run(module, subject: Subject, settings):
        with torch.inference_mode():
            made = {cell.key: cell.function(*cell.arguments) for cell in module.cells(subject, settings)}
        return module.summarize(subject, settings, json.loads(json.dumps(made)), tmp_path)

    return run
