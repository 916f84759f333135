"""The law of loading, tried on files as interrupted saves, conversions and edits leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fot_model import FotLlamaForCausalLM
from fot_model.checkpoint import check_shapes, own_output_layer, with_prefix

TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
HEAD, EMBEDDINGS, DOWN = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
GATE, TEMPERATURE = "model.layers.1.self_attn.mem_gate", "model.layers.1.self_attn.mem_temperature"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A random LLaMA as a directory, its tensors changed by a function, its config.json by settings."""

    def save(change: Callable[[Tensors], Any] = lambda tensors: None, /, **settings: Any) -> Path:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
        return tmp_path

    return save


def without(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def tensors_also(**named: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in named.items()})


REFUSED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "lacks some": (without(HEAD, DOWN), {}, rf"lacks {HEAD}, {DOWN}: download or convert it again"),
    "lacks the output layer": (without(HEAD), {}, rf"lacks {HEAD}: .* tie_word_embeddings: true in its config.json"),
    "lacks both ends": (without(HEAD, EMBEDDINGS), {"tie_word_embeddings": True}, rf"lacks {HEAD}, {EMBEDDINGS}"),
    "lacks a layer": (lambda tensors: None, {"num_hidden_layers": 3}, r"lacks model\.layers\.2\..* and 7 more"),
    "a layer more": (lambda tensors: None, {"num_hidden_layers": 1}, r"holds model\.layers\.1\..* has no place for"),
    "a bias": (
        tensors_also(model__layers__0__self_attn__q_proj__bias=torch.ones(16)),
        {},
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which the model .* has no place for",
    ),
    "another task's head": (
        lambda tensors: tensors.update({"score.weight": tensors.pop(HEAD)}),
        {},
        rf"lacks {HEAD}, which the model needs, and holds score\.weight",
    ),
    "other embeddings": (lambda tensors: None, {"vocab_size": 48}, rf"holds {HEAD} of \[40, 16\], .* is \[48, 16\]"),
    "other heads": (
        lambda tensors: None,
        {"num_key_value_heads": 1},
        r"holds model\.layers\.0\.self_attn\.k_proj\.weight of \[16, 16\], by its config\.json it is \[8, 16\]",
    ),
}


@pytest.mark.parametrize(("change", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_all_of_the_model_and_nothing_else_is_refused_by_name(saved, change, settings, said) -> None:
    with pytest.raises(ValueError, match=rf"^{saved(change, **settings)} {said}"):
        FotLlamaForCausalLM.from_pretrained(saved(change, **settings), mem_layers=[0])


def test_shapes_that_were_asked_to_differ_may(saved) -> None:
    wider = FotLlamaForCausalLM.from_pretrained(saved(), vocab_size=48, ignore_mismatched_sizes=True)
    assert wider.lm_head.weight.shape == (48, 16)


def test_what_is_computed_or_added_by_the_configuration_is_not_asked_for(saved) -> None:
    frequencies = tensors_also(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    model, info = FotLlamaForCausalLM.from_pretrained(
        saved(frequencies), mem_layers=[1], mem_gate=True, mem_qk_norm=True, output_loading_info=True
    )
    assert {*info["missing_keys"]} == {GATE, TEMPERATURE}
    assert torch.equal(model.get_parameter(GATE), torch.zeros(2))


def test_a_gate_that_was_trained_is_not_left_out(saved, tmp_path: Path) -> None:
    model = FotLlamaForCausalLM.from_pretrained(saved(), mem_layers=[1], mem_gate=True)
    model.save_pretrained(tmp_path / "gated")
    with pytest.raises(ValueError, match=f"holds {GATE}, which the model"):
        FotLlamaForCausalLM.from_pretrained(tmp_path / "gated", mem_gate=False)


def test_an_output_layer_of_its_own_is_kept_whatever_the_configuration_says(saved, tmp_path: Path) -> None:
    own = torch.randn(40, 16)
    path = saved(tensors_also(lm_head__weight=own), tie_word_embeddings=True)
    model = FotLlamaForCausalLM.from_pretrained(path, mem_layers=[1]).eval()
    assert torch.equal(model.lm_head.weight, own)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "again")
    for kind in (FotLlamaForCausalLM, LlamaForCausalLM):
        again = kind.from_pretrained(tmp_path / "again")
        assert torch.equal(again.lm_head.weight, own)
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("held", [(HEAD,), (EMBEDDINGS,), (HEAD, EMBEDDINGS)], ids=str)
def test_tied_ends_may_be_there_once_or_twice(saved, held: tuple[str, ...]) -> None:
    def change(tensors: Tensors) -> None:
        ends = tensors.pop(HEAD)
        del tensors[EMBEDDINGS]
        tensors.update({name: ends.clone() for name in held})

    model = FotLlamaForCausalLM.from_pretrained(saved(change, tie_word_embeddings=True), mem_layers=[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("case", [*REFUSED, None])
def test_the_headers_alone_tell_the_same(saved, case: str | None) -> None:
    change, settings, said = REFUSED[case] if case else (lambda tensors: None, {}, "")
    path = saved(change, **settings)
    theirs = {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
    config = LlamaConfig.from_pretrained(path)
    ours = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if case is None:
        check_shapes("it", theirs, ours, tied=False)
        return
    with pytest.raises(ValueError, match=rf"^it {said}"):
        check_shapes("it", theirs, ours, config.tie_word_embeddings)


def test_a_model_saved_without_its_output_layer_has_other_names() -> None:
    assert with_prefix({"norm.weight": (1,), HEAD: (2,)}) == {"model.norm.weight": (1,), HEAD: (2,)}
    assert with_prefix({"model.norm.weight": (1,), "score": (2,)}) == {"model.norm.weight": (1,), "score": (2,)}


def test_ends_of_equal_numbers_are_tied() -> None:
    one = torch.ones(2)
    assert not own_output_layer({HEAD: one, EMBEDDINGS: one.clone()})
    assert not own_output_layer({EMBEDDINGS: one})
    assert own_output_layer({HEAD: 2 * one, EMBEDDINGS: one})
    assert own_output_layer({HEAD: one})
