"""What a training starts with: the base, with what its objective needs."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from fot_model import Adapter, FotLlamaForCausalLM, Lora, fingerprint
from jobs.config.train_spec import TrainSpec
from jobs.train.model import build_model
from pipelines.workflow.errors import UserError

FOT = {"kind": "fot", "context": 8, "mem_layers": [0, 1], "mem_positionals": False}
MEMORIZING = {"kind": "memorizing", "context": 8, "contexts": 2}


@pytest.fixture
def build(spec: TrainSpec, changed):
    names = (f"made{number}" for number in count())

    def make(objective: dict, **deepspeed: object):
        return build_model(changed(next(names), {"objective": objective, "deepspeed": deepspeed}))[0]

    return make


def test_memory_layers_windows_and_gates_are_the_objectives(build) -> None:
    config = build(FOT).config
    assert (config.mem_layers, config.mem_positionals, config.local_context, config.mem_gate) == (
        [0, 1],
        False,
        8,
        False,
    )
    config = build(MEMORIZING).config
    assert (config.mem_layers, config.mem_gate) == ([1], True)
    assert build({**MEMORIZING, "gate": False}).config.mem_gate is False
    assert config.previous_context is False
    chained = build({"kind": "transformer_xl", "context": 8, "contexts": 2}).config
    assert (chained.local_context, chained.previous_context) == (None, True)


def test_the_type_and_checkpointing_are_deepspeeds(build, spec: TrainSpec) -> None:
    model = build(FOT, dtype="bfloat16", activation_checkpointing=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing
    assert model.training
    plain, _ = build_model(spec)
    assert not plain.is_gradient_checkpointing
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


def test_a_new_model_has_the_shape_and_the_tokenizers_vocabulary(spec: TrainSpec, recipe: dict) -> None:
    from jobs.config.recipe import ModelShape

    shape = ModelShape.model_validate({**recipe["base"]["pretrain"]["shape"], "num_key_value_heads": 1})
    config = build_model(replace(spec, base=shape))[0].config
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (300, 32, 1)
    assert (config.max_position_embeddings, config.mem_layers) == (16, [])


# In part


MLP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj"
LORA = {"train": "memory_attention", "lora": {"rank": 2, "targets": ["q_proj"]}}


@pytest.fixture
def part(spec: TrainSpec, changed):
    """Builds a model that is trained in part, on an adapter or not."""
    names = (f"part{number}" for number in count())

    def make(settings: dict, adapter=None):
        return build_model(replace(changed(next(names), settings), adapter=adapter))

    return make


@pytest.fixture
def before(spec: TrainSpec, tmp_path) -> Adapter:
    """An adapter of the base: other queries, another MLP matrix."""
    base = FotLlamaForCausalLM.from_pretrained(spec.base)
    tensors = {name: torch.randn_like(base.get_parameter(name)) for name in (f"{QUERY}.weight", MLP)}
    adapter = Adapter(fingerprint(base), {"mem_layers": [1]}, tensors=tensors)
    adapter.save(tmp_path / "before")
    return adapter


def test_what_is_not_trained_needs_no_gradient(part) -> None:
    model, adapter = part({"train": "memory_attention"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.1.self_attn.{one}_proj.weight" for one in "qkvo"}
    assert (adapter.tensors, adapter.lora, adapter.settings["mem_layers"]) == ({}, None, [1])
    assert adapter.training["train"] == "memory_attention"


def test_whole_trainings_have_no_adapter_but_may_begin_with_one(part, before, tmp_path) -> None:
    assert part({})[1] is None
    model, adapter = part({}, tmp_path / "before")
    assert adapter is None
    assert torch.equal(model.get_parameter(MLP), before.tensors[MLP])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_an_earlier_adapter_changed_stays_in_the_new_one(part, before, tmp_path) -> None:
    model, adapter = part({"train": "memory_attention"}, tmp_path / "before")
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.tensors.items())
    assert adapter.base == before.base
    assert {*adapter.tensors} == {MLP}  # queries are trained on
    assert torch.equal(adapter.tensors[MLP], before.tensors[MLP])


def test_an_adapter_of_another_base_is_one_line(part, before, tmp_path) -> None:
    replace(before, base="0" * 32).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"^the adapter was trained from another base than "):
        part({"train": "memory_attention"}, tmp_path / "other")


def test_lora_begins_as_the_base_and_is_the_same_on_every_rank(part, spec) -> None:
    (model, adapter), (other, _) = part(LORA), part(LORA)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*trained} == {f"{QUERY}.lora_A.default.weight", f"{QUERY}.lora_B.default.weight"}
    assert all(torch.equal(other.get_parameter(name), parameter) for name, parameter in trained.items())
    assert (adapter.lora, adapter.tensors) == (Lora(2, 16.0, ("q_proj",)), {})
    ids = torch.arange(16)[None] + 3
    plain = FotLlamaForCausalLM.from_pretrained(spec.base)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, use_cache=False).logits, plain.eval()(ids, use_cache=False).logits)


def test_lora_goes_on_with_its_pairs_and_merges_those_of_another_kind(part, before, tmp_path) -> None:
    pairs = {f"{QUERY}.lora_A.weight": torch.randn(2, 32), f"{QUERY}.lora_B.weight": torch.randn(32, 2)}
    replace(before, lora=Lora(2, 16.0, ("q_proj",)), tensors={**pairs, MLP: before.tensors[MLP]}).save(
        tmp_path / "lora"
    )
    model, adapter = part(LORA, tmp_path / "lora")
    state = model.state_dict()
    assert torch.equal(state[f"{QUERY}.lora_A.default.weight"], pairs[f"{QUERY}.lora_A.weight"])
    assert torch.equal(state[f"{QUERY}.lora_B.default.weight"], pairs[f"{QUERY}.lora_B.weight"])
    assert {*adapter.tensors} == {MLP}
    model, adapter = part({**LORA, "lora": {"rank": 3, "targets": ["q_proj"]}}, tmp_path / "lora")
    merged = model.state_dict()[f"{QUERY}.base_layer.weight"]
    assert {*adapter.tensors} == {MLP, f"{QUERY}.weight"}
    assert torch.equal(adapter.tensors[f"{QUERY}.weight"], merged)
    assert torch.allclose(
        merged - state[f"{QUERY}.base_layer.weight"],
        8 * pairs[f"{QUERY}.lora_B.weight"] @ pairs[f"{QUERY}.lora_A.weight"],
        atol=1e-5,
    )
