"""Shapes: R rows, L tokens a context, d additional contexts, H query heads, D head size, N additional tokens."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import DenseMemory, FotCache, FotLlamaForCausalLM, TopKMemory, attention_mass, key_mass, memory_mass
from fot_model import mass as mass_module
from fot_model.plan import pad_plan
from fot_model.rope import rotation

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
PLAN = [[], [0], [1, 0], [0, 1]]
OF_ROWS = torch.tensor([7, 7, 5, 7])
OF_TOKENS = torch.tensor([[7, 7, 7, 5, 5], [5, 5, 5, 5, 5], [5, 6, 6, 6, 6], [8, 8, 7, 7, 7]])


@pytest.fixture(scope="session")
def focused(focused) -> Callable[..., FotLlamaForCausalLM]:
    """Makes models with two memory layers."""
    return partial(focused, num_key_value_heads=2, mem_layers=[0, 2])


def naive_masses(
    model: FotLlamaForCausalLM,
    layer: int,
    hidden_RLC: Tensor,
    plan: list[list[int]],
    documents_RL: Tensor,
    joined_RL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positive and additional mass by head [H], from one softmax a query."""
    attention, rope = model.model.layers[layer].self_attn, LlamaRotaryEmbedding(model.config)
    frequencies, scale = rope.inv_freq, rope.attention_scaling
    if not model.config.mem_positionals:
        frequencies, scale = frequencies * 0, 1.0
    R, L, _ = hidden_RLC.shape
    H, D = model.config.num_attention_heads, attention.head_dim

    def turned(x_D: Tensor, position: int) -> Tensor:
        angles_D = (position * frequencies).repeat(2)
        first, second = x_D.chunk(2)
        return (x_D * angles_D.cos() + torch.cat([-second, first]) * angles_D.sin()) * scale

    q_RLHD = attention.q_proj(hidden_RLC).view(R, L, H, D)
    k_RLHD = attention.k_proj(hidden_RLC).view(R, L, -1, D)
    k_RLHD = k_RLHD.repeat_interleave(H // k_RLHD.shape[2], dim=2)
    positive_H, additional_H = torch.zeros(H), torch.zeros(H)
    for row in range(R):
        for at in range(L):
            near = [
                before for before in range(at + 1) if joined_RL is None or joined_RL[row, before] == joined_RL[row, at]
            ]
            far = [(other, there) for other in plan[row] for there in range(L)]
            same_N = torch.tensor([float(documents_RL[place] == documents_RL[row, at]) for place in far])
            for head in range(H):
                keys = [turned(k_RLHD[row, before, head], before) for before in near]
                keys += [turned(k_RLHD[other, there, head], 0) for other, there in far]
                weights = torch.softmax(torch.stack(keys) @ turned(q_RLHD[row, at, head], at) / D**0.5, dim=0)
                weights_N = weights[len(near) :]
                positive_H[head] += (weights_N * same_N).sum()
                additional_H[head] += weights_N.sum()
    return positive_H, additional_H


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "no-positions": {"mem_positionals": False},
    "yarn": {"rope_parameters": YARN},
    "yarn-no-positions": {"rope_parameters": YARN, "mem_positionals": False},
    "bias": {"attention_bias": True},
}


