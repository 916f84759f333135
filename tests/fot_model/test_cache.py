"""Shapes: B batch, L tokens, Hk key/value heads, D head size."""

import copy
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model import DenseMemory, FotCache, FotLlamaConfig, FotLlamaForCausalLM, TopKMemory
from fot_model.cache_file import sampled_fingerprint

VOCABULARY, WINDOW = 40, 8
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "local_context": WINDOW,
    "mem_layers": [1],
}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 3.0, 4.0, 5.0]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    "yarn with an attention factor": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "attention_factor": 1.7,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "short_factor": SHORT,
        "long_factor": LONG,
    },
}  # fmt: skip
SETUPS: dict[str, tuple[dict[str, Any], bool]] = {  # the configuration's changes; with padding?
    "plain": ({}, False),
    "padded": ({}, True),
    "last context": ({"last_context_length": 4}, False),
    "padded last context": ({"last_context_length": 4}, True),
    "bfloat16 memory": ({"mem_dtype": "bfloat16"}, True),
    "no positions": ({"mem_positionals": False}, False),
    "yarn": ({"rope_parameters": ROPES["yarn"], "mem_layers": [0, 2]}, True),
}
setups = pytest.mark.parametrize(("changes", "padded"), SETUPS.values(), ids=SETUPS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def focused(seed: int = 0, **changes: Any) -> FotLlamaForCausalLM:
    """A random model in which every layer, norm and position matters."""
    torch.manual_seed(seed)
    model = FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, "initializer_range": 0.2, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


@lru_cache
def focused_with(rope: str, mem_positionals: bool, mem_layers: tuple[int, ...]) -> FotLlamaForCausalLM:
    return focused(
        rope_parameters=ROPES[rope], mem_positionals=mem_positionals, mem_layers=list(mem_layers), local_context=64
    )


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(padded: bool, L: int) -> Tensor | None:
    """Three rows' mask [3, L]: no padding, three tokens, nearly all."""
    if not padded:
        return None
    return torch.arange(L) >= torch.tensor([[0], [3], [L - 2]])


def read(model: Any, cache: FotCache, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Logits [B, L, V] of what comes next."""
    logits = model(ids_BL, attention_mask=None if mask_BL is None else mask_BL.long(), past_key_values=cache).logits
    return logits if mask_BL is None else logits.where(mask_BL[:, :, None], 0)


def fresh(model: Any, *texts: Tensor, mask: Tensor | None = None, memory: DenseMemory | None = None) -> FotCache:
    """A cache that has read these texts, the first with this mask."""
    cache = FotCache(model.config, memory)
    for at, ids_BL in enumerate(texts):
        read(model, cache, ids_BL, None if at else mask)
    return cache


def goes_on(model: Any, cache: FotCache) -> list[Tensor]:
    """Logits of a question, two tokens of an answer one by one, and another question."""
    assert cache.rows is not None
    questions = [tokens(1, length, seed=50 + length).expand(cache.rows, -1) for length in (5, 1, 1, 9)]
    return [read(model, cache, question) for question in questions]


def assert_same(got: Any, wanted: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


class Projections:
    """What the layers' k_proj and v_proj gave, [B, Hk, L, D] by layer, of all tokens since the start."""

    def __init__(self, model: FotLlamaForCausalLM) -> None:
        self.parts: dict[tuple[str, int], list[Tensor]] = {}
        self.hooks = []
        for number, layer in enumerate(model.model.layers):
            for name in ("k_proj", "v_proj"):
                note = partial(self._note, (name, number), layer.self_attn.head_dim)
                self.hooks.append(getattr(layer.self_attn, name).register_forward_hook(note))

    def _note(self, key: tuple[str, int], D: int, _module: Any, _args: Any, out_BLC: Tensor) -> None:
        self.parts.setdefault(key, []).append(out_BLC.unflatten(2, (-1, D)).transpose(1, 2))

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys, without positions, and values."""
        keys, values = (torch.cat(self.parts[name, layer], dim=2) for name in ("k_proj", "v_proj"))
        return keys, values

    def __enter__(self) -> "Projections":
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def scale(model: Any, layer: int) -> float:
    """What the layer's kind of RoPE multiplies keys with."""
    config = model.config
    turned = config.mem_positionals or layer not in config.mem_layers
    return model.model.rotary_emb.attention_scaling if turned else 1.0


def rotated(model: Any, layer: int, keys_BHkLD: Tensor, positions_BL: Tensor) -> Tensor:
    """The layer's keys at these positions."""
    if layer in model.config.mem_layers and not model.config.mem_positionals:
        return keys_BHkLD
    return apply_rotary_pos_emb(keys_BHkLD, keys_BHkLD, *model.model.rotary_emb(keys_BHkLD, positions_BL))[1]


def assert_holds(cache: FotCache, model: Any, projections: Projections, seen_BL: Tensor, left: int) -> None:
    """The cache holds the first `left` tokens in memory as position 0 and the others as a local context of their own,
    and whatever is no padding is right in it."""
    B, L = seen_BL.shape
    assert (cache.get_seq_length(), cache.local_length, cache.get_query_offset()) == (L, L - left, L - left)
    state = cache.memory.state_dict()
    assert {int(name.split(".")[0]) for name in state} == (set(model.config.mem_layers) if left else set())
    assert len(cache.memory) == (left if model.config.mem_layers else 0)
    positions_BL = (seen_BL[:, left:].long().cumsum(1) - 1).clamp(min=0)
    if cache._lead_B1 is not None:
        positions_BL = positions_BL + cache._lead_B1
    gone, local = seen_BL[:, None, :left, None], seen_BL[:, None, left:, None]
    for number, layer in enumerate(cache.layers):
        keys, values = projections.of(number)
        if number in model.config.mem_layers and left:
            found = state.get(f"{number}.seen", torch.ones(B, 1, left, 1, dtype=torch.bool))
            assert torch.equal(found, gone)
            assert_same(state[f"{number}.keys"] * gone, keys[:, :, :left] * scale(model, number) * gone)
            assert_same(state[f"{number}.values"] * gone, values[:, :, :left] * gone, 0)
        if left < L:
            assert_same(layer.keys * local, rotated(model, number, keys[:, :, left:], positions_BL) * local)
            assert_same(layer.values * local, values[:, :, left:] * local, 0)
            assert layer.keys.isfinite().all()


ropes = pytest.mark.parametrize("rope", ROPES)


@ropes
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("mem_layers", [(), (1,), (0, 2)], ids=str)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_what_leaves_the_local_context_is_remembered_as_position_zero_and_what_stays_starts_at_zero(
    rope: str, mem_positionals: bool, mem_layers: tuple[int, ...], data: Any
) -> None:
    model = focused_with(rope, mem_positionals, mem_layers)
    cache, seen_BL, left = FotCache(model.config), torch.ones(3, 0, dtype=torch.bool), 0
    with Projections(model) as projections:
        for step in range(data.draw(st.integers(1, 4), label="steps")):
            size = data.draw(st.integers(1, 6), label="read")
            bits = data.draw(st.none() | st.lists(st.booleans(), min_size=3 * size, max_size=3 * size), label="seen")
            mask_BL = None if bits is None else torch.tensor(bits).view(3, size)
            read(model, cache, tokens(3, size, seed=step), mask_BL)
            new_BL = torch.ones(3, size, dtype=torch.bool) if mask_BL is None else mask_BL
            seen_BL = torch.cat([seen_BL, new_BL], dim=1)
            count = data.draw(st.integers(0, cache.local_length), label="evict")
            cache.evict(count)
            left += count
            assert_holds(cache, model, projections, seen_BL, left)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {**ROPES["longrope"], "original_max_position_embeddings": 10}},
        {"rope_parameters": ROPES["dynamic"], "max_position_embeddings": 10},
    ],
    ids=["longrope", "dynamic"],
)
@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([16], [4, 4]), ([16], [8, 8])],
    ids=["some", "all"],
)
def test_frequencies_that_depend_on_the_length_are_turned_back_as_they_were_turned(
    changes: dict[str, Any], sizes: list[int], counts: list[int]
) -> None:
    model = focused(**changes, local_context=16)
    cache = FotCache(model.config)
    with Projections(model) as projections:
        for ids_BL in tokens(2, 16).split(sizes, dim=1):
            read(model, cache, ids_BL)
        for count in counts:
            cache.evict(count)
        for number in model.config.mem_layers:
            wanted = projections.of(number)[0][:, :, : sum(counts)] * scale(model, number)
            assert_same(cache.memory.state_dict()[f"{number}.keys"], wanted)


