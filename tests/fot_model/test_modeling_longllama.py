"""Checkpoints in the layout of the released LongLLaMA.

Shapes: B batch, L tokens.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, LongLlamaForCausalLM

THETA = {"rope_theta": 10000.0}
SETS = ["longllama_rope", "longllama_nope", "longllama_theta1e6"]
RELEASED = {"rope_theta", "mem_layers", "mem_positionals", "mem_dtype", "mem_attention_grouping", "last_context_length"}
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=SETS)
def released(request: pytest.FixtureRequest, conformance: Path) -> Path:
    """A checkpoint in the layout of the released ones, with what the reference implementation computed."""
    return conformance / request.param


@torch.no_grad()
@pytest.mark.parametrize("load", [FotLlamaForCausalLM, AutoModelForCausalLM])
def test_a_longllama_checkpoint_gives_what_its_reference_implementation_gives(
    assert_same, load: Any, released: Path
) -> None:
    model, expected = load.from_pretrained(released).eval(), load_file(released / "expected.safetensors")
    assert isinstance(model, FotLlamaForCausalLM)
    ids_BL, mask_BL = expected["input_ids"], expected["padded_attention_mask"]
    calls: dict[str, Callable[[], Any]] = {
        "logits_no_cache": lambda: model(ids_BL, use_cache=False),
        "logits_cache": lambda: model(ids_BL, use_cache=True),
        "logits_last24": lambda: model(ids_BL, last_context_length=24),
        "logits_short": lambda: model(ids_BL[:, :20]),
    }
    for name, call in calls.items():
        assert_same(call().logits, expected[name], 1e-4)
    padded_BL, positions_BL = expected["padded_input_ids"], mask_BL.cumsum(1) - 1
    logits = model(padded_BL, attention_mask=mask_BL, position_ids=positions_BL).logits
    assert_same(logits[mask_BL.bool()], expected["padded_logits"][mask_BL.bool()], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("load", [FotLlamaForCausalLM, AutoModelForCausalLM])
def test_a_longllama_checkpoint_continues_as_its_reference_implementation_does(load: Any, released: Path) -> None:
    model, expected = load.from_pretrained(released).eval(), load_file(released / "expected.safetensors")
    ids_BL, greedy_BL = expected["input_ids"], expected["greedy"]
    generated = model.generate(ids_BL, last_context_length=16, **{**GREEDY, "max_new_tokens": greedy_BL.shape[1]})
    assert generated[:, ids_BL.shape[1] :].tolist() == greedy_BL.tolist()


def longllama_read(model: FotLlamaForCausalLM, ids_BL: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids_BL).logits


@pytest.mark.parametrize("load", [FotLlamaForCausalLM, LongLlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("name", SETS)
def test_a_longllama_checkpoint_saved_in_its_layout_is_the_one_loaded(
    conformance, name: str, load: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(conformance / name, source)
    released = json.loads((source / "config.json").read_text())
    released |= {"mem_attention_grouping": [4, 2048], "mem_dtype": "bfloat16", "rms_norm_eps": 1e-5}
    code = {"auto_map": {"AutoConfig": "x.Y"}, "torch_attention": False, "gradient_checkpoint_every_ith": 1}
    (source / "config.json").write_text(json.dumps({**released, **code}))
    model = load.from_pretrained(source)
    assert isinstance(model, FotLlamaForCausalLM)
    how = {} if isinstance(model, LongLlamaForCausalLM) else {"form": "longllama"}
    model.save_pretrained(tmp_path / "saved", **how)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: saved.get(key) for key in released} == released
    assert saved.keys() >= RELEASED
    assert not saved.keys() & {"rope_parameters", "rope_scaling", "local_context", "mem_gate", *code}
    ids_BL = load_file(source / "expected.safetensors")["input_ids"]
    expected = longllama_read(model, ids_BL)
    for again in (FotLlamaForCausalLM, LongLlamaForCausalLM, AutoModelForCausalLM):
        assert torch.equal(longllama_read(again.from_pretrained(tmp_path / "saved"), ids_BL), expected)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_any_multi_head_llama_is_written_in_the_layout_of_longllama(
    focused, tokens, theta: float, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    model = focused(
        mem_layers=[0, 2], rope_parameters=rope, local_context=16, last_context_length=6, tie_word_embeddings=True
    )
    model.save_pretrained(tmp_path, form="longllama")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "longllama"
    expected = {"rope_theta": theta, "mem_layers": [0, 2], "mem_positionals": True, "last_context_length": 6}
    expected |= {"max_position_embeddings": 16, "mem_dtype": "float32", "mem_attention_grouping": None}
    assert {name: saved[name] for name in expected} == expected
    assert type(model.config) is FotLlamaConfig, "saving leaves the model as it is"
    for load in (FotLlamaForCausalLM, LongLlamaForCausalLM, AutoModelForCausalLM):
        again = load.from_pretrained(tmp_path)
        assert again.config.mem_layers == [0, 2]
        assert torch.equal(longllama_read(again, tokens(2, 50)), longllama_read(model, tokens(2, 50)))


UNSAYABLE: dict[str, dict[str, Any]] = {
    "last_context_length": {"last_context_length": None},
    "num_key_value_heads": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 12},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "mem_gate": {"mem_gate": True},
    "rope_type": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}},
}


@pytest.mark.parametrize("kind", [FotLlamaForCausalLM, LongLlamaForCausalLM])
@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_the_layout_of_longllama_cannot_say_is_refused_by_name(
    focused, tiny, name: str, kind: Any, tmp_path: Path
) -> None:
    how = {"form": "longllama"} if kind is FotLlamaForCausalLM else {}
    config = kind.config_class(**{**tiny, "last_context_length": 8, **UNSAYABLE[name]}, mem_layers=[1])
    with pytest.raises(ValueError, match=rf"the longllama layout has no {name} .*fot_llama"):
        kind(config).save_pretrained(tmp_path / "new", **how)
    assert not (tmp_path / "new").exists(), "nothing was written"
    focused(**UNSAYABLE[name]).save_pretrained(tmp_path)


def test_a_longllama_checkpoint_loaded_as_fot_llama_is_saved_as_that(conformance, tokens, tmp_path: Path) -> None:
    model = LongLlamaForCausalLM.from_pretrained(conformance / SETS[0])
    FotLlamaForCausalLM.from_pretrained(conformance / SETS[0]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fot_llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FotLlamaForCausalLM
    assert torch.equal(longllama_read(again, tokens(2, 100)), longllama_read(model, tokens(2, 100)))


def test_a_form_that_is_not_there_is_refused_by_name(focused, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"form 'longlama'.*longllama"):
        focused().save_pretrained(tmp_path, form="longlama")
