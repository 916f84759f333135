"""A LLaMA whose retrieval head is known, because its weights are written by hand."""

from pathlib import Path

import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from pipelines.tokens.tokenizer import train_tokenizer

VOCABULARY, LAYERS, HEADS, SIZE = 280, 4, 4, 64
LAYER, HEAD = 2, 3  # that copies
E, HIDDEN = 36, 112  # dimensions of a token: as many as have next to no rotation; of a hidden state
THETA = 1e9
SHARP = 30.0  # factor of scores


@pytest.fixture(scope="session")
def retrieving(tmp_path_factory) -> Path:
    """Layer 0 writes each token's predecessor beside it; head `HEAD` of layer `LAYER` looks for tokens that follow the
    present one's like, and what it finds is predicted. All other heads see all tokens alike and say nothing.

    A hidden state is [token, token before, found, 1].
    """
    directory = tmp_path_factory.mktemp("retrieving")
    train_tokenizer(["the number of a shelf: 1 2 3 45678\n" * 5], VOCABULARY, directory)
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=SIZE,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    model = FotLlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (*layer.self_attn.children(), *layer.mlp.children()):
                if isinstance(projection, torch.nn.Linear):
                    projection.weight.zero_()
        tokens_VE = torch.randn(VOCABULARY, E).sign()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :E] = tokens_VE
        model.model.embed_tokens.weight[:, -1] = 1.0
        _before(model.model.layers[0].self_attn, head=1)
        _copies(model.model.layers[LAYER].self_attn, head=HEAD)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 2 * E : 3 * E] = tokens_VE
    model.save_pretrained(directory)
    return directory


def _before(attention: torch.nn.Module, head: int) -> None:
    """The head attends to the token before: its scores are a sum of cosines of (distance - 1) at every frequency."""
    frequencies_F = THETA ** (-torch.arange(SIZE // 2) / (SIZE // 2))
    q, k, v = head * SIZE, head // 2 * SIZE, head // 2 * SIZE
    attention.q_proj.weight[q : q + SIZE // 2, -1] = SHARP
    attention.k_proj.weight[k : k + SIZE // 2, -1] = frequencies_F.cos() * SHARP
    attention.k_proj.weight[k + SIZE // 2 : k + SIZE, -1] = frequencies_F.sin() * SHARP
    attention.v_proj.weight[v : v + E, :E] = torch.eye(E)
    attention.o_proj.weight[E : 2 * E, head * SIZE : head * SIZE + E] = torch.eye(E)


def _copies(attention: torch.nn.Module, head: int) -> None:
    """The head looks, in the dimensions that rotate slowest, for what its own token is the predecessor of."""
    slow = [half * SIZE // 2 + place for half in (0, 1) for place in range(SIZE // 2 - E // 2, SIZE // 2)]
    q, k, v = head * SIZE, head // 2 * SIZE, head // 2 * SIZE
    for place, dimension in enumerate(slow):
        attention.q_proj.weight[q + dimension, place] = SHARP / 8
        attention.k_proj.weight[k + dimension, E + place] = 1.0
    attention.v_proj.weight[v : v + E, :E] = torch.eye(E)
    attention.o_proj.weight[2 * E : 3 * E, head * SIZE : head * SIZE + E] = torch.eye(E)
