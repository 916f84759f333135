"""Shapes: B batch (R rows of contexts in training), L local tokens, H query heads, Hk key/value heads, D head size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from fot_model import DenseMemory, FotLlamaConfig, FotLlamaForCausalLM, cross_batch_plan
from fot_model import memory as memory_module
from fot_model.cross_batch import pad_plan

VOCABULARY = 40
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied-embeddings": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def randomised(model: Any) -> Any:
    """All parameters random: biases and norms too, which start at constants."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})))


def focused(mem_layers: list[int], **changes: Any) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, **changes}, mem_layers=mem_layers)))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def read(model: FotLlamaForCausalLM, windows: list[Tensor], memory: DenseMemory | None = None) -> list[Tensor]:
    """Logits of each window [B, L], read one after the other."""
    memory = DenseMemory() if memory is None else memory
    with torch.no_grad():
        return [model(window, memory=memory).logits for window in windows]


def assert_same(got: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@variants
@pytest.mark.parametrize("mem_layers", [[], [1], [0, 1, 2]])
def test_within_one_context_memory_layers_change_nothing_of_a_llama(
    mem_layers: list[int], changes: dict[str, Any], tmp_path: Path
) -> None:
    base = llama(**changes)
    base.save_pretrained(tmp_path)
    model = FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=mem_layers)
    assert model.config.mem_layers == mem_layers
    ids_BL = tokens(2, 9)
    with torch.no_grad():
        expected = base(ids_BL, labels=ids_BL)
        plain = model(ids_BL, labels=ids_BL)
        alone = model(ids_BL, labels=ids_BL, plan=pad_plan([[], []]))
        first = model(ids_BL, labels=ids_BL, memory=DenseMemory())
    for got, atol in ((plain, 1e-6), (alone, 1e-5), (first, 1e-5)):
        assert_same(got.logits, expected.logits, atol)
        assert_same(got.loss, expected.loss, atol)


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_a_llama_generates_the_same_with_memory_layers() -> None:
    model, base = focused([1]), llama()
    base.load_state_dict(model.state_dict())
    ids_BL = tokens(2, 7).clamp(min=1)
    assert model.generate(ids_BL, **GREEDY).tolist() == base.generate(ids_BL, **GREEDY).tolist()


@pytest.mark.parametrize(
    "mask_given",
    [
        True,
        False,
    ],
)
def test_a_llama_generates_the_same_from_left_padded_prompts(mask_given: bool) -> None:
    model, base = focused([1]), llama()
    base.load_state_dict(model.state_dict())
    ids_BL = tokens(2, 7).clamp(min=1)
    ids_BL[0, :3] = 0
    mask = {"attention_mask": (ids_BL != 0).long()} if mask_given else {}
    assert model.generate(ids_BL, **mask, **GREEDY).tolist() == base.generate(ids_BL, **mask, **GREEDY).tolist()


def test_generation_with_its_cache_equals_generation_without_where_memory_layers_have_no_positions() -> None:
    model = focused([1], mem_positionals=False)
    ids_BL = tokens(2, 7).clamp(min=1)
    expected_BL = ids_BL
    with torch.no_grad():
        for _ in range(8):
            expected_BL = torch.cat([expected_BL, model(expected_BL).logits[:, -1:].argmax(-1)], dim=1)
    assert model.generate(ids_BL, **GREEDY).tolist() == expected_BL.tolist()


@variants
def test_there_are_no_new_parameters(changes: dict[str, Any]) -> None:
    base, model = llama(**changes), focused([0, 2], **changes)
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in base.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())


def test_fresh_memory_layers_start_as_widely_spread_as_the_others() -> None:
    torch.manual_seed(0)
    model = FotLlamaForCausalLM(FotLlamaConfig(**TINY, mem_layers=[1], initializer_range=0.5))
    spreads = [layer.self_attn.k_proj.weight.std().item() for layer in model.model.layers]
    assert spreads == pytest.approx([0.5] * 3, rel=0.1)


