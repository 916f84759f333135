"""The recipe's training parts: objective, batch, optimizer, schedule, DeepSpeed, checkpoints, what is watched."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from pipelines.config import Part
from pipelines.workflow.plugins import Plugin, find_plugins

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seen = tuple[Count, Count]
LONGLLAMA_3B = ((0, 0), (1, 1), (2, 1), (3, 0))


class Auto(Part):
    """The layers that a probe of the base ranks first (`fot probe`): so many, or where that is None as many as the
    paper would take for the model's depth."""

    auto: Positive | None = None


def _layers(value: Any) -> Any:
    """Takes `auto` for {auto: null}; refuses what is neither that nor numbers in one line, where a union would give one
    for each kind."""
    if value is None or isinstance(value, Auto):
        return value
    numbers = isinstance(value, list | tuple) and value and all(type(each) is int and each >= 0 for each in value)
    if numbers:
        return tuple(value)
    if value == "auto":
        return Auto()
    if isinstance(value, dict) and set(value) == {"auto"}:
        count = value["auto"]
        if count is None or (type(count) is int and count > 0):
            return Auto(auto=count)
    raise ValueError(
        f"finetune.objective.mem_layers {value!r}: give layer numbers, such as [8, 15], auto, or {{auto: 4}}"
    )


MemLayers = Annotated[tuple[int, ...] | Auto | None, BeforeValidator(_layers)]


class Rows(Part):
    """What every objective has: rows of `context` tokens.

    `separate_documents`: where documents are joined in a row, attention within the row stays inside each of them.
    Additional contexts are seen whole: what there is of other documents is a negative (paper, section 3.2).
    """

    context: Positive = Field(description="tokens of the local context")
    separate_documents: bool = True


class MemoryRows(Rows):
    """What an objective has whose model has memory layers.

    `mem_layers`: numbers; `auto`, or `{auto: 4}`, has them chosen by a probe of the base; by default those the paper
    would choose for the model's depth.
    """

    mem_layers: MemLayers = None
    mem_positionals: bool = True


class StandardObjective(Rows):
    """Next-token prediction within the local context."""

    kind: Literal["standard"] = "standard"

    @property
    def contexts(self) -> int:
        return 1


class Switch(Part):
    """d is `first` until step `until`, `then` from there on (paper: 2, later 64)."""

    first: Positive
    until: Positive
    then: Positive


class Draw(Part):
    """d is drawn anew for each step, all of `of` alike (paper: 2 or 128)."""

    of: Annotated[tuple[Positive, ...], Field(min_length=1)]


class FotObjective(MemoryRows):
    """The Focused Transformer: in memory layers a context also sees additional contexts (CrossBatch).

    Who sees whom is either a table or a number:

    - `segments`: (positives, negatives) for each of the consecutive contexts of a document group (LongLLaMA);
    - `d`: a context sees the one before it in its document and those at the same place in the d - 1 next documents
      (the paper's small models), with `contexts` consecutive contexts a group.
    """

    kind: Literal["fot"] = "fot"
    segments: Annotated[tuple[Seen, ...], Field(min_length=2)] | None = None
    d: Positive | Switch | Draw | None = None
    contexts: Annotated[int, Field(ge=2)] = 4

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, values: Any) -> Any:
        """Where neither is given, LongLLaMA 3B's table; a table says itself how many contexts a group has."""
        if not isinstance(values, dict):
            return values
        if values.get("segments") is not None and values.get("d") is not None:
            raise ValueError("finetune.objective has both segments and d: set the one you do not want to null")
        if values.get("segments") is None and values.get("d") is None:
            values = {**values, "segments": LONGLLAMA_3B}
        table = values.get("segments")
        return {"contexts": len(table), **values} if isinstance(table, list | tuple) and len(table) > 1 else values

    @model_validator(mode="after")
    def _positives_come_before(self) -> "FotObjective":
        for place, (positives, _) in enumerate(self.segments or ()):
            if positives > place:
                raise ValueError(
                    f"segments: segment {place} asks for {positives} positives, only {place} contexts come before it"
                )
        if self.segments is not None and self.contexts != len(self.segments):
            raise ValueError(f"contexts is {self.contexts}, segments has {len(self.segments)}: leave contexts out")
        return self

    @property
    def ds(self) -> Sequence[int]:
        """Every d that may come."""
        match self.d:
            case None:
                return []
            case Switch(first=first, then=then):
                return [first, then]
            case Draw(of=of):
                return of
            case constant:
                return [constant]


