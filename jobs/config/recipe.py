"""The recipe: one strict, frozen model of everything a run needs, read from YAML with `--set key=value` on top."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from jobs.config.checkpoint_name import kind_of
from jobs.config.evaluation import Evaluation
from jobs.config.registry import Registry
from jobs.config.settings import WorkDirectory, read_overridden, validated
from jobs.config.training import Continued, Positive, Resources, Training, auto_layers, most_layers, named_layers
from pipelines.config import Data, Part, TokenizerPart
from pipelines.workflow.credentials import without_credentials
from pipelines.workflow.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


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
        if not self.training.whole:
            raise ValueError("base.pretrain.training: there is no base yet, leave train and lora out")
        return self


class CheckpointShape(ModelShape):
    """Shape of a LLaMA that exists."""

    vocab_size: Positive
    head_dim: Positive | None = None
    max_position_embeddings: Positive
    tie_word_embeddings: bool = False


class Base(Part):
    """The existing LLaMA: `checkpoint`, or `pretrain` to make one.

    `checkpoint`: a Hugging Face directory, a .gguf file, a hub id (ORGANIZATION/NAME), what an installed Python package
    ships (package:NAME/PATH), or a registered model (models:/fot/NAME@ALIAS). `revision`: the hub id's branch, tag or
    commit. `adapter`: one of the checkpoint's, a directory, to begin with. `shape`: the checkpoint's. Another one is
    refused, and `fot plan` needs no download.
    """

    checkpoint: str | None = None
    revision: Annotated[str | None, Field(exclude_if=lambda revision: revision is None)] = None  # older keys stay
    adapter: Annotated[str | None, Field(exclude_if=lambda adapter: adapter is None)] = None  # older keys stay
    shape: CheckpointShape | None = None
    pretrain: Pretrain | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Base":
        if (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError(
                "base: give either a Hugging Face LLaMA directory (--set base.checkpoint=DIR; or a .gguf file, a hub "
                "id, package:NAME/FILE) or base.pretrain"
            )
        if self.adapter is not None and self.pretrain is not None:
            raise ValueError("base.adapter is of a checkpoint: with base.pretrain leave it out")
        if self.shape is not None and self.pretrain is not None:
            raise ValueError("base.shape is a checkpoint's: with base.pretrain leave it out")
        if self.revision is not None and (self.checkpoint is None or kind_of(self.checkpoint) != "hub"):
            raise ValueError(
                f"base.revision belongs to a hub id (ORGANIZATION/NAME), which {self.checkpoint or 'base.pretrain'} is "
                f"not: leave it out"
            )
        return self


class Texts(Part):
    """What every job on text says: whose name it has, the corpus and how it is tokenized, the model it is about.
    `work_dir` holds all that is made."""

    name: Name
    seed: int = 0
    work_dir: WorkDirectory = "runs"
    data: Data
    tokenizer: TokenizerPart = TokenizerPart()
    base: Base


class Recipe(Texts):
    """A whole run. `name` becomes the registered model's name. With `continues` the fine-tuning goes on with that of a
    registered model, on what the sources have gained since."""

    finetune: Training
    continues: Continued | None = None
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    registry: Registry = Registry()

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
        if most_layers(objective) > layers:
            auto = auto_layers(objective)
            asked = list(named_layers(objective)) if auto is None else f"{{auto: {auto.auto}}}"
            raise ValueError(f"finetune.objective.mem_layers {asked}: the base has {layers} layers, 0 to {layers - 1}")
        return self

    def described(self) -> dict[str, Any]:
        """All that decides what comes of it, as JSON for everybody to read: not where it is kept."""
        dumped = self.model_dump(mode="json", exclude={"work_dir": True, "registry": {"tracking_uri"}})
        return dict(without_credentials(dumped))

    @property
    def trainings(self) -> dict[str, Training]:
        """What is trained, by the name of its stage."""
        pretrain = {"base": self.base.pretrain.training} if self.base.pretrain is not None else {}
        return {**pretrain, "finetune": self.finetune}

    @property
    def evaluated_local(self) -> int:
        """Tokens of the local context in evaluations."""
        return self.evaluation.local or self.finetune.objective.context

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

    @model_validator(mode="after")
    def _evaluations_fit_the_model(self) -> "Recipe":
        """What asks of memory is asked of a model that has one."""
        kind, perplexity = self.finetune.objective.kind, self.evaluation.perplexity
        if self.evaluated_local > self.finetune.objective.context:
            raise ValueError(
                f"evaluation.local ({self.evaluated_local}) is longer than finetune.objective.context "
                f"({self.finetune.objective.context}): lower it"
            )
        if kind == "transformer_xl" and self.evaluation.reader == "full":
            raise ValueError("evaluation.reader: a Transformer-XL is read as it was trained, not in full attention")
        if kind != "transformer_xl" and (kind != "standard" or self.base.pretrain is None):
            return self
        if self.evaluation.attention_mass is not None:
            raise ValueError(f"evaluation.attention_mass: with finetune.objective.kind {kind} there is no memory layer")
        if perplexity is not None and perplexity.others:
            raise ValueError(f"evaluation.perplexity.others: with finetune.objective.kind {kind} there is no memory")
        if perplexity is not None and kind == "transformer_xl" and perplexity.mode == "whole_document":
            raise ValueError("evaluation.perplexity.mode: a Transformer-XL is scored with last_window alone")
        return self

    @model_validator(mode="after")
    def _the_gate_can_be_passed(self) -> "Recipe":
        """Every condition is on something that is measured."""
        local = self.evaluated_local
        for condition in self.registry.promote:
            for metric in (condition.metric, *([condition.of] if condition.of else [])):
                task = metric.partition("/")[0].replace("bits_per_byte", "perplexity")
                part = self.evaluation.tasks.get(task)
                if part is None:
                    raise ValueError(f"registry.promote: {metric} is not measured: evaluation.{task} is not asked for")
                steps = [length * local for name in ("contexts", "lengths") for length in getattr(part, name, ())]
                if condition.at is not None and task in ("perplexity", "passkey") and condition.at not in steps:
                    there = ", ".join(map(str, steps))
                    raise ValueError(f"registry.promote: {metric} is measured at {there} tokens, not at {condition.at}")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe, without its variants. `overrides`: "key.path=value", values in YAML.

    Raises UserError, one line, for whatever is wrong.
    """
    content = read_overridden(path, overrides)
    content.pop("variants", None)
    if content.get("kind") == "dictionary":
        raise UserError(
            f"recipe {path} is of the dictionary task: only `fot run`, `fot status` and `fot submit` take it"
        )
    return validated(Recipe, content, f"recipe {path}")