@pytest.mark.parametrize("by", ["rows", "tokens"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mass_is_what_one_softmax_gives_to_the_tokens_of_the_own_document(
    focused, tokens, changes: dict[str, Any], joined: bool, by: str
) -> None:
    model = focused(**changes)
    caught: dict[int, Tensor] = {}
    for layer in (0, 2):
        model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: caught.__setitem__(layer, kwargs["hidden_states"].detach()),
            with_kwargs=True,
        )
    documents = OF_ROWS if by == "rows" else OF_TOKENS
    documents_RL = documents[:, None].expand(4, 5) if by == "rows" else documents
    joined_RL = OF_TOKENS if joined else None
    with attention_mass(model, documents) as found, torch.no_grad():
        model(tokens(4, 5), plan=pad_plan(PLAN), document_ids=joined_RL)
        expected = {layer: naive_masses(model, layer, caught[layer], PLAN, documents_RL, joined_RL) for layer in (0, 2)}
    assert found.layers.keys() == {0, 2}
    for layer, (positive_H, additional_H) in expected.items():
        mass = found.layers[layer]
        torch.testing.assert_close(torch.as_tensor(mass.positive).float(), positive_H, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(mass.additional).float(), additional_H, rtol=0, atol=1e-5)
        torch.testing.assert_close(mass.share().float(), positive_H / additional_H, rtol=0, atol=1e-5)
        assert found.r_d()[layer] == pytest.approx(float(positive_H.sum() / additional_H.sum()), abs=1e-5)
        assert 0.05 < found.r_d()[layer] < 0.95


def test_passes_add_up(focused, tokens) -> None:
    model, plan_Rd = focused(), pad_plan(PLAN)
    batches = [tokens(4, 5, seed=seed) for seed in (1, 2)]
    alone = []
    with torch.no_grad():
        for ids_RL in batches:
            with attention_mass(model, OF_ROWS) as found:
                model(ids_RL, plan=plan_Rd)
            alone.append(found)
        with attention_mass(model, OF_ROWS) as both:
            for ids_RL in batches:
                model(ids_RL, plan=plan_Rd)
                model(ids_RL, use_cache=False)  # without a plan there is nothing to add
    for layer in (0, 2):
        for name in ("positive", "additional"):
            total = sum(getattr(found.layers[layer], name) for found in alone)
            torch.testing.assert_close(getattr(both.layers[layer], name), total, rtol=0, atol=1e-9)
            assert not torch.equal(getattr(alone[0].layers[layer], name), getattr(alone[1].layers[layer], name))


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_a_model_that_does_not_tell_documents_apart_gives_each_of_d_contexts_its_share(focused, tokens, d: int) -> None:
    model = focused()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
    R = d + 1
    plan_Rd = torch.stack([torch.tensor([other for other in range(R) if other != row]) for row in range(R)])
    documents_R = torch.arange(R)
    documents_R[0] = documents_R[R - 1]  # rows 0 and d are of one document, the others alone
    with attention_mass(model, documents_R) as found, torch.no_grad():
        model(tokens(R, 6), plan=plan_Rd)
    for layer, share in found.r_d().items():
        assert share == pytest.approx(2 / R / d, abs=1e-6)
        assert found.layers[layer].share().tolist() == pytest.approx([2 / R / d] * 4, abs=1e-6)
    near_and_far = [d * 6 / (d * 6 + at + 1) for at in range(6)]
    assert found.layers[0].additional.tolist() == pytest.approx([R * sum(near_and_far)] * 4, abs=1e-4)


def test_shares_are_one_with_positives_alone_and_nothing_without(focused, tokens) -> None:
    model = focused()
    with torch.no_grad():
        with attention_mass(model, torch.tensor([3, 3, 3, 3])) as own:
            model(tokens(4, 5), plan=pad_plan(PLAN))
        with attention_mass(model, torch.tensor([1, 2, 3, 4])) as others:
            model(tokens(4, 5), plan=pad_plan(PLAN))
        with attention_mass(model, OF_ROWS) as none:
            model(tokens(4, 5), plan=pad_plan([[], [], [], []]))
    assert own.r_d() == pytest.approx({0: 1.0, 2: 1.0})
    assert others.r_d() == {0: 0.0, 2: 0.0}
    assert all(math.isnan(share) for share in none.r_d().values())
    assert none.layers[0].share().isnan().all()


def hooks(model: FotLlamaForCausalLM) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_nothing_stays_registered_not_even_after_an_error(focused) -> None:
    model = focused()
    before = hooks(model)
    with attention_mass(model, OF_ROWS):
        assert hooks(model) == before + 2
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="stopped"), attention_mass(model, OF_ROWS):
        raise RuntimeError("stopped")
    assert hooks(model) == before


def test_masses_stay_as_they_are_once_closed(focused, tokens) -> None:
    model = focused()
    with torch.no_grad():
        with attention_mass(model, OF_ROWS) as found:
            model(tokens(4, 5), plan=pad_plan(PLAN))
        before = found.r_d()
        model(tokens(4, 5, seed=3), plan=pad_plan(PLAN))
    assert found.r_d() == before


def test_layers_are_all_memory_layers_or_those_asked_for(focused, tokens) -> None:
    model = focused()
    with torch.no_grad():
        with attention_mass(model, OF_ROWS) as all_layers:
            model(tokens(4, 5), plan=pad_plan(PLAN))
        with attention_mass(model, OF_ROWS, layers=[2]) as one:
            model(tokens(4, 5), plan=pad_plan(PLAN))
    assert all_layers.r_d().keys() == {0, 2}
    assert one.r_d() == {2: all_layers.r_d()[2]}


@pytest.mark.parametrize("layers", [[1], [0, 1], [3], [-1]])
def test_a_layer_that_is_no_memory_layer_is_refused_by_number(focused, layers: list[int]) -> None:
    model = focused()
    wrong = [layer for layer in layers if layer != 0]
    with (
        pytest.raises(ValueError, match=rf"layers \[{wrong[0]}\] are no memory layers: those are \[0, 2\]"),
        attention_mass(model, OF_ROWS, layers=layers),
    ):
        pass
    assert hooks(model) == 0


