import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from fot_model import FotLlamaConfig, default_mem_layers


@pytest.mark.parametrize(("layers", "expected"), [(26, [6, 12, 18]), (32, [8, 16, 24]), (12, [8])])
def test_default_memory_layers_are_the_papers_choices(layers: int, expected: list[int]) -> None:
    assert default_mem_layers(layers) == expected


@pytest.mark.parametrize("layers", range(1, 101))
def test_default_memory_layers_exist_in_a_model_of_any_depth(layers: int) -> None:
    chosen = default_mem_layers(layers)
    assert chosen
    assert chosen == sorted(set(chosen))
    assert all(0 <= layer < layers for layer in chosen)


@pytest.mark.parametrize("nothing", [None, []])
def test_a_configuration_without_memory_layers_is_an_ordinary_llama(nothing: list[int] | None) -> None:
    config = FotLlamaConfig(mem_layers=nothing)
    assert config.mem_layers == []
    theirs, ours = LlamaConfig().to_dict(), config.to_dict()
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"mem_layers", "mem_positionals", "model_type"}


def test_memory_layers_are_kept_in_order_and_once() -> None:
    assert FotLlamaConfig(mem_layers=[18, 6, 12, 6]).mem_layers == [6, 12, 18]


@pytest.mark.parametrize("load", [FotLlamaConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_saved_configuration_comes_back_with_its_memory_layers(load, tmp_path: Path) -> None:
    FotLlamaConfig(mem_layers=[3, 1], mem_positionals=False, rms_norm_eps=1e-5).save_pretrained(tmp_path)
    config = load(tmp_path)
    assert type(config) is FotLlamaConfig
    assert (config.mem_layers, config.mem_positionals, config.rms_norm_eps) == ([1, 3], False, 1e-5)


def test_a_llama_configuration_loads_with_memory_layers_added(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2).save_pretrained(tmp_path)
    config = FotLlamaConfig.from_pretrained(tmp_path, mem_layers=[2, 5])
    assert config.mem_layers == [2, 5]
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (96, 6, 2)


def test_memory_layers_given_at_loading_win_over_the_saved_ones(tmp_path: Path) -> None:
    FotLlamaConfig(mem_layers=[1]).save_pretrained(tmp_path)
    assert FotLlamaConfig.from_pretrained(tmp_path, mem_layers=[2, 3]).mem_layers == [2, 3]


def test_the_configuration_of_a_checkpoint_that_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    with pytest.raises(ValueError, match=r"no LLaMA.*gpt2"):
        FotLlamaConfig.from_pretrained(tmp_path)
