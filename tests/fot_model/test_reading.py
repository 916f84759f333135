"""Shapes: B batch, L tokens, M keys, H query heads, Hk key/value heads, D head size, C hidden size, V vocabulary."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, TopKMemory, longllama_plan

CONFORMANCE = Path(__file__).parent / "conformance"
VOCABULARY = 40
WINDOW = 16
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "mem_layers": [1],
}
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
KINDS: dict[str, dict[str, Any]] = {
    **{f"rope {name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
    "no positions": {"mem_positionals": False},
    "yarn, no positions": {"rope_parameters": ROPES["yarn"], "mem_positionals": False},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "first and last": {"mem_layers": [0, 2]},
    "all layers": {"mem_layers": [0, 1, 2]},
    "odd window": {"local_context": 7},
    "window of two": {"local_context": 2},
    "gate": {"mem_gate": True},
    "bias": {"attention_bias": True},
}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def randomised(model: Any) -> Any:
    """All parameters random: biases, norms and gates too, which start at constants."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def focused(**changes: Any) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, **changes})))


def plain(model: FotLlamaForCausalLM) -> LlamaForCausalLM:
    """A LLaMA with the same weights."""
    fields = model.config.to_dict()
    base = LlamaForCausalLM(
        LlamaConfig(**{name: fields[name] for name in LlamaConfig().to_dict() if name != "model_type"})
    )
    base.load_state_dict(model.state_dict())
    return base.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without 0, which is padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


