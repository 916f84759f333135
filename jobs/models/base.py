"""Is a checkpoint a LLaMA that can be used here? Looked at whole before anything is made with it, from its
configuration and its files' headers: what `look_at_checkpoint` lets through, training and evaluation load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.config.recipe import CheckpointShape
from jobs.config.training import Training, named_layers
from jobs.models.backward import Backward
from jobs.models.shape import Shape
from jobs.models.weights import check_dtypes, read_headers
from pipelines.tokens.tokenizer import TextTokenizer, has_tokenizer, read_tokenizer
from pipelines.workflow.errors import UserError
from pipelines.workflow.files import check_fetched

OTHER_JSON = ("generation_config.json",)  # that loading reads, too
PEFT_ADAPTER = "adapter_config.json"
SIZES = ("vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size")


def look_at_checkpoint(path: Path, shape: CheckpointShape | None = None) -> dict[str, Any]:
    """The configuration of a LLaMA checkpoint directory that is whole: each tensor of its files has its place in the
    model, each parameter of the model its tensor, of the same shape. Raises UserError, one line, for anything else."""
    config = read_llama_config(path, shape)
    if (path / PEFT_ADAPTER).exists():
        raise UserError(
            f"base.checkpoint {path} holds a PEFT adapter ({PEFT_ADAPTER}): merge it into the model, or remove it"
        )
    for name in OTHER_JSON:
        if (path / name).exists():
            _read_json(path / name)
    headers = read_headers(path, config.get("transformers_weights"))
    check_dtypes(path, headers)
    _check_tensors(path, {name: header.shape for name, header in headers.items()})
    return config


def _check_tensors(path: Path, theirs: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where the tensors there are not those of the model that the configuration makes."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from fot_model import FotLlamaConfig, FotLlamaForCausalLM
    from fot_model.checkpoint import check_shapes, with_prefix

    try:
        config = FotLlamaConfig.from_pretrained(path)
        rope = config.rope_parameters["rope_type"]
        if rope not in ("default", *ROPE_INIT_FUNCTIONS):
            known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
            raise UserError(f"base.checkpoint {path}: its RoPE is of an unknown kind, {rope!r}: known are {known}")
        with torch.device("meta"):
            model = FotLlamaForCausalLM(config)
    except UserError:
        raise
    except Exception as error:  # whatever transformers says of a configuration from outside
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"base.checkpoint {path}: no model can be made of its config.json ({type(error).__name__}: {said}): mend it"
        ) from None
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        check_shapes(path, with_prefix(theirs), ours, config.tie_word_embeddings)
    except ValueError as error:
        raise UserError(f"base.checkpoint {error}") from None


def load_llama(path: Path, **how: Any) -> Any:
    """`FotLlamaForCausalLM.from_pretrained`, but that it raises UserError for a checkpoint that is not that model."""
    from fot_model import FotLlamaForCausalLM

    try:
        return FotLlamaForCausalLM.from_pretrained(path, **how)
    except ValueError as error:
        raise UserError(f"base.checkpoint {error}") from None


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
    if not (path / "config.json").is_file():
        raise UserError(f"base.checkpoint {path} is no Hugging Face checkpoint: it has no config.json")
    return _read_json(path / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    check_fetched(file)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"base.checkpoint {file.parent}: its {file.name} is not JSON") from None
    return content if isinstance(content, dict) else {}


def check_config(where: object, config: Mapping[str, Any], shape: CheckpointShape | None = None) -> None:
    """Raises UserError where a checkpoint's configuration is no LLaMA's, or another one's than the recipe is for."""
    if (model_type := config.get("model_type")) not in ("llama", "fot_llama", "longllama"):
        raise UserError(f"base.checkpoint {where} is no LLaMA: its config.json says model_type {model_type!r}")
    if missing := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise UserError(f"base.checkpoint {where}: its config.json has no {missing[0]}")
    if config.get("quantization_config"):
        given = config["quantization_config"]
        method = given.get("quant_method", "") if isinstance(given, Mapping) else ""
        raise UserError(
            f"base.checkpoint {where} is quantized ({method or 'quantization_config'}): give the model's weights as "
            f"they were before, in float32, bfloat16 or float16"
        )
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


def check_llama(path: Path, config: Mapping[str, Any], training: Training, tokenizer: TextTokenizer) -> None:
    """Raises UserError where vocabulary, context or memory layers do not go with the recipe."""
    check_vocabulary(path, tokenizer)
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


def check_vocabulary(path: Path, tokenizer: TextTokenizer) -> None:
    """Raises UserError where a document may hold a token that the model in `path` has no embedding for. Tokens that
    none can hold may be more than the embeddings: a padding token, say, that was added to the tokenizer alone."""
    size = read_config(path)["vocab_size"]
    token, number = max(tokenizer.in_documents.items(), key=lambda item: item[1])
    if number >= size:
        raise UserError(
            f"the tokenizer has {number + 1} tokens, the model in {path} only {size}: set tokenizer.path to the "
            f"model's own tokenizer, or take {token!r} and what else is beyond out of it"
        )


def check_tokens(path: Path, tokenizer: TextTokenizer) -> None:
    """Raises UserError where the data's tokenizer has other tokens than the one beside the model, if there is one."""
    if not has_tokenizer(path):
        return
    theirs = read_tokenizer(str(path)).tokenizer.get_vocab()
    ours = tokenizer.tokenizer.get_vocab()
    if other := next((token for token, number in ours.items() if theirs.get(token) != number), None):
        raise UserError(
            f"tokenizer.path: token {ours[other]} is {other!r} there, but not in the tokenizer of the model in {path}: "
            f"unset tokenizer.path, so that the data are made with the model's own"
        )


def asked_mem_layers(training: Training) -> list[int] | None:
    """The memory layers a recipe names, None where a probe or the model's depth decides."""
    return list(named_layers(training.objective)) or None
