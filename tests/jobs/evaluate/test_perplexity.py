import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.evaluate.perplexity import Scoring, Window, choose_windows, window_losses
from pipelines.corpus import Document
from pipelines.errors import UserError
from pipelines.shards import Manifest, Shard, TokenDataset, write_shard

LOCAL = 8


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three documents of 30, 70 and 101 random tokens."""
    tokens = [np.random.default_rng(size).integers(0, 50, size).tolist() for size in (30, 70, 101)]
    documents = [Document(f"s/{n}", "s", "text", "file", 0, 4, f"{n}") for n in range(3)]
    counts = write_shard(tmp_path / "a.arrow", [(documents, tokens)], 50)
    Manifest("tokenizer", {}, (Shard("a.arrow", "0", *counts, {}),)).write(tmp_path)
    return tmp_path


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
    tokens = TokenDataset(dataset)
    windows = choose_windows(tokens, np.arange(3), LOCAL, 4, 100)
    assert len(set(windows)) == len(windows)
    assert all(window.start >= 3 * LOCAL for window in windows)
    assert all(window.start + LOCAL < tokens.lengths[window.document] for window in windows)
    assert {document: sum(w.document == document for w in windows) for document in (1, 2)} == {1: 5, 2: 9}
    assert {window.document for window in choose_windows(tokens, np.arange(3), LOCAL, 4, 2)} == {1, 2}


def test_no_document_long_enough_is_a_users_error(dataset: Path) -> None:
    with pytest.raises(UserError, match="the longest of 3 has 101"):
        choose_windows(TokenDataset(dataset), np.arange(3), LOCAL, 16, 10)
    with pytest.raises(UserError, match="held_out"):
        choose_windows(TokenDataset(dataset), np.arange(0), LOCAL, 1, 10)


@pytest.mark.parametrize("context", [1, 2, 5])
def test_losses_are_those_of_a_long_causal_pass(dataset: Path, model: FotLlamaForCausalLM, context: int) -> None:
    tokens, window = TokenDataset(dataset), Window(2, 40)
    scoring = Scoring(dataset / "model", {}, dataset, LOCAL, [context])
    measured = window_losses(scoring, [window])[context]
    first = 40 - (context - 1) * LOCAL
    text = torch.tensor(tokens.tokens(2, first, 40 + LOCAL + 1).astype(np.int64))
    with torch.no_grad():
        log_probabilities = model(text[None, :-1]).logits[0, -LOCAL:].log_softmax(-1)
    expected = -log_probabilities.gather(1, text[-LOCAL:, None]).sum().item()
    assert measured == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(measured)


def test_memory_settings_apply_to_a_plain_llama(dataset: Path, model: FotLlamaForCausalLM) -> None:
    without = Scoring(dataset / "model", {"mem_layers": []}, dataset, LOCAL, [1, 4])
    losses = window_losses(without, [Window(2, 40)])
    assert losses[1] == losses[4]  # no memory layer: the context before the window makes no difference
