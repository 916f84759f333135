"""Shapes: R rows of contexts, L tokens, B batch, C hidden size."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fot_model import FotCache, FotLlamaConfig, FotLlamaForCausalLM, LongLlamaForCausalLM
from fot_model.plan import pad_plan

CONFORMANCE = Path(__file__).parent / "conformance"
VOCABULARY = 40
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
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


def randomised(model: Any) -> Any:
    """All parameters random: biases, norms and gates too, which start at constants."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})))


def focused(mem_layers: list[int], **changes: Any) -> FotLlamaForCausalLM:
    torch.manual_seed(0)
    return randomised(FotLlamaForCausalLM(FotLlamaConfig(**{**TINY, **changes}, mem_layers=mem_layers)))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without 0, which is padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got: Any, expected: Any, atol: float = 1e-5, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda found: f"{what} {found}")


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_reads_as(model: FotLlamaForCausalLM, base: LlamaForCausalLM, ids_BL: Tensor) -> None:
    """Within one context, in every way."""
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
        for token_B1 in ids_BL.split(1, dim=1):
            step = model(token_B1, past_key_values=cache, use_cache=True)
            base_step = base(token_B1, past_key_values=base_cache, use_cache=True)
            cache, base_cache = step.past_key_values, base_step.past_key_values
            assert_same(step.logits, base_step.logits)


@variants
@pytest.mark.parametrize("mem_layers", [[], [1], [0, 1, 2]])
def test_within_one_context_memory_layers_change_nothing_of_a_llama(
    mem_layers: list[int], changes: dict[str, Any], tmp_path: Path
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
def test_rope_said_in_the_older_form_of_config_json_is_read(old: dict[str, Any], tmp_path: Path) -> None:
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
def test_a_local_context_longer_than_the_positions_of_a_checkpoint_is_read_as_the_llama_reads_it(rope: str) -> None:
    changes = {"max_position_embeddings": 8, "rope_parameters": ROPES[rope]}
    model, base, ids_BL = focused([1], local_context=24, **changes), llama(**changes), tokens(2, 20)
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = base(ids_BL).logits
        for how in ({}, {"use_cache": False}, {"plan": NOBODY}):
            assert_same(model(ids_BL, **how).logits, expected)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_other_forms_of_checkpoints_load(form: str, tmp_path: Path) -> None:
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
def test_a_checkpoint_loads_in_the_number_type_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "single")
    model = FotLlamaForCausalLM.from_pretrained(tmp_path / "single", mem_layers=[1], mem_gate=True, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens(2, 9), use_cache=False).logits.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    again = FotLlamaForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_memory_layers_given_at_loading_are_kept_in_order_and_once(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1, 0, 1]).config.mem_layers == [0, 1]


def test_fresh_memory_layers_start_as_widely_spread_as_the_others() -> None:
    torch.manual_seed(0)
    model = FotLlamaForCausalLM(FotLlamaConfig(**TINY, mem_layers=[1], initializer_range=0.5))
    spreads = [layer.self_attn.k_proj.weight.std().item() for layer in model.model.layers]
    assert spreads == pytest.approx([0.5] * 3, rel=0.1)


@pytest.mark.parametrize("mem_gate", [False, True])
def test_a_gate_a_head_is_all_that_is_new_among_the_parameters(mem_gate: bool) -> None:
    base, model = llama(), focused([0, 2], mem_gate=mem_gate)
    gates = {f"model.layers.{layer}.self_attn.mem_gate": torch.Size([4]) for layer in (0, 2)}
    assert shapes(model) == {**shapes(base), **(gates if mem_gate else {})}


@variants
def test_a_saved_model_loads_as_a_plain_llama_and_as_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    model = focused([0, 2], **changes)
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


def test_what_the_configuration_says_of_memory_is_saved(tmp_path: Path) -> None:
    said = {"mem_positionals": False, "mem_dtype": "bfloat16", "mem_gate": True, "local_context": 8}
    model = focused([1], last_context_length=3, **said)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in said} == said
    assert (again.config.last_context_length, again.config.window) == (3, 8)
    ids_BL = tokens(2, 40)
    assert torch.equal(again(ids_BL).logits, model(ids_BL).logits)


def test_a_model_with_a_gate_loads_as_a_plain_llama_too(tmp_path: Path) -> None:
    model = focused([1], mem_gate=True)
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(tokens(2, 9)).logits, model(tokens(2, 9), use_cache=False).logits)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=str)
def test_a_llama_generates_the_same_with_memory_layers(changes: dict[str, Any]) -> None:
    model, base = focused([1], **changes), llama(**changes)
    base.load_state_dict(model.state_dict())
    ids_BL = tokens(2, 7)
    mask_BL = torch.ones_like(ids_BL)
    assert model.generate(ids_BL, **GREEDY).tolist() == base.generate(ids_BL, **GREEDY).tolist()
    mask_BL[0, :3] = ids_BL[0, :3] = 0
    for masks in ({}, {"attention_mask": mask_BL}):
        assert model.generate(ids_BL, **masks, **GREEDY).tolist() == base.generate(ids_BL, **masks, **GREEDY).tolist()