@pytest.mark.parametrize("pads", [1, 4])
def test_a_padded_row_goes_on_as_if_read_alone_without_padding(pads: int) -> None:
    model = focused(local_context=32, mem_layers=[0, 2])
    ids_BL, new_BL = tokens(2, 12), tokens(2, 7, seed=1)
    mask_BL = torch.arange(12) >= torch.tensor([[pads], [0]])
    together = fresh(model, ids_BL, mask=mask_BL)
    together.evict(6)
    logits = read(model, together, new_BL)
    for row, start in ((0, pads), (1, 0)):
        alone = fresh(model, ids_BL[[row], start:])
        alone.evict(6 - start)
        assert_same(logits[[row]], read(model, alone, new_BL[[row]]))


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), padded=st.booleans(), kept=st.sampled_from([None, 3])
)
@settings(deadline=None, max_examples=15)
def test_the_length_counts_everything_read(sizes: list[int], padded: bool, kept: int | None) -> None:
    model = focused(last_context_length=kept)
    cache = FotCache(model.config)
    assert (cache.get_seq_length(), cache.rows) == (0, None)
    for at, size in enumerate(sizes):
        read(model, cache, tokens(3, size), torch.rand(3, size) > 0.3 if padded else None)
        assert cache.get_seq_length() == sum(sizes[: at + 1])
        assert cache.get_seq_length() == len(cache.memory) + cache.local_length
        assert cache.local_length <= WINDOW
        assert cache.rows == 3


