"""Rows selected, repeated and copied.

Shapes: B batch, L tokens.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fot_model import FotCache, FotLlamaForCausalLM

WINDOW = 8

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with a local context of 8 tokens."""
    return partial(focused, num_key_value_heads=2, local_context=WINDOW)


@pytest.mark.parametrize(
    ("select", "rows"),
    [
        ("reorder_cache", [2, 0, 1]),
        *[("batch_select_indices", rows) for rows in ([2, 0, 1], [1, 1, 0], [1], [0, 2, 2, 1])],
    ],
    ids=str,
)
def test_selected_rows_go_on_as_these_rows_read_alone(
    focused, tokens, left_padding, fresh, goes_on, assert_same, setup, select: str, rows: list[int]
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(is_padded, 22)
    cache = fresh(model, ids_BL, mask=mask_BL)
    getattr(cache, select)(torch.tensor(rows))
    assert cache.rows == len(rows)
    wanted = fresh(model, ids_BL[rows], mask=None if mask_BL is None else mask_BL[rows])
    assert_same(goes_on(model, cache), goes_on(model, wanted))


@pytest.mark.parametrize("flushed", [False, True])
def test_repeated_rows_go_on_as_these_rows_read_alone(
    focused, tokens, left_padding, fresh, goes_on, assert_same, setup, flushed: bool
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(is_padded, 22)
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


def test_an_empty_cache_has_no_rows_to_select_or_repeat(focused) -> None:
    cache = FotCache(focused().config)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0]))
    assert (cache.rows, cache.get_seq_length()) == (None, 0)


def test_a_copy_goes_its_own_way(focused, tokens, left_padding, fresh, read, goes_on, assert_same, setup) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(is_padded, 22)
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
def test_a_cache_read_without_switching_gradients_off_is_copied_too(focused, tokens, fresh, read, assert_same) -> None:
    model = focused()
    cache = fresh(model, tokens(1, 20))
    copied, question_BL = copy.deepcopy(cache), tokens(1, 6, seed=1)
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in copied.layers)
    assert_same(read(model, copied, question_BL), read(model, cache, question_BL), 0)


def test_what_was_read_in_inference_mode_is_read_on_outside_of_it(
    focused, tokens, left_padding, fresh, read, goes_on, assert_same, setup
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    ids_BL, mask_BL = tokens(3, 22), left_padding(is_padded, 22)
    with torch.inference_mode():
        cache = fresh(model, ids_BL, mask=mask_BL)
        cache.reorder_cache(torch.arange(3))
        read(model, cache, tokens(3, 5, seed=1))
    assert_same(goes_on(model, cache), goes_on(model, fresh(model, ids_BL, tokens(3, 5, seed=1), mask=mask_BL)))