class MemorizingObjective(MemoryRows):
    """The Memorizing Transformer: memory layers see all earlier contexts of the group, undifferentiated.

    With `gate` through a learnt gate a head, else in one softmax: so the paper fine-tunes a FoT model for 1k steps.
    """

    kind: Literal["memorizing"] = "memorizing"
    contexts: Annotated[int, Field(ge=2)] = 4
    gate: bool = True


class TransformerXlObjective(Rows):
    """Transformer-XL: every layer sees the previous context, undifferentiated, at the positions before."""

    kind: Literal["transformer_xl"] = "transformer_xl"
    contexts: Annotated[int, Field(ge=2)] = 4


class OwnObjective(MemoryRows):
    """What the objective of a plugin (docs/plugins.md) derives from: trained as the Focused Transformer is, where the
    plugin says who sees whom. It gives `kind` a literal type, the plugin's name."""

    kind: str
    contexts: Annotated[int, Field(ge=2)] = 4

    def plan(self, rows: Any, step: int, seed: int) -> Any:
        """Which rows each row of a step's micro-batch (rows.group, rows.segment, rows.related) sees besides itself: a
        plan [R, d], as `fot_model.pad_plan` makes of lists, or None. A function of its arguments and the settings."""
        raise NotImplementedError

    @property
    def seen(self) -> float:
        """How many a row sees on average, or at most: what `fot plan` reckons time and memory by."""
        raise NotImplementedError

    @classmethod
    def more_keys(cls) -> Mapping[str, Callable[[], Any]]:
        """Keys of the plugins that are loaded, with their types."""
        fields = {name: field for each in cls.__subclasses__() for name, field in each.model_fields.items()}
        return {name: partial(getattr, field, "annotation") for name, field in fields.items()}


OBJECTIVES = "fot.objectives"  # entry points
OURS = (StandardObjective, FotObjective, MemorizingObjective, TransformerXlObjective)
KINDS = frozenset(each.model_fields["kind"].default for each in OURS)


def objective_plugin(kind: str) -> Plugin | None:
    """The plugin that an objective comes from. Raises UserError as `find_plugins` does."""
    return find_plugins(OBJECTIVES, KINDS).get(kind)


@cache
def _adapter(*own: type[OwnObjective]) -> TypeAdapter[Any]:
    kinds: Any = Annotated[Union[(*OURS, *own)], Field(discriminator="kind")]
    return TypeAdapter(kinds)


def _load_objective(kind: str, plugin: Plugin) -> type[OwnObjective]:
    """Raises UserError for what is no objective of that name."""
    own = plugin.load()
    if not (isinstance(own, type) and issubclass(own, OwnObjective)):
        raise plugin.mistake("is no class that derives from jobs.config.training.OwnObjective")
    if get_args(own.model_fields["kind"].annotation) != (kind,):
        raise plugin.mistake(f"has a kind other than its name: write kind: Literal[{kind!r}] = {kind!r}")
    if missing := [name for name in ("plan", "seen") if getattr(own, name) is getattr(OwnObjective, name)]:
        raise plugin.mistake(f"has no {missing[0]} of its own")
    return own


