"""Which parameters are trained, by name; and what of the model a gradient, an optimizer and a graph are kept for."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.config.training import Training
from jobs.models.shape import Shape, parameter_sizes
from jobs.models.trained import layer_of, lora_modules, trained_names
from jobs.train.model import checkpoint_activations
from pipelines.workflow.errors import UserError

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
NAMES = list(parameter_sizes(Shape.of(SHAPE), gated=[1, 2]))
TIED = list(parameter_sizes(Shape.of({**SHAPE, "tie_word_embeddings": True})))


def training(train: object = "all", kind: str = "fot", **changes: object) -> Training:
    objective = {"kind": kind, "context": 8} | ({"mem_layers": [1, 2]} if kind == "fot" else {})
    return Training.model_validate({"objective": objective, "steps": 1, "train": train, **changes})


def test_all_is_all() -> None:
    assert trained_names(training(), NAMES, [1, 2]) == NAMES


def test_memory_attention_is_projections_and_gates_of_the_memory_layers() -> None:
    parts = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "mem_gate")
    expected = [f"model.layers.{layer}.self_attn.{part}" for layer in (1, 2) for part in parts]
    assert trained_names(training("memory_attention"), NAMES, [1, 2]) == expected


def test_memory_and_above_leaves_embeddings_and_what_is_below() -> None:
    names = trained_names(training("memory_and_above"), NAMES, [2, 3])
    assert {layer_of(name) for name in names} == {2, 3, None}
    assert [name for name in names if layer_of(name) is None] == ["model.norm.weight", "lm_head.weight"]
    assert all(name in names for name in NAMES if layer_of(name) in (2, 3))
    tied = trained_names(training("memory_and_above"), TIED, [2])
    assert [name for name in tied if layer_of(name) is None] == ["model.norm.weight"]


def test_patterns_choose_by_name() -> None:
    made = training({"patterns": [r"layers\.3\..*norm", "embed"]}, kind="standard")
    assert trained_names(made, NAMES, []) == [
        "model.embed_tokens.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.post_attention_layernorm.weight",
    ]


def test_a_pattern_that_matches_nothing_is_one_line() -> None:
    made = training({"patterns": ["q_proj", "qproj"]})
    with pytest.raises(
        UserError, match=r"^finetune.train.patterns.1 'qproj' matches no parameter of the model: names a"
    ):
        trained_names(made, NAMES, [1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": "memory_attention", "kind": "standard"},
            "memory_attention with objective.kind standard, which has no",
        ),
        ({"train": "memory_and_above", "kind": "transformer_xl"}, "transformer_xl, which has no memory layers"),
        ({"train": {"patterns": ["("]}}, "no regular expression"),
        ({"train": {"patterns": []}}, "at least 1 item"),
        ({"train": "memory"}, "memory_attention"),
        ({"lora": {"targets": ["embed_tokens"]}}, "q_proj"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_recipe(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(**changes)


def test_lora_goes_beside_targets_within_the_choice() -> None:
    made = training("memory_attention", lora={"targets": ["q_proj", "up_proj"]})
    scope = trained_names(made, NAMES, [1, 2])
    assert lora_modules(made, scope) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 2)]
    other = training("memory_attention", lora={"targets": ["up_proj"]})
    with pytest.raises(
        UserError, match=r"^finetune.lora.targets \['up_proj'\]: none of them is among what finetune.tr"
    ):
        lora_modules(other, scope)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_is_kept_below_the_lowest_trained_layer(checkpointing: bool) -> None:
    config = FotLlamaConfig(**SHAPE, mem_layers=[2], max_position_embeddings=8)
    model = FotLlamaForCausalLM(config).train()
    if checkpointing:
        checkpoint_activations(model)
    names = [name for name, _ in model.named_parameters()]
    trained = set(trained_names(training("memory_attention"), names, [2]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _module, _args, output, number=number: outputs.update({number: output}))
    ids = torch.arange(16).view(2, 8)
    plan = torch.tensor([[1], [0]])
    model(ids, labels=ids, plan=plan, use_cache=False).loss.backward()
    assert [outputs[number].requires_grad for number in range(4)] == [False, False, True, True]
    given = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert given == trained
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained)


def test_the_choice_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, jobs.models.trained, jobs.models.backward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0