def naive_memory_layer(
    attention: Any, hidden_RLC: Tensor, plan: list[list[int]], cos_LD: Tensor, sin_LD: Tensor
) -> Tensor:
    """What the memory layer gives to its output projection, a query at a time. Returns [R, L, H * D]."""
    R, L, _ = hidden_RLC.shape
    D = attention.head_dim

    def rotated(x_D: Tensor, at: int) -> Tensor:
        return x_D * cos_LD[at] + torch.cat([-x_D[D // 2 :], x_D[: D // 2]]) * sin_LD[at]

    q_RLHD, k_RLHkD, v_RLHkD = (
        projection(hidden_RLC).view(R, L, -1, D)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    H, group = q_RLHD.shape[2], q_RLHD.shape[2] // k_RLHkD.shape[2]
    out_RLHD = torch.empty(R, L, H, D)
    for row in range(R):
        for at in range(L):
            for head in range(H):
                serving = head // group
                keys = [rotated(k_RLHkD[row, before, serving], before) for before in range(at + 1)]
                values = [v_RLHkD[row, before, serving] for before in range(at + 1)]
                for other in plan[row]:
                    keys += list(k_RLHkD[other, :, serving])
                    values += list(v_RLHkD[other, :, serving])
                weights = torch.softmax(torch.stack(keys) @ rotated(q_RLHD[row, at, head], at) / D**0.5, dim=0)
                out_RLHD[row, at, head] = weights @ torch.stack(values)
    return out_RLHD.flatten(2)


@pytest.mark.parametrize("mem_positionals", [True, False])
@variants
def test_in_training_a_memory_layer_attends_to_the_rows_of_the_plan_as_position_zero(
    changes: dict[str, Any], mem_positionals: bool
) -> None:
    model = focused([1], mem_positionals=mem_positionals, **changes)
    attention = model.model.layers[1].self_attn
    plan = [[], [0], [1, 0]]
    caught: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(hidden=kwargs["hidden_states"]), with_kwargs=True
    )
    attention.o_proj.register_forward_pre_hook(lambda _, args: caught.update(attended=args[0]))
    L, D = 4, attention.head_dim
    with torch.no_grad():
        model(tokens(3, L), plan=pad_plan(plan))
        angles_LD = torch.outer(torch.arange(L), 10000.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
        angles_LD = angles_LD * mem_positionals
        expected = naive_memory_layer(attention, caught["hidden"], plan, angles_LD.cos(), angles_LD.sin())
    assert_same(caught["attended"], expected)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        YARN,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_remembered_token_is_a_token_at_position_zero_under_any_rope(rope: dict[str, Any]) -> None:
    model = focused([0], num_hidden_layers=1, rope_parameters=rope)
    ids_BL = tokens(2, 3)
    with torch.no_grad():  # windows of one token each, so all of them stand at position 0
        expected = model(ids_BL, position_ids=torch.zeros(1, 3, dtype=torch.long)).logits
    assert_same(torch.cat(read(model, list(ids_BL.split(1, dim=1))), dim=1), expected)


def test_ordinary_layers_do_not_see_the_rows_of_the_plan() -> None:
    model = focused([2])
    caught: list[Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    ids_RL = tokens(3, 5)
    with torch.no_grad():
        alone, crossed = model(ids_RL).logits, model(ids_RL, plan=pad_plan([[], [0], [1, 0]])).logits
    assert torch.equal(caught[0], caught[1])
    assert_same(crossed[0], alone[0])
    assert not torch.allclose(crossed[1:], alone[1:], atol=1e-2)


@pytest.mark.parametrize("chunk", [3, 4096])
@pytest.mark.parametrize("mem_positionals", [True, False])
@variants
def test_training_on_positives_is_reading_them_into_memory_oldest_first(
    changes: dict[str, Any], mem_positionals: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "CHUNK", chunk)
    model = focused([1], mem_positionals=mem_positionals, **changes)
    ids_RL = tokens(8, 6)
    unrelated = [[False, False], [False, False]]
    plan_Rd = cross_batch_plan([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2, unrelated, [(0, 0), (1, 0), (2, 0), (3, 0)])
    with torch.no_grad():
        trained = model(ids_RL, plan=plan_Rd).logits.view(2, 4, 6, VOCABULARY)
    memory = DenseMemory()
    windows = list(ids_RL.view(2, 4, 6).unbind(1))  # both documents at once, four windows each
    for at, logits in enumerate(read(model, windows, memory)):
        assert_same(logits, trained[:, at])
    assert len(memory) == 24


def test_training_on_negatives_is_reading_them_into_memory_too() -> None:
    model = focused([1], num_key_value_heads=2)
    ids_RL = tokens(3, 5)
    with torch.no_grad():
        trained = model(ids_RL, plan=pad_plan([[1, 2], [], []])).logits
    assert_same(read(model, [ids_RL[[2]], ids_RL[[1]], ids_RL[[0]]])[2], trained[[0]])


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 5, 2], [2, 9, 1], [12]])
@pytest.mark.parametrize("Hk", [4, 2])
def test_one_layer_without_positions_reads_windows_as_one_long_causal_context(sizes: list[int], Hk: int) -> None:
    model = focused([0], num_hidden_layers=1, mem_positionals=False, num_key_value_heads=Hk)
    ids_BL = tokens(2, sum(sizes))
    with torch.no_grad():
        expected = model(ids_BL).logits
    assert_same(torch.cat(read(model, list(ids_BL.split(sizes, dim=1))), dim=1), expected)


def test_a_memory_reset_between_documents_leaves_no_trace_of_the_first() -> None:
    model = focused([0, 2])
    memory = DenseMemory()
    read(model, [tokens(1, 6, seed=1)], memory)
    memory.reset()
    windows = [tokens(1, 6, seed=2), tokens(1, 6, seed=3)]
    for got, expected in zip(read(model, windows, memory), read(model, windows), strict=True):
        assert torch.equal(got, expected)


def test_reading_keeps_no_second_cache_beside_the_memory() -> None:
    model = focused([1])
    assert model(tokens(1, 5)).past_key_values is not None
    assert model(tokens(1, 5), memory=DenseMemory()).past_key_values is None


def test_a_memory_truncated_to_where_it_was_asks_the_same_question_again() -> None:
    model = focused([0, 2])
    memory = DenseMemory()
    read(model, [tokens(1, 6, seed=1), tokens(1, 6, seed=2)], memory)
    question = tokens(1, 4, seed=3)
    [first] = read(model, [question], memory)
    assert len(memory) == 16
    memory.truncate(12)
    [again] = read(model, [question], memory)
    assert torch.equal(again, first)


@variants
def test_a_saved_model_loads_as_a_plain_llama_and_as_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    model = focused([0, 2], **changes)
    model.save_pretrained(tmp_path)
    ids_BL = tokens(2, 9)
    plain, itself = LlamaForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(ids_BL).logits, model(ids_BL).logits)
        plan_Rd = pad_plan([[1], [0]])
        assert torch.equal(itself(ids_BL, plan=plan_Rd).logits, model(ids_BL, plan=plan_Rd).logits)
    assert type(plain) is LlamaForCausalLM
    assert type(itself) is FotLlamaForCausalLM
    assert itself.config.mem_layers == [0, 2]


@pytest.mark.parametrize("bad", [3, -1, 100])
def test_a_memory_layer_that_is_not_there_is_refused_by_its_number(bad: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range: the model has 3 layers, 0 to 2"):
        FotLlamaForCausalLM(FotLlamaConfig(**TINY, mem_layers=[1, bad]))
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range"):
        FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[bad])


def test_a_checkpoint_that_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2}))
    with pytest.raises(ValueError, match=r"no LLaMA.*gpt2"):
        FotLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_plan_and_a_memory_together_are_refused() -> None:
    memory = DenseMemory()
    with pytest.raises(ValueError, match=r"plan .* memory .* exclude each other"):
        focused([1])(tokens(2, 3), plan=pad_plan([[], [0]]), memory=memory)
    assert len(memory) == 0


