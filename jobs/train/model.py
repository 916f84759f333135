"""The model a training starts with, and what is trained of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fot_model import Adapter, FotLlamaConfig, FotLlamaForCausalLM, Lora, default_mem_layers, fingerprint
from fot_model.adapter import settings_of
from jobs.config.recipe import ModelShape
from jobs.config.train_spec import TrainSpec
from jobs.config.training import (
    MemorizingObjective,
    MemoryRows,
    Objective,
    TransformerXlObjective,
    auto_layers,
    named_layers,
)
from jobs.models.base import load_llama
from jobs.models.trained import lora_modules, trained_names, whole_beside_lora
from jobs.train.estimate import tokens_per_step
from jobs.train.export import PEFT, load_adapter
from pipelines.tokens.tokenizer import load_tokenizer
from pipelines.workflow.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LORA = ".lora_"  # in the names of LoRA's parameters


def build_model(spec: TrainSpec) -> tuple[FotLlamaForCausalLM, Adapter | None]:
    """The base with the objective's memory layers, or a new LLaMA of the given shape; what is not trained needs no
    gradient.

    The second is None where all is trained, else what will be the adapter of this training, with those tensors of the
    adapter that it starts from that are not trained here. Raises UserError for what cannot be trained.
    """
    settings = spec.training.deepspeed
    dtype = DTYPES[settings.dtype]
    adapter = None
    if isinstance(spec.base, ModelShape):
        model = FotLlamaForCausalLM(_new_config(spec.base, spec.tokenizer, spec.training.objective.context)).to(dtype)
    elif spec.training.whole and spec.adapter is None:
        config = _base_config(spec.base, spec.training.objective)
        model = load_llama(spec.base, config=config, dtype=dtype)
    else:
        model, adapter = _with_adapter(spec, spec.base, dtype)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    return model.train(), adapter


def checkpoint_activations(model: FotLlamaForCausalLM) -> None:
    """Compute activations again in the backward pass, down to the lowest trained layer."""
    model.gradient_checkpointing_enable()
    # Only reentrant checkpointing, which is not used, needs embeddings that require a gradient: all layers would.
    model.disable_input_require_grads()


def _with_adapter(spec: TrainSpec, base: Path, dtype: torch.dtype) -> tuple[FotLlamaForCausalLM, Adapter | None]:
    """A model that is trained in part, or begins with an adapter."""
    config, training = _base_config(base, spec.training.objective), spec.training
    model, info = load_llama(base, config=config, dtype="auto", output_loading_info=True)
    own, model = fingerprint(model, info["missing_keys"]), model.to(dtype)  # of the numbers as the files have them
    names = [name for name, _ in model.named_parameters()]
    scope = trained_names(training, names, config.mem_layers or ())
    modules = lora_modules(training, scope) if training.lora is not None else []
    lora = Lora(**training.lora.model_dump()) if training.lora is not None else None
    before = Adapter(own, {}) if spec.adapter is None else _load(spec.adapter, own, base)
    goes_on = lora is not None and before.lora == lora and {*before.pairs} == {*modules}
    (before.without_pairs() if goes_on else before).apply(model)

    trained = {name for name in scope if lora is None or whole_beside_lora(name)}
    changed = {*before.whole_names(merged=not goes_on)} - trained
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in changed}
    if lora is not None:
        _inject(model, modules, lora, spec.seed)
        model = model.to(dtype)
        if goes_on:
            _set_pairs(model, before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or LORA in name)
    return model, None if training.whole else Adapter(own, settings_of(config), _facts(spec), lora, kept)


def _load(directory: Path, own: str, base: Path) -> Adapter:
    adapter = load_adapter(directory)
    try:
        adapter.check_base(own, base)
    except ValueError as error:
        raise UserError(str(error)) from None
    return adapter


def _inject(model: FotLlamaForCausalLM, modules: Sequence[str], lora: Lora, seed: int) -> None:
    """Put LoRA's pairs into modules, the same on every rank; their product is zero. Raises UserError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("finetune.lora needs peft: pip install 'fot[peft]'") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alpha: Any = lora.alpha  # peft takes fractions, too
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(modules)), model)


@torch.no_grad()
def _set_pairs(model: FotLlamaForCausalLM, adapter: Adapter) -> None:
    for name, parameter in model.named_parameters():
        if LORA in name:
            parameter.copy_(adapter.tensors[name.replace(PEFT, "")])


def _facts(spec: TrainSpec) -> Mapping[str, Any]:
    """What an adapter says of how it came to be."""
    training = spec.training.model_dump(
        mode="json", include={"objective", "batch", "optimizer", "schedule", "train", "lora"}
    )
    tokens = {"tokens_per_step": tokens_per_step(spec.training)}
    return {**training, **tokens, "seed": spec.seed, "manifest": spec.identity.get("manifest")}


def _base_config(base: Path, objective: Objective) -> FotLlamaConfig:
    """The base's configuration; with the memory layers and windows it is trained with, where it is."""
    config = FotLlamaConfig.from_pretrained(base)
    config.previous_context = isinstance(objective, TransformerXlObjective)
    if isinstance(objective, MemoryRows):
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
