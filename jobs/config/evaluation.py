"""The recipe's evaluation parts. Lengths are multiples of the local context; results say tokens."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, create_model, model_validator

from jobs.config.dictionary import DictionaryEvaluation
from jobs.config.training import Positive
from pipelines.config import Part
from pipelines.workflow.plugins import Plugin, find_plugins

Dtype = Literal["float32", "bfloat16", "float16"]
Lengths = Annotated[tuple[Positive, ...], Field(min_length=1)]

RIVALS = {  # ways to read a long text without memory -> what they are called in tables
    "full": "full attention",
    "yarn": "YaRN",
    "dynamic_ntk": "dynamic NTK",
    "bm25": "retrieval (BM25)",
}
RIVALS_STAGE = "rivals"
EVALUATIONS = "fot.evaluations"  # entry points
STAGES = (  # beside the evaluations, whose stages have the tasks' names
    *("checkpoint", "tokenizer", "shards", "index", "documents", "base", "probe", "finetune", "model", "report"),
    RIVALS_STAGE,
)
READERS_TASKS = ("perplexity", "passkey")  # those that can be read in any of these ways
READ_WITH_MEMORY = ("attention_mass", "dictionary", "trec", "webquestions")
HOW = ("memory", "local", "dtype", "reader", "rivals", "rivals_up_to")  # of `Evaluation`, beside the tasks


def _known_rival(name: str) -> str:
    if name not in RIVALS:
        near = difflib.get_close_matches(name, RIVALS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(RIVALS)}"
        raise ValueError(f"rival {name} is unknown: {hint}")
    return name


Rival = Annotated[str, AfterValidator(_known_rival)]


class MemorySettings(Part):
    """How what was read is attended to: exactly (`top_k: null`), or the `top_k` keys of largest inner product with each
    query. `dtype`: number type of keys and values held, by default the model's."""

    top_k: Positive | None = None
    dtype: Dtype | None = None


class Perplexity(Part):
    """Perplexity and bits per byte of held-out documents by context length, in all and by source.

    `mode`: `last_window` scores the same windows of one local context at every length; `whole_document` scores the
    first tokens of the documents, as many as the length says. `windows`: how many windows of one local context are
    scored, spread over the documents long enough. `others`: beside the longest context the memory also holds so many
    local contexts of other documents (the paper's multi-document setting); every number is measured.
    """

    contexts: Lengths = (1, 2, 4, 16)
    windows: Positive = 96
    mode: Literal["last_window", "whole_document"] = "last_window"
    others: tuple[Positive, ...] = ()


class Passkey(Part):
    """Passkey retrieval: a random number is hidden in filler text, at random depths.

    `prompt`: `text` (Landmark Attention's, as LongLLaMA uses it) or `digits`, of digits and line breaks alone, for
    models too small to read. `trials`: a length; `at_once`: prompts read together, at most (fewer where they are long).
    """

    lengths: Lengths = (1, 4, 16)
    trials: Positive = 20
    digits: Annotated[int, Field(ge=2, le=9)] = 5
    prompt: Literal["text", "digits"] = "text"
    at_once: Positive = 20


class AttentionMassSettings(Part):
    """r_d, the attention mass on positives among d additional contexts. `samples`: held-out windows that are asked."""

    d: Lengths = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    samples: Positive = 16


class FewShot(Part):
    """Questions with as many demonstrations in context as fit each length.

    `train`, `test`: files or URLs (hf://datasets/...) of JSON lines or Parquet. `draws`: how often demonstrations are
    drawn, `questions`: asked for each draw, `at_once`: of them together. `choice`: also have the model choose among all
    classes, for models too small to spell one (trec alone; many times the work).
    """

    train: str
    test: str
    lengths: Lengths = (1, 2, 3, 4)
    draws: Positive = 20
    questions: Positive = 25
    at_once: Positive = 8
    choice: bool = False


