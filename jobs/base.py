"""Is the base checkpoint a LLaMA that the recipe can fine-tune? Found out from its configuration and file headers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jobs.recipe import FotObjective, Training
from pipelines.errors import UserError

SIZES = ("vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size")


def read_llama_config(path: Path) -> dict[str, Any]:
    """The configuration of a LLaMA checkpoint directory. Raises UserError for anything else."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"base.checkpoint {path} is no Hugging Face checkpoint: it has no config.json") from None
    except ValueError:
        raise UserError(f"base.checkpoint {path}: its config.json is not JSON") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in ("llama", "fot_llama", "longllama"):
        raise UserError(f"base.checkpoint {path} is no LLaMA: its config.json says model_type {model_type!r}")
    if missing := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise UserError(f"base.checkpoint {path}: its config.json has no {missing[0]}")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"base.checkpoint {path} holds no weights (*.safetensors): download or convert them")
    return config


def check_llama(path: Path, config: Mapping[str, Any], training: Training, vocab_size: int) -> None:
    """Raises UserError where weights, vocabulary, context or memory layers do not go with the recipe."""
    _check_weights(path, config["num_hidden_layers"])
    if vocab_size > config["vocab_size"]:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the model in {path} only {config['vocab_size']}: set "
            f"tokenizer.path to the model's own tokenizer"
        )
    longest = config["max_position_embeddings"]
    if training.objective.context > longest:
        raise UserError(
            f"finetune.objective.context is {training.objective.context}, the model in {path} was made for {longest}: "
            f"set it to {longest} or less"
        )
    layers = config["num_hidden_layers"]
    if bad := [layer for layer in asked_mem_layers(training) or () if layer >= layers]:
        raise UserError(
            f"finetune.objective.mem_layers {bad}: the model in {path} has {layers} layers, 0 to {layers - 1}"
        )


def _check_weights(path: Path, layers: int) -> None:
    names: set[str] = set()
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                names |= set(weights.keys())
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): download or copy it again") from None
    needed = ["model.embed_tokens.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(layers))]
    if files and (missing := [name for name in needed if name not in names]):
        raise UserError(f"base.checkpoint {path} is no LLaMA: its weights hold no {missing[0]}")


def asked_mem_layers(training: Training) -> list[int] | None:
    """The memory layers a recipe names, None where the model's depth decides."""
    objective = training.objective
    return list(objective.mem_layers) if isinstance(objective, FotObjective) and objective.mem_layers else None
