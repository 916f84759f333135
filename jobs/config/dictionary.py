"""The recipe of the dictionary task: model, curriculum, optimizer, evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jobs.config.registry import Registry
from jobs.config.settings import WorkDirectory, override, read_yaml, validated
from pipelines.config import Part, Positive

RECORDS = 25  # records of a context in evaluation: what 256 tokens hold
WINDOW = 256  # its tokens
SYMBOLS = 60
PARTS = 4

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class DictionaryShape(Part):
    """The model: a LLaMA from nothing whose last layers are memory layers without positions, with cosine scores."""

    hidden_size: Positive = 128
    intermediate_size: Positive = 256
    num_hidden_layers: Positive = 2
    num_attention_heads: Positive = 2
    num_key_value_heads: Positive = 2
    head_dim: Positive = 64
    mem_layers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)

    @model_validator(mode="after")
    def _fits(self) -> "DictionaryShape":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("model.num_attention_heads must be a multiple of model.num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even")
        if max(self.mem_layers) >= self.num_hidden_layers:
            raise ValueError(
                f"model.mem_layers {list(self.mem_layers)}: the model has {self.num_hidden_layers} layers, 0 to "
                f"{self.num_hidden_layers - 1}"
            )
        return self


class Phase(Part):
    """A part of the curriculum. A step's batch holds `documents` contexts of `records` records, and a context of
    questions for each of the first `asking` of them (all, by default), which sees its own document and the d - 1 next.

    `symbols`: of how many of the 60 symbols a step's keys are made at each place, in turn; fewer make keys more alike,
    as they are in a large dictionary. `rate`: what learning rates are multiplied with at the first step and, linearly
    changing, behind the last. `temperature`: what all temperatures are held at; null lets them be learnt. A low one
    makes the model hold keys further apart, so that a high one afterwards tells more of them from one another.
    """

    steps: Positive
    records: Annotated[int, Field(ge=1, le=RECORDS)]
    documents: Positive
    asking: Positive | None = None
    d: Positive = 1
    symbols: Annotated[tuple[Annotated[int, Field(ge=1, le=SYMBOLS)], ...], Field(min_length=1)] = (SYMBOLS,)
    rate: tuple[Share, Share] = (1.0, 1.0)
    temperature: Rate | None = None

    @property
    def askers(self) -> int:
        return self.documents if self.asking is None else self.asking

    @model_validator(mode="after")
    def _fits(self) -> "Phase":
        if self.d > self.documents:
            raise ValueError(f"phases: d is {self.d}, a batch holds {self.documents} documents: raise documents")
        if self.askers > self.documents:
            raise ValueError(f"phases: asking is {self.askers}, a batch holds {self.documents} documents: lower asking")
        keys = min(self.symbols) ** PARTS
        if keys < self.documents * self.records:
            raise ValueError(
                f"phases: {self.documents} documents of {self.records} records need {self.documents * self.records} "
                f"keys, {min(self.symbols)} symbols make {keys}: raise symbols"
            )
        return self


class DictionaryOptimizer(Part):
    """AdamW; temperatures have a learning rate of their own, and no weight decay."""

    learning_rate: Rate = 2e-3
    temperature_learning_rate: Rate = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Rate = 1.0
    warmup_steps: Count = 50


class DictionaryTraining(Part):
    """`phases` one after the other; a checkpoint every `checkpoint_every` steps."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    optimizer: DictionaryOptimizer = DictionaryOptimizer()
    checkpoint_every: Positive = 50

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


class DictionaryEvaluation(Part):
    """Accuracy with a dictionary of each of `tokens` tokens in memory (256 tokens hold 25 records).

    `windows`: contexts of 25 questions asked at each size. `top_k`: beside dense attention, that to the k best keys;
    null for dense alone. `dtype`: number type of keys and values in memory. `seed`: dictionaries and questions are
    drawn from it and the training's seed, apart from the training's. `batch`: contexts read at once. A memory
    that takes more than `max_gigabytes` is refused.
    """

    tokens: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2**14, 2**16, 2**18, 2**20)
    windows: Positive = 16
    top_k: Positive | None = 32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: Count = 1_000_000
    batch: Positive = 64
    max_gigabytes: Rate = 10.0

    @field_validator("tokens")
    @classmethod
    def _whole_contexts(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        largest = SYMBOLS**PARTS // RECORDS * WINDOW
        for size in tokens:
            if size % WINDOW:
                raise ValueError(f"{size} tokens are no whole contexts: give multiples of {WINDOW}")
            if size > largest:
                raise ValueError(f"{size} tokens need more keys than there are: give at most {largest}")
        return tuple(sorted(set(tokens)))


class DictionaryRecipe(Part):
    """A whole run: a model for each of `seeds`, and how far each one's memory reaches."""

    kind: Literal["dictionary"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0, 1, 2)
    work_dir: WorkDirectory = "runs"
    model: DictionaryShape = DictionaryShape()
    training: DictionaryTraining
    evaluation: DictionaryEvaluation = DictionaryEvaluation()
    registry: Registry = Registry()


def load_dictionary(path: Path, overrides: Sequence[str] = ()) -> DictionaryRecipe | None:
    """The recipe in a file that says `kind: dictionary`; None for any other. Raises UserError, one line, for whatever
    is wrong in it."""
    content = read_yaml(path)
    if content.get("kind") != "dictionary":
        return None
    for text in overrides:
        override(content, text)
    return validated(DictionaryRecipe, content, f"recipe {path}")