def test_a_padded_batch_has_the_logits_of_a_llama_but_for_padding() -> None:
    model, base = focused([1]), llama()
    base.load_state_dict(model.state_dict())
    ids_BL, mask_BL = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask_BL[0, :4] = mask_BL[1, 7:] = 0
    with torch.no_grad():
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        expected = base(ids_BL, attention_mask=mask_BL, position_ids=positions_BL).logits[mask_BL.bool()]
        for how in ({}, {"use_cache": False}):
            got = model(ids_BL, attention_mask=mask_BL, position_ids=positions_BL, **how).logits[mask_BL.bool()]
            assert_same(got, expected)


SETS = ["longllama_rope", "longllama_nope", "longllama_theta1e6"]
RELEASED = {"rope_theta", "mem_layers", "mem_positionals", "mem_dtype", "mem_attention_grouping", "last_context_length"}


def longllama_read(model: FotLlamaForCausalLM, ids_BL: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids_BL).logits


@pytest.mark.parametrize("load", [FotLlamaForCausalLM, LongLlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("name", SETS)
def test_a_longllama_checkpoint_saved_in_its_layout_is_the_one_loaded(name: str, load: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CONFORMANCE / name, source)
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
    for again in (FotLlamaForCausalLM, LongLlamaForCausalLM, AutoModelForCausalLM):
        assert torch.equal(
            longllama_read(again.from_pretrained(tmp_path / "saved"), ids_BL), longllama_read(model, ids_BL)
        )


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_any_multi_head_llama_is_written_in_the_layout_of_longllama(theta: float, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    model = focused([0, 2], rope_parameters=rope, local_context=16, last_context_length=6, tie_word_embeddings=True)
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
def test_what_the_layout_of_longllama_cannot_say_is_refused_by_name(name: str, kind: Any, tmp_path: Path) -> None:
    how = {"form": "longllama"} if kind is FotLlamaForCausalLM else {}
    config = kind.config_class(**{**TINY, "last_context_length": 8, **UNSAYABLE[name]}, mem_layers=[1])
    with pytest.raises(ValueError, match=rf"the longllama layout has no {name} .*fot_llama"):
        kind(config).save_pretrained(tmp_path / "new", **how)
    assert not (tmp_path / "new").exists(), "nothing was written"
    focused([1], **UNSAYABLE[name]).save_pretrained(tmp_path)


def test_a_longllama_checkpoint_loaded_as_fot_llama_is_saved_as_that(tmp_path: Path) -> None:
    model = LongLlamaForCausalLM.from_pretrained(CONFORMANCE / SETS[0])
    FotLlamaForCausalLM.from_pretrained(CONFORMANCE / SETS[0]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fot_llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FotLlamaForCausalLM
    assert torch.equal(longllama_read(again, tokens(2, 100)), longllama_read(model, tokens(2, 100)))


def test_a_form_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"form 'longlama'.*longllama"):
        focused([1]).save_pretrained(tmp_path, form="longlama")


def loss_and_gradients(model: FotLlamaForCausalLM, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**how).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_trains_every_parameter_with_the_loss_of_all_rows() -> None:
    model, ids_RL, plan_Rd = focused([1], num_key_value_heads=2).train(), tokens(3, 6), pad_plan([[], [0], [1, 0]])
    output = model(ids_RL, labels=ids_RL, plan=plan_Rd, skip_logits=False)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_RL[:, 1:].flatten())
    assert_same(output.loss, expected, 1e-6)
    assert output.past_key_values is None
    _, gradients = loss_and_gradients(model, input_ids=ids_RL, labels=ids_RL, plan=plan_Rd)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((gradient != 0).any() for gradient in gradients.values())


def test_the_number_of_items_in_a_batch_divides_the_loss_with_a_plan() -> None:
    model, ids_RL = focused([1]), tokens(2, 6)
    how = {"labels": ids_RL, "plan": pad_plan([[], [0]])}
    assert_same(model(ids_RL, num_items_in_batch=7, **how).loss, model(ids_RL, **how).loss * 10 / 7)


def test_a_plan_that_names_rows_is_refused_by_a_model_without_memory_layers() -> None:
    model, ids_RL = focused([]), tokens(2, 6)
    with pytest.raises(ValueError, match=r"no memory layers .*mem_layers="):
        model(ids_RL, plan=pad_plan([[], [0]]))
    nobody = model(ids_RL, plan=torch.full((2, 1), -1)).logits
    assert (model(ids_RL, plan=pad_plan([[], [0]]), objective="transformer_xl").logits - nobody).abs().max() > 1e-3


def test_embeddings_and_kept_logits_go_with_a_plan() -> None:
    model, ids_RL, plan_Rd = focused([1]), tokens(2, 6), pad_plan([[], [0]])
    expected = model(ids_RL, plan=plan_Rd).logits
    embeddings_RLC = model.get_input_embeddings()(ids_RL)
    assert_same(model(inputs_embeds=embeddings_RLC, plan=plan_Rd).logits, expected, 1e-6)
    assert_same(model(ids_RL, plan=plan_Rd, logits_to_keep=2).logits, expected[:, -2:], 1e-6)
    [logits] = model(ids_RL, plan=plan_Rd, return_dict=False)
    assert torch.equal(logits, expected)


def test_a_mask_without_padding_changes_nothing_with_a_plan() -> None:
    model, ids_RL, plan_Rd = focused([1]), tokens(2, 6), pad_plan([[], [0]])
    got = model(ids_RL, plan=plan_Rd, attention_mask=torch.ones_like(ids_RL)).logits
    assert torch.equal(got, model(ids_RL, plan=plan_Rd).logits)


def test_a_few_steps_of_gradient_descent_lower_the_loss() -> None:
    model, ids_RL, plan_Rd = focused([1]).train(), tokens(3, 6), pad_plan([[], [0], [1, 0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss, _ = loss_and_gradients(model, input_ids=ids_RL, labels=ids_RL, plan=plan_Rd)
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


STEPS: list[tuple[int, int, int, int]] = [  # rows, tokens, additional contexts, tokens a document (0: not joined)
    (3, 6, 2, 0), (4, 6, 2, 0), (5, 8, 3, 0), (5, 8, 3, 3), (2, 7, 1, 5), (6, 9, 4, 0), (4, 12, 1, 4), (7, 5, 2, 0),
]  # fmt: skip
LATER = [(3, 10, 3, 2), (8, 11, 5, 0), (2, 9, 1, 3), (9, 4, 6, 0)]


def step_of(R: int, L: int, d: int, joined: int) -> dict[str, Any]:
    ids_RL, plan = tokens(R, L, seed=R), [list(range(row))[:d] + [-1] * max(0, d - row) for row in range(R)]
    documents = {"document_ids": torch.arange(L) // joined + 100 * torch.arange(R)[:, None]} if joined else {}
    return {"input_ids": ids_RL, "labels": ids_RL, "plan": torch.tensor(plan), **documents}


def test_compiled_the_model_trains_and_reads_the_same_whatever_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    backend, model = CompileCounterWithBackend("eager"), focused([1], num_hidden_layers=2, local_context=8).train()
    compiled: Any = torch.compile(model, backend=backend)
    graphs = []
    for shapes_of_step in (*STEPS, *LATER):
        model.zero_grad()
        loss = compiled(**step_of(*shapes_of_step)).loss
        loss.backward()
        found = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_same(found, loss_and_gradients(model, **step_of(*shapes_of_step)))
        graphs.append(backend.frame_count)
    assert graphs[0] > 0
    assert graphs[len(STEPS) :] == graphs[-1:] * len(LATER), "what comes later is computed by the graphs that are there"
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend=backend)
    caches: list[FotCache | None] = [None, None]
    with torch.no_grad():
        for part_BL in tokens(2, 40).split([20, 3, 1, 1, 1, 9, 5], dim=1):
            outputs = [
                each(part_BL, past_key_values=cache, use_cache=True)
                for each, cache in zip((compiled, model), caches, strict=True)
            ]
            assert torch.equal(outputs[0].logits, outputs[1].logits)
            caches = [output.past_key_values for output in outputs]
        for L in (5, 6, 7):
            ids_BL = tokens(2, L)
            assert_same(compiled(ids_BL, use_cache=False).logits, model(ids_BL, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("bad", [3, -1, 100])
def test_a_memory_layer_that_is_not_there_is_refused_by_its_number(bad: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range: the model has 3 layers, 0 to 2"):
        FotLlamaForCausalLM(FotLlamaConfig(**TINY, mem_layers=[1, bad]))
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"mem_layers \[{bad}\] out of range"):
        FotLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[bad])


def test_a_checkpoint_that_is_no_llama_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2}))
    with pytest.raises(ValueError, match=r"no LLaMA.*gpt2"):
        FotLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_number_type_that_memory_cannot_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"mem_dtype 'int8': give one of float32, bfloat16, float16"):
        focused([1], mem_dtype="int8")


@pytest.mark.parametrize("mem_layers", [[1], [0, 1, 2], []])
@pytest.mark.parametrize("plan", [[[], []], [[], [0]]])
def test_positions_that_start_again_keep_documents_apart_in_all_layers(
    plan: list[list[int]], mem_layers: list[int]
) -> None:
    """As a collator that flattens documents into rows gives them."""
    if not mem_layers and plan[1]:
        return
    model, ids_RL, plan_Rd = focused(mem_layers), tokens(2, 9), pad_plan(plan)
    positions_RL = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 0, 1, 2, 3, 4]])
    starts = [[0, 4], [0, 1, 4]]
    with torch.no_grad():
        got = model(ids_RL, position_ids=positions_RL, plan=plan_Rd).logits
        documents_RL = (positions_RL == 0).cumsum(1)
        assert torch.equal(
            model(ids_RL, position_ids=positions_RL, plan=plan_Rd, document_ids=documents_RL).logits, got
        )
        for row, firsts in enumerate(starts):
            for first, end in zip(firsts, [*firsts[1:], 9], strict=True):
                if not plan[row]:
                    assert_same(got[row, first:end], model(ids_RL[row : row + 1, first:end]).logits[0])
        other_RL = ids_RL.clone()
        other_RL[1, :4] = tokens(4, seed=1)
        assert_same(model(other_RL, position_ids=positions_RL, plan=plan_Rd).logits[1, 4:], got[1, 4:])


