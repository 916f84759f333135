"""A layer's attention in training, against one that goes query by query; gates.

Shapes: R rows, L tokens a context, d additional contexts, H query heads, Hk key/value heads, D head size, C hidden
size, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM, longllama_plan
from fot_model.layer import FotAttention
from fot_model.plan import pad_plan

THETA = {"rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 3.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
    **THETA,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "attention-bias": {"attention_bias": True},
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
    "no-positions": {"mem_positionals": False},
    "yarn": {"rope_parameters": YARN},
    "yarn-no-positions": {"rope_parameters": YARN, "mem_positionals": False},
    "longrope": {"rope_parameters": LONGROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}},
    "large-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
PLAN = [[], [0], [1, 0]]


def last_row_only(ids_RL: Tensor) -> Tensor:
    """Labels that leave out all rows but the last."""
    labels_RL = torch.full_like(ids_RL, -100)
    labels_RL[-1] = ids_RL[-1]
    return labels_RL


class NaiveLayer:
    """A layer's attention in training, a query at a time, over an explicit list of keys."""

    def __init__(self, model: FotLlamaForCausalLM, layer: int, objective: str = "fot") -> None:
        self.attention, self.objective = model.model.layers[layer].self_attn, objective
        self.gate = None if objective != "memorizing" else self.attention.mem_gate
        rope = LlamaRotaryEmbedding(model.config)
        turns = model.config.mem_positionals or layer not in model.config.mem_layers
        self.frequencies = rope.inv_freq * turns
        self.scale = rope.attention_scaling if turns else 1.0

    def turned(self, x_D: Tensor, position: int) -> Tensor:
        angles_D = (position * self.frequencies).repeat(2)
        first, second = x_D.chunk(2)
        return (x_D * angles_D.cos() + torch.cat([-second, first]) * angles_D.sin()) * self.scale

    def __call__(self, hidden_RLC: Tensor, plan: list[list[int]], documents: Any = None) -> Tensor:
        """What goes to the output projection [R, L, H * D]."""
        R, L, _ = hidden_RLC.shape
        D = self.attention.head_dim
        q_RLHD, k_RLHkD, v_RLHkD = (
            projection(hidden_RLC).view(R, L, -1, D)
            for projection in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        )
        far_k, far_v = (k_RLHkD, v_RLHkD) if self.objective == "fot" else (k_RLHkD.detach(), v_RLHkD.detach())
        H, group = q_RLHD.shape[2], q_RLHD.shape[2] // k_RLHkD.shape[2]
        out = []
        for row in range(R):
            for at in range(L):
                for head in range(H):
                    serving = head // group
                    query_D = self.turned(q_RLHD[row, at, head], at)
                    near = [
                        (self.turned(k_RLHkD[row, before, serving], before), v_RLHkD[row, before, serving])
                        for before in range(at + 1)
                        if documents is None or documents[row][before] == documents[row][at]
                    ]
                    back = L if self.objective == "transformer_xl" else None
                    far = [
                        (
                            self.turned(far_k[other, there, serving], there - back if back else 0),
                            far_v[other, there, serving],
                        )
                        for other in plan[row]
                        for there in range(L)
                    ]
                    if self.gate is None:
                        out.append(self.softmax(query_D, near + far))
                    elif not far:
                        out.append(self.softmax(query_D, near))
                    else:
                        gate = self.gate[head].sigmoid()
                        out.append(gate * self.softmax(query_D, far) + (1 - gate) * self.softmax(query_D, near))
        return torch.stack(out).view(R, L, H * D)

    @staticmethod
    def softmax(query_D: Tensor, held: list[tuple[Tensor, Tensor]]) -> Tensor:
        keys, values = (torch.stack(part) for part in zip(*held, strict=True))
        return torch.softmax(keys @ query_D / query_D.shape[0] ** 0.5, dim=0) @ values


