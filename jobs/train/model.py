"""The model a training starts with."""

from pathlib import Path

import torch

from fot_model import FotLlamaConfig, FotLlamaForCausalLM, default_mem_layers
from jobs.recipe import ModelShape
from jobs.train.config import (
    FotObjective,
    MemorizingObjective,
    Objective,
    TransformerXlObjective,
    auto_layers,
    named_layers,
)
from jobs.train.spec import TrainSpec
from pipelines.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_model(spec: TrainSpec) -> FotLlamaForCausalLM:
    """The base with the objective's memory layers, or a new LLaMA of the given shape."""
    settings = spec.training.deepspeed
    dtype = DTYPES[settings.dtype]
    if isinstance(spec.base, ModelShape):
        model = FotLlamaForCausalLM(_new_config(spec.base, spec.tokenizer, spec.training.objective.context)).to(dtype)
    else:
        config = _base_config(spec.base, spec.training.objective)
        model = FotLlamaForCausalLM.from_pretrained(spec.base, config=config, dtype=dtype)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def _base_config(base: Path, objective: Objective) -> FotLlamaConfig:
    """The base's configuration; with the memory layers and windows it is trained with, where it is."""
    config = FotLlamaConfig.from_pretrained(base)
    config.previous_context = isinstance(objective, TransformerXlObjective)
    if isinstance(objective, FotObjective | MemorizingObjective):
        assert auto_layers(objective) is None, "what a probe chose is in the spec"
        config.mem_layers = list(named_layers(objective) or default_mem_layers(config.num_hidden_layers))
        config.mem_positionals = objective.mem_positionals
        config.local_context = objective.context
        config.last_context_length = None  # windows that do not depend on how an input is split
    if isinstance(objective, MemorizingObjective):
        config.mem_gate = objective.gate
    return config


def _new_config(shape: ModelShape, tokenizer_directory: Path, context: int) -> FotLlamaConfig:
    tokenizer = load_tokenizer(tokenizer_directory)
    return FotLlamaConfig(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        max_position_embeddings=context,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings,
    )
