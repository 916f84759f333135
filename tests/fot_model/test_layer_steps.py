"""Steps of training in 16 bits, under autocast, with recomputed activations and compiled.

Shapes: R rows, L tokens a context, d additional contexts.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional

from fot_model.plan import pad_plan

PLAN = [[], [0], [1, 0]]
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 12, [3] * 2 + [4] * 9 + [5]])

STEPS: dict[str, dict[str, Any]] = {
    "fot": {"plan": pad_plan(PLAN)},
    "memorizing": {"plan": pad_plan(PLAN), "objective": "memorizing"},
    "transformer_xl": {"plan": pad_plan([[], [0], [1]]), "objective": "transformer_xl"},
    "documents": {"plan": pad_plan([[], [0], [0]]), "document_ids": DOCUMENTS},
}
steps = pytest.mark.parametrize("how", STEPS.values(), ids=STEPS)


@steps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_close_to_single(
    focused, tokens, trained, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    exact, rounded = (focused(num_key_value_heads=2, mem_gate=True) for _ in range(2))
    rounded = rounded.to(dtype)
    exact.load_state_dict(rounded.state_dict())
    ids_RL = tokens(3, 12)
    got, expected = rounded(ids_RL, **how).logits, exact(ids_RL, **how).logits
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < 0.03 * expected.norm()
    _, found = trained(rounded, ids_RL, **how)
    _, wanted = trained(exact, ids_RL, **how)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert functional.cosine_similarity(gradient.float().flatten(), wanted[name].flatten(), dim=0) > 0.98, name


@steps
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast_trains_close_to_single(focused, tokens, trained, implementation: str, how: dict[str, Any]) -> None:
    model, ids_RL = focused(num_key_value_heads=2, mem_gate=True), tokens(3, 12)
    model.set_attn_implementation(implementation)
    loss, wanted = trained(model, ids_RL, **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_loss, found = trained(model, ids_RL, **how)
    assert 0 < (cast_loss - loss).abs() < 0.02 * loss
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert functional.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.98, name


@steps
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    focused, tokens, trained, assert_same, reentrant: bool, how: dict[str, Any]
) -> None:
    model = focused(mem_layers=[1, 2], num_key_value_heads=2, mem_gate=True).train()
    ids_RL = tokens(3, 12)
    passes: list[int] = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: passes.append(1))
    loss, wanted = trained(model, ids_RL, **how)
    assert len(passes) == 1
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed_loss, found = trained(model, ids_RL, **how)
    assert len(passes) == 3, "the memory layer was not recomputed"
    assert_same(checkpointed_loss, loss, 1e-6)
    assert found.keys() == wanted.keys()
    assert_same(found, wanted, 1e-6)


def test_a_compiled_model_has_the_same_loss_and_gradients(focused, tokens, trained, gradients, assert_same) -> None:
    model, ids_RL, how = focused(num_hidden_layers=2, num_key_value_heads=2).train(), tokens(3, 12), STEPS["documents"]
    loss, wanted = trained(model, ids_RL, **how)
    torch.compiler.reset()
    compiled_loss = torch.compile(model, backend="aot_eager")(ids_RL, labels=ids_RL, **how).loss
    compiled_loss.backward()
    assert_same(compiled_loss.detach(), loss)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("name", ["memorizing", "transformer_xl"])
def test_compiled_layers_have_the_same_loss_and_gradients(focused, tokens, trained, assert_same, name: str) -> None:
    model, ids_RL = focused(num_hidden_layers=1, mem_layers=[0], mem_gate=True).train(), tokens(3, 12)
    how = STEPS[name]
    loss, wanted = trained(model, ids_RL, **how)
    torch.compiler.reset()
    model.model.layers[0].compile(backend="aot_eager")
    compiled_loss, found = trained(model, ids_RL, **how)
    assert_same(compiled_loss, loss)
    assert_same(found, wanted)