@pytest.fixture(scope="session")
def check_layer(tokens, gradients, assert_same) -> Callable[..., None]:
    """The layer's output and the gradients of its input and parameters are the naive layer's."""

    def check(
        model: FotLlamaForCausalLM,
        layer: int,
        objective: str,
        plan: list[list[int]],
        documents: list[list[int]] | None = None,
    ) -> None:
        attention = model.model.layers[layer].self_attn
        caught: dict[str, Tensor] = {}

        def enter(_: Any, args: Any, kwargs: Any) -> Any:
            caught["hidden"] = kwargs["hidden_states"].detach().requires_grad_()
            return args, {**kwargs, "hidden_states": caught["hidden"]}

        hooks = [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(lambda _, args: caught.update(attended=args[0])),
        ]
        ids_RL = tokens(len(plan), 4 if documents is None else len(documents[0]))
        documents_RL = None if documents is None else torch.tensor(documents)
        model(ids_RL, plan=pad_plan(plan), objective=objective, document_ids=documents_RL)
        for hook in hooks:
            hook.remove()
        expected = NaiveLayer(model, layer, objective)(caught["hidden"], plan, documents)
        assert_same(caught["attended"], expected)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        outcomes = []
        for attended in (caught["attended"], expected):
            caught["hidden"].grad = None
            (attended * weights).sum().backward(retain_graph=True)
            outcomes.append({"hidden": caught["hidden"].grad.clone(), **gradients(attention)})
        assert outcomes[0].keys() == outcomes[1].keys()
        assert_same(outcomes[0], outcomes[1], 3e-5)

    return check


@variants
def test_fot_attends_to_the_rows_of_the_plan_as_position_zero_and_differentiates_them(
    check_layer, focused, changes: dict[str, Any]
) -> None:
    check_layer(focused(**changes), 1, "fot", PLAN)


@variants
def test_memorizing_attends_to_the_same_and_differentiates_only_what_is_local(
    check_layer, focused, tokens, changes: dict[str, Any]
) -> None:
    model = focused(**changes)
    check_layer(model, 1, "memorizing", PLAN)
    ids_RL, plan_Rd = tokens(3, 5), pad_plan(PLAN)
    assert torch.equal(model(ids_RL, plan=plan_Rd).logits, model(ids_RL, plan=plan_Rd, objective="memorizing").logits)


@variants
@pytest.mark.parametrize("layer", [0, 1])
def test_transformer_xl_attends_in_every_layer_to_the_previous_context_at_the_positions_before(
    check_layer, focused, layer: int, changes: dict[str, Any]
) -> None:
    check_layer(focused(**changes), layer, "transformer_xl", [[], [0], [1]])


@variants
def test_a_gate_mixes_memory_and_local_context_head_by_head(check_layer, focused, changes: dict[str, Any]) -> None:
    check_layer(focused(mem_gate=True, **changes), 1, "memorizing", PLAN)


@pytest.mark.parametrize("objective", ["fot", "memorizing"])
def test_the_order_of_the_rows_of_a_plan_and_holes_in_it_do_not_matter(
    focused, tokens, assert_same, objective: str
) -> None:
    model, ids_RL = focused(mem_gate=True), tokens(3, 5)
    plans = [torch.tensor(plan) for plan in ([[-1, -1], [0, -1], [1, 0]], [[-1, -1], [-1, 0], [0, 1]])]
    first, second = (model(ids_RL, plan=plan_Rd, objective=objective).logits for plan_Rd in plans)
    assert_same(first, second)


@pytest.mark.parametrize("objective", ["fot", "memorizing"])
def test_documents_joined_in_a_row_are_apart_in_the_local_context_of_a_memory_layer(
    check_layer, focused, objective: str
) -> None:
    documents = [[0, 0, 1, 1, 1], [2, 2, 2, 2, 2], [3, 4, 4, 5, 5]]
    model = focused(num_key_value_heads=2, mem_gate=objective == "memorizing")
    check_layer(model, 1, objective, PLAN, documents)