def loss_and_gradients(model: FotLlamaForCausalLM, ids_RL: Tensor, plan_Rd: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids_RL, labels=ids_RL, plan=plan_Rd).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_neither_loss_nor_gradients() -> None:
    model = focused([1, 2], num_key_value_heads=2).train()
    ids_RL, plan_Rd = tokens(3, 6), pad_plan([[], [0], [1, 0]])
    passes: list[int] = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: passes.append(1))
    loss, gradients = loss_and_gradients(model, ids_RL, plan_Rd)
    assert len(passes) == 1
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, ids_RL, plan_Rd)
    assert len(passes) == 3, "the memory layer was not recomputed"
    assert_same(checkpointed_loss, loss, 1e-6)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert_same(checkpointed_gradients, gradients, 1e-6)


def test_a_loss_on_one_row_trains_the_memory_layer_through_the_rows_it_sees() -> None:
    model = focused([1], num_hidden_layers=2)
    ids_RL = tokens(2, 5)
    embeddings_RLC = model.get_input_embeddings()(ids_RL).detach().requires_grad_()
    labels_RL = ids_RL.clone()
    labels_RL[0] = -100
    model(inputs_embeds=embeddings_RLC, labels=labels_RL, plan=pad_plan([[], []])).loss.backward()
    assert (embeddings_RLC.grad[0] == 0).all()
    model(inputs_embeds=embeddings_RLC, labels=labels_RL, plan=pad_plan([[], [0]])).loss.backward()
    assert (embeddings_RLC.grad[0] != 0).any(-1).all()


def test_bfloat16_runs_and_stays_close() -> None:
    exact, rounded = (focused([0, 1], num_key_value_heads=2) for _ in range(2))
    rounded = rounded.to(torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    ids_RL, plan_Rd = tokens(3, 8), pad_plan([[], [0], [1, 0]])
    with torch.no_grad():
        pairs = [(rounded(ids_RL, plan=plan_Rd).logits, exact(ids_RL, plan=plan_Rd).logits)]
    windows = list(ids_RL[:, None].unbind(0))
    pairs += zip(read(rounded, windows), read(exact, windows), strict=True)
    for got, expected in pairs:
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).norm() < 0.03 * expected.norm()


def test_memory_layers_given_at_loading_are_kept_in_order_and_once(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1, 0, 1]).config.mem_layers == [0, 1]


@pytest.mark.parametrize("how", [{"plan": torch.empty(2, 0, dtype=torch.long)}, {"memory": DenseMemory()}])
def test_padding_and_a_cache_are_refused_with_a_plan_or_a_memory(how: dict[str, Any]) -> None:
    model, ids_BL = focused([0]), tokens(2, 4)
    mask_BL = torch.ones_like(ids_BL)
    model(ids_BL, attention_mask=mask_BL, **how)
    mask_BL[0, 0] = 0
    with pytest.raises(ValueError, match="padding"):
        model(ids_BL, attention_mask=mask_BL, **how)
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids_BL, past_key_values=DynamicCache(), **how)