def test_without_memory_layers_what_leaves_is_forgotten_and_still_counted() -> None:
    model = focused(mem_layers=[], local_context=32)
    cache = fresh(model, tokens(1, 10))
    cache.flush()
    assert (cache.get_seq_length(), len(cache.memory)) == (10, 0)
    new_BL = tokens(1, 5, seed=1)
    assert_same(read(model, cache, new_BL), model(new_BL).logits)


@setups
def test_a_new_document_sees_the_old_only_through_memory(changes: dict[str, Any], padded: bool) -> None:
    model = focused(**changes)
    old_BL, new_BL, question_BL = tokens(3, 14), tokens(3, 5, seed=1), tokens(3, 6, seed=2)
    mask_BL = left_padding(padded, 14)
    cache = FotCache(model.config)
    with Projections(model) as projections:
        read(model, cache, old_BL, mask_BL)
    cache.flush()
    assert (cache.local_length, len(cache.memory), cache.rows) == (0, 14, 3)
    for texts in ([new_BL], [new_BL, question_BL]):
        by_hand = FotCache(model.config)
        for number in model.config.mem_layers:
            keys, values = projections.of(number)
            by_hand.memory.append(number, keys * scale(model, number), values, mask_BL)
        wanted = read(model, by_hand, torch.cat(texts, dim=1))
        assert_same(read(model, cache, texts[-1]), wanted[:, -texts[-1].shape[1] :])
    assert cache.get_seq_length() == 14 + 11


def test_a_flushed_cache_takes_a_document_with_padding_after_one_without_and_without_after_one_with() -> None:
    model = focused(local_context=16)
    mask_BL = left_padding(True, 9)
    for first, second in ((mask_BL, None), (None, mask_BL)):
        cache = fresh(model, tokens(3, 9), mask=first)
        cache.flush()
        logits = read(model, cache, tokens(3, 9, seed=1), second)
        for row, start in ((0, 0), (1, 3)):
            one, other = (start if mask is not None else 0 for mask in (first, second))
            alone = fresh(model, tokens(3, 9)[[row], one:])
            alone.flush()
            assert_same(logits[[row], other:], read(model, alone, tokens(3, 9, seed=1)[[row], other:]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("length", range(21))
def test_a_truncated_cache_goes_on_as_one_that_read_no_more(length: int, mem_positionals: bool, padded: bool) -> None:
    model = focused(mem_positionals=mem_positionals, mem_layers=[0, 2])
    ids_BL, mask_BL = tokens(3, 20), left_padding(padded, 20)
    cache = fresh(model, ids_BL, mask=mask_BL)
    left = len(cache.memory)
    assert left == 12
    cache.truncate(length)
    assert (cache.get_seq_length(), len(cache.memory)) == (length, min(length, left))
    if length == 0:
        wanted = FotCache(model.config)
        question_BL = tokens(3, 6, seed=1)
        assert_same(read(model, cache, question_BL), read(model, wanted, question_BL), 0)
        return
    wanted = fresh(model, ids_BL[:, :length], mask=None if mask_BL is None else mask_BL[:, :length])
    wanted.evict(min(length, left) - len(wanted.memory))  # what left the local context does not come back to it
    assert_same(goes_on(model, cache), goes_on(model, wanted))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", range(24, 31))
def test_with_a_last_context_a_cache_truncated_within_it_goes_on_as_one_that_read_no_more(
    length: int, padded: bool
) -> None:
    model = focused(last_context_length=4)
    ids_BL, mask_BL = tokens(3, 30), left_padding(padded, 30)
    cache = fresh(model, ids_BL, mask=mask_BL)
    cache.truncate(length)
    assert cache.get_seq_length() == length
    wanted = fresh(model, ids_BL[:, :length], mask=None if mask_BL is None else mask_BL[:, :length])
    assert_same(goes_on(model, cache), goes_on(model, wanted))


@pytest.mark.parametrize("length", [1, 9, 16, 23])
def test_with_a_last_context_a_cache_truncated_before_it_goes_on_from_memory_alone(length: int) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 30))
    cache.truncate(length)
    assert (cache.get_seq_length(), len(cache.memory), cache.local_length) == (length, length, 0)
    wanted, plain = FotCache(model.config), focused()
    for window_BL in tokens(2, 30)[:, :length].split(WINDOW, dim=1):
        read(plain, wanted, window_BL)
        wanted.flush()
    assert_same(goes_on(model, cache), goes_on(model, wanted))


