"""The recipe: one strict, frozen model of everything a run needs, read from YAML with `--set key=value` on top."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from jobs.train.config import FotObjective, MemorizingObjective, Positive, Resources, Training
from pipelines.config import Data, Part, TokenizerPart
from pipelines.errors import UserError


class ModelShape(Part):
    """Shape of a LLaMA to pre-train, in Hugging Face's names."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 x num_attention_heads")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


class Pretrain(Part):
    """How to make a base where there is none."""

    shape: ModelShape
    training: Training

    @model_validator(mode="after")
    def _is_plain(self) -> "Pretrain":
        if self.training.objective.kind != "standard":
            raise ValueError("base.pretrain.training.objective.kind must be standard: memory layers come with finetune")
        return self


class CheckpointShape(ModelShape):
    """Shape of a LLaMA that exists."""

    vocab_size: Positive
    head_dim: Positive | None = None
    max_position_embeddings: Positive
    tie_word_embeddings: bool = False


class Base(Part):
    """The existing LLaMA: `checkpoint` (a Hugging Face directory), or `pretrain` to make one.

    `shape`: the checkpoint's. Another one is refused, and `fot plan` needs no download.
    """

    checkpoint: str | None = None
    shape: CheckpointShape | None = None
    pretrain: Pretrain | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Base":
        if (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError(
                "base: give either a Hugging Face LLaMA directory (--set base.checkpoint=DIR) or base.pretrain"
            )
        if self.shape is not None and self.pretrain is not None:
            raise ValueError("base.shape is a checkpoint's: with base.pretrain leave it out")
        return self


class Perplexity(Part):
    """Perplexity of the same held-out tokens with 1x, 2x, ... the local context.

    `windows`: how many windows of one local context are scored, spread over the held-out documents long enough.
    """

    contexts: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 16)
    windows: Positive = 96


class Passkey(Part):
    """Passkey retrieval: a random number is hidden in filler text. `lengths` in multiples of the local context."""

    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 4, 16)
    trials: Positive = 20
    digits: Annotated[int, Field(ge=2, le=9)] = 5


class Evaluation(Part):
    """What is measured after training."""

    perplexity: Perplexity = Perplexity()
    passkey: Passkey = Passkey()


class Recipe(Part):
    """A whole run. `name` becomes the registered model's name; `work_dir` holds all that is made."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    seed: int = 0
    work_dir: str = "runs"
    data: Data
    tokenizer: TokenizerPart = TokenizerPart()
    base: Base
    finetune: Training
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()

    @field_validator("work_dir")
    @classmethod
    def _expand(cls, work_dir: str) -> str:
        return os.path.expanduser(work_dir)

    @model_validator(mode="after")
    def _finetune_fits_the_base(self) -> "Recipe":
        """As far as the recipe says what the base is."""
        objective, pretrain, shape = self.finetune.objective, self.base.pretrain, self.base.shape
        if pretrain is not None:
            made, longest, known = "pre-trained with", pretrain.training.objective.context, pretrain.shape
        elif shape is not None:
            made, longest, known = "made for", shape.max_position_embeddings, shape
        else:
            return self
        if objective.context > longest:
            raise ValueError(
                f"finetune.objective.context ({objective.context}) is longer than the base is {made} ({longest})"
            )
        layers = known.num_hidden_layers
        asked = objective.mem_layers if isinstance(objective, FotObjective | MemorizingObjective) else None
        if max(asked or (0,)) >= layers:
            raise ValueError(
                f"finetune.objective.mem_layers {list(asked or ())}: the base has {layers} layers, 0 to {layers - 1}"
            )
        return self

    @property
    def trainings(self) -> dict[str, Training]:
        """What is trained, by the name of its stage."""
        pretrain = {"base": self.base.pretrain.training} if self.base.pretrain is not None else {}
        return {**pretrain, "finetune": self.finetune}

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        for name, training in self.trainings.items():
            key = "finetune" if name == "finetune" else "base.pretrain.training"
            spread, batch = self.resources.ranks_per_micro_batch, training.batch
            teams = self.resources.workers // spread
            if batch.micro_batches % teams:
                of = "resources.workers" + (" / resources.ranks_per_micro_batch" if spread > 1 else "")
                raise ValueError(
                    f"{key}.batch.micro_batches ({batch.micro_batches}) is not a multiple of {of} ({teams}): change "
                    f"one of them"
                )
            if batch.groups % spread:
                raise ValueError(
                    f"{key}.batch.groups ({batch.groups}) is not a multiple of resources.ranks_per_micro_batch "
                    f"({spread}): change one of them"
                )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe. `overrides`: "key.path=value", values in YAML.

    Raises UserError, one line, for whatever is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: see recipes/quickstart.yaml")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {path}: {_first_error(error)}") from None


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as key=value, for example --set finetune.steps=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    at: Any = content
    names = key.split(".")
    for place, name in enumerate(names):
        last = place == len(names) - 1
        if isinstance(at, list):
            if not name.isdigit() or int(name) > len(at):
                raise UserError(
                    f"--set {key}: {'.'.join(names[:place])} is a list of {len(at)}, not indexed by {name!r}"
                )
            if int(name) == len(at):
                at.append({})
            index: Any = int(name)
        else:
            if not isinstance(at.get(name), dict | list) and not last:
                at[name] = {}
            index = name
        if last:
            at[index] = value
        else:
            at = at[index]
            if not isinstance(at, dict | list):
                raise UserError(f"--set {key}: {'.'.join(names[: place + 1])} is a value and has no keys")


def _first_error(error: ValidationError) -> str:
    """The first error as one line that names the key and the nearest right one."""
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    names = [str(name) for name in first["loc"]]
    if "objective" in names[:-1]:  # pydantic puts the kind of objective behind its name
        del names[names.index("objective") + 1]
    where = ".".join(names)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], set(_keys(Recipe, names[:-1])), 1, 0.5)
        hint = f": did you mean {'.'.join([*names[:-1], near[0]])}?" if near else ": remove it"
        return f"unknown key {where}{hint}"
    if first["type"] == "missing":
        return f"{where} is missing: give it in the file or with --set {where}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not where or first["type"] == "value_error":
        return message
    return f"{where} = {first['input']!r}: {message}"


def _keys(model: Any, path: Iterable[str]) -> list[str]:
    """Names of the keys a recipe takes at a path."""
    models = [model]
    for name in path:
        if not name.isdigit():
            found = [child.model_fields[name].annotation for child in models if name in child.model_fields]
            models = [child for annotation in found for child in _models_in(annotation)]
    return [name for child in models for name in child.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models a type annotation speaks of, inside unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