def _objective(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """An objective by its kind: ours, or a plugin's, which is loaded when it is asked for. (The `handler` knows ours
    alone, and not by their kinds.)"""
    if isinstance(value, OwnObjective):
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    plugins = find_plugins(OBJECTIVES, KINDS)
    if plugins and isinstance(kind, str) and kind not in KINDS:
        if kind not in plugins:
            raise ValueError(f"objective.kind {kind} is unknown: give one of {', '.join([*sorted(KINDS), *plugins])}")
        return _adapter(_load_objective(kind, plugins[kind])).validate_python(value)
    return _adapter().validate_python(value)


Objective = Annotated[
    SerializeAsAny[StandardObjective | FotObjective | MemorizingObjective | TransformerXlObjective | OwnObjective],
    WrapValidator(_objective),
]


def named_layers(objective: Objective) -> tuple[int, ...]:
    """The memory layers that the recipe names; none where a probe or the model's depth decides."""
    layers = objective.mem_layers if isinstance(objective, MemoryRows) else None
    return layers if isinstance(layers, tuple) else ()


def auto_layers(objective: Objective) -> Auto | None:
    """What a probe of the base is to choose, if it is."""
    layers = objective.mem_layers if isinstance(objective, MemoryRows) else None
    return layers if isinstance(layers, Auto) else None


def most_layers(objective: Objective) -> int:
    """How many layers a model must have at least for those asked for."""
    auto = auto_layers(objective)
    return auto.auto or 1 if auto is not None else max(named_layers(objective), default=-1) + 1


class Batch(Part):
    """A step is `micro_batches` micro-batches of `groups` document groups. Rows of a micro-batch see one another."""

    micro_batches: Positive = 2
    groups: Positive = 4


def _is_an_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_is_an_expression)]


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Patterns(Part):
    """The parameters in whose name one of `patterns` (regular expressions) is found."""

    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)]


Trained = Literal["memory_attention", "memory_and_above", "all"] | Patterns


class LoraSettings(Part):
    """LoRA (arXiv 2106.09685): in place of the matrices `targets` among what `train` chooses, pairs of matrices of
    `rank` are trained, whose product times alpha / rank is added to them."""

    rank: Positive = 8
    alpha: Rate = 16.0
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "o_proj")


class ParameterGroup(Part):
    """What holds for parameters in whose name `pattern` (a regular expression) is found, instead of the optimizer's."""

    pattern: Pattern
    learning_rate: Rate | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class Optimizer(Part):
    """AdamW. `learning_rate` is the peak; `clip` the largest gradient norm. A parameter belongs to the first of
    `groups` whose pattern it matches, if to any."""

    learning_rate: Rate = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Rate = 1.0
    groups: tuple[ParameterGroup, ...] = ()


class RateSchedule(Part):
    """Learning rate over the steps: linear warm-up, then constant, a cosine down to `floor` of the peak at the last
    step, or the peak x sqrt(warmup_steps / step)."""

    kind: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: Count = 0
    floor: Share = 0.1


