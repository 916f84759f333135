"""What a training starts with: the base, with what its objective needs."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from jobs.train.model import build_model
from jobs.train.spec import TrainSpec

FOT = {"kind": "fot", "context": 8, "mem_layers": [0, 1], "mem_positionals": False}
MEMORIZING = {"kind": "memorizing", "context": 8, "contexts": 2}


@pytest.fixture
def build(spec: TrainSpec, changed):
    names = (f"made{number}" for number in count())

    def make(objective: dict, **deepspeed: object):
        return build_model(changed(next(names), {"objective": objective, "deepspeed": deepspeed}))

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
    plain = build_model(spec)
    assert not plain.is_gradient_checkpointing
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


def test_a_new_model_has_the_shape_and_the_tokenizers_vocabulary(spec: TrainSpec, recipe: dict) -> None:
    from jobs.recipe import ModelShape

    shape = ModelShape.model_validate({**recipe["base"]["pretrain"]["shape"], "num_key_value_heads": 1})
    config = build_model(replace(spec, base=shape)).config
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (300, 32, 1)
    assert (config.max_position_embeddings, config.mem_layers) == (16, [])