def test_a_plan_of_nothing_is_the_plain_llama(focused, tokens, assert_same) -> None:
    model, ids_RL = focused(num_key_value_heads=2, mem_layers=[0, 1, 2], mem_gate=True), tokens(2, 9)
    expected = model(ids_RL, use_cache=False).logits
    for plan_Rd in (torch.empty(2, 0, dtype=torch.long), torch.full((2, 3), -1), pad_plan([[], []]).int()):
        for objective in ("fot", "memorizing", "transformer_xl"):
            if objective != "transformer_xl" or plan_Rd.shape[1] < 2:
                assert_same(model(ids_RL, plan=plan_Rd, objective=objective).logits, expected)


def test_ordinary_layers_do_not_see_the_rows_of_the_plan(focused, tokens, assert_same) -> None:
    model = focused(mem_layers=[2])
    caught: list[Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    ids_RL = tokens(3, 5)
    alone, crossed = model(ids_RL, use_cache=False).logits, model(ids_RL, plan=pad_plan(PLAN)).logits
    assert torch.equal(caught[0], caught[1])
    assert_same(crossed[0], alone[0])
    assert (crossed[1:] - alone[1:]).abs().amax((1, 2)).min() > 1e-2


@pytest.mark.parametrize("objective", ["fot", "memorizing", "transformer_xl"])
@pytest.mark.parametrize("gate", [False, True])
def test_only_fot_trains_a_row_through_the_rows_it_sees(focused, tokens, objective: str, gate: bool) -> None:
    model = focused(mem_layers=[0, 2], mem_gate=gate)
    ids_RL = tokens(2, 5)
    embeddings_RLC = model.get_input_embeddings()(ids_RL).detach().requires_grad_()
    how = {"labels": last_row_only(ids_RL), "plan": pad_plan([[], [0]]), "objective": objective}
    model(inputs_embeds=embeddings_RLC, **how).loss.backward()
    assert (embeddings_RLC.grad[0] != 0).any(-1).all() == (objective == "fot")
    assert (embeddings_RLC.grad[0] == 0).all() == (objective != "fot")
    assert (embeddings_RLC.grad[1, :-1] != 0).any(-1).all()


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "mem_layers": [0, 2], "mem_positionals": False}], ids=str
)
def test_memorizing_has_the_gradients_of_reading_with_the_same_in_memory(
    focused, tokens, trained, assert_same, changes: dict[str, Any], gate: bool
) -> None:
    model, ids_RL = focused(mem_gate=gate, **changes), tokens(3, 6)
    how = {"plan": pad_plan(PLAN), "objective": "memorizing"}
    loss, expected = trained(model, ids_RL, last_row_only(ids_RL), **how)
    cache = FotCache(model.config)
    with torch.no_grad():
        for row in range(2):
            model(ids_RL[row : row + 1], past_key_values=cache)
            cache.flush()
    read_loss, got = trained(model, ids_RL[2:], past_key_values=cache)
    assert_same(read_loss, loss)
    assert got.keys() == expected.keys()
    assert_same(got, expected)