class LmEval(Part):
    """Tasks of the lm-evaluation-harness by name, the base beside the model.

    `few_shot`: examples before each question, by default as many as the task says; `limit`: examples a task, all by
    default; `include`: a directory with tasks of one's own; `lengths`: tokens of the prompts that RULER's tasks make.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    few_shot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    include: str | None = None
    lengths: Annotated[tuple[Literal[4096, 8192, 16384, 32768, 65536, 131072], ...], Field(min_length=1)] = (4096,)


def _settings_of(plugin: Plugin) -> Any:
    return load_evaluation(plugin).Settings


class Evaluation(Part):
    """What is measured after training; a task that is null is left out.

    `local`: tokens of the local context, by default that of the fine-tuning. `dtype`: what all models compute in, by
    default each in that of its file (bfloat16 is faster on GPUs, and on CPUs with AMX). `reader`: how the model itself
    reads in perplexity and passkey: with its `memory`, or in `full` attention (one that was fine-tuned with a long
    context).
    `rivals`: other ways for the base to read, without any training, measured beside it in perplexity and passkey at
    lengths of up to `rivals_up_to` tokens (full attention's cost grows with the square of the length).
    The tasks of plugins (docs/plugins.md) stand beside these by their names.
    """

    model_config = ConfigDict(extra="allow")  # what is there must be a plugin's

    memory: MemorySettings = MemorySettings()
    local: Positive | None = None
    dtype: Dtype | None = None
    reader: Literal["memory", "full"] = "memory"
    rivals: tuple[Rival, ...] = ()
    rivals_up_to: Positive = 16384
    perplexity: Perplexity | None = Perplexity()
    passkey: Passkey | None = Passkey()
    attention_mass: AttentionMassSettings | None = None
    dictionary: DictionaryEvaluation | None = None
    trec: FewShot | None = None
    webquestions: FewShot | None = None
    lm_eval: LmEval | None = None

    @model_validator(mode="before")
    @classmethod
    def _others_are_of_plugins(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not (
            others := {name: values[name] for name in values if name not in cls.model_fields}
        ):
            return values
        plugins = evaluation_plugins()
        known: dict[str, Any] = {
            name: (load_evaluation(plugins[name]).Settings | None, None) for name in others if name in plugins
        }
        return {**values, **dict(create_model("Plugins", __base__=Part, **known).model_validate(others))}

    @classmethod
    def more_keys(cls) -> Mapping[str, Callable[[], Any]]:
        """The tasks of plugins, with the types of their settings."""
        plugins = evaluation_plugins()
        return {name: partial(_settings_of, plugin) for name, plugin in plugins.items()}

    @property
    def tasks(self) -> dict[str, Part]:
        """What is asked for, by the task's name."""
        parts = {name: getattr(self, name) for name in type(self).model_fields if name not in HOW}
        parts |= self.model_extra or {}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def rivalled(self) -> dict[str, Part]:
        """The tasks in which rivals are measured."""
        return {name: part for name, part in self.tasks.items() if self.rivals and name in READERS_TASKS}

    @property
    def results(self) -> list[str]:
        """Names of the stages that hold a result."""
        return [*self.tasks, *([RIVALS_STAGE] if self.rivals else [])]

    @model_validator(mode="after")
    def _what_is_read_can_be(self) -> "Evaluation":
        if self.rivals and not self.rivalled:
            raise ValueError(
                f"evaluation.rivals: they are measured in {' and '.join(READERS_TASKS)}: ask for one of these"
            )
        if self.dtype is not None and self.dictionary is not None:
            raise ValueError("evaluation.dtype: the dictionary is asked in the model's own: leave it out")
        if self.reader == "full" and (
            others := [name for name in self.tasks if name in (*READ_WITH_MEMORY, *(self.model_extra or ()))]
        ):
            raise ValueError(f"evaluation.reader: {others[0]} is read with memory: leave it out, or reader: full")
        if self.reader == "full" and self.perplexity is not None and self.perplexity.others:
            raise ValueError(
                "evaluation.perplexity.others: other documents are read into memory; reader: full has none"
            )
        return self


OURS = frozenset((*Evaluation.model_fields, *STAGES))


def evaluation_plugins() -> Mapping[str, Plugin]:
    """By the tasks' names. Raises UserError as `find_plugins` does."""
    return find_plugins(EVALUATIONS, OURS)


def load_evaluation(plugin: Plugin) -> Any:
    """The plugin's module or class. Raises UserError for what is no evaluation."""
    own = plugin.load()
    settings = getattr(own, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Part)):
        raise plugin.mistake("has no Settings that derive from pipelines.config.Part")
    if missing := [name for name in ("cells", "summarize") if not callable(getattr(own, name, None))]:
        raise plugin.mistake(f"has no function {missing[0]}")
    return own
