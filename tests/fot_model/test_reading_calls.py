"""An input in one call or in several, and what a call gives.

Shapes: B batch, R rows, L tokens, C hidden size, V vocabulary.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fot_model import FotCache, FotLlamaForCausalLM, longllama_plan

WINDOW = 16

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models that read in windows of 16 tokens."""
    return partial(focused, num_key_value_heads=2, max_position_embeddings=WINDOW)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=2), data=st.data())
def test_one_call_equals_any_split_into_calls(
    focused, padded, any_kind, assert_same, lengths: list[int], data: Any
) -> None:
    model = focused(**data.draw(any_kind, label="kind"))
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


def test_one_call_equals_single_tokens(focused, tokens, read_parts, assert_same, kind: dict[str, Any]) -> None:
    model, ids_BL = focused(**kind), tokens(2, 40)
    assert_same(torch.cat(read_parts(model, list(ids_BL.split(1, dim=1))), dim=1), model(ids_BL).logits)


@settings(deadline=None, max_examples=40)
@given(
    last_context=st.integers(1, WINDOW),
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    short=st.integers(0, 12),
    data=st.data(),
)
def test_with_a_last_context_calls_of_several_tokens_end_as_one_call_does(
    focused, padded, any_kind, assert_same, last_context: int, sizes: list[int], short: int, data: Any
) -> None:
    model = focused(**data.draw(any_kind, label="kind"))
    how = {"last_context_length": min(last_context, model.config.window)}
    ids_BL, mask_BL = padded([sum(sizes), sum(sizes) - min(short, sizes[0] - 1)], sum(sizes))
    whole = model(ids_BL, attention_mask=mask_BL, **how).logits[:, -sizes[-1] :]
    cache, start = None, 0
    for size in sizes:
        end = start + size
        mask = mask_BL[:, :end] if start == 0 else None
        output = model(ids_BL[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True, **how)
        cache, start = output.past_key_values, end
        assert output.logits.shape == (2, size, 40)
        assert cache.get_seq_length() == end
    seen_BL = mask_BL[:, -sizes[-1] :].bool()
    assert_same(output.logits[seen_BL], whole[seen_BL])


def test_with_a_last_context_what_was_generated_is_read_again_with_the_next_prompt(
    focused, tokens, read_parts, assert_same
) -> None:
    model, ids_BL = focused(last_context_length=6), tokens(2, 60)
    parts = [*ids_BL[:, :22].split(22, dim=1), *ids_BL[:, 22:50].split(1, dim=1), ids_BL[:, 50:]]
    assert_same(read_parts(model, parts)[-1], model(ids_BL).logits[:, -10:])


@pytest.mark.parametrize("last_context", [None, 6])
def test_rows_chosen_from_a_cache_go_on_as_these_rows(focused, padded, assert_same, last_context: int | None) -> None:
    model, rows = focused(last_context_length=last_context), torch.tensor([2, 0, 2, 1])
    ids_BL, mask_BL = padded([45, 20, 30], 45)
    cache = model(ids_BL[:, :26], attention_mask=mask_BL[:, :26]).past_key_values
    cache.batch_select_indices(rows)
    got = model(ids_BL[rows, 26:], past_key_values=cache).logits
    assert_same(got, model(ids_BL, attention_mask=mask_BL).logits[rows, 26:])


@pytest.mark.parametrize("last_context", [None, 6])
@pytest.mark.parametrize("past", [6, 30])
def test_a_second_turn_whose_mask_hides_earlier_padding_is_as_one_call_and_as_a_llama(
    focused, plain, tokens, assert_same, past: int, last_context: int | None
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


def test_a_call_without_last_context_length_settles_what_was_read_before_it(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(2, 40)
    cache = model(ids_BL[:, :20], last_context_length=4).past_key_values
    model(ids_BL[:, 20:30], past_key_values=cache)
    assert cache.replay() is None
    model(ids_BL[:, 30:], past_key_values=cache, last_context_length=4)
    assert cache.get_seq_length() == 40
    cache.flush()
    assert len(cache.memory) == 40


def test_a_cache_read_in_inference_mode_is_read_on_outside_of_it(focused, tokens, assert_same) -> None:
    model, ids_BL = focused(), tokens(1, 90)
    with torch.inference_mode():
        cache = model(ids_BL[:, :50]).past_key_values
    assert_same(model(ids_BL[:, 50:], past_key_values=cache).logits, model(ids_BL).logits[:, 50:])


def test_reading_a_plan_of_positives_is_training_on_it(focused, tokens, read_parts, assert_same) -> None:
    model, ids_RL = focused(mem_layers=[0, 2], num_key_value_heads=4), tokens(4, 9)
    trained = model(ids_RL, plan=longllama_plan(4, 3)).logits
    cache = FotCache(model.config)
    for row in range(4):
        [logits] = read_parts(model, [ids_RL[row : row + 1]], cache)
        assert_same(logits[0], trained[row])
        cache.flush()


def test_what_goes_beyond_the_window_of_a_model_without_memory_layers_is_told(
    focused,
    tokens,
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


def test_reading_without_a_cache_returns_none_and_the_same_logits(focused, tokens) -> None:
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
def test_kept_logits_are_the_last_or_the_chosen_ones(focused, tokens, assert_same, L: int, use_cache: bool) -> None:
    model, ids_BL = focused(), tokens(2, L)
    how = {"use_cache": use_cache}
    logits = model(ids_BL, **how).logits
    for last in (1, 3, 8, 20, L, 100):
        assert_same(model(ids_BL, logits_to_keep=last, **how).logits, logits[:, -last:], 1e-6)
    chosen = torch.tensor([1, L - 2])
    assert_same(model(ids_BL, logits_to_keep=chosen, **how).logits, logits[:, chosen], 1e-6)


@pytest.mark.parametrize("L", [9, 45])
def test_labels_give_the_loss_of_the_next_tokens(focused, tokens, assert_same, L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    labels_BL = ids_BL.clone()
    labels_BL[0, :4] = -100
    output = model(ids_BL, labels=labels_BL)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
    assert_same(output.loss, expected, 1e-6)


def test_the_number_of_items_in_a_batch_divides_the_loss_of_a_long_input_too(focused, tokens, assert_same) -> None:
    model, ids_BL = focused(), tokens(2, 45)
    mean, divided = (model(ids_BL, labels=ids_BL, **how).loss for how in ({}, {"num_items_in_batch": 11}))
    assert_same(divided, mean * 88 / 11)


@pytest.mark.parametrize("L", [9, 45])
def test_embeddings_are_read_as_the_tokens_they_belong_to(focused, tokens, L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    embeddings_BLC = model.get_input_embeddings()(ids_BL)
    assert torch.equal(model(inputs_embeds=embeddings_BLC).logits, model(ids_BL).logits)


@pytest.mark.parametrize("last_context", [None, 6])
def test_hidden_states_are_those_of_the_tokens_given(focused, tokens, assert_same, last_context: int | None) -> None:
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
    assert whole.logits.shape == (2, 1, 40)
    assert_same(tuple(state[:, 20:] for state in whole.hidden_states), output.hidden_states)
    model.config.output_hidden_states = True
    assert_same(model(ids_BL, logits_to_keep=1).hidden_states, whole.hidden_states)


@pytest.mark.parametrize("L", [9, 45])
def test_a_tuple_is_returned_where_one_is_asked_for(focused, tokens, L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    loss, logits, cache = model(ids_BL, labels=ids_BL, return_dict=False)
    expected = model(ids_BL, labels=ids_BL)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert isinstance(cache, FotCache)


@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@torch.enable_grad()
def test_a_loss_is_differentiated_through_a_long_reading(focused, tokens, num_key_value_heads: int) -> None:
    model, ids_BL = focused(num_key_value_heads=num_key_value_heads), tokens(2, 40)
    model(ids_BL, labels=ids_BL).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