def test_a_cache_truncated_to_where_it_was_asks_the_same_question_again() -> None:
    model = focused()
    cache, question_BL = fresh(model, tokens(2, 19)), tokens(2, 1, seed=3)
    first = read(model, cache, question_BL)
    cache.truncate(19)
    assert_same(read(model, cache, question_BL), first, 0)


@pytest.mark.parametrize("length", [-1, 21])
def test_truncating_to_what_was_not_read_is_refused(length: int) -> None:
    cache = fresh(focused(), tokens(1, 20))
    with pytest.raises(ValueError, match=rf"^truncate to {length} tokens: 20 were read$"):
        cache.truncate(length)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("removed", [0, 3, 10, 20])
def test_cropping_removes_the_last_tokens_as_transformers_does(removed: int) -> None:
    model = focused()
    cropped, truncated = (fresh(model, tokens(1, 20)) for _ in range(2))
    cropped.crop(-removed)
    truncated.truncate(20 - removed)
    assert (cropped.get_seq_length(), cropped.local_length) == (20 - removed, truncated.local_length)
    question_BL = tokens(1, 6, seed=1)
    assert_same(read(model, cropped, question_BL), read(model, truncated, question_BL), 0)


def test_a_cache_does_not_promise_that_cropping_brings_back_what_it_was() -> None:
    assert not FotCache(focused().config).is_croppable


@setups
def test_a_reset_cache_is_a_new_one(changes: dict[str, Any], padded: bool) -> None:
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(padded, 22))
    cache.reset()
    assert (cache.get_seq_length(), cache.local_length, len(cache.memory)) == (0, 0, 0)
    ids_BL = tokens(3, 13, seed=1)
    new = FotCache(model.config)
    assert_same(read(model, cache, ids_BL), read(model, new, ids_BL))
    assert_same(goes_on(model, cache), goes_on(model, new))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    "forget",
    [FotCache.reset, lambda cache: cache.truncate(0), lambda cache: cache.crop(-22)],
    ids=["reset", "truncate", "crop"],
)
def test_a_cache_that_forgot_everything_takes_another_number_of_rows(
    forget: Callable[[FotCache], None], rows: int
) -> None:
    model = focused()
    cache = fresh(model, tokens(3, 22), mask=left_padding(True, 22))
    forget(cache)
    assert cache.rows is None
    assert_same(read(model, cache, tokens(rows, 13)), read(model, FotCache(model.config), tokens(rows, 13)))
    assert cache.rows == rows


@setups
@pytest.mark.parametrize("select", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [1], [0, 2, 2, 1]], ids=str)
def test_selected_rows_go_on_as_these_rows_read_alone(
    changes: dict[str, Any], padded: bool, select: str, rows: list[int]
) -> None:
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(padded, 22)
    cache = fresh(model, ids_BL, mask=mask_BL)
    getattr(cache, select)(torch.tensor(rows))
    assert cache.rows == len(rows)
    wanted = fresh(model, ids_BL[rows], mask=None if mask_BL is None else mask_BL[rows])
    assert_same(goes_on(model, cache), goes_on(model, wanted))


@setups
@pytest.mark.parametrize("flushed", [False, True])
def test_repeated_rows_go_on_as_these_rows_read_alone(changes: dict[str, Any], padded: bool, flushed: bool) -> None:
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(padded, 22)
    cache = fresh(model, ids_BL, mask=mask_BL)
    wanted = fresh(
        model, ids_BL.repeat_interleave(2, 0), mask=None if mask_BL is None else mask_BL.repeat_interleave(2, 0)
    )
    if flushed:
        cache.flush()
        wanted.flush()
    cache.batch_repeat_interleave(2)
    assert cache.rows == 6
    assert_same(goes_on(model, cache), goes_on(model, wanted))


def test_an_empty_cache_has_no_rows_to_select_or_repeat() -> None:
    cache = FotCache(focused().config)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0]))
    assert (cache.rows, cache.get_seq_length()) == (None, 0)


@setups
def test_a_copy_goes_its_own_way(changes: dict[str, Any], padded: bool) -> None:
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(padded, 22)
    cache = fresh(model, ids_BL, mask=mask_BL)
    copied = copy.deepcopy(cache)
    questions = [tokens(3, 9, seed=1), tokens(3, 9, seed=2)]
    answers = [read(model, cache, questions[0]), read(model, copied, questions[1])]
    for answer, question_BL in zip(answers, questions, strict=True):
        assert_same(answer, read(model, fresh(model, ids_BL, mask=mask_BL), question_BL), 0)
    copied.truncate(3)
    assert cache.get_seq_length() == 31
    assert_same(goes_on(model, cache), goes_on(model, fresh(model, ids_BL, questions[0], mask=mask_BL)), 0)


