"""Shapes: B batch, Hk key/value heads, L tokens, D head size."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fot_model.rope import rotation, turn_back

D = 8
TRAINED, SHORT = 16, 8  # max_position_embeddings, original_max_position_embeddings
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SHORT,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.0, 2.0, 2.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": SHORT,
    },
}
SCALES_KEYS = {"yarn", "longrope"}
kinds = st.sampled_from(list(KINDS))


def rope_of(kind: str) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=2 * D,
        num_attention_heads=2,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]},
    )
    return LlamaRotaryEmbedding(config)


def keys(seed: int, L: int, B: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, 3, L, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(rope: LlamaRotaryEmbedding, keys_BHkLD: Tensor, positions_BL: Tensor) -> Tensor:
    """Keys at these positions, as a LLaMA gives them."""
    cos, sin = rope(keys_BHkLD, positions_BL)
    return apply_rotary_pos_emb(keys_BHkLD, keys_BHkLD, cos, sin)[1]


@given(kind=kinds, L=st.integers(1, 2 * TRAINED), data=st.data())
@settings(deadline=None, max_examples=60)
def test_keys_turned_back_are_keys_of_earlier_positions_at_the_frequencies_of_the_whole_window(
    kind: str, L: int, data: Any
) -> None:
    rope, keys_BHkLD = rope_of(kind), keys(data.draw(st.integers(0, 2**32)), L)
    by_BL = torch.tensor([[data.draw(st.integers(0, at)) for at in range(L)] for _ in range(2)])
    positions_BL = torch.arange(L).expand(2, L)
    with_last_BL = torch.cat([positions_BL - by_BL, torch.full((2, 1), L - 1)], dim=1)
    with_last = rotated(rope, torch.cat([keys_BHkLD, keys_BHkLD[:, :, :1]], dim=2), with_last_BL)
    turned_BHkLD = turn_back(rotated(rope, keys_BHkLD, positions_BL), *rotation(rope, by_BL, L))
    torch.testing.assert_close(turned_BHkLD, with_last[:, :, :-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_turning_a_key_back_by_its_own_position_undoes_the_rotation_however_far(kind: str) -> None:
    rope, positions_1L = rope_of(kind), torch.tensor([[0, 255, 257, 1001, 4095, 100_003]])
    keys_BHkLD = keys(0, 6)
    turned_BHkLD = turn_back(rotated(rope, keys_BHkLD, positions_1L), *rotation(rope, positions_1L, 100_004))
    torch.testing.assert_close(turned_BHkLD, keys_BHkLD * rope.attention_scaling, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L", [2, SHORT, TRAINED, TRAINED + 1])
def test_turning_back_by_a_whole_window_is_turning_back_by_its_tokens(kind: str, L: int) -> None:
    rope, keys_BHkLD = rope_of(kind), keys(0, L)
    at_BHkLD = rotated(rope, keys_BHkLD, torch.arange(L)[None])
    window, last, one = (rotation(rope, torch.tensor([[by]]), L) for by in (L, L - 1, 1))
    by_tokens_BHkLD = turn_back(turn_back(at_BHkLD, *last), *one)
    torch.testing.assert_close(turn_back(at_BHkLD, *window), by_tokens_BHkLD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L", [SHORT, TRAINED, TRAINED + 1, 2 * TRAINED])
def test_asking_for_a_rotation_within_a_window_leaves_the_rope_of_the_model_as_it_was(kind: str, L: int) -> None:
    for by in (1, L - 1, L):
        rope, positions_1L = rope_of(kind), torch.arange(L)[None]
        before = rope(keys(0, L), positions_1L)
        rotation(rope, torch.tensor([[by]]), L)
        torch.testing.assert_close(rope(keys(0, L), positions_1L), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_changes_no_norm_though_the_kind_of_rope_scales_keys(kind: str) -> None:
    rope, keys_BHkLD = rope_of(kind), keys(0, 7)
    cos_BLD, sin_BLD = rotation(rope, torch.arange(7)[None], 7)
    assert cos_BLD.dtype == sin_BLD.dtype == torch.float32
    assert cos_BLD.shape == sin_BLD.shape == (1, 7, D)
    torch.testing.assert_close(cos_BLD**2 + sin_BLD**2, torch.ones(1, 7, D))
    turned_BHkLD = turn_back(keys_BHkLD, cos_BLD, sin_BLD)
    torch.testing.assert_close(turned_BHkLD.norm(dim=-1), keys_BHkLD.norm(dim=-1))
    scales = rotated(rope, keys_BHkLD, torch.arange(7)[None]).norm() > 1.01 * keys_BHkLD.norm()
    assert scales == (kind in SCALES_KEYS)


@given(kind=kinds, first=st.integers(0, 7), second=st.integers(0, 7))
@settings(deadline=None, max_examples=30)
def test_turning_back_twice_is_turning_back_by_the_sum_and_by_nothing_is_nothing(
    kind: str, first: int, second: int
) -> None:
    rope, keys_BHkLD = rope_of(kind), keys(first, 5)
    turns = [rotation(rope, torch.tensor([[by]]), TRAINED) for by in (first, second, first + second, 0)]
    once, again, both, nothing = turns
    twice_BHkLD = turn_back(turn_back(keys_BHkLD, *once), *again)
    torch.testing.assert_close(twice_BHkLD, turn_back(keys_BHkLD, *both), rtol=0, atol=1e-5)
    torch.testing.assert_close(turn_back(keys_BHkLD, *nothing), keys_BHkLD, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keys_keep_their_number_type_and_are_turned_in_float32_or_wider(dtype: torch.dtype) -> None:
    keys_BHkLD, turn = keys(0, 6, dtype=dtype), rotation(rope_of("default"), torch.arange(6)[None], 6)
    turned_BHkLD = turn_back(keys_BHkLD, *turn)
    exact_BHkLD = turn_back(keys_BHkLD.double(), *(x.double() for x in turn))
    assert turned_BHkLD.dtype == dtype
    torch.testing.assert_close(turned_BHkLD.double(), exact_BHkLD, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_gradient_of_turned_keys_reaches_the_keys() -> None:
    keys_BHkLD, turn = keys(0, 4).double().requires_grad_(), rotation(rope_of("default"), torch.tensor([[5]]), 6)
    assert torch.autograd.gradcheck(lambda x: turn_back(x, *(angle.double() for angle in turn)), [keys_BHkLD])