@pytest.mark.parametrize("mem_layers", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("rope", [None, YARN, LONGROPE], ids=lambda rope: rope["rope_type"] if rope else "default")
def test_transformer_xl_reads_two_contexts_as_one_causal_context(
    focused, plain, tokens, assert_same, mem_layers: list[int], rope: Any
) -> None:
    model = focused(mem_layers=mem_layers, num_key_value_heads=2, rope_parameters=rope)
    ids_RL = tokens(2, 9)
    base = plain(model)
    got = model(ids_RL, plan=pad_plan([[], [0]]), objective="transformer_xl").logits
    assert_same(got.flatten(0, 1), base(ids_RL.view(1, 18)).logits[0])


def test_transformer_xl_without_positions_in_memory_layers_too(focused, tokens, assert_same) -> None:
    model, ids_RL = focused(mem_layers=[0, 2], mem_positionals=False), tokens(2, 9)
    got = model(ids_RL, plan=pad_plan([[], [0]]), objective="transformer_xl").logits
    assert_same(got.flatten(0, 1), model(ids_RL.view(1, 18), use_cache=False).logits[0])


def test_transformer_xl_sees_as_many_contexts_back_as_there_are_layers(focused, tokens) -> None:
    model, ids_RL = focused(num_hidden_layers=2, mem_layers=[1]), tokens(4, 5)
    plan_Rd = pad_plan([[], [0], [1], [2]])
    before = model(ids_RL, plan=plan_Rd, objective="transformer_xl").logits[3]
    changes = []
    for row in range(4):
        other_RL = ids_RL.clone()
        other_RL[row] = tokens(5, seed=1)
        changes.append(
            (model(other_RL, plan=plan_Rd, objective="transformer_xl").logits[3] - before).abs().max() > 1e-4
        )
    assert changes == [False, True, True, True]


def test_transformer_xl_does_not_differentiate_the_previous_context(
    focused, plain, tokens, trained, gradients, assert_same
) -> None:
    model, ids_RL = focused(num_key_value_heads=2), tokens(2, 9)
    how = {"plan": pad_plan([[], [0]]), "objective": "transformer_xl"}
    loss, got = trained(model, ids_RL, last_row_only(ids_RL), **how)
    base, cache = plain(model), DynamicCache()
    with torch.no_grad():
        base(ids_RL[:1], past_key_values=cache)
    base_loss = base(ids_RL[1:], labels=ids_RL[1:], past_key_values=cache).loss
    base_loss.backward()
    assert_same(loss, base_loss.detach())
    assert_same(got, gradients(base))


@pytest.mark.parametrize("objective", ["fot", "transformer_xl"])
@pytest.mark.parametrize("L", [8, 16])
def test_contexts_under_dynamic_rope_up_to_its_first_length_have_the_ordinary_frequencies(
    focused, tokens, assert_same, L: int, objective: str
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, **THETA}
    model, default = focused(max_position_embeddings=16, rope_parameters=rope), focused()
    ids_RL, how = tokens(2, L), {"plan": pad_plan([[], [0]]), "objective": objective}
    alone = model(ids_RL, use_cache=False).logits
    assert_same(model(ids_RL, **how).logits, default(ids_RL, **how).logits)
    assert_same(model(ids_RL, use_cache=False).logits, alone, 0)


@pytest.mark.parametrize("L", [4, 6, 8])
def test_transformer_xl_under_longrope_turns_back_by_the_frequencies_of_the_contexts(
    focused, tokens, assert_same, L: int
) -> None:
    """Short factors up to the original length, long factors beyond, whatever the two contexts' length together."""
    rope = {**LONGROPE, "original_max_position_embeddings": 6, "attention_factor": 1.3}
    fixed = {**rope, "original_max_position_embeddings": 64}
    if L > 6:
        fixed["short_factor"] = rope["long_factor"]
    ids_RL, how = tokens(2, L), {"plan": pad_plan([[], [0]]), "objective": "transformer_xl"}
    got, expected = (focused(rope_parameters=parameters)(ids_RL, **how).logits for parameters in (rope, fixed))
    assert_same(got, expected)


def test_a_gate_starts_half_open_in_every_memory_layer_also_where_a_plain_llama_is_loaded(
    llama, tiny, assert_same, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path)
    how = {"mem_layers": [0, 2], "mem_gate": True}
    unloaded = FotLlamaForCausalLM(FotLlamaConfig(**{**tiny, **how}))
    for model in (unloaded, FotLlamaForCausalLM.from_pretrained(tmp_path, **how)):
        gates = {name: parameter for name, parameter in model.named_parameters() if name.endswith("mem_gate")}
        assert gates.keys() == {f"model.layers.{layer}.self_attn.mem_gate" for layer in (0, 2)}
        assert all(torch.equal(gate, torch.zeros(4)) for gate in gates.values())
    attention = unloaded.model.layers[0].self_attn
    near, far = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    assert_same(attention._gated(near, far, torch.ones(1, dtype=torch.bool)), (near + far) / 2, 1e-6)


def test_a_gate_is_trained_by_memorizing_alone_and_only_where_rows_have_memory(focused, tokens, trained) -> None:
    model, ids_RL = focused(mem_gate=True), tokens(3, 5)
    name = "model.layers.1.self_attn.mem_gate"
    _, found = trained(model, ids_RL, plan=pad_plan(PLAN), objective="memorizing")
    assert (found[name] != 0).all()
    _, found = trained(model, ids_RL, plan=pad_plan([[], [], []]), objective="memorizing")
    assert name not in found or (found[name] == 0).all()
    _, found = trained(model, ids_RL, plan=pad_plan(PLAN))
    assert name not in found


def test_under_other_objectives_a_gate_changes_nothing(focused, tokens) -> None:
    gated, ids_RL, plan_Rd = focused(mem_gate=True), tokens(3, 5), pad_plan([[], [0], [1]])
    bare = focused()
    bare.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.endswith("mem_gate")})
    for objective, differs in (("fot", False), ("transformer_xl", False), ("memorizing", True)):
        logits = [model(ids_RL, plan=plan_Rd, objective=objective).logits for model in (gated, bare)]
        assert torch.equal(*logits) != differs


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"mem_positionals": False}], ids=str)
def test_reading_through_a_gate_is_training_through_it(focused, tokens, assert_same, changes: dict[str, Any]) -> None:
    model, ids_RL = focused(mem_gate=True, mem_layers=[0, 2], **changes), tokens(4, 6)
    expected = model(ids_RL, plan=longllama_plan(4, 3), objective="memorizing").logits
    cache = FotCache(model.config)
    for row in range(4):
        assert_same(model(ids_RL[row : row + 1], past_key_values=cache).logits[0], expected[row])
        cache.flush()


