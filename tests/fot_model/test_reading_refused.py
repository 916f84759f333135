"""Mistakes in reading, each answered by what is wrong and what to do.

Shapes: B batch, L tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fot_model import FotCache, FotLlamaForCausalLM

WINDOW = 16

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models that read in windows of 16 tokens."""
    return partial(focused, num_key_value_heads=2, max_position_embeddings=WINDOW)


def test_a_model_that_recomputes_activations_cannot_read_with_memory(focused, tokens) -> None:
    model = focused().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing: call model\.eval\(\)"):
        model(tokens(1, 45))
    assert model.eval()(tokens(1, 45)).logits.isfinite().all()


@pytest.mark.parametrize(
    "how", [{}, {"plan": torch.tensor([[-1], [0]])}, {"document_ids": torch.arange(18).view(2, 9)}], ids=str
)
@pytest.mark.parametrize("said_in", ["call", "configuration"])
def test_attention_weights_are_refused_where_memory_layers_would_have_none(
    focused, tokens, said_in: str, how: dict[str, Any]
) -> None:
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


def test_a_filled_cache_of_another_class_is_refused(focused, plain, tokens) -> None:
    model, ids_BL = focused(), tokens(1, 9)
    filled = plain(model)(ids_BL, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache: give a FotCache\(model.config\)"):
        model(ids_BL, past_key_values=filled)


@pytest.mark.parametrize("flushed", [True, False])
def test_a_cache_of_other_rows_is_refused_with_the_way_to_repeat_it(focused, tokens, flushed: bool) -> None:
    model = focused()
    cache = model(tokens(1, 9)).past_key_values
    if flushed:
        cache.flush()
    with pytest.raises(ValueError, match=r"holds 1 rows, the input has 3: .*batch_repeat_interleave\(n\)"):
        model(tokens(3, 4), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert model(tokens(3, 4), past_key_values=cache).logits.shape == (3, 4, 40)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"mem_layers": [0]}])
def test_a_cache_of_a_model_with_other_layers_is_refused(focused, tokens, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"other layers.*FotCache\(model.config\)"):
        focused()(tokens(2, 9), past_key_values=FotCache(focused(**changes).config))


@pytest.mark.parametrize("length", [0, -1, WINDOW + 1])
def test_a_last_context_that_the_window_cannot_hold_is_refused(focused, tokens, length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"last_context_length {length}: the local context holds 1 to {WINDOW} tokens"
    ):
        focused()(tokens(1, 45), last_context_length=length)
    with pytest.raises(ValueError, match=f"last_context_length {length}"):
        focused(last_context_length=length)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (2, 12), (1, 9), (3, 9)], ids=str)
def test_a_mask_of_another_shape_is_refused(focused, tokens, shape: tuple[int, int], use_cache: bool) -> None:
    with pytest.raises(ValueError, match=r"attention_mask \[.*\]: give \[2, 9\]"):
        focused()(tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.long), use_cache=use_cache)


def test_a_mask_that_is_neither_of_the_new_tokens_nor_of_all_is_refused(focused, tokens) -> None:
    model = focused()
    cache = model(tokens(2, 9)).past_key_values
    for length in (3, 5, 12, 14):
        with pytest.raises(ValueError, match="attention_mask"):
            model(tokens(2, 4), attention_mask=torch.ones(2, length, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_what_was_padding_when_it_was_read_is_not_seen_later(focused, tokens, padded) -> None:
    model = focused()
    ids_BL, mask_BL = padded([30, 22], 30)
    for past in (12, 30):
        cache = model(ids_BL[:, :past], attention_mask=mask_BL[:, :past]).past_key_values
        with pytest.raises(ValueError, match="were padding when they were read: give the mask"):
            model(tokens(2, 3), attention_mask=torch.ones(2, past + 3, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == past


@pytest.mark.parametrize("ids", [[[1, 2, 3], [4, 5]], [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]], ids=repr)
def test_rows_of_unequal_lengths_are_refused_with_the_way_to_pad_them(focused, ids: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"input_ids is a list of rows of \[2, 3\] tokens.*left.*attention_mask"):
        focused()(ids)


def test_a_batch_padded_on_the_left_is_refused_without_its_mask(focused, tokens, padded) -> None:
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


def test_an_input_without_tokens_is_refused(focused, tokens) -> None:
    model = focused()
    for cache in (None, model(tokens(2, 9)).past_key_values):
        with pytest.raises(ValueError, match="no tokens"):
            model(tokens(2, 0), past_key_values=cache)


def test_both_or_neither_of_tokens_and_embeddings_are_refused(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(1, 4)
    for given_ids in ({}, {"input_ids": ids_BL, "inputs_embeds": model.get_input_embeddings()(ids_BL)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given_ids)