@torch.enable_grad()
def test_a_cache_read_without_switching_gradients_off_is_copied_too() -> None:
    model = focused()
    cache = fresh(model, tokens(1, 20))
    copied, question_BL = copy.deepcopy(cache), tokens(1, 6, seed=1)
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in copied.layers)
    assert_same(read(model, copied, question_BL), read(model, cache, question_BL), 0)


@setups
def test_what_was_read_in_inference_mode_is_read_on_outside_of_it(changes: dict[str, Any], padded: bool) -> None:
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(padded, 22)
    with torch.inference_mode():
        cache = fresh(model, ids_BL, mask=mask_BL)
        cache.reorder_cache(torch.arange(3))
        read(model, cache, tokens(3, 5, seed=1))
    assert_same(goes_on(model, cache), goes_on(model, fresh(model, ids_BL, tokens(3, 5, seed=1), mask=mask_BL)))


@pytest.mark.parametrize("mem_dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_kept_in_the_number_type_of_the_configuration(mem_dtype: str | None, dtype: torch.dtype) -> None:
    model = focused(mem_dtype=mem_dtype).to(dtype)
    cache = fresh(model, tokens(2, 20))
    wanted = dtype if mem_dtype is None else getattr(torch, mem_dtype)
    assert {tensor.dtype for tensor in cache.memory.state_dict().values()} == {wanted}
    assert cache.layers[0].keys.dtype == dtype


def test_a_memory_given_is_the_one_that_is_filled_and_attended_to() -> None:
    model, memory = focused(), TopKMemory(2)
    cache = fresh(model, tokens(2, 20), memory=memory)
    assert cache.memory is memory
    assert len(memory) == 12
    assert not torch.allclose(
        read(model, cache, tokens(2, 6)), read(model, fresh(model, tokens(2, 20)), tokens(2, 6)), atol=1e-3
    )


def test_what_a_memory_given_holds_counts_as_read() -> None:
    model, old = focused(), fresh(focused(), tokens(2, 20))
    old.flush()
    cache = FotCache(model.config, old.memory)
    assert cache.get_seq_length() == 20
    read(model, cache, tokens(2, 3))
    cache.truncate(20)
    assert len(cache.memory) == 20


@pytest.mark.parametrize("kept", [63, 32])
def test_keys_in_16_bits_are_not_worn_by_what_leaves_the_local_context(kept: int) -> None:
    """They are turned when they enter, once between and when they leave, not at every step."""
    model = focused(local_context=64, last_context_length=kept, mem_layers=[0, 2]).bfloat16()
    cache = FotCache(model.config)
    with Projections(model) as projections:
        for token_B1 in tokens(1, 320).split(1, dim=1):
            read(model, cache, token_B1)
    left, state = len(cache.memory), cache.memory.state_dict()
    positions_1L = torch.arange(cache.local_length)[None] + (0 if cache._lead_B1 is None else cache._lead_B1)
    exact = model.model.rotary_emb.float()
    for number, layer in enumerate(cache.layers):
        keys = projections.of(number)[0].float()
        angles = exact(keys, positions_1L)
        pairs = [(layer.keys, apply_rotary_pos_emb(keys[:, :, left:], keys[:, :, left:], *angles)[1])]
        if number in model.config.mem_layers:
            pairs.append((state[f"{number}.keys"], keys[:, :, :left]))
        for got, wanted in pairs:
            assert (got.float() - wanted).norm() < 2 * 2**-8 * wanted.norm()


class Failing:
    """Fails the n-th time that a layer is called."""

    def __init__(self, model: FotLlamaForCausalLM, layer: int, at: int) -> None:
        self.left = at
        self.hook = model.model.layers[layer].mlp.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of memory")

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


@setups
@pytest.mark.parametrize(("length", "at"), [(1, 1), (2, 1), (30, 1), (30, 4)], ids=str)
@pytest.mark.parametrize("before", [0, 7, 22])
def test_a_reading_that_fails_half_way_leaves_the_cache_as_it_was(
    before: int, length: int, at: int, changes: dict[str, Any], padded: bool
) -> None:
    model = focused(**changes)
    cache = FotCache(model.config)
    if before:
        read(model, cache, tokens(3, before), left_padding(padded, before))
        read(model, cache, tokens(3, 1))
    wanted, new_BL = copy.deepcopy(cache), tokens(3, length, seed=1)
    with Failing(model, 1, at), pytest.raises(RuntimeError, match="out of memory"):
        read(model, cache, new_BL)
    assert (cache.get_seq_length(), cache.local_length, cache.rows) == (
        wanted.get_seq_length(), wanted.local_length, wanted.rows,
    )  # fmt: skip
    assert_same(cache.memory.state_dict(), wanted.memory.state_dict(), 0)
    assert_same(read(model, cache, new_BL), read(model, wanted, new_BL), 0)
    assert_same(goes_on(model, cache), goes_on(model, wanted), 0)


def test_labels_of_another_shape_leave_the_cache_as_it_was() -> None:
    model = focused()
    cache = fresh(model, tokens(1, 20))
    with pytest.raises(ValueError, match="labels"):
        model(tokens(1, 9), labels=tokens(1, 8), past_key_values=cache)
    assert (cache.get_seq_length(), len(cache.memory)) == (20, 12)
    assert_same(goes_on(model, cache), goes_on(model, fresh(model, tokens(1, 20))), 0)


MEMORIES: dict[str, Callable[[], DenseMemory | None]] = {
    "its own": lambda: None,
    "dense": DenseMemory,
    "top-k": partial(TopKMemory, 3),
}


@setups
@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_saved_cache_goes_on_bit_for_bit(
    changes: dict[str, Any],
    padded: bool,
    make: Callable[[], DenseMemory | None],
    as_text: bool,
    tmp_path: Path,
) -> None:
    model = focused(**changes)
    path: Any = str(tmp_path / "book") if as_text else tmp_path / "book"
    cache = fresh(model, tokens(3, 22), mask=left_padding(padded, 22), memory=make())
    cache.save(path, model)
    loaded = FotCache.load(path, focused(**changes), make())
    assert [child.name for child in tmp_path.iterdir()] == ["book"]
    assert (loaded.get_seq_length(), loaded.local_length, loaded.rows) == (22, cache.local_length, 3)
    assert_same(loaded.memory.state_dict(), cache.memory.state_dict(), 0)
    assert {name: held.dtype for name, held in loaded.memory.state_dict().items()} == {
        name: held.dtype for name, held in cache.memory.state_dict().items()
    }
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)
    loaded.truncate(25)
    cache.truncate(25)
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)


