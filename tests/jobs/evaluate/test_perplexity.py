import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.evaluate.perplexity import Scoring, Window, choose_windows, window_losses
from pipelines.config import Data, Source
from pipelines.corpus import Document
from pipelines.dataset import TokenDataset
from pipelines.documents import index_documents
from pipelines.errors import UserError
from pipelines.hashing import hash_file
from pipelines.minhash import signature
from pipelines.shards import Encoded, Manifest, Shard, write_shard

LOCAL = 8


def make_dataset(directory: Path, held_out: float) -> Path:
    """Three documents of 30, 70 and 101 random tokens, with their index in the same directory."""
    rows = []
    for n, size in enumerate((30, 70, 101)):
        tokens = np.random.default_rng(size).integers(0, 50, size).astype(np.uint16)
        rows.append(Encoded(Document(f"s/{n}", "s", "text", "file", 0, 4, f"{n}"), tokens, signature(f"text {n}")))
    counts = write_shard(directory / "a.arrow", [rows], 50)
    shard = Shard(
        "a.arrow", hash_file(directory / "a.arrow"), {"source": "s", "entries": [], "span": None}, *counts, {}, 0
    )
    Manifest("uint16", {}, {}, (shard,), None, [1], {}).write(directory)
    index_documents(directory, Data(sources=(Source(name="s", path="x", held_out=held_out),)), directory)
    return directory


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """All documents are held out."""
    return make_dataset(tmp_path, held_out=1.0)


@pytest.fixture
def model(tmp_path: Path) -> FotLlamaForCausalLM:
    """One layer without positions: reading windows into memory equals one long causal pass."""
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LOCAL,
        mem_layers=[0],
        mem_positionals=False,
        initializer_range=0.5,
    )
    model = FotLlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    return model


def test_the_windows_have_the_longest_context_before_them_and_spread_over_documents(dataset: Path) -> None:
    tokens = TokenDataset(dataset, dataset)
    windows = choose_windows(tokens, LOCAL, 4, 100)
    assert len(set(windows)) == len(windows)
    assert all(window.start >= 3 * LOCAL for window in windows)
    assert all(window.start + LOCAL < tokens.length[window.document] for window in windows)
    assert {document: sum(w.document == document for w in windows) for document in (1, 2)} == {1: 5, 2: 9}
    assert {window.document for window in choose_windows(tokens, LOCAL, 4, 2)} == {1, 2}


def test_no_document_long_enough_is_a_users_error(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the longest of 3 has 101"):
        choose_windows(TokenDataset(dataset, dataset), LOCAL, 16, 10)
    (tmp_path / "none").mkdir()
    none = make_dataset(tmp_path / "none", held_out=0.0)
    with pytest.raises(UserError, match=r"the longest of 0 has 0.*held_out"):
        choose_windows(TokenDataset(none, none), LOCAL, 1, 10)


@pytest.mark.parametrize("context", [1, 2, 5])
def test_losses_are_those_of_a_long_causal_pass(dataset: Path, model: FotLlamaForCausalLM, context: int) -> None:
    tokens, window = TokenDataset(dataset, dataset), Window(2, 40)
    scoring = Scoring(dataset / "model", {}, dataset, dataset, LOCAL, [context])
    measured = window_losses(scoring, [window])[context]
    first = 40 - (context - 1) * LOCAL
    text = torch.tensor(tokens.tokens(2, first, 40 + LOCAL + 1).astype(np.int64))
    with torch.no_grad():
        log_probabilities = model(text[None, :-1]).logits[0, -LOCAL:].log_softmax(-1)
    expected = -log_probabilities.gather(1, text[-LOCAL:, None]).sum().item()
    assert measured == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(measured)


def test_memory_settings_apply_to_a_plain_llama(dataset: Path, model: FotLlamaForCausalLM) -> None:
    without = Scoring(dataset / "model", {"mem_layers": []}, dataset, dataset, LOCAL, [1, 4])
    losses = window_losses(without, [Window(2, 40)])
    assert losses[1] == losses[4]  # no memory layer: the context before the window makes no difference