def test_positions_that_count_on_change_nothing_with_a_plan() -> None:
    model, ids_RL, plan_Rd = focused([1]), tokens(2, 9), pad_plan([[], [0]])
    expected = model(ids_RL, plan=plan_Rd).logits
    for positions in (torch.arange(9)[None], torch.arange(9).expand(2, -1)):
        assert torch.equal(model(ids_RL, plan=plan_Rd, position_ids=positions).logits, expected)


DOCUMENTS = torch.zeros(2, 4, dtype=torch.long)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "padding with a plan: give rows"),
    "cache": ({"past_key_values": "new"}, "past_key_values with a plan: in training"),
    "objective": ({"objective": "fott"}, "objective 'fott': give one of fot, memorizing, transformer_xl"),
    "documents of another shape": ({"document_ids": DOCUMENTS[:, :3]}, r"document_ids \[2, 3\]: give \[2, 4\]"),
    "documents by row": ({"document_ids": DOCUMENTS[:, 0]}, r"document_ids \[2\]: give \[2, 4\]"),
    "rows that are not there": ({"plan": pad_plan([[], [2]])}, "row 1 sees row 2, but the batch has rows 0 to 1"),
    "itself": ({"plan": pad_plan([[0], []])}, "row 0 sees itself"),
    "the future": ({"plan": pad_plan([[1], []]), "document_ids": DOCUMENTS}, "row 0 sees row 1, the future of its own"),
    "a plan of other rows": ({"plan": pad_plan([[], [], []])}, r"plan is a torch.int64 tensor \[3, 0\]: .*\[2, d\]"),
    "a flat plan": ({"plan": torch.tensor([-1, 0])}, r"\[2\]: give whole numbers \[2, d\]"),
    "a plan of fractions": ({"plan": torch.zeros(2, 1)}, r"torch.float32 .*give whole numbers"),
    "a plan that is a list": ({"plan": [[-1], [0]]}, r"plan is a list.*tensor"),
    "two previous contexts": (
        {"plan": pad_plan([[], [0, -1]]), "objective": "transformer_xl"},
        "transformer_xl sees one context, the previous: the plan has 2 columns",
    ),
    "documents without a plan, by row": ({"plan": None, "document_ids": DOCUMENTS[:, 0]}, r"give \[2, 4\]"),
    "positions of another shape": ({"position_ids": torch.arange(3)[None]}, r"position_ids \[1, 3\]: give \[2, 4\]"),
    "positions that begin later": ({"position_ids": torch.arange(5, 9)[None]}, "let them count from 0 in each row"),
    "positions that jump": ({"position_ids": torch.tensor([[0, 1, 5, 6]])}, "count from 0 .*in each document"),
    "positions that start again inside a document": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "document_ids": DOCUMENTS},
        "position_ids start again inside a document: document_ids must change",
    ),
    "positions that start again, with transformer_xl": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "objective": "transformer_xl"},
        "transformer_xl with position_ids that start again",
    ),
    "an objective without a plan": ({"plan": None, "objective": "memorizing"}, "objective .*with a plan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_with_a_plan_is_answered_by_what_is_wrong_and_what_to_do(name: str) -> None:
    model, (how, message) = focused([0]), MISTAKES[name]
    how = {"plan": pad_plan([[], [0]]), **how}
    if how.get("past_key_values") == "new":
        how["past_key_values"] = FotCache(model.config)
    with pytest.raises(ValueError, match=message) as error:
        model(tokens(2, 4), **how)
    assert "\n" not in str(error.value)