@setups
def test_what_a_dense_memory_saved_a_top_k_memory_takes(changes: dict[str, Any], padded: bool, tmp_path: Path) -> None:
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(padded, 22))
    cache.save(tmp_path / "book", model)
    loaded = FotCache.load(tmp_path / "book", model, TopKMemory(3))
    top_k = TopKMemory(3)
    top_k.load_state_dict(cache.memory.state_dict())
    cache.memory = top_k
    assert_same(goes_on(model, loaded), goes_on(model, cache), 0)


@setups
def test_a_cache_is_saved_as_it_is_after_rows_were_selected_tokens_cropped_and_a_document_ended(
    changes: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(padded, 22))
    changed = [
        lambda: cache.reorder_cache(torch.tensor([1, 1, 0])),
        lambda: cache.truncate(20),
        cache.flush,
        lambda: cache.truncate(5),
        cache.reset,
    ]
    for change in changed:
        change()
        cache.save(tmp_path / "book", model)
        loaded, kept = FotCache.load(tmp_path / "book", model), copy.deepcopy(cache)
        assert loaded.get_seq_length() == kept.get_seq_length()
        question_BL = tokens(3, 6, seed=1)
        assert_same(read(model, loaded, question_BL), read(model, kept, question_BL), 0)


def test_an_empty_cache_is_saved_too(tmp_path: Path) -> None:
    model = focused()
    FotCache(model.config).save(tmp_path / "book", model)
    loaded = FotCache.load(tmp_path / "book", model)
    assert (loaded.get_seq_length(), loaded.rows) == (0, None)
    ids_BL = tokens(1, 19)
    assert_same(read(model, loaded, ids_BL), read(model, FotCache(model.config), ids_BL), 0)


def test_saving_changes_nothing_and_reading_on_changes_no_file(tmp_path: Path) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 22))
    cache.save(tmp_path / "book", model)
    before = (tmp_path / "book").read_bytes()
    loaded = FotCache.load(tmp_path / "book", model)
    answers = goes_on(model, cache)
    assert_same(answers, goes_on(model, fresh(model, tokens(2, 22))), 0)
    assert_same(goes_on(model, loaded), answers, 0)
    assert (tmp_path / "book").read_bytes() == before


def test_saving_again_replaces_the_file_at_once_also_for_who_reads_the_old_one(tmp_path: Path) -> None:
    model = focused()
    fresh(model, tokens(1, 30)).save(tmp_path / "book", model)
    before = (tmp_path / "book").read_bytes()
    with open(tmp_path / "book", "rb") as reader:
        fresh(model, tokens(1, 9)).save(tmp_path / "book", model)
        assert reader.read() == before
    assert FotCache.load(tmp_path / "book", model).get_seq_length() == 9
    assert [child.name for child in tmp_path.iterdir()] == ["book"]


@torch.enable_grad()
def test_a_cache_read_without_switching_gradients_off_is_saved_too(tmp_path: Path) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 22))
    cache.save(tmp_path / "book", model)
    assert_same(goes_on(model, FotCache.load(tmp_path / "book", model)), goes_on(model, cache), 0)