def test_a_row_whose_memory_is_all_padding_reads_past_its_gate(focused, tokens, assert_same) -> None:
    model, ids_BL = focused(mem_gate=True, max_position_embeddings=8), tokens(2, 12)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :8] = 0
    got = model(ids_BL, attention_mask=mask_BL).logits[0, 8:]
    assert_same(got, model(ids_BL[:1, 8:], use_cache=False).logits[0])


def test_dropout_of_attention_is_refused_with_a_plan_in_training_only(focused, tokens) -> None:
    model, ids_RL = focused(attention_dropout=0.5), tokens(3, 5)
    expected = focused()(ids_RL, plan=pad_plan(PLAN)).logits
    assert torch.equal(model(ids_RL, plan=pad_plan(PLAN)).logits, expected)
    with pytest.raises(ValueError, match=r"attention_dropout 0\.5 with a plan: set it to 0"):
        model.train()(ids_RL, plan=pad_plan(PLAN))


@pytest.mark.parametrize("trained", [True, False])
def test_heads_that_each_rank_would_learn_alone_are_not_trained(trained: bool) -> None:
    """Under tensor parallelism a rank has some of the heads, and all numbers of the gate."""
    mesh = SimpleNamespace(ndim=1, get_local_rank=lambda _: 1)
    layer = SimpleNamespace(q_proj=SimpleNamespace(weight=SimpleNamespace(device_mesh=mesh)))
    gate_H = torch.arange(4.0).requires_grad_(trained)
    if trained:
        with pytest.raises(ValueError, match="tensor parallelism does not train mem_gate and mem_qk_norm: freeze"):
            FotAttention._own(layer, gate_H, 2)
    with torch.no_grad():
        assert FotAttention._own(layer, gate_H, 2).tolist() == [2.0, 3.0]