class NaiveReader:
    """One token at a time. Every key is kept without its position and turned anew for each query: to its place in the
    local context, counted without padding, or to position 0 in memory."""

    def __init__(self, model: FotLlamaForCausalLM) -> None:
        self.model, self.config = model, model.config
        self.rope = LlamaRotaryEmbedding(self.config)
        layers = range(self.config.num_hidden_layers)
        self.local: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        self.memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        self.seen_local: list[Tensor] = []
        self.seen_memory: list[Tensor] = []

    def evict(self, count: int) -> None:
        for local, memory in zip(self.local, self.memory, strict=True):
            memory += [(key.detach(), value.detach()) for key, value in local[:count]]
            del local[:count]
        self.seen_memory += self.seen_local[:count]
        del self.seen_local[:count]

    def turned(self, x_BHMD: Tensor, positions_BM: Tensor, layer: int) -> Tensor:
        if layer in self.config.mem_layers and not self.config.mem_positionals:
            return x_BHMD
        angles_BMD = (positions_BM[..., None] * self.rope.inv_freq).repeat(1, 1, 2)[:, None]
        first, second = x_BHMD.chunk(2, dim=-1)
        turned_BHMD = x_BHMD * angles_BMD.cos() + torch.cat([-second, first], dim=-1) * angles_BMD.sin()
        return turned_BHMD * self.rope.attention_scaling

    def attend(self, q_BHD: Tensor, held: list[tuple[Tensor, Tensor]], positions_BM: Tensor, layer: int) -> Any:
        """Scores [B, H, M] and values [B, H, M, D]."""
        k_BHMD, v_BHMD = (
            torch.stack(part, dim=2).repeat_interleave(q_BHD.shape[1] // part[0].shape[1], dim=1)
            for part in zip(*held, strict=True)
        )
        k_BHMD = self.turned(k_BHMD, positions_BM, layer)
        return (k_BHMD @ q_BHD[..., None])[..., 0] * q_BHD.shape[-1] ** -0.5, v_BHMD

    def attention(self, layer: int, hidden_BC: Tensor) -> Tensor:
        attention = self.model.model.layers[layer].self_attn
        D = attention.head_dim
        q_BHD, k_BHkD, v_BHkD = (
            projection(hidden_BC).unflatten(-1, (-1, D))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.local[layer].append((k_BHkD, v_BHkD))
        seen_BM = torch.stack(self.seen_local, dim=1)
        positions_BM = (seen_BM.cumsum(1) - 1).clamp(min=0)
        q_BHD = self.turned(q_BHD[:, :, None], positions_BM[:, -1:], layer)[:, :, 0]
        scores, v_BHMD = self.attend(q_BHD, self.local[layer], positions_BM, layer)
        scores_BHM = scores.masked_fill(~seen_BM[:, None], -1e9)
        out_BHD = (scores_BHM.softmax(-1)[..., None] * v_BHMD).sum(2)
        if layer in self.config.mem_layers and self.seen_memory:
            far_seen_BM = torch.stack(self.seen_memory, dim=1)
            nowhere_BM = torch.zeros(far_seen_BM.shape)
            far_scores, far_v_BHMD = self.attend(q_BHD, self.memory[layer], nowhere_BM, layer)
            far_scores_BHM = far_scores.masked_fill(~far_seen_BM[:, None], -1e9)
            if self.config.mem_gate:
                gate = attention.mem_gate.sigmoid()[:, None] * far_seen_BM.any(1)[:, None, None]
                out_BHD = (1 - gate) * out_BHD + gate * (far_scores_BHM.softmax(-1)[..., None] * far_v_BHMD).sum(2)
            else:
                weights_BHM = torch.cat([scores_BHM, far_scores_BHM], dim=-1).softmax(-1)
                out_BHD = (weights_BHM[..., None] * torch.cat([v_BHMD, far_v_BHMD], dim=2)).sum(2)
        return attention.o_proj(out_BHD.flatten(1))

    def read(self, token_B: Tensor, seen_B: Tensor) -> Tensor:
        """Logits [B, V] after this token."""
        self.seen_local.append(seen_B)
        hidden_BC = self.model.model.embed_tokens(token_B)
        for number, layer in enumerate(self.model.model.layers):
            hidden_BC = hidden_BC + self.attention(number, layer.input_layernorm(hidden_BC))
            hidden_BC = hidden_BC + layer.mlp(layer.post_attention_layernorm(hidden_BC))
        return self.model.lm_head(self.model.model.norm(hidden_BC))


def naive_logits(
    model: FotLlamaForCausalLM, ids_BL: Tensor, seen_BL: Tensor | None = None, last_context: int | None = None
) -> Tensor:
    """Logits [B, L, V] of one call, by the rules of the windows."""
    reader, window, L = NaiveReader(model), model.config.window, ids_BL.shape[1]
    seen_BL = torch.ones(ids_BL.shape, dtype=torch.bool) if seen_BL is None else seen_BL
    logits = []
    for at in range(L):
        if last_context is None or last_context >= L:
            if len(reader.seen_local) == window:
                reader.evict(window - window // 2)
        elif at == L - last_context or (at < L - last_context and at % window == 0):
            reader.evict(len(reader.seen_local))
        logits.append(reader.read(ids_BL[:, at], seen_BL[:, at]))
    return torch.stack(logits, dim=1)


def read(model: FotLlamaForCausalLM, parts: list[Tensor], cache: FotCache | None = None, **how: Any) -> list[Tensor]:
    """Logits of each call."""
    logits = []
    for part in parts:
        output = model(part, past_key_values=cache, use_cache=True, **how)
        cache = output.past_key_values
        logits.append(output.logits)
    return logits


def padded(lengths: list[int], L: int) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and mask [B, L] of rows of these lengths, padded on the left."""
    mask_BL = torch.stack([torch.arange(L) >= L - length for length in lengths]).long()
    return tokens(len(lengths), L) * mask_BL, mask_BL


def greedy_loop(model: FotLlamaForCausalLM, ids_BL: Tensor, steps: int) -> Tensor:
    """The new tokens, each from a call with everything before it."""
    for _ in range(steps):
        ids_BL = torch.cat([ids_BL, model(ids_BL, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids_BL[:, -steps:]


@kinds
def test_a_long_input_goes_through_windows_that_keep_half_and_remember_the_rest_at_position_zero(
    changes: dict[str, Any],
) -> None:
    model, ids_BL = focused(**changes).double(), tokens(2, 45)  # float32 differs by 1.2e-5 on some processors
    assert_same(model(ids_BL).logits, naive_logits(model, ids_BL))


@kinds
@pytest.mark.parametrize("L", [5, 6, 7, 23, 38, 44])
def test_with_a_last_context_all_before_it_goes_to_memory_window_by_window(changes: dict[str, Any], L: int) -> None:
    model, ids_BL = focused(**changes), tokens(2, L)
    last_context = min(6, model.config.window)
    expected = naive_logits(model, ids_BL, last_context=last_context)
    assert_same(model(ids_BL, last_context_length=last_context).logits, expected)


@pytest.mark.parametrize("last_context", [1, 6, WINDOW])
@pytest.mark.parametrize("L", [12, 28])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_last_context_of_a_call_or_of_the_configuration_is_used_with_and_without_cache(
    last_context: int, use_cache: bool, L: int
) -> None:
    ids_BL = tokens(2, L)
    expected = naive_logits(focused(), ids_BL, last_context=last_context)
    given, configured = focused(last_context_length=3), focused(last_context_length=last_context)
    assert_same(given(ids_BL, last_context_length=last_context, use_cache=use_cache).logits, expected)
    assert_same(configured(ids_BL, use_cache=use_cache).logits, expected)


@pytest.mark.parametrize("last_context", [None, 6])
@kinds
def test_positions_and_attention_pass_over_padding_in_every_window(
    changes: dict[str, Any], last_context: int | None
) -> None:
    model = focused(**changes)
    last_context = last_context and min(last_context, model.config.window)
    ids_BL, mask_BL = padded([45, 22, 3], 45)
    mask_BL[0, 20:24] = 0
    seen_BL = mask_BL.bool()
    logits = model(ids_BL, attention_mask=mask_BL, last_context_length=last_context).logits
    assert logits.isfinite().all()
    assert_same(logits[seen_BL], naive_logits(model, ids_BL, seen_BL, last_context)[seen_BL])


@pytest.mark.parametrize("changes", [each for each in KINDS.values() if each.get("local_context", WINDOW) % 2 == 0])
def test_padding_of_whole_half_windows_leaves_a_row_what_it_is_alone(changes: dict[str, Any]) -> None:
    model = focused(**changes)
    half = model.config.window // 2
    ids_BL, mask_BL = padded([45, 45 - half, 45 - 2 * half], 45)
    logits = model(ids_BL, attention_mask=mask_BL).logits
    for row in range(3):
        assert_same(logits[row, row * half :], model(ids_BL[row : row + 1, row * half :]).logits[0])


@pytest.mark.parametrize("mem_layers", [[1], [0, 2]])
@pytest.mark.parametrize("rope", ROPES)
def test_what_is_remembered_is_the_key_at_position_zero_under_any_rope(rope: str, mem_layers: list[int]) -> None:
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
def test_what_longrope_turned_by_its_long_factors_is_turned_back_by_them(count: int) -> None:
    model = focused(mem_layers=[0], rope_parameters={**LONGROPE, "original_max_position_embeddings": 12})
    ids_BL = tokens(2, WINDOW)
    cache = model(ids_BL).past_key_values
    cache.evict(count)
    first = model.model.layers[0]
    keys_BLC = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(ids_BL[:, :count])))
    expected = keys_BLC.unflatten(-1, (-1, 8)).transpose(1, 2) * model.model.rotary_emb.attention_scaling
    assert_same(cache.memory.state_dict()["0.keys"], expected)


def test_memory_changes_what_is_read_far_from_it() -> None:
    model, ids_BL = focused(), tokens(1, 60)
    other_BL = torch.cat([tokens(1, 10, seed=1), ids_BL[:, 10:]], dim=1)
    assert (model(ids_BL).logits[:, -1] - model(other_BL).logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("mem_layers", [[1], [0, 1, 2]])
def test_eager_and_sdpa_read_the_same(mem_layers: list[int]) -> None:
    model = focused(mem_layers=mem_layers)
    ids_BL, mask_BL = padded([45, 22], 45)
    expected = model(ids_BL, attention_mask=mask_BL).logits
    model.set_attn_implementation("eager")
    assert_same(model(ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()], expected[mask_BL.bool()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_close_to_single(dtype: torch.dtype) -> None:
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


def test_autocast_reads_close_to_single() -> None:
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


def test_memory_is_held_in_the_number_type_of_the_configuration() -> None:
    exact, model, ids_BL = focused(), focused(mem_dtype="bfloat16"), tokens(2, 45)
    output = model(ids_BL)
    assert {tensor.dtype for tensor in output.past_key_values.memory.state_dict().values()} == {torch.bfloat16}
    assert output.logits.dtype == torch.float32
    expected = exact(ids_BL).logits
    assert 0 < (output.logits - expected).norm() < 0.02 * expected.norm()


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=2), data=st.data()
)
def test_one_call_equals_any_split_into_calls(kind: str, lengths: list[int], data: Any) -> None:
    model = focused(**KINDS[kind])
    ids_BL, mask_BL = padded(lengths, max(lengths))
    first = data.draw(st.integers(max(lengths) - min(lengths) + 1, max(lengths)))  # holds all padding
    cuts = sorted({first, *data.draw(st.lists(st.integers(first, max(lengths)), max_size=8)), max(lengths)})
    whole = model(ids_BL, attention_mask=mask_BL).logits
    cache, logits = None, []
    for start, end in zip([0, *cuts], cuts, strict=False):
        masks = {"full": mask_BL[:, :end], "new": mask_BL[:, start:end], "none": None}
        mask = masks[data.draw(st.sampled_from(sorted(masks))) if start else "full"]
        output = model(ids_BL[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        assert cache.get_seq_length() == end
    assert_same(torch.cat(logits, dim=1)[mask_BL.bool()], whole[mask_BL.bool()])


@kinds
def test_one_call_equals_single_tokens(changes: dict[str, Any]) -> None:
    model, ids_BL = focused(**changes), tokens(2, 40)
    assert_same(torch.cat(read(model, list(ids_BL.split(1, dim=1))), dim=1), model(ids_BL).logits)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    last_context=st.integers(1, WINDOW),
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    short=st.integers(0, 12),
)
def test_with_a_last_context_calls_of_several_tokens_end_as_one_call_does(
    kind: str, last_context: int, sizes: list[int], short: int
) -> None:
    model = focused(**KINDS[kind])
    how = {"last_context_length": min(last_context, model.config.window)}
    ids_BL, mask_BL = padded([sum(sizes), sum(sizes) - min(short, sizes[0] - 1)], sum(sizes))
    whole = model(ids_BL, attention_mask=mask_BL, **how).logits[:, -sizes[-1] :]
    cache, start = None, 0
    for size in sizes:
        end = start + size
        mask = mask_BL[:, :end] if start == 0 else None
        output = model(ids_BL[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True, **how)
        cache, start = output.past_key_values, end
        assert output.logits.shape == (2, size, VOCABULARY)
        assert cache.get_seq_length() == end
    seen_BL = mask_BL[:, -sizes[-1] :].bool()
    assert_same(output.logits[seen_BL], whole[seen_BL])


def test_with_a_last_context_what_was_generated_is_read_again_with_the_next_prompt() -> None:
    model, ids_BL = focused(last_context_length=6), tokens(2, 60)
    parts = [*ids_BL[:, :22].split(22, dim=1), *ids_BL[:, 22:50].split(1, dim=1), ids_BL[:, 50:]]
    assert_same(read(model, parts)[-1], model(ids_BL).logits[:, -10:])


def test_single_tokens_after_a_last_context_see_all_before_them() -> None:
    """A full local context keeps its last tokens, as many as a prompt's last context."""
    model, ids_BL = focused(last_context_length=6), tokens(2, 60)
    got = torch.cat(read(model, [ids_BL[:, :30], *ids_BL[:, 30:].split(1, dim=1)]), dim=1)
    reader, expected = NaiveReader(model), []
    for at in range(60):
        if at in (16, 24):
            reader.evict(len(reader.seen_local))
        elif at >= 30 and len(reader.seen_local) == WINDOW:
            reader.evict(WINDOW - 6)
        expected.append(reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
    assert_same(got, torch.stack(expected, dim=1))


@pytest.mark.parametrize("last_context", [None, 6])
def test_rows_chosen_from_a_cache_go_on_as_these_rows(last_context: int | None) -> None:
    model, rows = focused(last_context_length=last_context), torch.tensor([2, 0, 2, 1])
    ids_BL, mask_BL = padded([45, 20, 30], 45)
    cache = model(ids_BL[:, :26], attention_mask=mask_BL[:, :26]).past_key_values
    cache.batch_select_indices(rows)
    got = model(ids_BL[rows, 26:], past_key_values=cache).logits
    assert_same(got, model(ids_BL, attention_mask=mask_BL).logits[rows, 26:])


def test_a_last_context_asked_for_later_sends_what_was_local_to_memory_first() -> None:
    model, ids_BL = focused(), tokens(2, 50)
    reader, expected = NaiveReader(model), []
    for at in range(50):
        if at in (16, 20, 36, 44):
            reader.evict(8 if at == 16 else len(reader.seen_local))
        expected.append(reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
    cache = model(ids_BL[:, :20]).past_key_values
    got = model(ids_BL[:, 20:], past_key_values=cache, last_context_length=6).logits
    assert_same(got, torch.stack(expected[20:], dim=1))


def test_between_documents_a_flush_starts_a_new_local_context() -> None:
    model = focused()
    documents = [tokens(2, 10, seed=1), tokens(2, 37, seed=2), tokens(2, 12, seed=3)]
    reader, cache = NaiveReader(model), FotCache(model.config)
    for ids_BL in documents:
        [logits] = read(model, [ids_BL], cache)
        for at in range(ids_BL.shape[1]):
            if len(reader.seen_local) == WINDOW:
                reader.evict(WINDOW // 2)
            assert_same(logits[:, at], reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
        cache.flush()
        reader.evict(len(reader.seen_local))
        assert (cache.local_length, len(cache.memory)) == (0, cache.get_seq_length())


def test_with_a_last_context_a_flush_leaves_nothing_to_be_read_again() -> None:
    model, everything = focused(last_context_length=6), torch.ones(1, dtype=torch.bool)
    first, second = tokens(1, 10, seed=1), tokens(1, 5, seed=2)
    cache = model(first).past_key_values
    cache.flush()
    got = model(second, past_key_values=cache).logits
    reader = NaiveReader(model)
    for at in range(10):
        if at == 4:
            reader.evict(4)
        reader.read(first[:, at], everything)
    reader.evict(6)
    assert_same(got, torch.stack([reader.read(second[:, at], everything) for at in range(5)], dim=1))


def test_what_goes_beyond_the_window_of_a_model_without_memory_layers_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, logger = focused(mem_layers=[]), logging.getLogger("fot_model.modeling")
    logger.addHandler(caplog.handler)
    try:
        for ids_BL, how, told in (
            (tokens(2, WINDOW), {}, ""),
            (tokens(2, WINDOW + 1), {}, "read in full attention"),
            (tokens(2, WINDOW + 1), {"past_key_values": FotCache(model.config)}, "are forgotten"),
        ):
            caplog.clear()
            type(logger).warning_once.cache_clear()
            with caplog.at_level(logging.WARNING, logger=logger.name):
                model(ids_BL, **how)
            assert told in caplog.text
            assert bool(told) == ("no memory layers" in caplog.text)
    finally:
        logger.removeHandler(caplog.handler)


def test_without_memory_layers_a_fot_cache_is_a_window_that_forgets() -> None:
    model, ids_BL = focused(mem_layers=[]), tokens(2, 45)
    got = model(ids_BL, past_key_values=FotCache(model.config)).logits
    assert_same(got, naive_logits(model, ids_BL))
    assert_same(model(ids_BL).logits, plain(model)(ids_BL).logits)


def test_a_cache_read_in_inference_mode_is_read_on_outside_of_it() -> None:
    model, ids_BL = focused(), tokens(1, 90)
    with torch.inference_mode():
        cache = model(ids_BL[:, :50]).past_key_values
    assert_same(model(ids_BL[:, 50:], past_key_values=cache).logits, model(ids_BL).logits[:, 50:])


def test_reading_without_a_cache_returns_none_and_the_same_logits() -> None:
    model, ids_BL = focused(), tokens(2, 45)
    cached, uncached = model(ids_BL), model(ids_BL, use_cache=False)
    assert isinstance(cached.past_key_values, FotCache)
    assert uncached.past_key_values is None
    assert torch.equal(cached.logits, uncached.logits)
    model.config.use_cache = False
    assert model(ids_BL).past_key_values is None
    model.config.use_cache = True
    assert model.train()(ids_BL).past_key_values is None


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("L", [9, 45])
def test_kept_logits_are_the_last_or_the_chosen_ones(L: int, use_cache: bool) -> None:
    model, ids_BL = focused(), tokens(2, L)
    how = {"use_cache": use_cache}
    logits = model(ids_BL, **how).logits
    for last in (1, 3, 8, 20, L, 100):
        assert_same(model(ids_BL, logits_to_keep=last, **how).logits, logits[:, -last:], 1e-6)
    chosen = torch.tensor([1, L - 2])
    assert_same(model(ids_BL, logits_to_keep=chosen, **how).logits, logits[:, chosen], 1e-6)


@pytest.mark.parametrize("L", [9, 45])
def test_labels_give_the_loss_of_the_next_tokens(L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    labels_BL = ids_BL.clone()
    labels_BL[0, :4] = -100
    output = model(ids_BL, labels=labels_BL)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
    assert_same(output.loss, expected, 1e-6)


def test_the_number_of_items_in_a_batch_divides_the_loss_of_a_long_input_too() -> None:
    model, ids_BL = focused(), tokens(2, 45)
    mean, divided = (model(ids_BL, labels=ids_BL, **how).loss for how in ({}, {"num_items_in_batch": 11}))
    assert_same(divided, mean * 88 / 11)


@pytest.mark.parametrize("L", [9, 45])
def test_embeddings_are_read_as_the_tokens_they_belong_to(L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    embeddings_BLC = model.get_input_embeddings()(ids_BL)
    assert torch.equal(model(inputs_embeds=embeddings_BLC).logits, model(ids_BL).logits)


@pytest.mark.parametrize("last_context", [None, 6])
def test_hidden_states_are_those_of_the_tokens_given(last_context: int | None) -> None:
    model, ids_BL = focused(last_context_length=last_context), tokens(2, 45)
    cache = model(ids_BL[:, :20]).past_key_values
    again = copy.deepcopy(cache)
    output = model(ids_BL[:, 20:], past_key_values=cache, output_hidden_states=True)
    assert_same(model(ids_BL[:, 20:], past_key_values=again, logits_to_keep=100).logits, output.logits, 1e-6)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 25, 32)] * 4
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids_BL[:, 20:]))
    assert_same(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(ids_BL).hidden_states is None
    whole = model(ids_BL, output_hidden_states=True, logits_to_keep=1)
    assert whole.logits.shape == (2, 1, VOCABULARY)
    assert_same(tuple(state[:, 20:] for state in whole.hidden_states), output.hidden_states)
    model.config.output_hidden_states = True
    assert_same(model(ids_BL, logits_to_keep=1).hidden_states, whole.hidden_states)


@pytest.mark.parametrize("L", [9, 45])
def test_a_tuple_is_returned_where_one_is_asked_for(L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    loss, logits, cache = model(ids_BL, labels=ids_BL, return_dict=False)
    expected = model(ids_BL, labels=ids_BL)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert isinstance(cache, FotCache)


@torch.enable_grad()
def test_a_long_input_trains_all_parameters_through_the_local_context_but_not_through_memory() -> None:
    model, ids_BL = focused(num_key_value_heads=2).train(), tokens(2, 45)
    model(ids_BL, labels=ids_BL).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits_BLV = naive_logits(model, ids_BL)
    torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad != 0).any(), name
        assert_same(got[name], parameter.grad)


@kinds
def test_greedy_generation_with_a_cache_equals_generation_without_over_many_windows(changes: dict[str, Any]) -> None:
    model, ids_BL = focused(**changes), tokens(2, 11)
    generated = model.generate(ids_BL, **{**GREEDY, "max_new_tokens": 30})
    assert torch.equal(generated[:, :11], ids_BL)
    assert generated[:, 11:].tolist() == greedy_loop(model, ids_BL, 30).tolist()


@pytest.mark.parametrize("L", [11, 45])
def test_generate_without_a_cache_is_the_same(L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    assert model.generate(ids_BL, use_cache=False, **GREEDY).tolist() == model.generate(ids_BL, **GREEDY).tolist()


@pytest.mark.parametrize("window", [4, WINDOW])
@pytest.mark.parametrize("L", [11, 45])
def test_beams_with_a_cache_equal_beams_without(L: int, window: int) -> None:
    model, ids_BL = focused(local_context=window), tokens(2, L)
    how = {**GREEDY, "max_new_tokens": 24, "num_beams": 3, "num_return_sequences": 2}
    with_cache, without = (model.generate(ids_BL, use_cache=use, **how) for use in (True, False))
    assert with_cache.shape == (4, L + 24)
    assert with_cache.tolist() == without.tolist()
    greedy_BL = model.generate(ids_BL, **{**GREEDY, "max_new_tokens": 24})
    assert with_cache[::2].tolist() != greedy_BL.tolist()


def test_beams_of_padded_prompts_are_those_of_each_row_alone() -> None:
    model = focused()
    ids_BL, mask_BL = padded([8, 3], 8)
    how = {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    together = model.generate(ids_BL, attention_mask=mask_BL, **how)
    for row, length in enumerate([8, 3]):
        alone = model.generate(ids_BL[row : row + 1, -length:], **how)
        assert together[row, -8 - length :].tolist() == alone[0].tolist()


def test_sampling_is_reproducible_from_its_seed_with_and_without_a_cache() -> None:
    model, ids_BL = focused(), tokens(2, 11)

    def sampled(seed: int, **how: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(ids_BL, **{**GREEDY, "do_sample": True, "top_k": 5, **how}).tolist()

    assert sampled(1) == sampled(1) == sampled(1, use_cache=False)
    assert sampled(1) != sampled(2)


def test_sequences_returned_for_a_prompt_are_samples_of_their_own() -> None:
    model, ids_BL = focused(), tokens(2, 20)
    torch.manual_seed(0)
    samples = model.generate(ids_BL, **{**GREEDY, "do_sample": True, "num_return_sequences": 3})
    assert samples.shape == (6, 60)
    assert torch.equal(samples[:, :20], ids_BL.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in samples.tolist()}) == 6


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token() -> None:
    model, ids_BL, streamer = focused(), tokens(1, 11), Collected()
    generated = model.generate(ids_BL, streamer=streamer, **GREEDY)
    assert (streamer.tokens, streamer.ended) == (generated[0].tolist(), True)


@pytest.mark.parametrize("mask_given", [True, False])
def test_left_padded_prompts_are_continued_as_each_alone_within_the_window(mask_given: bool) -> None:
    model = focused()
    ids_BL, mask_BL = padded([8, 3, 5], 8)
    how = {**GREEDY, "max_new_tokens": 8}
    together = model.generate(ids_BL, **({"attention_mask": mask_BL} if mask_given else {}), **how)
    for row, length in enumerate([8, 3, 5]):
        alone = model.generate(ids_BL[row : row + 1, -length:], **how)
        assert together[row, -8 - length :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("last_context", [None, 6])
def test_left_padded_prompts_are_continued_far_past_the_window(last_context: int | None) -> None:
    model = focused(last_context_length=last_context)
    ids_BL, mask_BL = padded([37, 3], 37)
    output = model.generate(ids_BL, attention_mask=mask_BL, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.stack(output.logits).isfinite().all()
    assert output.past_key_values.get_seq_length() == 37 + 39
    if last_context is None:
        full_mask_BL = torch.cat([mask_BL, torch.ones(2, 39, dtype=torch.long)], dim=1)
        expected = naive_logits(model, output.sequences[:, :-1], full_mask_BL.bool())
        assert_same(torch.stack(output.logits, dim=1), expected[:, 36:])


@pytest.mark.parametrize("last_context", [None, 6])
@pytest.mark.parametrize("full", [True, False])
def test_a_conversation_continued_from_its_cache_goes_on_as_read_anew(full: bool, last_context: int | None) -> None:
    model = focused(last_context_length=last_context)
    first = model.generate(tokens(2, 21), return_dict_in_generate=True, **GREEDY)
    ids_BL = torch.cat([first.sequences, tokens(2, 9, seed=1)], dim=1)
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    anew = model.generate(ids_BL, **GREEDY)
    if full:
        assert model.generate(ids_BL, past_key_values=cache, **GREEDY).tolist() == anew.tolist()
    else:
        new_BL, mask_BL = ids_BL[:, cache.get_seq_length() :], torch.ones_like(ids_BL)
        continued = model.generate(new_BL, attention_mask=mask_BL, past_key_values=cache, **GREEDY)
        assert continued.tolist() == anew[:, -new_BL.shape[1] - 40 :].tolist()


def test_generation_uses_the_memory_it_is_given() -> None:
    model, ids_BL = focused(), tokens(2, 21)
    expected = model.generate(ids_BL, **GREEDY).tolist()
    outcomes = []
    for memory in (TopKMemory(1000), TopKMemory(1), DenseMemory()):
        cache = FotCache(model.config, memory)
        outcomes.append(model.generate(ids_BL, past_key_values=cache, **GREEDY).tolist())
        assert cache.memory is memory
        assert len(memory) > 2 * WINDOW
    assert [outcome == expected for outcome in outcomes] == [True, False, True]


class Lengths(LogitsProcessor):
    """Notes the local context's length after every step."""

    def __init__(self, cache: FotCache) -> None:
        self.cache = cache
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.lengths.append(self.cache.local_length)
        return scores


@pytest.mark.parametrize(("last_context", "kept"), [(None, 8), (6, 6), (1, 1), (WINDOW, WINDOW - 1)])
def test_the_local_context_keeps_its_half_or_last_context_all_through_generation(
    last_context: int | None, kept: int
) -> None:
    model = focused(last_context_length=last_context)
    cache = FotCache(model.config)
    noted = Lengths(cache)
    model.generate(tokens(1, 21), past_key_values=cache, logits_processor=[noted], **{**GREEDY, "max_new_tokens": 60})
    assert max(noted.lengths) == WINDOW
    assert min(noted.lengths[1:]) == kept + 1


def test_prompts_may_be_prefilled_in_chunks() -> None:
    model, ids_BL = focused(), tokens(2, 45)
    chunked = model.generate(ids_BL, prefill_chunk_size=7, **GREEDY)
    assert chunked.tolist() == model.generate(ids_BL, **GREEDY).tolist()


def test_embeddings_are_continued_as_the_tokens_they_belong_to() -> None:
    model, ids_BL = focused(), tokens(2, 45)
    continued = model.generate(inputs_embeds=model.get_input_embeddings()(ids_BL), **GREEDY)
    assert continued.tolist() == model.generate(ids_BL, **GREEDY)[:, 45:].tolist()


def test_assisted_generation_is_refused_because_what_went_to_memory_cannot_be_taken_back() -> None:
    model, ids_BL = focused(), tokens(1, 10).repeat(1, 4)
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids_BL, prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids_BL, assistant_model=focused(num_hidden_layers=2), **GREEDY)


def test_generation_past_the_window_does_not_warn_of_a_maximum_length(caplog: pytest.LogCaptureFixture) -> None:
    model, ids_BL, name = focused(), tokens(1, 11), "transformers.generation.stopping_criteria"
    logger: Any = logging.getLogger(name)
    type(logger).warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger=name):
            model.generate(ids_BL, **GREEDY)
            assert caplog.messages == []
            plain(model).generate(ids_BL, **GREEDY)
            assert "predefined maximum length" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_model_that_recomputes_activations_cannot_read_with_memory() -> None:
    model = focused().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing: call model\.eval\(\)"):
        model(tokens(1, 45))
    assert model.eval()(tokens(1, 45)).logits.isfinite().all()


@pytest.mark.parametrize(
    "how", [{}, {"plan": torch.tensor([[-1], [0]])}, {"document_ids": torch.arange(18).view(2, 9)}], ids=str
)
@pytest.mark.parametrize("said_in", ["call", "configuration"])
def test_attention_weights_are_refused_where_memory_layers_would_have_none(said_in: str, how: dict[str, Any]) -> None:
    model = focused()
    model.set_attn_implementation("eager")
    if said_in == "configuration":
        model.config.output_attentions = True
    else:
        how = {**how, "output_attentions": True}
    with pytest.raises(ValueError, match=r"output_attentions .*attention_mass"):
        model(tokens(2, 9), **how)
    plain_model = focused(mem_layers=[])
    plain_model.set_attn_implementation("eager")
    assert len(plain_model(tokens(2, 9), output_attentions=True).attentions) == 3


def test_a_filled_cache_of_another_class_is_refused() -> None:
    model, ids_BL = focused(), tokens(1, 9)
    filled = plain(model)(ids_BL, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache: give a FotCache\(model.config\)"):
        model(ids_BL, past_key_values=filled)


@pytest.mark.parametrize("flushed", [True, False])
def test_a_cache_of_other_rows_is_refused_with_the_way_to_repeat_it(flushed: bool) -> None:
    model = focused()
    cache = model(tokens(1, 9)).past_key_values
    if flushed:
        cache.flush()
    with pytest.raises(ValueError, match=r"holds 1 rows, the input has 3: .*batch_repeat_interleave\(n\)"):
        model(tokens(3, 4), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert model(tokens(3, 4), past_key_values=cache).logits.shape == (3, 4, VOCABULARY)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused_in_generation(implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"cache_implementation '{implementation}'.*FotCache"):
        focused().generate(tokens(1, 9), cache_implementation=implementation, **GREEDY)


@pytest.mark.parametrize("length", [0, -1, WINDOW + 1])
def test_a_last_context_that_the_window_cannot_hold_is_refused(length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"last_context_length {length}: the local context holds 1 to {WINDOW} tokens"
    ):
        focused()(tokens(1, 45), last_context_length=length)
    with pytest.raises(ValueError, match=f"last_context_length {length}"):
        focused(last_context_length=length)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (2, 12), (1, 9), (3, 9)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, int], use_cache: bool) -> None:
    with pytest.raises(ValueError, match=r"attention_mask \[.*\]: give \[2, 9\]"):
        focused()(tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.long), use_cache=use_cache)


def test_a_mask_that_is_neither_of_the_new_tokens_nor_of_all_is_refused() -> None:
    model = focused()
    cache = model(tokens(2, 9)).past_key_values
    for length in (3, 5, 12, 14):
        with pytest.raises(ValueError, match="attention_mask"):
            model(tokens(2, 4), attention_mask=torch.ones(2, length, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 9


HIDDEN: dict[str, list[slice]] = {  # what the mask of a second call hides of the first call's 9 or 30 tokens, by row
    "what ended a shorter row": [slice(0), slice(-3, None)],
    "the first tokens": [slice(0, 3), slice(0)],
    "some between, and nearly all": [slice(4, 6), slice(1, -1)],
}


@kinds
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("past", [9, 30])
def test_a_mask_hides_what_was_read_before_from_what_comes(
    past: int, hidden: list[slice], changes: dict[str, Any]
) -> None:
    model, ids_BL = focused(**changes), tokens(2, past + 20)
    mask_BL = torch.ones_like(ids_BL)
    for row, where in enumerate(hidden):
        mask_BL[row, :past][where] = 0
    cache, reader, expected = model(ids_BL[:, :past]).past_key_values, NaiveReader(model), []
    window = model.config.window
    for at in range(past + 20):
        if at == past:
            left = len(reader.seen_memory)
            reader.seen_memory = list(mask_BL[:, :left].bool().unbind(1))
            reader.seen_local = list(mask_BL[:, left:past].bool().unbind(1))
        if len(reader.seen_local) == window:
            reader.evict(window - window // 2)
        expected.append(reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
    got = [model(ids_BL[:, past : past + 4], attention_mask=mask_BL[:, : past + 4], past_key_values=cache).logits]
    got += read(model, [ids_BL[:, past + 4 :]], cache, attention_mask=mask_BL)
    assert_same(torch.cat(got, dim=1), torch.stack(expected[past:], dim=1), 5e-5)


@pytest.mark.parametrize("last_context", [None, 6])
@pytest.mark.parametrize("past", [6, 30])
def test_a_second_turn_whose_mask_hides_earlier_padding_is_as_one_call_and_as_a_llama(
    past: int, last_context: int | None
) -> None:
    """The shorter of two answers is padded at its end, which the mask of the next turn says."""
    model, ids_BL = focused(last_context_length=last_context), tokens(2, past + 8)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, past - 3 : past] = 0
    cache = model(ids_BL[:, :past]).past_key_values
    got = model(ids_BL[:, past:], attention_mask=mask_BL, past_key_values=cache).logits
    assert_same(got, model(ids_BL, attention_mask=mask_BL).logits[:, past:])
    if past + 8 <= WINDOW and last_context is None:
        alone_1L = ids_BL[1:, mask_BL[1].bool()]
        assert_same(got[1:], plain(model)(alone_1L).logits[:, -8:])


def test_what_was_padding_when_it_was_read_is_not_seen_later() -> None:
    model = focused()
    ids_BL, mask_BL = padded([30, 22], 30)
    for past in (12, 30):
        cache = model(ids_BL[:, :past], attention_mask=mask_BL[:, :past]).past_key_values
        with pytest.raises(ValueError, match="were padding when they were read: give the mask"):
            model(tokens(2, 3), attention_mask=torch.ones(2, past + 3, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == past


@pytest.mark.parametrize("ids", [[[1, 2, 3], [4, 5]], [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]], ids=repr)
def test_rows_of_unequal_lengths_are_refused_with_the_way_to_pad_them(ids: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"input_ids is a list of rows of \[2, 3\] tokens.*left.*attention_mask"):
        focused()(ids)


def test_a_batch_padded_on_the_left_is_refused_without_its_mask() -> None:
    model = focused(pad_token_id=0)
    ids_BL, mask_BL = padded([9, 6], 9)
    with pytest.raises(ValueError, match=r"rows \[1\] begin with padding \(token 0\).*attention_mask"):
        model(ids_BL)
    model(ids_BL, attention_mask=mask_BL)
    model(ids_BL[1:])
    for changed in (focused(pad_token_id=0, bos_token_id=0), focused(pad_token_id=None), focused(pad_token_id=3)):
        changed(ids_BL)
    cache = model(tokens(2, 9)).past_key_values
    model(ids_BL, past_key_values=cache)


def test_a_mask_of_ones_says_that_padding_tokens_are_text_in_generation_too() -> None:
    model, ids_BL = focused(pad_token_id=0), tokens(2, 9)
    ids_BL[0, :2] = 0
    outcomes = [
        model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=use_cache, **GREEDY).tolist()
        for use_cache in (True, False)
    ]
    assert outcomes[0] == outcomes[1]


def test_an_input_without_tokens_is_refused() -> None:
    model = focused()
    for cache in (None, model(tokens(2, 9)).past_key_values):
        with pytest.raises(ValueError, match="no tokens"):
            model(tokens(2, 0), past_key_values=cache)


def test_both_or_neither_of_tokens_and_embeddings_are_refused() -> None:
    model, ids_BL = focused(), tokens(1, 4)
    for given_ids in ({}, {"input_ids": ids_BL, "inputs_embeds": model.get_input_embeddings()(ids_BL)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given_ids)


@pytest.fixture(params=["rope", "nope", "theta1e6"])
def conformance(request: pytest.FixtureRequest) -> Path:
    return CONFORMANCE / f"longllama_{request.param}"


@pytest.mark.parametrize("load", [FotLlamaForCausalLM, AutoModelForCausalLM])
def test_a_longllama_checkpoint_gives_what_its_reference_implementation_gives(load: Any, conformance: Path) -> None:
    model, expected = load.from_pretrained(conformance).eval(), load_file(conformance / "expected.safetensors")
    assert isinstance(model, FotLlamaForCausalLM)
    ids_BL, mask_BL = expected["input_ids"], expected["padded_attention_mask"]
    calls: dict[str, Callable[[], Any]] = {
        "logits_no_cache": lambda: model(ids_BL, use_cache=False),
        "logits_cache": lambda: model(ids_BL, use_cache=True),
        "logits_last24": lambda: model(ids_BL, last_context_length=24),
        "logits_short": lambda: model(ids_BL[:, :20]),
    }
    for name, call in calls.items():
        assert_same(call().logits, expected[name], 1e-4)
    padded_BL, positions_BL = expected["padded_input_ids"], mask_BL.cumsum(1) - 1
    logits = model(padded_BL, attention_mask=mask_BL, position_ids=positions_BL).logits
    assert_same(logits[mask_BL.bool()], expected["padded_logits"][mask_BL.bool()], 1e-4)


@pytest.mark.parametrize("load", [FotLlamaForCausalLM, AutoModelForCausalLM])
def test_a_longllama_checkpoint_continues_as_its_reference_implementation_does(load: Any, conformance: Path) -> None:
    model, expected = load.from_pretrained(conformance).eval(), load_file(conformance / "expected.safetensors")
    ids_BL, greedy_BL = expected["input_ids"], expected["greedy"]
    generated = model.generate(ids_BL, last_context_length=16, **{**GREEDY, "max_new_tokens": greedy_BL.shape[1]})
    assert generated[:, ids_BL.shape[1] :].tolist() == greedy_BL.tolist()


def test_reading_a_plan_of_positives_is_training_on_it() -> None:
    model, ids_RL = focused(mem_layers=[0, 2], num_key_value_heads=4), tokens(4, 9)
    trained = model(ids_RL, plan=longllama_plan(4, 3)).logits
    cache = FotCache(model.config)
    for row in range(4):
        [logits] = read(model, [ids_RL[row : row + 1]], cache)
        assert_same(logits[0], trained[row])
        cache.flush()


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_model_cast_to_16_bits_turns_keys_back_by_the_angles_that_turned_them(cast: str) -> None:
    model = focused(max_position_embeddings=2048, num_hidden_layers=1, mem_layers=[0], head_dim=32)
    exact = model.model.rotary_emb.inv_freq.clone()
    getattr(model, cast)()
    assert model.dtype != torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert torch.equal(FotCache(model.config)._rope.inv_freq, exact)


def test_a_call_without_last_context_length_settles_what_was_read_before_it() -> None:
    model, ids_BL = focused(), tokens(2, 40)
    cache = model(ids_BL[:, :20], last_context_length=4).past_key_values
    model(ids_BL[:, 20:30], past_key_values=cache)
    assert cache.replay() is None
    model(ids_BL[:, 30:], past_key_values=cache, last_context_length=4)
    assert cache.get_seq_length() == 40
    cache.flush()
    assert len(cache.memory) == 40


@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@torch.enable_grad()
def test_a_loss_is_differentiated_through_a_long_reading(num_key_value_heads: int) -> None:
    model, ids_BL = focused(num_key_value_heads=num_key_value_heads), tokens(2, 40)
    model(ids_BL, labels=ids_BL).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"mem_layers": [0]}])
def test_a_cache_of_a_model_with_other_layers_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"other layers.*FotCache\(model.config\)"):
        focused()(tokens(2, 9), past_key_values=FotCache(focused(**changes).config))


def test_a_question_without_the_text_before_it_is_answered_with_what_generate_wants() -> None:
    model, ids_BL = focused(), tokens(1, 20)
    cache = model(ids_BL).past_key_values
    with pytest.raises(ValueError, match="put the 20 that the cache has read before"):
        model.generate(ids_BL[:, :5], past_key_values=cache, **GREEDY)
