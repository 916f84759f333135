"""A FoT model is the LLaMA that it was loaded from, and is saved and loaded as it is.

Shapes: B batch, R rows, L tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM
from fot_model.plan import pad_plan

THETA = {"rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 3.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    **THETA,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **THETA},
    "large theta": {"rope_type": "default", "rope_theta": 5e7},
    "linear": {"rope_type": "linear", "factor": 2.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA},
    "longrope, short": {**LONGROPE, "original_max_position_embeddings": 32},
    "longrope, long": {**LONGROPE, "original_max_position_embeddings": 4},
    "llama3": {**LLAMA3, "rope_theta": 5e5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, **THETA},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied-embeddings": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
    **{f"rope {name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NOBODY = torch.empty(2, 0, dtype=torch.long)


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def check_reads_as(assert_same) -> Callable[..., None]:
    """Within one context of 20 tokens, in every way."""

    def check(model: FotLlamaForCausalLM, base: LlamaForCausalLM, ids_BL: Tensor) -> None:
        B = ids_BL.shape[0]
        with torch.no_grad():
            expected = base(ids_BL, labels=ids_BL)
            ways: dict[str, dict[str, Any]] = {
                "default": {},
                "without cache": {"use_cache": False},
                "with cache": {"use_cache": True},
                "with a cache given": {"past_key_values": FotCache(model.config)},
                "no contexts": {"plan": NOBODY.expand(B, 0)},
                "padded plan": {"plan": torch.full((B, 2), -1)},
            }
            for name, how in ways.items():
                got = model(ids_BL, labels=ids_BL, **how)
                assert_same((got.loss, got.logits), (expected.loss, expected.logits), what=name)
            cache, base_cache = None, None
            for part_BL in ids_BL.split([1, 1, 8, 1, 1, 8], dim=1):
                step = model(part_BL, past_key_values=cache, use_cache=True)
                base_step = base(part_BL, past_key_values=base_cache, use_cache=True)
                cache, base_cache = step.past_key_values, base_step.past_key_values
                assert_same(step.logits, base_step.logits)

    return check


@variants
@pytest.mark.parametrize("mem_layers", [[], [1], [0, 1, 2]])
def test_within_one_context_memory_layers_change_nothing_of_a_llama(
    check_reads_as, llama, tokens, mem_layers: list[int], changes: dict[str, Any], tmp_path: Path
) -> None:
    base = llama(**changes)
    base.save_pretrained(tmp_path)
    model = FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=mem_layers).eval()
    assert model.config.mem_layers == mem_layers
    assert shapes(model) == shapes(base)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base.named_parameters()}
    check_reads_as(model, base, tokens(2, 20))


OLD_ROPES: dict[str, dict[str, Any]] = {
    "theta alone": {"rope_theta": 5e5},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "none": {"rope_theta": 1e6, "rope_scaling": None},
}


@pytest.mark.parametrize("old", OLD_ROPES.values(), ids=OLD_ROPES)
def test_rope_said_in_the_older_form_of_config_json_is_read(
    check_reads_as, llama, tokens, old: dict[str, Any], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
    model = FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1]).eval()
    base = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.rope_parameters["rope_theta"] == old["rope_theta"]
    check_reads_as(model, base, tokens(2, 20))
    unscaled = llama()
    assert (base(tokens(2, 20)).logits - unscaled(tokens(2, 20)).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "again")
    check_reads_as(FotLlamaForCausalLM.from_pretrained(tmp_path / "again").eval(), base, tokens(2, 20))


@pytest.mark.parametrize("rope", ["dynamic", "longrope, long", "yarn"])
def test_a_local_context_longer_than_the_positions_of_a_checkpoint_is_read_as_the_llama_reads_it(
    focused, llama, tokens, assert_same, rope: str
) -> None:
    changes = {"max_position_embeddings": 8, "rope_parameters": ROPES[rope]}
    model, base, ids_BL = focused(local_context=24, **changes), llama(**changes), tokens(2, 20)
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = base(ids_BL).logits
        for how in ({}, {"use_cache": False}, {"plan": NOBODY}):
            assert_same(model(ids_BL, **how).logits, expected)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_other_forms_of_checkpoints_load(llama, form: str, tmp_path: Path) -> None:
    base = llama(num_key_value_heads=2)
    base.save_pretrained(tmp_path, max_shard_size="12KB" if form == "sharded" else "1GB")
    if form != "sharded":
        (tmp_path / "model.safetensors").unlink()
        state = base.state_dict()
        names = sorted(state)
        files = {"pytorch_model.bin": names}
        if form == "sharded bin":
            files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
            where = {name: file for file, held in files.items() for name in held}
            index = {"metadata": {"total_size": 0}, "weight_map": where}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, held in files.items():
            torch.save({name: state[name] for name in held}, tmp_path / file)
    files_of_weights = [*tmp_path.glob("*.bin"), *tmp_path.glob("*.safetensors")]
    assert (len(files_of_weights) > 1) == form.startswith("sharded")
    model = FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1])
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoint_loads_in_the_number_type_asked_for(llama, tokens, dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "single")
    model = FotLlamaForCausalLM.from_pretrained(tmp_path / "single", mem_layers=[1], mem_gate=True, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens(2, 9), use_cache=False).logits.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    again = FotLlamaForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_memory_layers_given_at_loading_are_kept_in_order_and_once(llama, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1, 0, 1]).config.mem_layers == [0, 1]


def test_fresh_memory_layers_start_as_widely_spread_as_the_others(tiny) -> None:
    torch.manual_seed(0)
    model = FotLlamaForCausalLM(FotLlamaConfig(**tiny, mem_layers=[1], initializer_range=0.5))
    spreads = [layer.self_attn.k_proj.weight.std().item() for layer in model.model.layers]
    assert spreads == pytest.approx([0.5] * 3, rel=0.1)


@pytest.mark.parametrize("mem_gate", [False, True])
def test_a_gate_a_head_is_all_that_is_new_among_the_parameters(focused, llama, mem_gate: bool) -> None:
    base, model = llama(), focused(mem_layers=[0, 2], mem_gate=mem_gate)
    gates = {f"model.layers.{layer}.self_attn.mem_gate": torch.Size([4]) for layer in (0, 2)}
    assert shapes(model) == {**shapes(base), **(gates if mem_gate else {})}


@variants
def test_a_saved_model_loads_as_a_plain_llama_and_as_itself(
    focused, tokens, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = focused(mem_layers=[0, 2], **changes)
    model.save_pretrained(tmp_path)
    ids_BL = tokens(2, 20)
    plain, itself = LlamaForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(plain), type(itself)) == (LlamaForCausalLM, FotLlamaForCausalLM)
    assert itself.config.mem_layers == [0, 2]
    assert plain.config.rope_parameters == itself.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        expected = model(ids_BL, use_cache=False).logits
        assert torch.equal(plain(ids_BL).logits, expected)
        assert torch.equal(model(ids_BL).logits, expected)
        plan_Rd = pad_plan([[1], [0]])
        assert torch.equal(itself(ids_BL, plan=plan_Rd).logits, model(ids_BL, plan=plan_Rd).logits)
        assert torch.equal(itself(tokens(1, 150)).logits, model(tokens(1, 150)).logits)


def test_what_the_configuration_says_of_memory_is_saved(focused, tokens, tmp_path: Path) -> None:
    said = {"mem_positionals": False, "mem_dtype": "bfloat16", "mem_gate": True, "local_context": 8}
    model = focused(last_context_length=3, **said)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in said} == said
    assert (again.config.last_context_length, again.config.window) == (3, 8)
    ids_BL = tokens(2, 40)
    assert torch.equal(again(ids_BL).logits, model(ids_BL).logits)


def test_a_model_with_a_gate_loads_as_a_plain_llama_too(focused, tokens, tmp_path: Path) -> None:
    model = focused(mem_gate=True)
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(tokens(2, 9)).logits, model(tokens(2, 9), use_cache=False).logits)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=str)
def test_a_llama_generates_the_same_with_memory_layers(focused, llama, tokens, changes: dict[str, Any]) -> None:
    model, base = focused(**changes), llama(**changes)
    base.load_state_dict(model.state_dict())
    ids_BL = tokens(2, 7)
    mask_BL = torch.ones_like(ids_BL)
    assert model.generate(ids_BL, **GREEDY).tolist() == base.generate(ids_BL, **GREEDY).tolist()
    mask_BL[0, :3] = ids_BL[0, :3] = 0
    for masks in ({}, {"attention_mask": mask_BL}):
        assert model.generate(ids_BL, **masks, **GREEDY).tolist() == base.generate(ids_BL, **masks, **GREEDY).tolist()


def test_a_padded_batch_has_the_logits_of_a_llama_but_for_padding(focused, llama, tokens, assert_same) -> None:
    model, base = focused(), llama()
    base.load_state_dict(model.state_dict())
    ids_BL, mask_BL = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask_BL[0, :4] = mask_BL[1, 7:] = 0
    with torch.no_grad():
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        expected = base(ids_BL, attention_mask=mask_BL, position_ids=positions_BL).logits[mask_BL.bool()]
        for how in ({}, {"use_cache": False}):
            got = model(ids_BL, attention_mask=mask_BL, position_ids=positions_BL, **how).logits[mask_BL.bool()]
            assert_same(got, expected)


@pytest.mark.parametrize("bad", [3, -1, 100])
def test_a_memory_layer_that_is_not_there_is_refused_by_its_number(llama, tiny, bad: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range: the model has 3 layers, 0 to 2"):
        FotLlamaForCausalLM(FotLlamaConfig(**tiny, mem_layers=[1, bad]))
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range"):
        FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[bad])


def test_a_checkpoint_that_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2}))
    with pytest.raises(ValueError, match=r"no LLaMA.*gpt2"):
        FotLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_number_type_that_memory_cannot_have_is_refused_by_name(focused) -> None:
    with pytest.raises(ValueError, match=r"mem_dtype 'int8': give one of float32, bfloat16, float16"):
        focused(mem_dtype="int8")
