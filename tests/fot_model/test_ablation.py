"""The passes with one layer changed, against hooks that change it in the model's own pass. Shapes: L tokens."""

import pytest
import torch

from fot_model import FotLlamaForCausalLM
from fot_model.ablation import near_mask, one_changed

LAYERS, TOKENS, LOCAL = 3, 40, 8  # as many layers as the tiny shape has


@pytest.fixture(scope="module")
def model(focused) -> FotLlamaForCausalLM:
    return focused(num_key_value_heads=2, mem_layers=[])


def test_near_is_a_window_and_the_first_token() -> None:
    seen = near_mask(6, 2, torch.zeros(1))[0, 0] == 0
    expected = torch.eye(6, dtype=torch.bool) | torch.eye(6, dtype=torch.bool).roll(1, 0)
    expected[:, 0] = True
    expected[0, 5] = False
    assert seen.tolist() == expected.tolist()


def test_each_layer_in_turn_has_the_other_mask(tokens, model: FotLlamaForCausalLM) -> None:
    """Against hooks that put the mask into the model's own forward pass."""
    ids_1L = tokens(1, TOKENS)
    near = near_mask(TOKENS, LOCAL, model.model.embed_tokens.weight)

    def plain(masks: list) -> torch.Tensor:
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, inputs, mask=mask: (args, {**inputs, "attention_mask": mask}), with_kwargs=True
            )
            for layer, mask in zip(model.model.layers, masks, strict=True)
        ]
        with torch.no_grad():
            hidden = model.model(ids_1L, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return hidden

    for usual, changed in ((None, near), (near, None)):
        found = list(one_changed(model, ids_1L, usual, changed))
        for layer, hidden in enumerate(found[:-1]):
            expected = plain([changed if number == layer else usual for number in range(LAYERS)])
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[-1], plain([usual] * LAYERS), rtol=1e-4, atol=1e-4)
        assert len({round(float(hidden.sum()), 3) for hidden in found}) == LAYERS + 1, "every layer makes a difference"