class DeepSpeed(Part):
    """ZeRO stage, number type, and what is given up for memory: time, by keeping the optimizer's state or (stage 3) the
    parameters in the host's memory, or by computing activations again in the backward pass."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _stages_that_offload(self) -> "DeepSpeed":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("deepspeed.offload_parameters needs zero_stage 3")
        return self


class CheckpointSettings(Part):
    """A checkpoint every `every` steps, and at the end.

    The newest `keep` are kept, and all that are younger than `keep_hours`. `path`: a directory or a URL of pyarrow.fs
    (s3://, gs://, hdfs://), by default in work_dir; a training with the same settings goes on from what is there.
    """

    every: Positive = 100
    keep: Positive = 2
    keep_hours: Rate | None = None
    path: str | None = None


class BadLoss(Part):
    """What to do where a step's loss is no number, or more than `spike` times the median of the 100 steps before it:
    stop, or go back to the last checkpoint and on without that step, at most `most` times."""

    action: Literal["stop", "skip"] = "stop"
    spike: Annotated[float, Field(gt=1)] | None = None
    most: Positive = 10


class Measure(Part):
    """Every `every` steps: perplexity of `windows` held-out windows at `contexts` times the local context, and the
    attention mass on positives in one training micro-batch."""

    every: Positive
    contexts: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 4)
    windows: Positive = 16


class Training(Part):
    """One training: pre-training of the base, or fine-tuning.

    `train`: which parameters are trained, the others stay as the base has them. `memory_attention`: the attention of
    the memory layers (projections, gate and temperature); `memory_and_above`: all from the lowest memory layer on, with
    the last norm and an output layer of its own (embeddings, also tied ones, stay); or `patterns` of names. With `lora`
    the matrices among them are trained by way of it (peft), gates and temperatures themselves, and the rest is not.
    """

    objective: Objective
    steps: Positive
    train: Annotated[Trained, Field(exclude_if=lambda part: part == "all")] = "all"  # older keys stay
    lora: Annotated[LoraSettings | None, Field(exclude_if=lambda lora: lora is None)] = None
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: RateSchedule = RateSchedule()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoints: CheckpointSettings = CheckpointSettings()
    bad_loss: BadLoss = BadLoss()
    measure: Measure | None = None

    def with_mem_layers(self, layers: Sequence[int]) -> "Training":
        """The same with these memory layers, instead of `auto`; with none, those that the model's depth says."""
        objective = self.objective.model_copy(update={"mem_layers": tuple(layers) or None})
        return self.model_copy(update={"objective": objective})

    @model_validator(mode="after")
    def _memory_layers_are_there(self) -> "Training":
        kind = self.objective.kind
        if self.train in ("memory_attention", "memory_and_above") and kind in ("standard", "transformer_xl"):
            raise ValueError(
                f"train: {self.train} with objective.kind {kind}, which has no memory layers: give patterns"
            )
        return self

    @property
    def whole(self) -> bool:
        """Whether all parameters are trained."""
        return self.train == "all" and self.lora is None

    @model_validator(mode="after")
    def _batch_holds_what_is_seen(self) -> "Training":
        objective, groups = self.objective, self.batch.groups
        if not isinstance(objective, FotObjective):
            return self
        if (d := max(objective.ds, default=0)) > groups:
            raise ValueError(
                f"objective.d is {d}, a micro-batch holds {groups} document groups: raise batch.groups to {d} or "
                f"lower d"
            )
        negatives = max((negatives for _, negatives in objective.segments or ()), default=0)
        if negatives > (groups - 1) * objective.contexts:
            needed = -(-negatives // objective.contexts) + 1
            raise ValueError(
                f"objective.segments asks for {negatives} negatives, a micro-batch of {groups} groups holds "
                f"{(groups - 1) * objective.contexts} contexts of other documents: raise batch.groups to {needed}"
            )
        return self


class Continued(Part):
    """Going on with what trained a registered model, on documents that it has not read.

    `model`: models:/fot/NAME@champion or a version. Its last checkpoint's weights, optimizer, learning rate and step go
    on. `epochs`: how often the new documents are read, which says how many steps follow. `replay`: the share of groups
    that come from the documents read before, against forgetting.
    """

    model: Annotated[str, Field(pattern=r"^models:/.")]
    epochs: Rate = 1.0
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.25


class Resources(Part):
    """Training workers (ranks), and what Ray reserves for each.

    `ranks_per_micro_batch`: over how many of them the rows of a micro-batch are spread; the memory layers' keys and
    values are gathered, so d may be as large as several devices hold. `wait_minutes`: how long to wait for a cluster
    that grows. `restarts`: how often a training is started again after losing a worker or a node.
    """

    workers: Positive = 1
    cpus_per_worker: Positive = 1  # and the threads that a worker computes with on them
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    ranks_per_micro_batch: Positive = 1
    wait_minutes: Annotated[float, Field(ge=0)] = 10
    restarts: Count = 3

    @model_validator(mode="after")
    def _teams_are_whole(self) -> "Resources":
        if self.workers % self.ranks_per_micro_batch:
            raise ValueError(
                f"resources.workers ({self.workers}) is not a multiple of resources.ranks_per_micro_batch "
                f"({self.ranks_per_micro_batch}): change one of them"
            )
        return self