def refused(path: Path, model: FotLlamaForCausalLM, error: Any = ValueError) -> str:
    """The one clear line that refuses to load the file, and names it."""
    with pytest.raises(error) as caught:
        FotCache.load(path, model)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def stepped() -> FotLlamaForCausalLM:
    """The model after a small step of fine-tuning."""
    model = focused()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with torch.enable_grad():
        model(tokens(2, 8), labels=tokens(2, 8), use_cache=False).loss.backward()
    optimiser.step()
    return model


OTHER_MODELS: dict[str, Callable[[], FotLlamaForCausalLM]] = {
    "weights": partial(focused, seed=1),
    "memory layers": partial(focused, mem_layers=[2]),
    "more memory layers": partial(focused, mem_layers=[1, 2]),
    "positions": partial(focused, mem_positionals=False),
    "rope": partial(focused, rope_parameters=ROPES["linear"]),
    "rope theta": partial(focused, rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
    "heads of another size": partial(focused, num_attention_heads=2, num_key_value_heads=1, head_dim=16),
    "gate": partial(focused, mem_gate=True),
    "activation": partial(focused, hidden_act="gelu"),
    "epsilon of the norms": partial(focused, rms_norm_eps=1e-3),
    "depth": partial(focused, num_hidden_layers=2),
    "a step of fine-tuning": stepped,
}


@pytest.mark.parametrize("other", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_the_file_of_another_model_is_refused(other: Callable[[], FotLlamaForCausalLM], tmp_path: Path) -> None:
    model = focused()
    fresh(model, tokens(2, 22)).save(tmp_path / "book", model)
    message = refused(tmp_path / "book", other())
    assert re.search(r"another model .*: load that model, or read the text again", message)


def test_each_end_of_every_parameter_tells_models_apart() -> None:
    model = focused()
    names = {sampled_fingerprint(model)}
    for parameter in model.parameters():
        flat = parameter.view(-1)
        for end in (flat[: len(flat) // 2], flat[len(flat) // 2 :]):
            kept = end.clone()
            end.mul_(1.05)
            names.add(sampled_fingerprint(model))
            end.copy_(kept)
    assert len(names) == 1 + 2 * len(list(model.parameters()))
    assert sampled_fingerprint(model) in names


def test_how_much_is_read_at_once_does_not_tell_models_apart() -> None:
    assert sampled_fingerprint(focused()) == sampled_fingerprint(focused(local_context=16, last_context_length=2))


def test_a_checkpoint_has_one_fingerprint_in_float32_and_in_bfloat16(tmp_path: Path) -> None:
    model = focused()
    model.save_pretrained(tmp_path)
    rounded = FotLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert sampled_fingerprint(rounded) == sampled_fingerprint(model)


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("mem_dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("writes", "loads"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_what_a_model_saved_it_reads_on_in_another_number_type(
    writes: torch.dtype, loads: torch.dtype, mem_dtype: str | None, kept: int | None, tmp_path: Path
) -> None:
    writer, loader = (
        focused(last_context_length=kept, mem_dtype=mem_dtype).bfloat16().to(it) for it in (writes, loads)
    )
    fresh(writer, tokens(2, 22)).save(tmp_path / "book", writer)
    loaded = FotCache.load(tmp_path / "book", loader)
    wanted = goes_on(loader, fresh(loader, tokens(2, 22)))
    for got, logits in zip(goes_on(loader, loaded), wanted, strict=True):
        assert got.dtype == loads
        assert (got - logits).float().norm() < 0.1 * logits.float().norm()
    assert {layer.keys.dtype for layer in loaded.layers} == {loads}


def test_a_file_of_a_longer_local_context_is_read_on_in_a_shorter_one(tmp_path: Path) -> None:
    longer, shorter = focused(local_context=16), focused(local_context=6)
    cache = fresh(longer, tokens(2, 16))
    cache.save(tmp_path / "book", longer)
    cache.evict(16 - 3)  # as much as makes room for half of the shorter one
    assert_same(goes_on(shorter, FotCache.load(tmp_path / "book", shorter)), goes_on(shorter, cache))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_damaged_file_is_refused(kept: float, tmp_path: Path) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert "no memory file, or damaged" in refused(path, model)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_is_found(where: float, tmp_path: Path) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    whole[header + int(where * (len(whole) - header))] ^= 0x40
    path.write_bytes(whole)
    assert "digest" in refused(path, model)


def test_another_count_of_tokens_in_the_header_is_found(tmp_path: Path) -> None:
    model, path = focused(mem_layers=[]), tmp_path / "book"
    fresh(model, tokens(2, 22)).save(path, model)
    whole = path.read_bytes()
    assert b'"left":"16"' in whole
    path.write_bytes(whole.replace(b'"left":"16"', b'"left":"17"'))
    assert "digest" in refused(path, model)


def written_before(path: Path, model: FotLlamaForCausalLM, change: Callable[[dict[str, Tensor]], Any]) -> FotCache:
    """A cache, written in the format before, which had no digest and keys without a lead, with something changed."""
    cache = fresh(model, tokens(2, 20), mask=torch.arange(20) >= torch.tensor([[0], [3]]))
    assert cache.local_length == 8
    cache.truncate(15)
    assert cache._lead_B1 is None
    cache.save(path, model)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    change(tensors)
    metadata = {"format": "fot-cache-1", "model": sampled_fingerprint(model), "left": "12"}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return cache


def test_a_file_of_the_version_before_is_read_on(tmp_path: Path) -> None:
    model = focused()
    cache = written_before(tmp_path / "book", model, lambda tensors: None)
    loaded = FotCache.load(tmp_path / "book", model)
    assert (loaded.get_seq_length(), len(loaded.memory), loaded.rows) == (15, 12, 2)
    assert_same(goes_on(model, loaded), goes_on(model, cache))


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "keys shorter than values": (replaced("memory.1.keys", lambda x: x[:, :, :5]), "memory.1.keys"),
    "values shorter than keys": (replaced("memory.1.values", lambda x: x[:, :, :5]), "memory.1.values"),
    "a memory layer missing": (
        lambda tensors: [tensors.pop(f"memory.1.{x}") for x in ("keys", "values", "seen")],
        "memory.1.keys",
    ),
    "values missing": (lambda tensors: tensors.pop("memory.1.values"), "memory.1.values"),
    "a local layer missing": (lambda tensors: tensors.pop("local.2.keys"), "local.2.keys"),
    "a local layer shorter": (replaced("local.2.keys", lambda x: x[:, :, :2]), "local.2.keys"),
    "one row for two": (replaced("memory.1.values", lambda x: x[:1]), "memory.1.values"),
    "one local row for two": (replaced("local.0.values", lambda x: x[:1]), "local.0.values"),
    "heads of another size": (replaced("memory.1.keys", lambda x: x[..., :4]), "memory.1.keys"),
    "padding of another length": (replaced("memory.1.seen", lambda x: x[:, :, :4]), "memory.1.seen"),
    "padding as numbers": (replaced("memory.1.seen", lambda x: x.float()), "memory.1.seen"),
    "keys as whole numbers": (replaced("memory.1.keys", lambda x: x.long()), "memory.1.keys"),
    "something else": (
        lambda tensors: tensors.__setitem__("memory.0.keys", tensors["memory.1.keys"].clone()),
        "memory.0",
    ),
}


@pytest.mark.parametrize(("change", "named"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_whose_parts_do_not_fit_together_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], Any], named: str, tmp_path: Path
) -> None:
    model = focused()
    written_before(tmp_path / "book", model, change)
    message = refused(tmp_path / "book", model)
    assert "damaged memory file" in message
    assert named in message


@pytest.mark.parametrize("content", [b"", b"Call me Ishmael. " * 99, bytes(200), b"PK\x03\x04" * 99])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(content)
    assert "no memory file" in refused(tmp_path / "book.txt", focused())


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "fot-cache-0"}])
def test_a_safetensors_file_of_another_kind_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"seen": torch.ones(2, 2)}, tmp_path / "other.safetensors", metadata)
    assert "FotCache.save writes one" in refused(tmp_path / "other.safetensors", focused())


