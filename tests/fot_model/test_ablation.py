import pytest
import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from fot_model.ablation import near_mask, one_changed

LAYERS, TOKENS, LOCAL = 3, 40, 8


@pytest.fixture(scope="module")
def model() -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    config = FotLlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return FotLlamaForCausalLM(config).eval()


def test_near_is_a_window_and_the_first_token() -> None:
    seen = near_mask(6, 2, torch.zeros(1))[0, 0] == 0
    expected = torch.eye(6, dtype=torch.bool) | torch.eye(6, dtype=torch.bool).roll(1, 0)
    expected[:, 0] = True
    expected[0, 5] = False
    assert seen.tolist() == expected.tolist()


def test_each_layer_in_turn_has_the_other_mask(model: FotLlamaForCausalLM) -> None:
    """Against hooks that put the mask into the model's own forward pass."""
    ids_1L = torch.randint(50, (1, TOKENS), generator=torch.Generator().manual_seed(1))
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