def test_outputs_and_gradients_are_the_same_while_it_is_open(focused, tokens) -> None:
    model, ids_RL, plan_Rd = focused().train(), tokens(4, 5), pad_plan(PLAN)
    outcomes = []
    for watched in (False, True):
        model.zero_grad()
        with attention_mass(model, OF_ROWS, layers=[0, 2] if watched else []) as found:
            output = model(ids_RL, labels=ids_RL, plan=plan_Rd, skip_logits=False)
            output.loss.backward()
        outcomes.append([output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        assert all(not torch.as_tensor(mass.positive).requires_grad for mass in found.layers.values())
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_recomputed_activations_are_counted_once(focused, tokens) -> None:
    model, ids_RL, plan_Rd = focused().train(), tokens(4, 5), pad_plan(PLAN)
    masses = []
    for recomputes in (False, True):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with attention_mass(model, OF_ROWS) as found:
            model(ids_RL, labels=ids_RL, plan=plan_Rd).loss.backward()
        masses.append(found.layers[2].additional)
    torch.testing.assert_close(*masses, rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_reduced_precision_measures_nearly_the_same(focused, tokens, how: str) -> None:
    model, ids_RL, plan_Rd = focused(), tokens(4, 5), pad_plan(PLAN)
    shares = []
    for reduced in (False, True):
        if reduced and how == "bfloat16":
            model = model.to(torch.bfloat16)
        with (
            attention_mass(model, OF_ROWS) as found,
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced and how == "autocast"),
        ):
            model(ids_RL, plan=plan_Rd)
        shares.append(found.r_d())
    assert shares[0] != shares[1]
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


@pytest.mark.parametrize("shape", [(3,), (4, 6), (3, 5)], ids=str)
def test_documents_of_another_shape_are_refused(focused, tokens, shape: tuple[int, ...]) -> None:
    model, documents = focused(), torch.zeros(shape)
    with pytest.raises(ValueError, match="documents"), attention_mass(model, documents), torch.no_grad():
        model(tokens(4, 5), plan=pad_plan(PLAN))


def test_the_mass_of_an_objective_without_contexts_at_position_zero_is_refused(focused, tokens) -> None:
    model = focused()
    with pytest.raises(ValueError, match="transformer_xl"), attention_mass(model, OF_ROWS), torch.no_grad():
        model(tokens(4, 5), plan=pad_plan([[], [0], [1], [2]]), objective="transformer_xl")


def read_beside(model: FotLlamaForCausalLM, contexts_NL: Tensor, memory: DenseMemory | None = None) -> FotCache:
    """A cache whose memory holds the contexts, each read alone."""
    memory = DenseMemory() if memory is None else memory
    for context_L in contexts_NL:
        alone = FotCache(model.config)
        model(context_L[None], past_key_values=alone)
        alone.flush()
        for layer in model.config.mem_layers:
            state = alone.memory.state_dict()
            memory.append(layer, state[f"{layer}.keys"], state[f"{layer}.values"])
    return FotCache(model.config, memory)


READ: dict[str, dict[str, Any]] = {**VARIANTS, "cosine": {"mem_qk_norm": True}}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("changes", READ.values(), ids=READ)
def test_reading_with_contexts_in_memory_has_the_mass_of_training_on_them(
    focused, tokens, changes: dict[str, Any], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mass_module, "KEYS_AT_ONCE", 7)  # blocks that cut contexts
    model, rows_RL = focused(mem_layers=[1], **changes), tokens(5, 6)
    documents_R = torch.arange(5)
    documents_R[4] = place
    with torch.no_grad():
        with attention_mass(model, documents_R) as trained:
            model(rows_RL, plan=pad_plan([[], [], [], [], [0, 1, 2, 3]]))
        cache = read_beside(model, rows_RL[:4])
        with memory_mass(model, range(6 * place, 6 * place + 6)) as read:
            model(rows_RL[4:], past_key_values=cache)
    for name in ("positive", "additional"):
        expected, found = (getattr(mass.layers[1], name) for mass in (trained, read))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert 0.05 < read.r_d()[1] < 0.95


def test_what_was_read_before_in_the_local_context_takes_its_part_of_the_softmax(focused, tokens) -> None:
    model, rows_RL = focused(mem_layers=[1]), tokens(3, 6)
    with torch.no_grad():
        masses = []
        for cut in (6, 4):
            cache = read_beside(model, rows_RL[:2])
            with memory_mass(model, range(6)) as mass:
                for part_BL in rows_RL[2:].split(cut, dim=1):
                    model(part_BL, past_key_values=cache)
            masses.append(mass.layers[1])
    torch.testing.assert_close(masses[0].additional, masses[1].additional, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masses[0].positive, masses[1].positive, rtol=1e-5, atol=1e-6)


def test_keys_that_are_ahead_of_the_window_take_the_same_part_of_the_softmax(focused, tokens) -> None:
    model, rows_BL = focused(mem_layers=[1], local_context=8), tokens(2, 15)
    with torch.no_grad():
        cache = FotCache(model.config)
        model(rows_BL[:, :12], past_key_values=cache)
        assert (cache.local_length, len(cache.memory)) == (8, 4)
        cache.evict(3)
        level = copy.deepcopy(cache)
        assert level._lead_B1.tolist() == [[7]]
        level._turn_back(rotation(level._rope, level._lead_B1, level._positions_used))
        level._lead_B1, masses = None, []
        for each in (cache, level):
            with memory_mass(model, range(2)) as mass:
                model(rows_BL[:, 12:], past_key_values=each)
            masses.append(mass.layers[1])
    for name in ("positive", "additional"):
        torch.testing.assert_close(*(getattr(mass, name) for mass in masses), rtol=1e-5, atol=1e-6)


def test_a_gated_memory_has_a_softmax_of_its_own(focused, tokens) -> None:
    model, rows_RL = focused(mem_layers=[1], mem_gate=True), tokens(4, 6)
    plan_Rd = pad_plan([[], [], [], [0, 1, 2]])
    with torch.no_grad():
        with attention_mass(model, torch.tensor([3, 1, 2, 3])) as trained:
            model(rows_RL, plan=plan_Rd, objective="memorizing")
        cache = read_beside(model, rows_RL[:3])
        with memory_mass(model, range(6)) as read:
            model(rows_RL[3:], past_key_values=cache)
    assert read.layers[1].additional.tolist() == pytest.approx([6.0] * 4)
    torch.testing.assert_close(read.layers[1].positive, trained.layers[1].positive, rtol=1e-5, atol=1e-6)


def test_top_k_and_16_bit_memories_are_measured_over_all_they_hold(focused, tokens) -> None:
    model, rows_RL = focused(mem_layers=[1]), tokens(4, 6)
    shares = []
    with torch.no_grad():
        for memory in (DenseMemory(), TopKMemory(2), DenseMemory(torch.bfloat16)):
            cache = read_beside(model, rows_RL[:3], memory)
            with memory_mass(model, range(6)) as mass:
                model(rows_RL[3:], past_key_values=cache)
            shares.append(mass.r_d()[1])
    assert shares[0] == shares[1]
    assert shares[2] == pytest.approx(shares[0], abs=0.02)


def test_reading_without_memory_adds_nothing_and_padding_is_refused(focused, tokens) -> None:
    model, rows_RL = focused(), tokens(2, 6)
    seen_BL = torch.ones(2, 6, dtype=torch.long)
    seen_BL[0, :2] = 0
    cache = FotCache(model.config)
    with torch.no_grad(), memory_mass(model, range(6)) as mass:
        model(rows_RL, past_key_values=cache, attention_mask=seen_BL)
        assert all(math.isnan(share) for share in mass.r_d().values())
        cache.flush()
        with pytest.raises(ValueError, match="padding"):
            model(rows_RL, past_key_values=cache)
    assert hooks(model) == 0


def test_the_mass_in_memory_leaves_the_outputs_as_they_are(focused, tokens) -> None:
    model, rows_RL = focused(), tokens(3, 6)
    with torch.no_grad():
        plain = model(rows_RL[2:], past_key_values=read_beside(model, rows_RL[:2])).logits
        with memory_mass(model, range(6), layers=[2]) as mass:
            watched = model(rows_RL[2:], past_key_values=read_beside(model, rows_RL[:2])).logits
    assert torch.equal(plain, watched)
    assert mass.layers.keys() == {2}


ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_key_mass_is_that_of_the_models_own_weights(focused, tokens, rope: dict[str, Any]) -> None:
    model, ids_1L = focused(mem_layers=[], rope_parameters=rope), tokens(1, 30)
    model.set_attn_implementation("eager")
    queries_Q = torch.tensor([3, 29, 17])
    keys_SQL = torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    with torch.no_grad(), key_mass(model, queries_Q, keys_SQL) as found:
        weights = model(ids_1L, output_attentions=True, use_cache=False).attentions
    assert list(found) == [0, 1, 2]
    for layer, mass_SHQ in found.items():
        expected = torch.stack([(weights[layer][0, :, queries_Q] * keys_QL).sum(-1) for keys_QL in keys_SQL])
        torch.testing.assert_close(mass_SHQ, expected.double(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="give one row of 30 tokens"), key_mass(model, queries_Q, keys_SQL):
        model(ids_1L.repeat(2, 1), use_cache=False)