def test_the_weights_of_a_model_are_no_memory_file(tmp_path: Path) -> None:
    model = focused()
    model.save_pretrained(tmp_path)
    assert "no memory file" in refused(tmp_path / "model.safetensors", model)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "book", focused(), (ValueError, FileNotFoundError))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, focused(), (ValueError, IsADirectoryError))


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    model = focused()
    fresh(model, tokens(1, 22)).save(tmp_path / "book", model)
    with safe_open(tmp_path / "book", framework="pt") as file:
        said = file.metadata()
    assert said.pop("digest")
    assert said == {"format": "fot-cache-2", "model": sampled_fingerprint(model), "left": "16"}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    model, path = focused(), tmp_path / "book"
    fresh(model, tokens(1, 9)).save(path, model)
    before = path.read_bytes()
    longer = fresh(model, tokens(3, 400))
    with full_disk(20_000), pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        longer.save(path, model)
    assert [child.name for child in tmp_path.iterdir()] == ["book"]
    assert path.read_bytes() == before
    longer.save(path, model)
    assert FotCache.load(path, model).get_seq_length() == 400


def test_saving_into_a_directory_that_is_not_there_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    model = focused()
    path = tmp_path / "nowhere" / "book"
    with pytest.raises((ValueError, OSError), match=re.escape(str(path.parent))):
        fresh(model, tokens(1, 9)).save(path, model)
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_directory_is_refused_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    model = focused()
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "page").touch()
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path / "book"))):
        fresh(model, tokens(1, 9)).save(tmp_path / "book", model)
    assert [child.name for child in tmp_path.rglob("*")] == ["book", "page"]
