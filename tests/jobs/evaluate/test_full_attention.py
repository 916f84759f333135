"""Held against transformers' own LLaMA, which reads a text in one call."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from jobs.evaluate import full_attention as module
from jobs.evaluate.full_attention import FullReader, full_attention, ntk_rope, read_on, yarn_rope

LOCAL, MADE_FOR, LONGEST = 16, 32, 128


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """With grouped queries, and a scale at which attention tells positions apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MADE_FOR,
        initializer_range=0.4,
    )
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def model(llama: Path) -> FotLlamaForCausalLM:
    return FotLlamaForCausalLM.from_pretrained(llama).eval()


def texts(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 90, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def expected(llama: LlamaForCausalLM, text_BT: torch.Tensor, scored: int) -> list[list[float]]:
    with torch.no_grad():
        log_probabilities = llama(text_BT[:, :-1]).logits.log_softmax(-1)
    losses = -log_probabilities.gather(2, text_BT[:, 1:, None])[..., 0]
    return losses[:, -scored * LOCAL :].unflatten(1, (scored, LOCAL)).sum(-1).tolist()


@pytest.mark.parametrize(("context", "scored"), [(1, 1), (3, 1), (8, 1), (8, 3), (4, 4)])
@pytest.mark.parametrize("piece", [5, 16, 512])
def test_losses_are_those_of_a_llama_that_reads_all_at_once(
    llama: Path, model, monkeypatch, context: int, scored: int, piece: int
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    text_BT = texts(context * LOCAL + 1, rows=2)
    with torch.inference_mode():
        found = FullReader(model, LOCAL).losses(text_BT, scored)
    whole = expected(LlamaForCausalLM.from_pretrained(llama).eval(), text_BT, scored)
    for row, wanted in zip(found.tolist(), whole, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


SCALED = {"yarn": yarn_rope, "dynamic": ntk_rope}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("context", [2, 4, 8])
def test_scaled_positions_are_those_of_a_llama_loaded_with_them(llama: Path, model, kind: str, context: int) -> None:
    """Dynamic NTK as it is in one call with the whole text, whatever was read before."""
    config = LlamaConfig.from_pretrained(llama)
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind, "factor": LONGEST / MADE_FOR}
    config.standardize_rope_params()
    text_BT = texts(context * LOCAL + 1)
    whole = expected(LlamaForCausalLM.from_pretrained(llama, config=config).eval(), text_BT, 1)

    def rope_of(tokens: int):
        return yarn_rope(model, LONGEST) if kind == "yarn" else ntk_rope(model, tokens, LONGEST)

    with torch.inference_mode():
        reader = FullReader(model, LOCAL, rope_of)
        reader.losses(texts(LONGEST + 1), 1)
        found = reader.losses(text_BT, 1)
        plain = FullReader(model, LOCAL).losses(text_BT, 1)
    assert found.tolist()[0] == pytest.approx(whole[0], rel=1e-5)
    within = kind == "dynamic" and context * LOCAL <= MADE_FOR
    assert (found.item() == pytest.approx(plain.item(), rel=1e-4)) == within


def test_within_its_own_length_a_model_is_left_as_it_is(model) -> None:
    assert yarn_rope(model, MADE_FOR) is model.model.rotary_emb
    assert ntk_rope(model, MADE_FOR, LONGEST) is model.model.rotary_emb


def test_answers_follow_a_prompt_that_is_read_once(llama: Path, model, monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE", 7)
    prompt_BT, plain = texts(3 * LOCAL - 4, rows=2), LlamaForCausalLM.from_pretrained(llama).eval()
    read: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    with torch.inference_mode():
        ask = FullReader(model, LOCAL).ask(prompt_BT, 2, 4)
        assert sum(read) == prompt_BT.shape[1]
        for seed in range(3):
            answer_BA = texts(4 + 90 * seed, rows=2)[:, :4]
            logits = plain(torch.cat([prompt_BT, answer_BA], dim=1)).logits[:, -5:]
            torch.testing.assert_close(ask(answer_BA), logits, rtol=1e-4, atol=1e-4)
    assert sum(read) == prompt_BT.shape[1] + 3 * 4


def test_the_model_is_as_before_afterwards(model) -> None:
    rope, attention = model.model.rotary_emb, model.config._attn_implementation
    with pytest.raises(IndexError), full_attention(model, yarn_rope(model, LONGEST)):
        model(texts(3) + 90)  # no such tokens
    with full_attention(model, yarn_rope(model, LONGEST)):
        assert model.model.rotary_emb is not rope
    assert (model.model.rotary_emb, model.config._attn_implementation) == (rope, attention)


def test_no_score_of_every_pair_and_no_logit_but_of_what_is_scored(model, monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE", 8)
    made, seen = [], []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: made.append(inputs[0].shape[-2]))
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs.get("attention_mask"))), with_kwargs=True
    )
    with torch.inference_mode():
        FullReader(model, LOCAL).losses(texts(4 * LOCAL + 1), 1)
    assert sum(made) == LOCAL
    assert seen == [(8, None)] * 8


def test_what_was_read_before_is_seen(model) -> None:
    with torch.inference_mode(), full_attention(model):
        cache, ids = DynamicCache(), texts(10)
        parts = torch.cat([read_on(model, ids[:, :6], cache), read_on(model, ids[:, 6:], cache)], dim=1)
        torch.testing.assert_close(parts, read_on(model, ids, DynamicCache()), rtol=1e-4, atol=1e-4)
