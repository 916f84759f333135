"""Tokens taken back: a cache truncated, cropped, reset, or whose reading failed.

Shapes: B batch, L tokens.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fot_model import FotCache, FotLlamaForCausalLM

WINDOW = 8

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with a local context of 8 tokens."""
    return partial(focused, num_key_value_heads=2, local_context=WINDOW)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mem_positionals", [True, False])
@pytest.mark.parametrize("length", [0, 1, 5, 11, *range(12, 21)])  # 12 are in memory
def test_a_truncated_cache_goes_on_as_one_that_read_no_more(
    focused, tokens, left_padding, fresh, read, goes_on, assert_same, length: int, mem_positionals: bool, padded: bool
) -> None:
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
    focused, tokens, left_padding, fresh, goes_on, assert_same, length: int, padded: bool
) -> None:
    model = focused(last_context_length=4)
    ids_BL, mask_BL = tokens(3, 30), left_padding(padded, 30)
    cache = fresh(model, ids_BL, mask=mask_BL)
    cache.truncate(length)
    assert cache.get_seq_length() == length
    wanted = fresh(model, ids_BL[:, :length], mask=None if mask_BL is None else mask_BL[:, :length])
    assert_same(goes_on(model, cache), goes_on(model, wanted))


@pytest.mark.parametrize("length", [1, 9, 16, 23])
def test_with_a_last_context_a_cache_truncated_before_it_goes_on_from_memory_alone(
    focused, tokens, fresh, read, goes_on, assert_same, length: int
) -> None:
    model = focused(last_context_length=4)
    cache = fresh(model, tokens(2, 30))
    cache.truncate(length)
    assert (cache.get_seq_length(), len(cache.memory), cache.local_length) == (length, length, 0)
    wanted, plain = FotCache(model.config), focused()
    for window_BL in tokens(2, 30)[:, :length].split(WINDOW, dim=1):
        read(plain, wanted, window_BL)
        wanted.flush()
    assert_same(goes_on(model, cache), goes_on(model, wanted))


def test_a_cache_truncated_to_where_it_was_asks_the_same_question_again(
    focused, tokens, fresh, read, assert_same
) -> None:
    model = focused()
    cache, question_BL = fresh(model, tokens(2, 19)), tokens(2, 1, seed=3)
    first = read(model, cache, question_BL)
    cache.truncate(19)
    assert_same(read(model, cache, question_BL), first, 0)


@pytest.mark.parametrize("length", [-1, 21])
def test_truncating_to_what_was_not_read_is_refused(focused, tokens, fresh, length: int) -> None:
    cache = fresh(focused(), tokens(1, 20))
    with pytest.raises(ValueError, match=rf"^truncate to {length} tokens: 20 were read$"):
        cache.truncate(length)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("removed", [0, 3, 10, 20])
def test_cropping_removes_the_last_tokens_as_transformers_does(
    focused, tokens, fresh, read, assert_same, removed: int
) -> None:
    model = focused()
    cropped, truncated = (fresh(model, tokens(1, 20)) for _ in range(2))
    cropped.crop(-removed)
    truncated.truncate(20 - removed)
    assert (cropped.get_seq_length(), cropped.local_length) == (20 - removed, truncated.local_length)
    question_BL = tokens(1, 6, seed=1)
    assert_same(read(model, cropped, question_BL), read(model, truncated, question_BL), 0)


def test_a_cache_does_not_promise_that_cropping_brings_back_what_it_was(focused) -> None:
    assert not FotCache(focused().config).is_croppable


def test_a_reset_cache_is_a_new_one(focused, tokens, left_padding, fresh, read, goes_on, assert_same, setup) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    cache = fresh(model, tokens(3, 22), mask=left_padding(is_padded, 22))
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
    focused, tokens, left_padding, fresh, read, assert_same, forget: Callable[[FotCache], None], rows: int
) -> None:
    model = focused()
    cache = fresh(model, tokens(3, 22), mask=left_padding(True, 22))
    forget(cache)
    assert cache.rows is None
    assert_same(read(model, cache, tokens(rows, 13)), read(model, FotCache(model.config), tokens(rows, 13)))
    assert cache.rows == rows


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


@pytest.mark.parametrize(("length", "at"), [(1, 1), (2, 1), (30, 1), (30, 4)], ids=str)
@pytest.mark.parametrize("before", [0, 7, 22])
def test_a_reading_that_fails_half_way_leaves_the_cache_as_it_was(
    focused, read, tokens, left_padding, assert_same, goes_on, before: int, length: int, at: int, setup
) -> None:
    changes, is_padded = setup
    model = focused(**changes)
    cache = FotCache(model.config)
    if before:
        read(model, cache, tokens(3, before), left_padding(is_padded, before))
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


def test_labels_of_another_shape_leave_the_cache_as_it_was(focused, tokens, fresh, goes_on, assert_same) -> None:
    model = focused()
    cache = fresh(model, tokens(1, 20))
    with pytest.raises(ValueError, match="labels"):
        model(tokens(1, 9), labels=tokens(1, 8), past_key_values=cache)
    assert (cache.get_seq_length(), len(cache.memory)) == (20, 12)
    assert_same(goes_on(model, cache), goes_on(model, fresh(model, tokens(1, 20))), 0)
