"""What leaves the local context is in memory as position 0, what stays is a local context of its own.

Shapes: B batch, L tokens, Hk key/value heads, D head size.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fot_model import FotCache, FotLlamaForCausalLM, TopKMemory

WINDOW = 8

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
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with a local context of 8 tokens."""
    return partial(focused, num_key_value_heads=2, local_context=WINDOW)


@pytest.fixture(scope="module")
def focused_with(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Made once for all examples that try it."""

    @cache
    def make(rope: str, mem_positionals: bool, mem_layers: tuple[int, ...]) -> FotLlamaForCausalLM:
        settings = {"mem_positionals": mem_positionals, "mem_layers": list(mem_layers)}
        return focused(rope_parameters=ROPES[rope], local_context=64, **settings)

    return make


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


@pytest.fixture(scope="session")
def assert_holds(assert_same) -> Callable[..., None]:
    """The cache holds the first `left` tokens in memory as position 0 and the others as a local context of their own,
    and whatever is no padding is right in it."""

    def check(cache: FotCache, model: Any, projections: Projections, seen_BL: Tensor, left: int) -> None:
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

    return check


ropes = pytest.mark.parametrize("rope", ROPES)


@ropes
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("mem_layers", [(), (1,), (0, 2)], ids=str)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_what_leaves_the_local_context_is_remembered_as_position_zero_and_what_stays_starts_at_zero(
    focused_with, tokens, read, assert_holds, rope: str, mem_positionals: bool, mem_layers: tuple[int, ...], data: Any
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
    focused, tokens, read, assert_same, changes: dict[str, Any], sizes: list[int], counts: list[int]
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
def test_a_padded_row_goes_on_as_if_read_alone_without_padding(
    focused, tokens, fresh, read, assert_same, pads: int
) -> None:
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
def test_the_length_counts_everything_read(
    focused, tokens, read, sizes: list[int], padded: bool, kept: int | None
) -> None:
    model = focused(last_context_length=kept)
    cache = FotCache(model.config)
    assert (cache.get_seq_length(), cache.rows) == (0, None)
    for at, size in enumerate(sizes):
        read(model, cache, tokens(3, size), torch.rand(3, size) > 0.3 if padded else None)
        assert cache.get_seq_length() == sum(sizes[: at + 1])
        assert cache.get_seq_length() == len(cache.memory) + cache.local_length
        assert cache.local_length <= WINDOW
        assert cache.rows == 3


def test_without_memory_layers_what_leaves_is_forgotten_and_still_counted(
    focused, tokens, fresh, read, assert_same
) -> None:
    model = focused(mem_layers=[], local_context=32)
    cache = fresh(model, tokens(1, 10))
    cache.flush()
    assert (cache.get_seq_length(), len(cache.memory)) == (10, 0)
    new_BL = tokens(1, 5, seed=1)
    assert_same(read(model, cache, new_BL), model(new_BL).logits)


def test_a_new_document_sees_the_old_only_through_memory(
    focused, tokens, left_padding, read, assert_same, setup
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    old_BL, new_BL, question_BL = tokens(3, 14), tokens(3, 5, seed=1), tokens(3, 6, seed=2)
    mask_BL = left_padding(is_padded, 14)
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


def test_a_flushed_cache_takes_a_document_with_padding_after_one_without_and_without_after_one_with(
    focused, tokens, left_padding, fresh, read, assert_same
) -> None:
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


@pytest.mark.parametrize("mem_dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_kept_in_the_number_type_of_the_configuration(
    focused, tokens, fresh, mem_dtype: str | None, dtype: torch.dtype
) -> None:
    model = focused(mem_dtype=mem_dtype).to(dtype)
    cache = fresh(model, tokens(2, 20))
    wanted = dtype if mem_dtype is None else getattr(torch, mem_dtype)
    assert {tensor.dtype for tensor in cache.memory.state_dict().values()} == {wanted}
    assert cache.layers[0].keys.dtype == dtype


def test_a_memory_given_is_the_one_that_is_filled_and_attended_to(focused, tokens, fresh, read) -> None:
    model, memory = focused(), TopKMemory(2)
    cache = fresh(model, tokens(2, 20), memory=memory)
    assert cache.memory is memory
    assert len(memory) == 12
    assert not torch.allclose(
        read(model, cache, tokens(2, 6)), read(model, fresh(model, tokens(2, 20)), tokens(2, 6)), atol=1e-3
    )


def test_what_a_memory_given_holds_counts_as_read(focused, tokens, fresh, read) -> None:
    model, old = focused(), fresh(focused(), tokens(2, 20))
    old.flush()
    cache = FotCache(model.config, old.memory)
    assert cache.get_seq_length() == 20
    read(model, cache, tokens(2, 3))
    cache.truncate(20)
    assert len(cache.memory) == 20


@pytest.mark.parametrize("kept", [63, 32])
def test_keys_in_16_bits_are_not_worn_by_what_leaves_the_local_context(focused, tokens, read, kept: int) -> None:
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
