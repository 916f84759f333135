"""`generate` with memory.

Shapes: B batch, L tokens.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from fot_model import DenseMemory, FotCache, FotLlamaForCausalLM, TopKMemory

WINDOW = 16
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models that read in windows of 16 tokens."""
    return partial(focused, num_key_value_heads=2, max_position_embeddings=WINDOW)


def greedy_loop(model: FotLlamaForCausalLM, ids_BL: Tensor, steps: int) -> Tensor:
    """The new tokens, each from a call with everything before it."""
    for _ in range(steps):
        ids_BL = torch.cat([ids_BL, model(ids_BL, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids_BL[:, -steps:]


def test_greedy_generation_with_a_cache_equals_generation_without_over_many_windows(
    focused, tokens, kind: dict[str, Any]
) -> None:
    model, ids_BL = focused(**kind), tokens(2, 11)
    generated = model.generate(ids_BL, **{**GREEDY, "max_new_tokens": 22})
    assert torch.equal(generated[:, :11], ids_BL)
    assert generated[:, 11:].tolist() == greedy_loop(model, ids_BL, 22).tolist()


@pytest.mark.parametrize("L", [11, 45])
def test_generate_without_a_cache_is_the_same(focused, tokens, L: int) -> None:
    model, ids_BL = focused(), tokens(2, L)
    assert model.generate(ids_BL, use_cache=False, **GREEDY).tolist() == model.generate(ids_BL, **GREEDY).tolist()


@pytest.mark.parametrize("window", [4, WINDOW])
@pytest.mark.parametrize("L", [11, 45])
def test_beams_with_a_cache_equal_beams_without(focused, tokens, L: int, window: int) -> None:
    model, ids_BL = focused(local_context=window), tokens(2, L)
    how = {**GREEDY, "max_new_tokens": 24, "num_beams": 3, "num_return_sequences": 2}
    with_cache, without = (model.generate(ids_BL, use_cache=use, **how) for use in (True, False))
    assert with_cache.shape == (4, L + 24)
    assert with_cache.tolist() == without.tolist()
    greedy_BL = model.generate(ids_BL, **{**GREEDY, "max_new_tokens": 24})
    assert with_cache[::2].tolist() != greedy_BL.tolist()


def test_beams_of_padded_prompts_are_those_of_each_row_alone(focused, padded) -> None:
    model = focused()
    ids_BL, mask_BL = padded([8, 3], 8)
    how = {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    together = model.generate(ids_BL, attention_mask=mask_BL, **how)
    for row, length in enumerate([8, 3]):
        alone = model.generate(ids_BL[row : row + 1, -length:], **how)
        assert together[row, -8 - length :].tolist() == alone[0].tolist()


def test_sampling_is_reproducible_from_its_seed_with_and_without_a_cache(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(2, 11)

    def sampled(seed: int, **how: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(ids_BL, **{**GREEDY, "do_sample": True, "top_k": 5, **how}).tolist()

    assert sampled(1) == sampled(1) == sampled(1, use_cache=False)
    assert sampled(1) != sampled(2)


def test_sequences_returned_for_a_prompt_are_samples_of_their_own(focused, tokens) -> None:
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


def test_a_streamer_gets_every_token(focused, tokens) -> None:
    model, ids_BL, streamer = focused(), tokens(1, 11), Collected()
    generated = model.generate(ids_BL, streamer=streamer, **GREEDY)
    assert (streamer.tokens, streamer.ended) == (generated[0].tolist(), True)


@pytest.mark.parametrize("mask_given", [True, False])
def test_left_padded_prompts_are_continued_as_each_alone_within_the_window(focused, padded, mask_given: bool) -> None:
    model = focused()
    ids_BL, mask_BL = padded([8, 3, 5], 8)
    how = {**GREEDY, "max_new_tokens": 8}
    together = model.generate(ids_BL, **({"attention_mask": mask_BL} if mask_given else {}), **how)
    for row, length in enumerate([8, 3, 5]):
        alone = model.generate(ids_BL[row : row + 1, -length:], **how)
        assert together[row, -8 - length :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("last_context", [None, 6])
@pytest.mark.parametrize("full", [True, False])
def test_a_conversation_continued_from_its_cache_goes_on_as_read_anew(
    focused, tokens, full: bool, last_context: int | None
) -> None:
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


def test_generation_uses_the_memory_it_is_given(focused, tokens) -> None:
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
    focused, tokens, last_context: int | None, kept: int
) -> None:
    model = focused(last_context_length=last_context)
    cache = FotCache(model.config)
    noted = Lengths(cache)
    model.generate(tokens(1, 21), past_key_values=cache, logits_processor=[noted], **{**GREEDY, "max_new_tokens": 60})
    assert max(noted.lengths) == WINDOW
    assert min(noted.lengths[1:]) == kept + 1


def test_prompts_may_be_prefilled_in_chunks(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(2, 45)
    chunked = model.generate(ids_BL, prefill_chunk_size=7, **GREEDY)
    assert chunked.tolist() == model.generate(ids_BL, **GREEDY).tolist()


def test_embeddings_are_continued_as_the_tokens_they_belong_to(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(2, 45)
    continued = model.generate(inputs_embeds=model.get_input_embeddings()(ids_BL), **GREEDY)
    assert continued.tolist() == model.generate(ids_BL, **GREEDY)[:, 45:].tolist()


def test_a_mask_of_ones_says_that_padding_tokens_are_text_in_generation_too(focused, tokens) -> None:
    model, ids_BL = focused(pad_token_id=0), tokens(2, 9)
    ids_BL[0, :2] = 0
    outcomes = [
        model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=use_cache, **GREEDY).tolist()
        for use_cache in (True, False)
    ]
    assert outcomes[0] == outcomes[1]


def test_assisted_generation_is_refused_because_what_went_to_memory_cannot_be_taken_back(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(1, 10).repeat(1, 4)
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids_BL, prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids_BL, assistant_model=focused(num_hidden_layers=2), **GREEDY)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused_in_generation(focused, tokens, implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"cache_implementation '{implementation}'.*FotCache"):
        focused().generate(tokens(1, 9), cache_implementation=implementation, **GREEDY)


def test_a_question_without_the_text_before_it_is_answered_with_what_generate_wants(focused, tokens) -> None:
    model, ids_BL = focused(), tokens(1, 20)
    cache = model(ids_BL).past_key_values
    with pytest.raises(ValueError, match="put the 20 that the cache has read before"):
        model.generate(ids_BL[:, :5], past_key_values=cache, **GREEDY)


def test_generation_past_the_window_does_not_warn_of_a_maximum_length(
    focused, plain, tokens, caplog: pytest.LogCaptureFixture
) -> None:
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
