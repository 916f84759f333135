"""`mem_qk_norm`: memory layers score by temperature x cosine, everywhere.

Shapes: R rows, B batch, L tokens, H query heads, D head size.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, TopKMemory, attention_mass
from fot_model.cache_file import DECIDING, sampled_fingerprint
from fot_model.layer import TEMPERATURE, unit
from fot_model.plan import pad_plan

POSITIONS = pytest.mark.parametrize("mem_positionals", [False, True])
PLAN = [[], [0], [1, 0], [0]]
NAME = "model.layers.1.self_attn.mem_temperature"


@pytest.fixture(scope="session")
def cosine(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with large random weights, and another temperature for each head."""

    def make(**changes: Any) -> FotLlamaForCausalLM:
        model = focused(**{"num_key_value_heads": 2, "mem_qk_norm": True, **changes})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mem_temperature"):
                    parameter.copy_(torch.tensor([2.0, 4.0, 6.0, 8.0]))
        return model

    return make


def naive_layer(model: FotLlamaForCausalLM, hidden_RLC: Tensor, plan: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What the memory layer's attention gives [R, L, C], from one softmax a query and head; and its weights
    [R, H, L, (1 + d) L], 0 for what is not seen."""
    attention, config = model.model.layers[1].self_attn, model.config
    R, L, _ = hidden_RLC.shape
    H, Hk, D = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    cos, sin = LlamaRotaryEmbedding(config)(hidden_RLC, torch.arange(L)[None])
    if not config.mem_positionals:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    q, k, v = (
        projection(hidden_RLC).reshape(R, L, -1, D).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    local_q, local_k = apply_rotary_pos_emb(q, k, cos, sin)
    most = max(map(len, plan))
    out, all_weights = torch.zeros(R, L, H, D), torch.zeros(R, H, L, (1 + most) * L)
    for row in range(R):
        for head in range(H):
            shared = head // (H // Hk)
            keys = torch.cat([local_k[row, shared], *(k[other, shared] for other in plan[row])])
            values = torch.cat([v[row, shared], *(v[other, shared] for other in plan[row])])
            for at in range(L):
                seen = [*range(at + 1), *range(L, len(keys))]
                query = local_q[row, head, at]
                cosines = keys[seen] @ query / (keys[seen].norm(dim=-1) * query.norm())
                weights = (attention.mem_temperature[head] * cosines).softmax(0)
                out[row, at, head] = weights @ values[seen]
                all_weights[row, head, at, seen] = weights
    return attention.o_proj(out.flatten(2)), all_weights


def caught(model: FotLlamaForCausalLM, run: Any) -> tuple[Tensor, Tensor]:
    """The memory layer's input and output while `run` goes through the model."""
    seen: dict[str, Tensor] = {}

    def keep(_module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> None:
        seen["in"], seen["out"] = inputs["hidden_states"], output[0]

    hook = model.model.layers[1].self_attn.register_forward_hook(keep, with_kwargs=True)
    run()
    hook.remove()
    return seen["in"], seen["out"]


@POSITIONS
@torch.no_grad()
def test_training_scores_by_temperature_times_cosine(cosine, tokens, mem_positionals: bool) -> None:
    model = cosine(mem_positionals=mem_positionals)
    hidden, out = caught(model, lambda: model(tokens(4, 6), plan=pad_plan(PLAN)))
    torch.testing.assert_close(out, naive_layer(model, hidden, PLAN)[0], rtol=1e-4, atol=1e-5)


@POSITIONS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_without_plan_and_memory_it_does_too(cosine, tokens, mem_positionals: bool, implementation: str) -> None:
    model = cosine(mem_positionals=mem_positionals, attn_implementation=implementation)
    hidden, out = caught(model, lambda: model(tokens(2, 6), use_cache=False))
    torch.testing.assert_close(out, naive_layer(model, hidden, [[], []])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 1000])
@POSITIONS
@torch.no_grad()
def test_reading_with_memory_equals_training_with_the_plan(
    cosine, tokens, mem_positionals: bool, top_k: int | None
) -> None:
    model = cosine(mem_positionals=mem_positionals)
    ids = tokens(2, 6)
    trained = model(ids, plan=pad_plan([[], [0]])).logits[1]
    cache = FotCache(model.config, DenseMemory() if top_k is None else TopKMemory(top_k))
    model(ids[:1], past_key_values=cache)
    cache.flush()
    torch.testing.assert_close(model(ids[1:], past_key_values=cache).logits[0], trained, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_by_token_equals_one_call(cosine, tokens) -> None:
    model, ids = cosine(local_context=8), tokens(1, 20)
    at_once = FotCache(model.config)
    whole = model(ids, past_key_values=at_once).logits
    cache = FotCache(model.config)
    parts = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(20)]
    assert len(cache.memory) == len(at_once.memory) > 0
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_top_k_takes_the_keys_of_largest_cosine(cosine, tokens) -> None:
    model, ids = cosine(mem_positionals=False), tokens(2, 12)
    with torch.no_grad():  # lengths that would decide, were they not taken away
        model.model.layers[1].self_attn.k_proj.weight.mul_(torch.logspace(-1, 1, 16)[:, None])
    cache = FotCache(model.config, memory := TopKMemory(1))
    model(ids[:1], past_key_values=cache)
    cache.flush()
    keys = memory.state_dict()["1.keys"]
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(keys.shape[:-1]))
    attention = model.model.layers[1].self_attn
    q, _, _ = attention.project(torch.randn(1, 3, 32))
    out, lse = memory.attend(1, q, attention.scaling)
    scores = q.unflatten(1, (2, 2)) @ keys[:, :, None].transpose(-1, -2) * attention.scaling
    best = scores.max(-1)
    torch.testing.assert_close(lse, best.values.flatten(1, 2))
    cosines = scores.flatten(1, 2) / torch.tensor([2.0, 4.0, 6.0, 8.0])[None, :, None, None]
    assert cosines.abs().max() <= 1 + 1e-5
    values = memory.state_dict()["1.values"][0]
    picked = torch.stack([values[head // 2][best.indices.flatten(1, 2)[0, head]] for head in range(4)])
    torch.testing.assert_close(out[0], picked)


@POSITIONS
@torch.no_grad()
def test_attention_mass_is_that_of_the_same_softmax(cosine, tokens, mem_positionals: bool) -> None:
    model, documents = cosine(mem_positionals=mem_positionals), torch.tensor([7, 7, 5, 7])
    with attention_mass(model, documents) as found:
        hidden, _ = caught(model, lambda: model(tokens(4, 6), plan=pad_plan(PLAN)))
    _, weights = naive_layer(model, hidden, PLAN)
    own = torch.zeros(4)
    for row, seen in enumerate(PLAN):
        for place, other in enumerate(seen, start=1):
            if documents[row] == documents[other]:
                own += weights[row, :, :, 6 * place : 6 * (place + 1)].sum((1, 2))
    torch.testing.assert_close(found.layers[1].positive.float(), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.layers[1].additional.float(), weights[..., 6:].sum((0, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_temperatures_learn_and_lengths_do_not(cosine, tokens) -> None:
    model = cosine(mem_positionals=False).train()
    model(tokens(4, 6), labels=tokens(4, 6), plan=pad_plan(PLAN)).loss.backward()
    attention = model.model.layers[1].self_attn
    assert (attention.mem_temperature.grad != 0).all()
    for projection, heads in ((attention.q_proj, 4), (attention.k_proj, 2)):
        along = (projection.weight.grad * projection.weight).unflatten(0, (heads, -1)).sum((1, 2))
        assert along.abs().max() < 1e-4 * projection.weight.grad.norm()


def test_a_temperature_a_head_is_all_that_is_new_and_starts_at_ten(tiny) -> None:
    plain = FotLlamaForCausalLM(FotLlamaConfig(**tiny, mem_layers=[1])).state_dict()
    model = FotLlamaForCausalLM(FotLlamaConfig(**tiny, mem_layers=[1], mem_qk_norm=True)).state_dict()
    assert {name: (tensor.tolist()) for name, tensor in model.items() if name not in plain} == {NAME: [TEMPERATURE] * 4}
    assert plain.keys() <= model.keys()
    assert TEMPERATURE == 10


def test_without_it_a_model_is_a_llama_bit_for_bit(focused, plain, tokens) -> None:
    model = focused()
    base = plain(model)
    assert model.model.layers[1].self_attn.mem_temperature is None
    assert torch.equal(model(tokens(2, 9), use_cache=False).logits, base(tokens(2, 9), use_cache=False).logits)


def test_a_checkpoint_keeps_its_temperatures(cosine, tokens, tmp_path) -> None:
    model = cosine()
    model.save_pretrained(tmp_path)
    loaded = FotLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mem_qk_norm
    assert loaded.state_dict()[NAME].tolist() == [2, 4, 6, 8]
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_without_temperatures_gets_the_first(cosine, tmp_path, dtype: torch.dtype) -> None:
    cosine(mem_qk_norm=False).save_pretrained(tmp_path)
    loaded = FotLlamaForCausalLM.from_pretrained(tmp_path, mem_qk_norm=True, dtype=dtype)
    assert loaded.state_dict()[NAME].tolist() == [TEMPERATURE] * 4


def test_the_longllama_layout_refuses_it(cosine, tmp_path) -> None:
    with pytest.raises(ValueError, match="the longllama layout has no mem_qk_norm True"):
        cosine(num_key_value_heads=4).save_pretrained(tmp_path, form="longllama")


def test_the_longllama_layout_does_not_speak_of_it(cosine, tmp_path) -> None:
    cosine(num_key_value_heads=4, mem_qk_norm=False, last_context_length=8).save_pretrained(tmp_path, form="longllama")
    assert "mem_qk_norm" not in (tmp_path / "config.json").read_text()


def test_a_memory_belongs_to_models_that_score_alike(cosine, tokens, tmp_path) -> None:
    model, ids = cosine(), tokens(1, 9)
    with_it, without = sampled_fingerprint(model), sampled_fingerprint(cosine(mem_qk_norm=False))
    assert with_it != without
    cache = FotCache(model.config)
    model(ids, past_key_values=cache)
    cache.flush()
    cache.save(tmp_path / "memory", model)
    again = FotCache.load(tmp_path / "memory", model)
    assert torch.equal(model(ids, past_key_values=again).logits, model(ids, past_key_values=cache).logits)


def test_sixteen_bits_keep_queries_and_keys_in_sixteen(cosine) -> None:
    model = cosine().to(torch.bfloat16)
    q, k, v = model.model.layers[1].self_attn.project(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    lengths = q.float().norm(dim=-1)[0, :, 0] * model.model.layers[1].self_attn.scaling
    torch.testing.assert_close(lengths, torch.tensor([2.0, 4.0, 6.0, 8.0]), rtol=0.01, atol=0)


def test_a_vector_of_zeros_stays_one() -> None:
    assert unit(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert math.isclose(unit(torch.tensor([3.0, 4.0]))[1].item(), 0.8, rel_tol=1e-6)


def test_the_fingerprint_of_a_model_without_it_is_what_it_was_before_there_was_such_a_thing(cosine) -> None:
    model = cosine(mem_qk_norm=False)
    digest = hashlib.sha256()
    shape = {name: getattr(model.config, name) for name in DECIDING if name != "mem_qk_norm"}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    assert sampled_fingerprint(model) == digest.hexdigest()
    assert sampled_fingerprint(cosine()) != digest.hexdigest()
