import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from fot_model import FotLlamaConfig, LongLlamaConfig, default_mem_layers

MEMORY = {
    "mem_layers", "mem_positionals", "mem_dtype", "mem_gate", "mem_qk_norm",
    "previous_context", "local_context", "last_context_length",
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
RELEASED: dict[str, Any] = {
    "model_type": "longllama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "max_position_embeddings": 64,
    "mem_layers": [2, 4],
    "mem_dtype": "bfloat16",
    "mem_attention_grouping": [4, 2048],
    "last_context_length": 32,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}


def written(path: Path, values: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(values))
    return path


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
    assert ours.keys() - theirs.keys() == MEMORY
    assert {name for name in theirs if ours[name] != theirs[name]} == {"model_type"}


def test_memory_layers_are_kept_in_order_and_once() -> None:
    assert FotLlamaConfig(mem_layers=[18, 6, 12, 6]).mem_layers == [6, 12, 18]


def test_the_window_is_the_local_context_or_else_all_positions_of_the_model() -> None:
    assert FotLlamaConfig(max_position_embeddings=96).window == 96
    assert FotLlamaConfig(max_position_embeddings=96, local_context=32).window == 32
    assert FotLlamaConfig(max_position_embeddings=96, local_context=128).window == 128


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_number_type_of_memory_is_one_of_torchs(name: str) -> None:
    config = FotLlamaConfig(mem_dtype=name)
    config.check()
    assert config.memory_dtype == getattr(torch, name)
    assert FotLlamaConfig().memory_dtype is None


SAID: dict[str, Any] = {
    "mem_layers": [1, 3],
    "mem_positionals": False,
    "mem_dtype": "bfloat16",
    "mem_gate": True,
    "previous_context": True,
    "local_context": 40,
    "last_context_length": 7,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
}


@pytest.mark.parametrize("load", [FotLlamaConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_saved_configuration_comes_back_with_all_it_says(load: Any, tmp_path: Path) -> None:
    FotLlamaConfig(**{**SAID, "mem_layers": [3, 1]}).save_pretrained(tmp_path)
    config = load(tmp_path)
    assert type(config) is FotLlamaConfig
    assert {name: getattr(config, name) for name in SAID} == SAID
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fot_llama"


def test_a_llama_configuration_loads_with_memory_layers_added(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2).save_pretrained(tmp_path)
    config = FotLlamaConfig.from_pretrained(tmp_path, mem_layers=[2, 5])
    assert config.mem_layers == [2, 5]
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (96, 6, 2)
    assert config.last_context_length is None


def test_memory_layers_given_at_loading_win_over_the_saved_ones(tmp_path: Path) -> None:
    FotLlamaConfig(mem_layers=[1]).save_pretrained(tmp_path)
    assert FotLlamaConfig.from_pretrained(tmp_path, mem_layers=[2, 3]).mem_layers == [2, 3]


def test_the_configuration_of_a_checkpoint_that_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no LLaMA.*gpt2"):
        FotLlamaConfig.from_pretrained(written(tmp_path, {"model_type": "gpt2", "n_layer": 2}))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mem_layers": [0, 32]}, r"mem_layers \[32\] out of range: the model has 32 layers, 0 to 31"),
    ({"mem_layers": [-1, -2, 5]}, r"mem_layers \[-2, -1\] out of range"),
    ({"mem_dtype": "int8"}, "mem_dtype 'int8': give one of float32, bfloat16, float16"),
    ({"mem_dtype": "torch.float16"}, "mem_dtype 'torch.float16'"),
    ({"last_context_length": 0}, "last_context_length 0: the local context holds 1 to 2048 tokens"),
    ({"last_context_length": -3}, "last_context_length -3"),
    (
        {"last_context_length": 33, "local_context": 32},
        "last_context_length 33: the local context holds 1 to 32 tokens",
    ),
    ({"local_context": 0}, "local_context 0: give the tokens of a window, 2 or more"),
    ({"local_context": 1}, "local_context 1"),
    ({"local_context": -4}, "local_context -4"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_a_value_out_of_range_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FotLlamaConfig(**values).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [3, "3", [1.0], ["1"], [True], {1: 2}], ids=repr)
def test_memory_layers_that_are_no_list_of_numbers_are_refused(wrong: Any) -> None:
    """Whoever makes the configuration is told, or else who makes a model of it."""
    with pytest.raises(ValueError, match="mem_layers"):
        FotLlamaConfig(mem_layers=wrong).check()
    config = FotLlamaConfig()
    config.mem_layers = wrong
    with pytest.raises(ValueError, match=r"mem_layers .*give a list of layer numbers"):
        config.check()


@pytest.mark.parametrize("length", [1, 32])
def test_a_last_context_that_the_window_holds_is_accepted(length: int) -> None:
    FotLlamaConfig(last_context_length=length, local_context=32).check()


LOADS = [FotLlamaConfig.from_pretrained, LongLlamaConfig.from_pretrained, AutoConfig.from_pretrained]


@pytest.mark.parametrize("load", LOADS)
def test_a_released_longllama_configuration_is_read_in_full(load: Any, tmp_path: Path) -> None:
    config = load(written(tmp_path, RELEASED))
    assert type(config) is (FotLlamaConfig if load is LOADS[0] else LongLlamaConfig)
    assert (config.mem_layers, config.mem_dtype, config.last_context_length) == ([2, 4], "bfloat16", 32)
    assert (config.mem_positionals, config.mem_attention_grouping) == (True, [4, 2048])
    assert config.rope_parameters == ROPE
    assert (config.window, config.num_key_value_heads, config.dtype) == (64, 4, torch.bfloat16)


@pytest.mark.parametrize("load", LOADS)
def test_what_a_longllama_configuration_leaves_out_is_as_in_its_reference_implementation(
    load: Any, tmp_path: Path
) -> None:
    sizes = {name: RELEASED[name] for name in ("model_type", "hidden_size", "num_attention_heads")}
    config = load(written(tmp_path, sizes))
    assert (config.mem_layers, config.mem_positionals, config.mem_dtype) == ([], True, "bfloat16")
    assert (config.last_context_length, config.max_position_embeddings) == (1024, 2048)
    assert (config.rms_norm_eps, config.pad_token_id) == (1e-6, 0)
    assert getattr(config, "mem_attention_grouping", None) is None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("load", LOADS)
def test_what_belongs_to_the_code_of_longllama_is_left_behind(load: Any, tmp_path: Path) -> None:
    code = {
        "auto_map": {"AutoConfig": "configuration_longllama.LongLlamaConfig"},
        "torch_attention": False,
        "gradient_checkpoint_every_ith": 1,
    }
    load(written(tmp_path, {**RELEASED, **code})).save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "config.json").read_text()).keys() & code.keys()


def test_a_longllama_configuration_is_written_as_it_was_released(tmp_path: Path) -> None:
    LongLlamaConfig.from_pretrained(written(tmp_path, RELEASED)).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = {**RELEASED, "dtype": RELEASED["torch_dtype"]}
    del expected["torch_dtype"]
    assert {name: saved.get(name) for name in expected} == expected
    assert not saved.keys() & {"rope_parameters", "num_key_value_heads", "head_dim", "mem_gate", "local_context"}


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_any_configuration_that_the_layout_can_say_is_written_as_longllama_and_read_back(
    theta: float, tmp_path: Path
) -> None:
    config = FotLlamaConfig(
        mem_layers=[3], local_context=16, last_context_length=5, rope_parameters={**ROPE, "rope_theta": theta}
    )
    LongLlamaConfig.of(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["rope_theta"], saved["max_position_embeddings"]) == ("longllama", theta, 16)
    for load in LOADS:
        again = load(tmp_path)
        assert (again.mem_layers, again.window, again.last_context_length) == ([3], 16, 5)
        assert again.rope_parameters == config.rope_parameters
        assert again.num_key_value_heads == config.num_attention_heads


@pytest.mark.parametrize(("dtype", "name"), [(None, "float32"), (torch.bfloat16, "bfloat16"), ("float16", "float16")])
def test_memory_of_the_models_number_type_is_written_by_its_name(dtype: Any, name: str) -> None:
    config = FotLlamaConfig(dtype=dtype, last_context_length=32)
    assert LongLlamaConfig.of(config).to_dict()["mem_dtype"] == name
    config.mem_dtype = "float32"
    assert LongLlamaConfig.of(config).to_dict()["mem_dtype"] == "float32"


UNSAYABLE: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 8}, r"num_key_value_heads 8 \(only 32\)"),
    ({"head_dim": 64}, r"head_dim 64 \(only 128\)"),
    ({"attention_bias": True}, r"attention_bias True \(only False\)"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"mem_gate": True}, "mem_gate True"),
    ({"previous_context": True}, "previous_context True"),
    ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, r"rope_type 'linear' \(only 'default'\)"),
]


@pytest.mark.parametrize(("values", "message"), UNSAYABLE, ids=[name for values, _ in UNSAYABLE for name in values])
def test_what_the_layout_of_longllama_cannot_say_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"the longllama layout has no {message}.*save it as fot_llama") as error:
        LongLlamaConfig.of(FotLlamaConfig(**values))
    assert "\n" not in str(error.value)
