"""What is read, against a reader that goes token by token and keeps every key.

Shapes: B batch, L tokens, M keys, H query heads, Hk key/value heads, D head size, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import FotCache, FotLlamaForCausalLM

WINDOW = 16
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models that read in windows of 16 tokens."""
    return partial(focused, num_key_value_heads=2, max_position_embeddings=WINDOW)


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


def test_a_long_input_goes_through_windows_that_keep_half_and_remember_the_rest_at_position_zero(
    focused,
    tokens,
    assert_same,
    kind: dict[str, Any],
) -> None:
    model, ids_BL = focused(**kind).double(), tokens(2, 45)  # float32 differs by 1.2e-5 on some processors
    assert_same(model(ids_BL).logits, naive_logits(model, ids_BL))


@pytest.mark.parametrize("L", [23, 44])
def test_with_a_last_context_all_before_it_goes_to_memory_window_by_window(
    focused, tokens, assert_same, kind: dict[str, Any], L: int
) -> None:
    model, ids_BL = focused(**kind), tokens(2, L)
    last_context = min(6, model.config.window)
    expected = naive_logits(model, ids_BL, last_context=last_context)
    assert_same(model(ids_BL, last_context_length=last_context).logits, expected)


@pytest.mark.parametrize("window", [WINDOW, 7, 2])
@pytest.mark.parametrize("L", [5, 6, 7, 38])
def test_a_last_context_may_be_longer_or_shorter_than_the_input_by_any_part_of_a_window(
    focused, tokens, assert_same, window: int, L: int
) -> None:
    model, ids_BL = focused(local_context=window), tokens(2, L)
    last_context = min(6, window)
    expected = naive_logits(model, ids_BL, last_context=last_context)
    assert_same(model(ids_BL, last_context_length=last_context).logits, expected)


@pytest.mark.parametrize("last_context", [1, 6, WINDOW])
@pytest.mark.parametrize("L", [12, 28])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_last_context_of_a_call_or_of_the_configuration_is_used_with_and_without_cache(
    focused, tokens, assert_same, last_context: int, use_cache: bool, L: int
) -> None:
    ids_BL = tokens(2, L)
    expected = naive_logits(focused(), ids_BL, last_context=last_context)
    given, configured = focused(last_context_length=3), focused(last_context_length=last_context)
    assert_same(given(ids_BL, last_context_length=last_context, use_cache=use_cache).logits, expected)
    assert_same(configured(ids_BL, use_cache=use_cache).logits, expected)


@pytest.mark.parametrize("last_context", [None, 6])
def test_positions_and_attention_pass_over_padding_in_every_window(
    focused, padded, assert_same, kind: dict[str, Any], last_context: int | None
) -> None:
    model = focused(**kind)
    last_context = last_context and min(last_context, model.config.window)
    ids_BL, mask_BL = padded([45, 22, 3], 45)
    mask_BL[0, 20:24] = 0
    seen_BL = mask_BL.bool()
    logits = model(ids_BL, attention_mask=mask_BL, last_context_length=last_context).logits
    assert logits.isfinite().all()
    assert_same(logits[seen_BL], naive_logits(model, ids_BL, seen_BL, last_context)[seen_BL])


def test_padding_of_whole_half_windows_leaves_a_row_what_it_is_alone(
    focused, padded, assert_same, kind: dict[str, Any]
) -> None:
    model = focused(**kind)
    half = model.config.window - model.config.window // 2  # what goes to memory at once
    ids_BL, mask_BL = padded([45, 45 - half, 45 - 2 * half], 45)
    logits = model(ids_BL, attention_mask=mask_BL).logits
    for row in range(3):
        assert_same(logits[row, row * half :], model(ids_BL[row : row + 1, row * half :]).logits[0])


