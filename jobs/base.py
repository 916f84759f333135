"""Is the base checkpoint a LLaMA that the recipe can fine-tune? Found out from its configuration and file headers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from jobs.recipe import CheckpointShape
from jobs.train.backward import Backward
from jobs.train.config import Training, named_layers
from jobs.train.shape import Shape
from pipelines.errors import UserError
from pipelines.tokenizer import TextTokenizer

SIZES = ("vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size")


def read_llama_config(path: Path, shape: CheckpointShape | None = None) -> dict[str, Any]:
    """The configuration of a LLaMA checkpoint directory, of the shape that the recipe says, if it says one. Raises
    UserError for anything else."""
    config = read_config(path)
    check_config(path, config, shape)
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"base.checkpoint {path} holds no weights (*.safetensors): download or convert them")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint directory's config.json, of whatever model. Raises UserError where there is none."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"base.checkpoint {path} is no Hugging Face checkpoint: it has no config.json") from None
    except ValueError:
        raise UserError(f"base.checkpoint {path}: its config.json is not JSON") from None
    return config if isinstance(config, dict) else {}


def check_config(where: object, config: Mapping[str, Any], shape: CheckpointShape | None = None) -> None:
    """Raises UserError where a checkpoint's configuration is no LLaMA's, or another one's than the recipe is for."""
    if (model_type := config.get("model_type")) not in ("llama", "fot_llama", "longllama"):
        raise UserError(f"base.checkpoint {where} is no LLaMA: its config.json says model_type {model_type!r}")
    if missing := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise UserError(f"base.checkpoint {where}: its config.json has no {missing[0]}")
    if shape is not None:
        _check_shape(where, config, shape)


def _check_shape(where: object, config: Mapping[str, Any], shape: CheckpointShape) -> None:
    has, wanted = _shape_values(config), _shape_values(shape.model_dump())
    if different := [name for name in wanted if has[name] != wanted[name]]:
        name = different[0]
        raise UserError(
            f"base.checkpoint {where} has {name} {has[name]}, base.shape says {wanted[name]}: give the model that the "
            f"recipe is for, or --set base.shape=null"
        )


def _shape_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `base.shape` says, of a config.json or of `base.shape` itself, missing values as transformers takes them."""
    heads, rope = config.get("num_attention_heads", 32), config.get("rope_parameters") or {}
    defaults = {
        "num_attention_heads": heads,
        "intermediate_size": 11008,
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }
    given = {name: config.get(name) for name in CheckpointShape.model_fields}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


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
    if not config.get("mem_qk_norm"):  # that has parameters of its own
        Backward.of(Shape.of(config), training)  # do its patterns match anything?


def check_tokens(path: Path, tokenizer: TextTokenizer) -> None:
    """Raises UserError where the data's tokenizer has other tokens than the one beside the model, if there is one."""
    own = path / "tokenizer.json"
    if not own.exists():
        return
    theirs = Tokenizer.from_file(str(own)).get_vocab()
    ours = tokenizer.tokenizer.get_vocab()
    if other := next((token for token, number in ours.items() if theirs.get(token) != number), None):
        raise UserError(
            f"tokenizer.path: token {ours[other]} is {other!r} there, but not in the tokenizer of the model in {path}: "
            f"unset tokenizer.path, so that the data are made with the model's own"
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
    """The memory layers a recipe names, None where a probe or the model's depth decides."""
    return list(named_layers(training.objective)) or None
