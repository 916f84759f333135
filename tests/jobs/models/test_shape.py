"""Sizes of parameters against the models' own."""

import pytest
import torch
from fixtures.estimate import OPEN_LLAMA_3B, SMALL, count_of

from fot_model import FotLlamaConfig, FotLlamaForCausalLM
from jobs.models.shape import Shape, parameter_sizes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
        {"attention_bias": True, "num_key_value_heads": 1},
        {"mlp_bias": True},
        {"mem_layers": [0, 2], "mem_gate": True},
        {"num_hidden_layers": 1, "vocab_size": 7},
        {**OPEN_LLAMA_3B, "num_hidden_layers": 2},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_parameters_are_the_models_own(changes: dict) -> None:
    config = FotLlamaConfig(**{**SMALL, "num_key_value_heads": None, "mem_layers": None, **changes})
    with torch.device("meta"):
        model = FotLlamaForCausalLM(config)
    gated = config.mem_layers if config.mem_gate else ()
    theirs = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameter_sizes(Shape.of(config.to_dict()), gated) == theirs


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (OPEN_LLAMA_3B, 3_426_473_600),
        ({**OPEN_LLAMA_3B, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
        (
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            8_030_261_248,
        ),
    ],
    ids=["OpenLLaMA 3B", "7B", "Llama 3.1 8B"],
)
def test_parameters_of_released_models(shape: dict, count: int) -> None:
    assert count_of(Shape.of(shape)) == count


def test_a_config_without_a_size_means_what_transformers_means() -> None:
    given = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = FotLlamaForCausalLM(FotLlamaConfig(**given))
    assert count_of(Shape.of(given)) == model.num_parameters()