def test_memory_changes_what_is_read_far_from_it(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(1, 60)
    other_BL = torch.cat([tokens(1, 10, seed=1), ids_BL[:, 10:]], dim=1)
    assert (model(ids_BL).logits[:, -1] - model(other_BL).logits[:, -1]).abs().max() > 1e-3


def test_single_tokens_after_a_last_context_see_all_before_them(focused, tokens, read_parts, assert_same) -> None:
    """A full local context keeps its last tokens, as many as a prompt's last context."""
    model, ids_BL = focused(last_context_length=6), tokens(2, 60)
    got = torch.cat(read_parts(model, [ids_BL[:, :30], *ids_BL[:, 30:].split(1, dim=1)]), dim=1)
    reader, expected = NaiveReader(model), []
    for at in range(60):
        if at in (16, 24):
            reader.evict(len(reader.seen_local))
        elif at >= 30 and len(reader.seen_local) == WINDOW:
            reader.evict(WINDOW - 6)
        expected.append(reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
    assert_same(got, torch.stack(expected, dim=1))


def test_a_last_context_asked_for_later_sends_what_was_local_to_memory_first(focused, tokens, assert_same) -> None:
    model, ids_BL = focused(), tokens(2, 50)
    reader, expected = NaiveReader(model), []
    for at in range(50):
        if at in (16, 20, 36, 44):
            reader.evict(8 if at == 16 else len(reader.seen_local))
        expected.append(reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
    cache = model(ids_BL[:, :20]).past_key_values
    got = model(ids_BL[:, 20:], past_key_values=cache, last_context_length=6).logits
    assert_same(got, torch.stack(expected[20:], dim=1))


def test_between_documents_a_flush_starts_a_new_local_context(focused, tokens, read_parts, assert_same) -> None:
    model = focused()
    documents = [tokens(2, 10, seed=1), tokens(2, 37, seed=2), tokens(2, 12, seed=3)]
    reader, cache = NaiveReader(model), FotCache(model.config)
    for ids_BL in documents:
        [logits] = read_parts(model, [ids_BL], cache)
        for at in range(ids_BL.shape[1]):
            if len(reader.seen_local) == WINDOW:
                reader.evict(WINDOW // 2)
            assert_same(logits[:, at], reader.read(ids_BL[:, at], torch.ones(2, dtype=torch.bool)))
        cache.flush()
        reader.evict(len(reader.seen_local))
        assert (cache.local_length, len(cache.memory)) == (0, cache.get_seq_length())


def test_with_a_last_context_a_flush_leaves_nothing_to_be_read_again(focused, tokens, assert_same) -> None:
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


def test_without_memory_layers_a_fot_cache_is_a_window_that_forgets(focused, plain, tokens, assert_same) -> None:
    model, ids_BL = focused(mem_layers=[]), tokens(2, 45)
    got = model(ids_BL, past_key_values=FotCache(model.config)).logits
    assert_same(got, naive_logits(model, ids_BL))
    assert_same(model(ids_BL).logits, plain(model)(ids_BL).logits)


@torch.enable_grad()
def test_a_long_input_trains_all_parameters_through_the_local_context_but_not_through_memory(
    focused, tokens, assert_same
) -> None:
    model, ids_BL = focused(num_key_value_heads=2).train(), tokens(2, 45)
    model(ids_BL, labels=ids_BL).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits_BLV = naive_logits(model, ids_BL)
    torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad != 0).any(), name
        assert_same(got[name], parameter.grad)


@pytest.mark.parametrize("last_context", [None, 6])
def test_left_padded_prompts_are_continued_far_past_the_window(
    focused, padded, assert_same, last_context: int | None
) -> None:
    model = focused(last_context_length=last_context)
    ids_BL, mask_BL = padded([37, 3], 37)
    output = model.generate(ids_BL, attention_mask=mask_BL, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.stack(output.logits).isfinite().all()
    assert output.past_key_values.get_seq_length() == 37 + 39
    if last_context is None:
        full_mask_BL = torch.cat([mask_BL, torch.ones(2, 39, dtype=torch.long)], dim=1)
        expected = naive_logits(model, output.sequences[:, :-1], full_mask_BL.bool())
        assert_same(torch.stack(output.logits, dim=1), expected[:, 36:])


HIDDEN = [  # what the mask of a second call hides of the first call's 9 or 30 tokens, by row
    slice(0),
    slice(-3, None),  # what ended a shorter row
    slice(0, 3),
    slice(4, 6),
    slice(1, -1),
]


@pytest.mark.parametrize("past", [9, 30])
def test_a_mask_hides_what_was_read_before_from_what_comes(
    focused, tokens, read_parts, assert_same, past: int, kind: dict[str, Any]
) -> None:
    model, ids_BL = focused(**kind), tokens(len(HIDDEN), past + 20)
    mask_BL = torch.ones_like(ids_BL)
    for row, where in enumerate(HIDDEN):
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
        expected.append(reader.read(ids_BL[:, at], torch.ones(len(HIDDEN), dtype=torch.bool)))
    got = [model(ids_BL[:, past : past + 4], attention_mask=mask_BL[:, : past + 4], past_key_values=cache).logits]
    got += read_parts(model, [ids_BL[:, past + 4 :]], cache, attention_mask=mask_BL)
    assert_same(torch.cat(got, dim=1), torch.stack(expected[past:], dim=1), 5e-5)
