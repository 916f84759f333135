"""What a reading puts into memory: keys under any RoPE, in any number type.

Shapes: B batch, Hk key/value heads, L tokens, D head size, C hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fot_model import FotCache, FotLlamaForCausalLM

WINDOW = 16
THETA = {"rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE = {"rope_type": "longrope", "factor": 3.0, **FACTORS, **THETA}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, **THETA},
    "longrope": {**LONGROPE, "original_max_position_embeddings": WINDOW},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
        **THETA,
    },
}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models that read in windows of 16 tokens."""
    return partial(focused, num_key_value_heads=2, max_position_embeddings=WINDOW)


@pytest.mark.parametrize("mem_layers", [[1], [0, 2]])
@pytest.mark.parametrize("rope", ROPES)
def test_what_is_remembered_is_the_key_at_position_zero_under_any_rope(
    focused, tokens, assert_same, rope: str, mem_layers: list[int]
) -> None:
    model = focused(mem_layers=mem_layers, rope_parameters=ROPES[rope])
    caught: dict[int, Tensor] = {}
    for number in mem_layers:
        model.model.layers[number].self_attn.k_proj.register_forward_hook(
            lambda _, args, out, number=number: caught.__setitem__(number, out)
        )
    cache = model(tokens(2, 13)).past_key_values
    cache.evict(5)
    cache.flush()
    state = cache.memory.state_dict()
    for number in mem_layers:
        keys_BHkLD = caught[number].unflatten(-1, (-1, 8)).transpose(1, 2) * model.model.rotary_emb.attention_scaling
        assert_same(state[f"{number}.keys"], keys_BHkLD)
    assert len(state) == 2 * len(mem_layers)


@pytest.mark.parametrize("count", [5, 12, WINDOW])
def test_what_longrope_turned_by_its_long_factors_is_turned_back_by_them(
    focused, tokens, assert_same, count: int
) -> None:
    model = focused(mem_layers=[0], rope_parameters={**LONGROPE, "original_max_position_embeddings": 12})
    ids_BL = tokens(2, WINDOW)
    cache = model(ids_BL).past_key_values
    cache.evict(count)
    first = model.model.layers[0]
    keys_BLC = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(ids_BL[:, :count])))
    expected = keys_BLC.unflatten(-1, (-1, 8)).transpose(1, 2) * model.model.rotary_emb.attention_scaling
    assert_same(cache.memory.state_dict()["0.keys"], expected)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_model_cast_to_16_bits_turns_keys_back_by_the_angles_that_turned_them(focused, cast: str) -> None:
    model = focused(max_position_embeddings=2048, num_hidden_layers=1, mem_layers=[0], head_dim=32)
    exact = model.model.rotary_emb.inv_freq.clone()
    getattr(model, cast)()
    assert model.dtype != torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert torch.equal(FotCache(model.config)._rope.inv_freq, exact)


@pytest.mark.parametrize("mem_layers", [[1], [0, 1, 2]])
def test_eager_and_sdpa_read_the_same(focused, padded, assert_same, mem_layers: list[int]) -> None:
    model = focused(mem_layers=mem_layers)
    ids_BL, mask_BL = padded([45, 22], 45)
    expected = model(ids_BL, attention_mask=mask_BL).logits
    model.set_attn_implementation("eager")
    assert_same(model(ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()], expected[mask_BL.bool()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_close_to_single(focused, padded, dtype: torch.dtype) -> None:
    exact, rounded = focused(), focused().to(dtype)
    exact.load_state_dict(rounded.state_dict())
    ids_BL, mask_BL = padded([45, 22], 45)
    seen_BL = mask_BL.bool()
    expected = exact(ids_BL, attention_mask=mask_BL).logits[seen_BL]
    output = rounded(ids_BL, attention_mask=mask_BL)
    assert output.logits.dtype == dtype
    assert {tensor.dtype for tensor in output.past_key_values.memory.state_dict().values()} == {dtype, torch.bool}
    got = output.logits[seen_BL].float()
    assert got.isfinite().all()
    assert (got - expected).norm() < 0.03 * expected.norm()


def test_autocast_reads_close_to_single(focused, padded) -> None:
    model = focused(mem_layers=[0, 1])
    ids_BL, mask_BL = padded([45, 22], 45)
    how = {"attention_mask": mask_BL, "last_context_length": 6}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids_BL[:, :30], **{**how, "attention_mask": mask_BL[:, :30]})
        output = model(ids_BL[:, 30:], past_key_values=output.past_key_values, last_context_length=6)
    held = output.past_key_values.memory.state_dict()
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16, torch.bool}
    expected = model(ids_BL, **how).logits[:, 30:]
    assert 0 < (output.logits.float() - expected).norm() < 0.03 * expected.norm()


def test_memory_is_held_in_the_number_type_of_the_configuration(focused, tokens) -> None:
    exact, model, ids_BL = focused(), focused(mem_dtype="bfloat16"), tokens(2, 45)
    output = model(ids_BL)
    assert {tensor.dtype for tensor in output.past_key_values.memory.state_dict().values()} == {torch.bfloat16}
    assert output.logits.dtype == torch.float32
    expected = exact(ids_BL).logits
    assert 0 < (output.logits - expected).norm() < 0.02 * expected.norm()
